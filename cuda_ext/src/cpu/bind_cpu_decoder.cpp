// Binds the decoder: weights once, as tuples of tensors in the order of gearfall.infra.kernels.cpu_decoder.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include <map>
#include <string>

#include "cpu_decoder.hpp"
#include "python_tensor.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gearfall::cpu;

namespace {

TensorView tensor_at(const char *name, const nb::handle &view) {
    return tensor(name, nb::cast<nb::tuple>(view));
}

std::optional<TensorView> optional_at(const char *name, const nb::handle &view) {
    if (view.is_none()) return std::nullopt;
    return tensor_at(name, view);
}

// (weight, bias or None)
StoredLinear linear_at(const char *name, const nb::handle &pair) {
    const auto parts = nb::cast<nb::tuple>(pair);
    require(parts.size() == 2, "a linear layer is (weight, bias)");
    return {tensor_at(name, parts[0]), optional_at("bias", parts[1])};
}

std::optional<StoredLinear> optional_linear_at(const char *name, const nb::handle &pair) {
    if (pair.is_none()) return std::nullopt;
    return linear_at(name, pair);
}

DecoderLayer layer_at(const nb::handle &item) {
    const auto parts = nb::cast<nb::tuple>(item);
    require(parts.size() == 22, "a decoder layer has 22 parts");
    return {tensor_at("attention_norm", parts[0]),
            linear_at("q", parts[1]),
            linear_at("k", parts[2]),
            linear_at("v", parts[3]),
            linear_at("o", parts[4]),
            optional_at("q_norm", parts[5]),
            optional_at("k_norm", parts[6]),
            tensor_at("mlp_norm", parts[7]),
            linear_at("gate", parts[8]),
            optional_linear_at("up", parts[9]),
            linear_at("down", parts[10]),
            tensor_at("k_cache", parts[11]),
            tensor_at("v_cache", parts[12]),
            {nb::cast<float>(parts[13]), nb::cast<std::int64_t>(parts[14]),
             nb::cast<float>(parts[15])},
            optional_at("attention_norm_bias", parts[16]),
            optional_at("mlp_norm_bias", parts[17]),
            optional_at("post_attention_norm", parts[18]),
            optional_at("post_mlp_norm", parts[19]),
            nb::cast<bool>(parts[20]),
            nb::cast<float>(parts[21])};
}

void make(Decoder *self, const nb::tuple &embedding, const nb::list &layers, const nb::tuple &norm,
          const nb::tuple &head, float eps, const nb::object &norm_bias, int activation,
          float embedding_scale, const nb::object &positions, std::int64_t position_offset) {
    require(activation >= 0 && activation < kActivations, "no such activation");
    DecoderWeights weights{tensor("embedding", embedding),
                           {},
                           tensor("norm", norm),
                           linear_at("head", head),
                           eps,
                           optional_at("norm_bias", norm_bias),
                           static_cast<Activation>(activation),
                           embedding_scale,
                           optional_at("positions", positions),
                           position_offset};
    for (const nb::handle item : layers) weights.layers.push_back(layer_at(item));
    new (self) Decoder(std::move(weights));
}

// (a, b, scale)
LowRank low_rank_at(const nb::handle &item) {
    const auto parts = nb::cast<nb::tuple>(item);
    require(parts.size() == 3, "an adapter's update is (a, b, scale)");
    return {tensor_at("a", parts[0]), tensor_at("b", parts[1]), nb::cast<float>(parts[2])};
}

// For each layer, for each site, an update or None.
void attach(Decoder &self, std::int64_t adapter, const nb::list &layers) {
    DecoderAdapter updates;
    for (const nb::handle item : layers) {
        const auto sites = nb::cast<nb::tuple>(item);
        require(sites.size() == kSites, "an adapter's layer has 7 sites");
        auto &layer = updates.layers.emplace_back();
        for (int site = 0; site < kSites; ++site) {
            if (!sites[site].is_none()) layer[site] = low_rank_at(sites[site]);
        }
    }
    self.attach(adapter, std::move(updates));
}

void run(Decoder &self, const nb::tuple &token_ids, const nb::tuple &cos, const nb::tuple &sin,
         const nb::object &local_cos, const nb::object &local_sin, const nb::tuple &block_tables, const nb::tuple &seq_index, const nb::tuple &positions,
         const nb::tuple &logit_rows, const nb::tuple &logits, int threads,
         const std::string &variant, bool is_rounded, const nb::list &adapters) {
    DecoderStep step{tensor("token_ids", token_ids),       tensor("cos", cos),
                           tensor("sin", sin),                   tensor("block_tables", block_tables),
                           tensor("seq_index", seq_index),       tensor("positions", positions),
                           tensor("logit_rows", logit_rows),     tensor("logits", logits),
                           optional_at("local_cos", local_cos),
                           optional_at("local_sin", local_sin),
                           is_rounded,
                           {}};
    for (const nb::handle item : adapters) {
        const auto group = nb::cast<nb::tuple>(item);
        require(group.size() == 2, "an adapter's tokens are (adapter, tokens)");
        step.adapters.push_back(
            {nb::cast<std::int64_t>(group[0]), tensor_at("tokens", group[1])});
    }
    const nb::gil_scoped_release released;
    self.run(step, threads, variant);
}

std::map<std::string, double> seconds(const Decoder &self) {
    static constexpr const char *kNames[kPhases] = {"row", "projection", "attention", "mlp",
                                                    "head"};
    const auto spent = self.seconds();
    std::map<std::string, double> named;
    for (int i = 0; i < kPhases; ++i) named[kNames[i]] = spent[i];
    return named;
}

}  // namespace

void bind_cpu_decoder(nb::module_ &module) {
    nb::class_<Decoder>(module, "CpuDecoder")
        .def("__init__", &make, "embedding"_a, "layers"_a, "norm"_a, "head"_a, "eps"_a,
             "norm_bias"_a.none(), "activation"_a, "embedding_scale"_a, "positions"_a.none(),
             "position_offset"_a)
        .def("run", &run, "token_ids"_a, "cos"_a, "sin"_a, "local_cos"_a.none(),
             "local_sin"_a.none(), "block_tables"_a, "seq_index"_a,
             "positions"_a, "logit_rows"_a, "logits"_a, "threads"_a, "variant"_a,
             "is_rounded"_a = false, "adapters"_a = nb::list(),
             "Compute one step and write the wanted logits.")
        .def("attach", &attach, "adapter"_a, "layers"_a,
             "Make steps able to name an adapter, given its updates by layer and site.")
        .def("detach", &Decoder::detach, "adapter"_a, "Forget an adapter.")
        .def("seconds", &seconds, "Return the seconds spent in each phase so far.");
}
