// Kernels over whole rows.
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"

namespace gearfall::cpu {

void rms_norm(const TensorView &x, const TensorView &weight, const TensorView &out, float eps,
              const std::string &variant) {
    require_rows(x, 2);
    require_dtype(x, DType::f32);
    require(x.shape[1] >= 1, "x must have at least one column");
    require_dense(weight, 1, weight.dtype);
    require_weight_dtype(weight);
    require_size(weight, 0, x.shape[1]);
    require_dense(out, 2, DType::f32);
    require_size(out, 0, x.shape[0]);
    require_size(out, 1, x.shape[1]);
    require(eps >= 0.0f, "eps must not be negative");
    const Kernels &kernels = find_kernels(variant.c_str());
    std::vector<float> floats;
    const float *factors = weight.f32();
    if (weight.dtype != DType::f32) {
        floats.resize(weight.shape[0]);
        for (std::int64_t i = 0; i < weight.shape[0]; ++i) floats[i] = float_at(weight, i);
        factors = floats.data();
    }
    for (std::int64_t t = 0; t < x.shape[0]; ++t) {
        kernels.rms_norm(x.f32() + t * x.stride[0], factors, x.shape[1], eps,
                         out.f32() + t * x.shape[1]);
    }
}

void silu_mul(const TensorView &gate, const TensorView &up, const TensorView &out,
              const std::string &variant) {
    require_dense(out, 2, DType::f32);
    for (const TensorView *tensor : {&gate, &up}) {
        require_rows(*tensor, 2);
        require_dtype(*tensor, DType::f32);
        require_size(*tensor, 0, out.shape[0]);
        require_size(*tensor, 1, out.shape[1]);
    }
    const Kernels &kernels = find_kernels(variant.c_str());
    for (std::int64_t t = 0; t < out.shape[0]; ++t) {
        kernels.silu_mul(gate.f32() + t * gate.stride[0], up.f32() + t * up.stride[0],
                         out.shape[1], out.f32() + t * out.shape[1]);
    }
}

}  // namespace gearfall::cpu
