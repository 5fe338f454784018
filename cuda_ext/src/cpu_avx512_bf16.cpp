// Products of rounded tokens by AVX512_BF16's own instruction, twice as many as by float32's.
#if defined(__x86_64__)
#include <cstring>

#include "cpu_denormals.hpp"
#include "cpu_half.hpp"
#include "cpu_isa.hpp"  // before the target: what others share must run everywhere
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu_avx512_lanes.hpp"

namespace gearfall::cpu {

namespace {

struct Avx512Bf16 : Avx512 {
    static constexpr bool kHasPairDot = true;

    using Pairs = __m512bh;
    static Pairs pairs(const void *from) {
        return reinterpret_cast<Pairs>(_mm512_loadu_si512(from));
    }
    static Lanes dot_pairs(Pairs a, Pairs b, Lanes c) { return _mm512_dpbf16_ps(c, a, b); }
};

}  // namespace

void dot_rounded_avx512_bf16(const DotPanel &panel) { Dots<Avx512Bf16>::dot<Rounded>(panel); }

void pack_avx512_bf16(Operand operand, const float *const *rows, std::int64_t tokens,
                      std::int64_t k, float *packed) {
    Dots<Avx512Bf16>::pack(operand, rows, tokens, k, packed);
}

}  // namespace gearfall::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
