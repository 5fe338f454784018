// Flushing of numbers too small for a whole exponent, as the bfloat16 instructions have it.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace gearfall::cpu {

// While it lives, this thread's float arithmetic reads such numbers as zero and gives zero for
// them.
class DenormalsFlushed {
public:
    DenormalsFlushed() : before_(control()) { set_control(before_ | kFlush); }
    ~DenormalsFlushed() { set_control(before_); }
    DenormalsFlushed(const DenormalsFlushed &) = delete;
    DenormalsFlushed &operator=(const DenormalsFlushed &) = delete;

private:
#if defined(__x86_64__)
    using Control = unsigned int;
    static constexpr Control kFlush = 0x8040;  // flush to zero, denormals are zero
    static Control control() { return _mm_getcsr(); }
    static void set_control(Control value) {
        asm volatile("" ::: "memory");  // no operand may be read on the wrong side
        _mm_setcsr(value);
        asm volatile("" ::: "memory");
    }
#elif defined(__aarch64__)
    using Control = std::uint64_t;
    static constexpr Control kFlush = std::uint64_t{1} << 24;
    static Control control() {
        Control value;
        asm volatile("mrs %0, fpcr" : "=r"(value));
        return value;
    }
    static void set_control(Control value) { asm volatile("msr fpcr, %0" ::"r"(value) : "memory"); }
#else
    using Control = int;
    static constexpr Control kFlush = 0;
    static Control control() { return 0; }
    static void set_control(Control) {}
#endif
    Control before_;
};

}  // namespace gearfall::cpu
