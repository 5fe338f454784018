// The CPU kernels: arguments are checked (BadArgument), then the work is cut up for the pool.
#pragma once

#include <string>

#include "cpu_tensor.hpp"

namespace gearfall::cpu {

// out[t, n] = sum over k of x[t, k] * weight[n, k], plus bias[n] where there is one.
struct Linear {
    TensorView x;
    TensorView weight;
    const TensorView *bias;  // or nullptr
    TensorView out;
    bool is_rounded;  // x to bfloat16, where the weight is
    std::int64_t exact_rows = 0;  // of x, its first ones, that are not rounded
};
void linear(const Linear &call, int threads, const std::string &variant);

// Where each token of a step lies in the paged cache.
struct Pages {
    TensorView k_cache;
    TensorView v_cache;
    TensorView block_tables;
    TensorView seq_index;
    TensorView positions;
};
void write_kv(const TensorView &k, const TensorView &v, const Pages &pages);

struct AttentionOptions {
    float scale;
    std::int64_t sliding_window;  // 0: all positions
    float softcap;                // 0: none
};
void paged_attention(const TensorView &q, const Pages &pages, const TensorView &out,
                     const AttentionOptions &options, int threads, const std::string &variant);

void rms_norm(const TensorView &x, const TensorView &weight, const TensorView &out, float eps,
              const std::string &variant);
void layer_norm(const TensorView &x, const TensorView &weight, const TensorView &bias,
                const TensorView &out, float eps, const std::string &variant);
// out = activation(gate), times up where there is one; see Activation.
void activate(int activation, const TensorView &gate, const TensorView *up, const TensorView &out,
              const std::string &variant);

// For each row of logits [R, V]: best i32[R], the first place of the largest, -1 where the row has
// none (see Kernels::summarize), and numbers [R, 4]; sharpness [R].
void summarize_logits(const TensorView &logits, const TensorView &sharpness, const TensorView &best,
                      const TensorView &numbers, int threads, const std::string &variant);

}  // namespace gearfall::cpu
