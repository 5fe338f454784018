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

    // 32 elements, each by rounded_bits: the instruction for it reads tiny numbers as zeros. To go
    // past the caches, `to` must be a whole line.
    template <bool kIsAway>
    static void pack_pairs(const float *from, float *to) {
        const __m512i packed = _mm512_inserti64x4(_mm512_castsi256_si512(rounded(from)),
                                                  rounded(from + kLanes), 1);
        if constexpr (kIsAway) {
            _mm512_stream_si512(reinterpret_cast<__m512i *>(to), packed);
        } else {
            _mm512_storeu_si512(to, packed);
        }
    }
    static __m256i rounded(const float *from) {
        const __m512 x = _mm512_loadu_ps(from);
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i nearest =
            _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i all = _mm512_mask_blend_epi32(is_nan, nearest, quiet);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
    }
};

}  // namespace

void dot_rounded_avx512_bf16(const DotPanel &panel) { Dots<Avx512Bf16>::dot<Rounded>(panel); }

void pack_avx512_bf16(Operand operand, const float *const *rows, std::int64_t tokens,
                      std::int64_t k, float *packed) {
    Dots<Avx512Bf16>::pack<false>(operand, rows, tokens, k, packed);
}

void pack_away_avx512_bf16(Operand operand, const float *const *rows, std::int64_t tokens,
                           std::int64_t k, float *packed) {
    Dots<Avx512Bf16>::pack<true>(operand, rows, tokens, k, packed);
}

}  // namespace gearfall::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
