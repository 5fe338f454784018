// Sixteen lanes as one AVX-512 register. Included under the includer's own target.
#pragma once

#include <immintrin.h>

#include "cpu_dots.hpp"

namespace gearfall::cpu {
namespace {

struct Avx512 {
    using Lanes = __m512;
    static constexpr int kRows = 4;
    static constexpr int kTokens = 6;
    static constexpr int kQueries = 4;
    static constexpr bool kHasPairDot = false;

    static Lanes zero() { return _mm512_setzero_ps(); }
    static Lanes set(float value) { return _mm512_set1_ps(value); }
    static Lanes load(const float *from) { return _mm512_loadu_ps(from); }
    static void store(float *to, Lanes value) { _mm512_storeu_ps(to, value); }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
    static Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
    static Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
    static Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
    static Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
    static Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
    static Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
    }
    static Lanes scale_by_power(Lanes value, Lanes shifted) {
        const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), power));
    }

    static Lanes widen(const float *from, int) { return _mm512_loadu_ps(from); }
    static Lanes widen(const F16 *from, int) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    }
    // Even elements for part 0, odd ones for part 1.
    static Lanes widen(const Bf16 *from, int part) {
        const __m512i both = _mm512_loadu_si512(from);
        return _mm512_castsi512_ps(
            part == 0 ? _mm512_slli_epi32(both, 16)
                      : _mm512_and_si512(both, _mm512_set1_epi32(-0x10000)));
    }

    template <int R>
    static void reduce(const Lanes *sums, float *out) {
        if constexpr (R == 4) {
            // [a8 b8] and [c8 d8], then [a4 b4 c4 d4], then each quarter down to its first lane.
            const __m512 ab = add_halves(sums[0], sums[1]);
            const __m512 cd = add_halves(sums[2], sums[3]);
            __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),
                                       _mm512_shuffle_f32x4(ab, cd, 0xDD));
            all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
            all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
            const __m512i firsts = _mm512_castsi128_si512(_mm_set_epi32(12, 8, 4, 0));
            _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
        } else {
            for (int r = 0; r < R; ++r) out[r] = reduce_one(sums[r]);
        }
    }

    static __m512 add_halves(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    }
    static float reduce_one(__m512 value) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(value),
                                           _mm512_extractf32x8_ps(value, 1));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_add_ps(four, _mm_permute_ps(four, 0x4E));
        return _mm_cvtss_f32(_mm_add_ps(four, _mm_permute_ps(four, 0xB1)));
    }
};

}  // namespace
}  // namespace gearfall::cpu
