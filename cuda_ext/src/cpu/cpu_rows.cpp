// Kernels over whole rows.
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"

namespace gearfall::cpu {

namespace {

void check_norm(const TensorView &x, const TensorView &out, float eps) {
    require_rows(x, 2);
    require_dtype(x, DType::f32);
    require(x.shape[1] >= 1, "x must have at least one column");
    require_dense(out, 2, DType::f32);
    require_size(out, 0, x.shape[0]);
    require_size(out, 1, x.shape[1]);
    require(eps >= 0.0f, "eps must not be negative");
}

// A vector of a norm as float32.
class Floats {
public:
    Floats(const TensorView &vector, std::int64_t size) {
        require_dense(vector, 1, vector.dtype);
        require_weight_dtype(vector);
        require_size(vector, 0, size);
        first_ = vector.f32();
        if (vector.dtype == DType::f32) return;
        widened_.resize(size);
        for (std::int64_t i = 0; i < size; ++i) widened_[i] = float_at(vector, i);
        first_ = widened_.data();
    }
    const float *data() const { return first_; }

private:
    std::vector<float> widened_;
    const float *first_;
};

}  // namespace

void rms_norm(const TensorView &x, const TensorView &weight, const TensorView &out, float eps,
              const std::string &variant) {
    check_norm(x, out, eps);
    const Kernels &kernels = find_kernels(variant.c_str());
    const Floats factors(weight, x.shape[1]);
    for (std::int64_t t = 0; t < x.shape[0]; ++t) {
        kernels.rms_norm(x.f32() + t * x.stride[0], factors.data(), x.shape[1], eps,
                         out.f32() + t * x.shape[1]);
    }
}

void layer_norm(const TensorView &x, const TensorView &weight, const TensorView &bias,
                const TensorView &out, float eps, const std::string &variant) {
    check_norm(x, out, eps);
    const Kernels &kernels = find_kernels(variant.c_str());
    const Floats factors(weight, x.shape[1]), terms(bias, x.shape[1]);
    for (std::int64_t t = 0; t < x.shape[0]; ++t) {
        kernels.layer_norm(x.f32() + t * x.stride[0], factors.data(), terms.data(), x.shape[1],
                           eps, out.f32() + t * x.shape[1]);
    }
}

void activate(int activation, const TensorView &gate, const TensorView *up, const TensorView &out,
              const std::string &variant) {
    require(activation >= 0 && activation < kActivations, "no such activation");
    require_dense(out, 2, DType::f32);
    for (const TensorView *tensor : {&gate, up}) {
        if (tensor == nullptr) continue;
        require_rows(*tensor, 2);
        require_dtype(*tensor, DType::f32);
        require_size(*tensor, 0, out.shape[0]);
        require_size(*tensor, 1, out.shape[1]);
    }
    const Kernels &kernels = find_kernels(variant.c_str());
    for (std::int64_t t = 0; t < out.shape[0]; ++t) {
        kernels.activate(static_cast<Activation>(activation), gate.f32() + t * gate.stride[0],
                         up == nullptr ? nullptr : up->f32() + t * up->stride[0], out.shape[1],
                         out.f32() + t * out.shape[1]);
    }
}

}  // namespace gearfall::cpu
