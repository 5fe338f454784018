// Working memory of one call: floats on a cache line's boundary, not initialised.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace gearfall::cpu {

// Asks for memory to read.
inline void ask_for_reading(const void *begin, const void *end) {
    for (const char *line = static_cast<const char *>(begin); line < end; line += 64) {
        __builtin_prefetch(line, 0, 2);
    }
}

// Asks for the cache lines of `count` floats to write to them. Stores leave a core in order: a line
// that other cores read last would hold up all behind it, one after the other.
inline void ask_for_writing(const float *floats, std::int64_t count) {
    constexpr std::int64_t kLineFloats = 16;
    for (std::int64_t i = 0; i < count; i += kLineFloats) {
#if defined(__x86_64__)
        asm volatile("prefetchw %0" : : "m"(floats[i]));
#else
        __builtin_prefetch(floats + i, 1);
#endif
    }
}

class Scratch {
public:
    explicit Scratch(std::int64_t count)
        : floats_(static_cast<float *>(std::aligned_alloc(kLine, bytes(count)))) {
        if (floats_ == nullptr) throw std::bad_alloc();
    }
    float *data() const { return floats_.get(); }

private:
    struct Free {
        void operator()(float *floats) const { std::free(floats); }
    };
    static constexpr std::size_t kLine = 64;
    static std::size_t bytes(std::int64_t count) {
        return (static_cast<std::size_t>(count) * sizeof(float) / kLine + 1) * kLine;
    }
    std::unique_ptr<float, Free> floats_;
};

}  // namespace gearfall::cpu
