// What sampling asks of a row of logits.
#include <limits>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"
#include "cpu_pool.hpp"

namespace gearfall::cpu {

void summarize_logits(const TensorView &logits, const TensorView &sharpness, const TensorView &best,
                      const TensorView &numbers, int threads, const std::string &variant) {
    require_rows(logits, 2);
    require_dtype(logits, DType::f32);
    const std::int64_t rows = logits.shape[0];
    const std::int64_t count = logits.shape[1];
    require(count >= 1 && count <= std::numeric_limits<std::int32_t>::max(),
            "logits must have between one and 2^31 - 1 columns");
    require_dense(sharpness, 1, DType::f32);
    require_size(sharpness, 0, rows);
    require_dense(best, 1, DType::i32);
    require_size(best, 0, rows);
    require_dense(numbers, 2, DType::f32);
    require_size(numbers, 0, rows);
    require_size(numbers, 1, 4);
    require_threads(threads);
    const Kernels &kernels = find_kernels(variant.c_str());
    auto *const places = static_cast<std::int32_t *>(best.data);
    parallel_for(rows, threads, [&](std::int64_t row) {
        places[row] = static_cast<std::int32_t>(
            kernels.summarize(logits.f32() + row * logits.stride[0], count,
                              sharpness.f32()[row], numbers.f32() + row * 4));
    });
}

}  // namespace gearfall::cpu
