// A tensor as the CPU kernels see it, and the checks that come before any of its memory is touched.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace gearfall::cpu {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i32 = 3 };

// A shape, index or count that does not fit the other arguments; a ValueError in Python.
struct BadArgument : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

constexpr int kMaxRank = 4;

// Memory of somebody else: base address, sizes and strides in elements.
struct TensorView {
    const char *name = "";
    void *data = nullptr;
    DType dtype = DType::f32;
    int rank = 0;
    std::array<std::int64_t, kMaxRank> shape{};
    std::array<std::int64_t, kMaxRank> stride{};

    float *f32() const { return static_cast<float *>(data); }
    const std::int32_t *i32() const { return static_cast<const std::int32_t *>(data); }
};

constexpr std::int64_t element_bytes(DType dtype) {
    return dtype == DType::f32 || dtype == DType::i32 ? 4 : 2;
}

// Element `index` of a dense f32, bf16 or f16 vector.
float float_at(const TensorView &vector, std::int64_t index);

[[noreturn]] void refuse(const std::string &message);

// Refuses with `message` unless `holds`. A message that must be put together goes to refuse itself:
// these checks run before every kernel.
inline void require(bool holds, const char *message) {
    if (!holds) refuse(message);
}

// For reading: `rank` dimensions, the last one's elements adjacent, other strides as they come.
void require_rows(const TensorView &tensor, int rank);
// `rank` dimensions, dense throughout.
void require_dense(const TensorView &tensor, int rank, DType dtype);
void require_size(const TensorView &tensor, int dimension, std::int64_t size);
void require_dtype(const TensorView &tensor, DType dtype);
void require_weight_dtype(const TensorView &tensor);
// Whether the N elements of a weight [N, K] that belong to one k lie side by side.
inline bool has_columns_adjacent(const TensorView &weight) {
    return weight.rank == 2 && weight.shape[1] > 1 && weight.stride[1] != 1 &&
           (weight.stride[0] == 1 || weight.shape[0] == 1);
}
// A weight [N, K], the elements of a row or of a column adjacent, and its bias [N], which may be
// nullptr.
void require_weight(const TensorView &weight, const TensorView *bias);
void require_threads(int threads);

}  // namespace gearfall::cpu
