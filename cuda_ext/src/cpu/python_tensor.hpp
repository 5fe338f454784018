// Tensors that come from Python as (address, dtype code, shape, strides).
#pragma once

#include <nanobind/nanobind.h>

#include "cpu_tensor.hpp"

namespace gearfall::cpu {

// Reads the tuple that gearfall.infra.kernels.cpu_kernels makes; ranks beyond the largest are refused here.
inline TensorView tensor(const char *name, const nanobind::tuple &view) {
    namespace nb = nanobind;
    require(view.size() == 4, "a tensor is (address, dtype, shape, strides)");
    const auto shape = nb::cast<nb::tuple>(view[2]);
    const auto stride = nb::cast<nb::tuple>(view[3]);
    TensorView tensor;
    tensor.name = name;
    tensor.data = reinterpret_cast<void *>(nb::cast<std::uintptr_t>(view[0]));
    tensor.dtype = static_cast<DType>(nb::cast<int>(view[1]));
    require(shape.size() <= kMaxRank && shape.size() == stride.size(),
            "a tensor may have at most 4 dimensions");
    tensor.rank = static_cast<int>(shape.size());
    for (int i = 0; i < tensor.rank; ++i) {
        tensor.shape[i] = nb::cast<std::int64_t>(shape[i]);
        tensor.stride[i] = nb::cast<std::int64_t>(stride[i]);
    }
    return tensor;
}

}  // namespace gearfall::cpu
