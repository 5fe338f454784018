// The checks of tensor arguments.
#include "cpu_tensor.hpp"

#include "cpu_half.hpp"

namespace gearfall::cpu {

namespace {

constexpr int kMaxThreads = 256;

const char *dtype_name(DType dtype) {
    switch (dtype) {
        case DType::f32: return "float32";
        case DType::bf16: return "bfloat16";
        case DType::f16: return "float16";
        case DType::i32: return "int32";
    }
    return "unknown";
}

void require_rank(const TensorView &tensor, int rank) {
    if (tensor.rank == rank) return;
    refuse(tensor.name + (" must have " + std::to_string(rank)) + " dimensions, not " +
           std::to_string(tensor.rank));
}

void require_stride(const TensorView &tensor, int dimension, std::int64_t stride) {
    if (tensor.shape[dimension] <= 1 || tensor.stride[dimension] == stride) return;
    refuse(tensor.name + (" must be contiguous in dimension " + std::to_string(dimension)));
}

bool is_empty(const TensorView &tensor) {
    for (int i = 0; i < tensor.rank; ++i) {
        if (tensor.shape[i] == 0) return true;
    }
    return false;
}

}  // namespace

float float_at(const TensorView &vector, std::int64_t index) {
    if (vector.dtype == DType::f32) return vector.f32()[index];
    const std::uint16_t bits = static_cast<const std::uint16_t *>(vector.data)[index];
    return vector.dtype == DType::bf16 ? widened_bf16(bits) : widened_f16(bits);
}

void refuse(const std::string &message) { throw BadArgument(message); }

void require_dtype(const TensorView &tensor, DType dtype) {
    if (tensor.dtype == dtype) return;
    refuse(std::string(tensor.name) + " must be " + dtype_name(dtype) + ", not " +
           dtype_name(tensor.dtype));
}

void require_weight_dtype(const TensorView &tensor) {
    if (tensor.dtype != DType::i32) return;
    refuse(std::string(tensor.name) + " must be float32, bfloat16 or float16, not int32");
}

void require_rows(const TensorView &tensor, int rank) {
    require_rank(tensor, rank);
    require_stride(tensor, rank - 1, 1);
}

void require_dense(const TensorView &tensor, int rank, DType dtype) {
    require_rank(tensor, rank);
    require_dtype(tensor, dtype);
    if (is_empty(tensor)) return;
    std::int64_t dense = 1;
    for (int i = rank - 1; i >= 0; --i) {
        require_stride(tensor, i, dense);
        dense *= tensor.shape[i];
    }
}

void require_size(const TensorView &tensor, int dimension, std::int64_t size) {
    if (tensor.shape[dimension] == size) return;
    refuse(tensor.name + (" must have size " + std::to_string(size)) + " in dimension " +
           std::to_string(dimension) + ", not " + std::to_string(tensor.shape[dimension]));
}

void require_weight(const TensorView &weight, const TensorView *bias) {
    if (!has_columns_adjacent(weight)) require_rows(weight, 2);
    require_weight_dtype(weight);
    if (bias == nullptr) return;
    require_dense(*bias, 1, bias->dtype);
    require_weight_dtype(*bias);
    require_size(*bias, 0, weight.shape[0]);
}

void require_threads(int threads) {
    if (threads >= 1 && threads <= kMaxThreads) return;
    refuse("threads must be between 1 and 256, not " + std::to_string(threads));
}

}  // namespace gearfall::cpu
