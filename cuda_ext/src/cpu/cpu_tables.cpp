// The choice of an instruction set.
#include <cstring>
#include <string>

#include "cpu_half.hpp"
#include "cpu_isa.hpp"
#include "cpu_tensor.hpp"

namespace gearfall::cpu {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
void dot_rounded_avx512_bf16(const DotPanel &panel);
void pack_avx512_bf16(Operand operand, const float *const *rows, std::int64_t tokens,
                      std::int64_t k, float *packed);
void pack_away_avx512_bf16(Operand operand, const float *const *rows, std::int64_t tokens,
                           std::int64_t k, float *packed);
#endif

namespace {

constexpr int kMostTables = 4;

// kAvx512Kernels with the bfloat16 instruction.
#if defined(__x86_64__)
Kernels with_pair_dot() {
    Kernels kernels = kAvx512Kernels;
    kernels.name = "avx512_bf16";
    kernels.rounded_step_floats = kLanes;
    kernels.dot[static_cast<int>(Operand::rounded)] = dot_rounded_avx512_bf16;
    kernels.pack = pack_avx512_bf16;
    kernels.pack_away = pack_away_avx512_bf16;
    return kernels;
}
#endif

// The canonical bits are what the instruction was documented and found to give. A processor that
// gives others is served by the emulation: this holds both against each other over sums of ordinary
// and of tiny numbers.
class PairDotTrial {
public:
    bool agree(const Kernels &one, const Kernels &other) const {
        float first[kTokens * kRows], second[kTokens * kRows];
        multiply(one, first);
        multiply(other, second);
        return std::memcmp(first, second, sizeof(first)) == 0;
    }

private:
    static constexpr std::int64_t kTokens = 3;
    static constexpr std::int64_t kRows = 5;
    static constexpr std::int64_t kElements = 70;

    void multiply(const Kernels &kernels, float *out) const {
        std::uint32_t state = 1;
        std::uint16_t weights[kRows][kElements];
        float x[kTokens][kElements];
        float packed[kTokens * padded(kElements, 2 * kLanes)];
        const void *rows[kRows];
        const float *tokens[kTokens];
        for (std::int64_t r = 0; r < kRows; ++r) {
            rows[r] = weights[r];
            // The last row's products are near the smallest numbers that have a whole exponent.
            const std::uint32_t exponent = r + 1 == kRows ? 1 : 120;
            for (auto &weight : weights[r]) weight = to_bits(number(state, exponent)) >> 16;
        }
        for (std::int64_t t = 0; t < kTokens; ++t) {
            tokens[t] = x[t];
            for (float &value : x[t]) value = number(state, 122);
        }
        kernels.pack(Operand::rounded, tokens, kTokens, kElements, packed);
        kernels.dot[static_cast<int>(Operand::rounded)](
            {rows, kRows, packed, kTokens, 0, TokenTiles(kTokens, kernels.tile_tokens).count,
             kElements, out, kRows, 0});
    }

    // Either sign, any fraction, one of eight exponents from `exponent`.
    static float number(std::uint32_t &state, std::uint32_t exponent) {
        state = state * 1664525 + 1013904223;
        return from_bits((state & 0x80000000) | (exponent + (state >> 28 & 7)) << 23 |
                         (state >> 5 & 0x7FFFFF));
    }
};

struct Found {
    Kernels tables[kMostTables];
    int count = 0;

    Found() {
#if defined(__x86_64__)
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                              __builtin_cpu_supports("f16c");
        if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
            const Kernels paired = with_pair_dot();
            if (__builtin_cpu_supports("avx512bf16") &&
                PairDotTrial().agree(paired, kAvx512Kernels)) {
                tables[count++] = paired;
            }
            tables[count++] = kAvx512Kernels;
        }
        if (has_avx2) tables[count++] = kAvx2Kernels;
#endif
        tables[count++] = kPortableKernels;
    }
};

}  // namespace

KernelTables all_kernels() {
    static const Found found;
    return {found.tables, found.count};
}

const Kernels &find_kernels(const char *variant) {
    for (const Kernels &kernels : all_kernels()) {
        if (*variant == '\0' || std::strcmp(variant, kernels.name) == 0) return kernels;
    }
    refuse(std::string("this machine has no variant ") + variant);
}

}  // namespace gearfall::cpu
