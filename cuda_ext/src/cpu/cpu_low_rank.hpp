// What LoRA adapters add to a product: out[row] += scale * (b (a x[row])), for rows that ask for
// it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_tensor.hpp"

namespace gearfall::cpu {

struct LowRank {
    TensorView a;  // [rank, K]
    TensorView b;  // [N, rank]
    float scale;
};

// A token's row of the product's input and of its output.
struct UpdateRow {
    const float *x;
    float *out;
};

// The bits of two products by cpu_linear.cpp, each element then multiplied and added apart.
void add_low_rank(const Kernels &kernels, const LowRank &update, const std::vector<UpdateRow> &rows,
                  bool is_rounded, int threads);

// Refuses factors that do not fit a product of `inputs` and `outputs`.
void check_low_rank(const LowRank &update, std::int64_t inputs, std::int64_t outputs);

}  // namespace gearfall::cpu
