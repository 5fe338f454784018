// The inner kernels for AVX2 with FMA and F16C: sixteen lanes are two registers.
#if defined(__x86_64__)
#include <cstring>

#include "cpu_denormals.hpp"
#include "cpu_half.hpp"
#include "cpu_isa.hpp"  // before the target: what others share must run everywhere
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "cpu_tiles.hpp"

namespace gearfall::cpu {
namespace {

struct Avx2 {
    struct Lanes {
        __m256 low;   // lanes 0..7
        __m256 high;  // lanes 8..15
    };
    static constexpr int kRows = 2;
    static constexpr int kTokens = 3;
    static constexpr int kQueries = 2;
    static constexpr bool kHasPairDot = false;

    static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Lanes set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Lanes load(const float *from) {
        return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    }
    static void store(float *to, Lanes value) {
        _mm256_storeu_ps(to, value.low);
        _mm256_storeu_ps(to + 8, value.high);
    }
    static Lanes fma(Lanes a, Lanes b, Lanes c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static Lanes add(Lanes a, Lanes b) {
        return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
    }
    static Lanes sub(Lanes a, Lanes b) {
        return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
    }
    static Lanes mul(Lanes a, Lanes b) {
        return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
    }
    static Lanes div(Lanes a, Lanes b) {
        return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
    }
    static Lanes max(Lanes a, Lanes b) {
        return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
    }
    static Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
        return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
                _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
    }
    static Lanes scale_by_power(Lanes value, Lanes shifted) {
        return {scaled(value.low, shifted.low), scaled(value.high, shifted.high)};
    }

    static Lanes widen(const float *from, int) { return load(from); }
    static Lanes widen(const F16 *from, int) {
        const __m128i *halves = reinterpret_cast<const __m128i *>(from);
        return {_mm256_cvtph_ps(_mm_loadu_si128(halves)),
                _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    }
    // Even elements for part 0, odd ones for part 1.
    static Lanes widen(const Bf16 *from, int part) {
        const __m256i *halves = reinterpret_cast<const __m256i *>(from);
        return {widened(_mm256_loadu_si256(halves), part),
                widened(_mm256_loadu_si256(halves + 1), part)};
    }

    template <int R>
    static void reduce(const Lanes *sums, float *out) {
        for (int r = 0; r < R; ++r) {
            const __m256 eight = _mm256_add_ps(sums[r].low, sums[r].high);
            __m128 four =
                _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
            four = _mm_add_ps(four, _mm_permute_ps(four, 0x4E));
            out[r] = _mm_cvtss_f32(_mm_add_ps(four, _mm_permute_ps(four, 0xB1)));
        }
    }

    static __m256 widened(__m256i both, int part) {
        return _mm256_castsi256_ps(part == 0
                                       ? _mm256_slli_epi32(both, 16)
                                       : _mm256_and_si256(both, _mm256_set1_epi32(-0x10000)));
    }
    static __m256 scaled(__m256 value, __m256 shifted) {
        const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), power));
    }
};

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = Tiles<Avx2>::table("avx2");

}  // namespace gearfall::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
