// The inner kernels, one table for each instruction set; all tables give the same bits.
//
// Canonical order, which every table keeps: a dot product over K runs in 16 float32 partial sums by
// fused multiply-add, partial sum j taking elements j, j+16, j+32, ... (for bfloat16 weights 2j,
// 2j+1, 2j+32, ...), the end padded with zeros; then lanes i and i+8, i and i+4, i and i+2, i and
// i+1 are added. Nothing in it depends on a neighbour row, so tiles may have any shape.
#pragma once

#include <cstdint>

namespace gearfall::cpu {

constexpr std::int64_t kLanes = 16;

// Elements of one step over K: packed rows are padded with zeros to a multiple of it.
constexpr std::int64_t step_elements(int dtype) { return dtype == 1 ? 2 * kLanes : kLanes; }
constexpr std::int64_t padded(std::int64_t count, std::int64_t step) {
    return (count + step - 1) / step * step;
}

// `rows` by `tokens` dot products over k elements: out[token * out_stride + row].
struct DotPanel {
    const void *const *rows;
    std::int64_t row_count;
    const float *packed;  // by Kernels::pack, for the weights' dtype
    std::int64_t token_count;
    std::int64_t k;
    float *out;
    std::int64_t out_stride;
};

// sums[q][0..d) += weights[q][i] * rows[i][0..d), for each query q, i in order.
struct WeighPanel {
    const float *const *rows;
    std::int64_t row_count;
    std::int64_t d;
    const float *weights;
    std::int64_t weights_stride;
    std::int64_t query_count;
    float *sums;
    std::int64_t sums_stride;
};

struct Kernels {
    const char *name;
    // Tokens of one packed tile; a dot panel starts at a multiple of it.
    std::int64_t tile_tokens;
    // By weight dtype: f32, bf16, f16.
    void (*dot[3])(const DotPanel &panel);
    // Copies token rows into tiles, interleaved by step, in the order weights of `dtype` widen to.
    void (*pack)(int dtype, const float *const *rows, std::int64_t tokens, std::int64_t k,
                 float *packed);
    // Replaces scores[0..count) by exp(s - max), s = the score scaled and capped, and returns the
    // reciprocal of their sum. Reads and writes up to the next multiple of kLanes.
    float (*softmax)(float *scores, std::int64_t count, float scale, float softcap);
    void (*weigh)(const WeighPanel &panel);
    void (*rms_norm)(const float *x, const float *weight, std::int64_t k, float eps, float *out);
    void (*silu_mul)(const float *gate, const float *up, std::int64_t k, float *out);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// Calls visit(const Kernels &) for each table this machine can run, fastest first.
template <class Visit>
void for_each_kernels(Visit visit) {
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        visit(kAvx512Kernels);
    }
    if (has_avx2) visit(kAvx2Kernels);
#endif
    visit(kPortableKernels);
}

// The table named `variant`, the fastest for "". Throws BadArgument for one this machine lacks.
const Kernels &find_kernels(const char *variant);

}  // namespace gearfall::cpu
