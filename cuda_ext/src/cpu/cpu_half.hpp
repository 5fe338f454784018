// Widening of one 16-bit float, exact, for code that is not compiled for one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace gearfall::cpu {

static inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline float widened_bf16(std::uint16_t bits) {
    return from_bits(static_cast<std::uint32_t>(bits) << 16);
}

static inline float widened_f16(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1F;
    const std::uint32_t fraction = bits & 0x3FF;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        return from_bits(to_bits(static_cast<float>(fraction) * 5.9604644775390625e-8f) | sign);
    }
    const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return from_bits(sign | wide << 23 | fraction << 13);
}

}  // namespace gearfall::cpu
