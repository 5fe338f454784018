// Binds the CPU kernels of the engine: tensors come as (address, dtype code, shape, strides).
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"
#include "python_tensor.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using gearfall::cpu::TensorView;
using gearfall::cpu::tensor;

namespace {

gearfall::cpu::Pages pages(const nb::tuple &k_cache, const nb::tuple &v_cache,
                           const nb::tuple &block_tables, const nb::tuple &seq_index,
                           const nb::tuple &positions) {
    return {tensor("k_cache", k_cache), tensor("v_cache", v_cache),
            tensor("block_tables", block_tables), tensor("seq_index", seq_index),
            tensor("positions", positions)};
}

std::vector<std::string> variants() {
    std::vector<std::string> names;
    for (const auto &kernels : gearfall::cpu::all_kernels()) names.push_back(kernels.name);
    return names;
}

void linear(const nb::tuple &x, const nb::tuple &weight, const std::optional<nb::tuple> &bias,
            const nb::tuple &out, int threads, const std::string &variant, bool is_rounded,
            std::int64_t exact_rows) {
    TensorView bias_view;
    if (bias) bias_view = tensor("bias", *bias);
    const gearfall::cpu::Linear call{tensor("x", x), tensor("weight", weight),
                                     bias ? &bias_view : nullptr, tensor("out", out), is_rounded,
                                     exact_rows};
    const nb::gil_scoped_release released;
    gearfall::cpu::linear(call, threads, variant);
}

void write_kv(const nb::tuple &k, const nb::tuple &v, const nb::tuple &k_cache,
              const nb::tuple &v_cache, const nb::tuple &block_tables, const nb::tuple &seq_index,
              const nb::tuple &positions) {
    const TensorView keys = tensor("k", k);
    const TensorView values = tensor("v", v);
    const auto cache = pages(k_cache, v_cache, block_tables, seq_index, positions);
    const nb::gil_scoped_release released;
    gearfall::cpu::write_kv(keys, values, cache);
}

void paged_attention(const nb::tuple &q, const nb::tuple &k_cache, const nb::tuple &v_cache,
                     const nb::tuple &block_tables, const nb::tuple &seq_index,
                     const nb::tuple &positions, const nb::tuple &out, float scale,
                     std::int64_t sliding_window, float softcap, int threads,
                     const std::string &variant) {
    const TensorView queries = tensor("q", q);
    const TensorView result = tensor("out", out);
    const auto cache = pages(k_cache, v_cache, block_tables, seq_index, positions);
    const nb::gil_scoped_release released;
    const gearfall::cpu::AttentionOptions options{scale, sliding_window, softcap};
    gearfall::cpu::paged_attention(queries, cache, result, options, threads, variant);
}

void rms_norm(const nb::tuple &x, const nb::tuple &weight, const nb::tuple &out, float eps,
              const std::string &variant) {
    const TensorView rows = tensor("x", x);
    const TensorView factors = tensor("weight", weight);
    const TensorView result = tensor("out", out);
    const nb::gil_scoped_release released;
    gearfall::cpu::rms_norm(rows, factors, result, eps, variant);
}

void layer_norm(const nb::tuple &x, const nb::tuple &weight, const nb::tuple &bias,
                const nb::tuple &out, float eps, const std::string &variant) {
    const TensorView rows = tensor("x", x);
    const TensorView factors = tensor("weight", weight);
    const TensorView terms = tensor("bias", bias);
    const TensorView result = tensor("out", out);
    const nb::gil_scoped_release released;
    gearfall::cpu::layer_norm(rows, factors, terms, result, eps, variant);
}

void activate(int activation, const nb::tuple &gate, const std::optional<nb::tuple> &up,
              const nb::tuple &out, const std::string &variant) {
    const TensorView gates = tensor("gate", gate);
    TensorView ups;
    if (up) ups = tensor("up", *up);
    const TensorView result = tensor("out", out);
    const nb::gil_scoped_release released;
    gearfall::cpu::activate(activation, gates, up ? &ups : nullptr, result, variant);
}

void summarize_logits(const nb::tuple &logits, const nb::tuple &sharpness, const nb::tuple &best,
                      const nb::tuple &numbers, int threads, const std::string &variant) {
    const TensorView rows = tensor("logits", logits);
    const TensorView factors = tensor("sharpness", sharpness);
    const TensorView places = tensor("best", best);
    const TensorView results = tensor("numbers", numbers);
    const nb::gil_scoped_release released;
    gearfall::cpu::summarize_logits(rows, factors, places, results, threads, variant);
}

}  // namespace

void bind_cpu_decoder(nb::module_ &module);

void bind_cpu(nb::module_ &module) {
    nb::exception<gearfall::cpu::BadArgument>(module, "BadArgument", PyExc_ValueError);
    module.def("cpu_variants", &variants,
               "Return the instruction sets that can run, fastest first.");
    module.def("cpu_linear", &linear, "x"_a, "weight"_a, "bias"_a.none(), "out"_a, "threads"_a,
               "variant"_a, "is_rounded"_a = false, "exact_rows"_a = 0, "Write x @ weight.T + bias to out.");
    module.def("cpu_write_kv", &write_kv, "k"_a, "v"_a, "k_cache"_a, "v_cache"_a, "block_tables"_a,
               "seq_index"_a, "positions"_a, "Copy keys and values into the paged cache.");
    module.def("cpu_paged_attention", &paged_attention, "q"_a, "k_cache"_a, "v_cache"_a,
               "block_tables"_a, "seq_index"_a, "positions"_a, "out"_a, "scale"_a,
               "sliding_window"_a, "softcap"_a, "threads"_a, "variant"_a,
               "Write causal attention over the paged cache to out.");
    module.def("cpu_rms_norm", &rms_norm, "x"_a, "weight"_a, "out"_a, "eps"_a, "variant"_a,
               "Write root-mean-square normalised rows to out.");
    module.def("cpu_layer_norm", &layer_norm, "x"_a, "weight"_a, "bias"_a, "out"_a, "eps"_a,
               "variant"_a, "Write normalised rows to out.");
    module.def("cpu_activate", &activate, "activation"_a, "gate"_a, "up"_a.none(), "out"_a,
               "variant"_a, "Write activation(gate), times up if there is one, to out.");
    module.def("cpu_summarize_logits", &summarize_logits, "logits"_a, "sharpness"_a, "best"_a,
               "numbers"_a, "threads"_a, "variant"_a,
               "Write the best place of each row, and its largest, second, and sums of powers.");
    bind_cpu_decoder(module);
}
