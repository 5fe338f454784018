// What a decoder's weights and steps must fulfil before any of their memory is touched.
#include <algorithm>

#include "cpu_attention_tile.hpp"
#include "cpu_decoder.hpp"

namespace gearfall::cpu {

namespace {

void require_vector(const TensorView &tensor, std::int64_t size) {
    require_dense(tensor, 1, DType::f32);
    require_size(tensor, 0, size);
}

void require_linear(const StoredLinear &linear, std::int64_t outputs, std::int64_t inputs) {
    require_weight(linear.weight, linear.bias_or_null());
    require_size(linear.weight, 0, outputs);
    require_size(linear.weight, 1, inputs);
}

// Products over the same packed tokens must widen alike.
void require_alike(const StoredLinear &one, const StoredLinear &other) {
    require_dtype(other.weight, one.weight.dtype);
    require(has_columns_adjacent(one.weight) == has_columns_adjacent(other.weight),
            "products of the same tokens must have weights that lie alike");
}

void check_layer(const DecoderLayer &layer, const DecoderLayer &first, const DecoderSizes &sizes) {
    require_vector(layer.attention_norm, sizes.width);
    require_vector(layer.mlp_norm, sizes.width);
    require_linear(layer.q, sizes.q_floats(), sizes.width);
    require_linear(layer.k, sizes.kv_floats(), sizes.width);
    require_linear(layer.v, sizes.kv_floats(), sizes.width);
    require_linear(layer.o, sizes.width, sizes.q_floats());
    require_linear(layer.gate, layer.gate.weight.shape[0], sizes.width);
    if (layer.up) require_linear(*layer.up, layer.gate.outputs(), sizes.width);
    require_linear(layer.down, sizes.width, layer.gate.outputs());
    require(layer.gate.outputs() >= 1, "gate must have at least one row");
    require_alike(layer.q, layer.k);
    require_alike(layer.q, layer.v);
    if (layer.up) require_alike(layer.gate, *layer.up);
    for (const auto *vector : {&layer.attention_norm_bias, &layer.mlp_norm_bias,
                               &layer.post_attention_norm, &layer.post_mlp_norm}) {
        if (*vector) require_vector(**vector, sizes.width);
    }
    for (const auto *norm : {&layer.q_norm, &layer.k_norm}) {
        if (*norm) require_vector(**norm, sizes.head_size);
    }
    require_options(layer.attention);
    for (const TensorView *cache : {&layer.k_cache, &layer.v_cache}) {
        require_dense(*cache, 4, DType::f32);
        for (int i = 0; i < 4; ++i) require_size(*cache, i, first.k_cache.shape[i]);
    }
}

void check_ids(const TensorView &ids, std::int64_t limit) {
    for (std::int64_t i = 0; i < ids.shape[0]; ++i) {
        const std::int64_t id = ids.i32()[i];
        if (id >= 0 && id < limit) continue;
        refuse(ids.name + ("[" + std::to_string(i)) + "] is " + std::to_string(id) +
               ", not below " + std::to_string(limit));
    }
}

void check_rotary(const TensorView &cos, const TensorView &sin, const TensorView &positions,
                  std::int64_t head_size) {
    require_dense(cos, 2, DType::f32);
    require_dense(sin, 2, DType::f32);
    for (int i = 0; i < 2; ++i) require_size(sin, i, cos.shape[i]);
    require(cos.shape[1] % 2 == 0 && cos.shape[1] <= head_size,
            "cos must have an even number of columns, at most the size of a head");
    check_ids(positions, cos.shape[0]);
}

// The window that covers every layer's, 0 where one of them sees all.
std::int64_t widest_window(const std::vector<DecoderLayer> &layers) {
    std::int64_t widest = layers[0].attention.sliding_window;
    for (const DecoderLayer &layer : layers) {
        const std::int64_t window = layer.attention.sliding_window;
        widest = widest == 0 || window == 0 ? 0 : std::max(widest, window);
    }
    return widest;
}

}  // namespace

DecoderSizes check_weights(const DecoderWeights &weights) {
    require(!weights.layers.empty(), "a decoder must have at least one layer");
    require_rows(weights.embedding, 2);
    require_weight_dtype(weights.embedding);
    require(weights.eps >= 0.0f, "eps must not be negative");
    const DecoderLayer &first = weights.layers[0];
    require_dense(first.k_cache, 4, DType::f32);
    require_weight(first.q.weight, nullptr);
    const std::int64_t width = weights.embedding.shape[1];
    const std::int64_t kv_heads = first.k_cache.shape[2];
    const std::int64_t head_size = first.k_cache.shape[3];
    require(width >= 1 && kv_heads >= 1 && head_size >= 1, "k_cache has an empty dimension");
    const std::int64_t heads = first.q.outputs() / head_size;
    require(heads >= kv_heads && heads % kv_heads == 0 && heads / kv_heads <= kMaxGroup,
            "q must have a multiple of the cache's heads, at most 256 for one of them");
    DecoderSizes sizes{width, heads, kv_heads, head_size, 0};
    for (const DecoderLayer &layer : weights.layers) {
        check_layer(layer, first, sizes);
        sizes.inner = std::max(sizes.inner, layer.gate.outputs());
    }
    require_vector(weights.norm, width);
    if (weights.norm_bias) require_vector(*weights.norm_bias, width);
    if (weights.positions) {
        require_rows(*weights.positions, 2);
        require_weight_dtype(*weights.positions);
        require_size(*weights.positions, 1, width);
        require(weights.position_offset >= 0, "position_offset must not be negative");
    }
    require_linear(weights.head, weights.head.weight.shape[0], width);
    return sizes;
}

void check_adapter(const DecoderWeights &weights, const DecoderAdapter &adapter) {
    require(adapter.layers.size() == weights.layers.size(),
            "an adapter must have as many layers as the decoder");
    for (std::size_t i = 0; i < adapter.layers.size(); ++i) {
        const DecoderLayer &layer = weights.layers[i];
        const StoredLinear *const up = layer.up ? &*layer.up : nullptr;
        const StoredLinear *const sites[kSites] = {&layer.q,    &layer.k, &layer.v,   &layer.o,
                                                   &layer.gate, up,       &layer.down};
        for (int site = 0; site < kSites; ++site) {
            const auto &update = adapter.layers[i][site];
            if (!update) continue;
            require(sites[site] != nullptr, "an adapter updates a product that is not there");
            const TensorView &weight = sites[site]->weight;
            check_low_rank(*update, weight.shape[1], weight.shape[0]);
        }
    }
}

PageSizes check_step(const DecoderWeights &weights, const DecoderSizes &sizes,
                     const DecoderStep &step) {
    require_dense(step.token_ids, 1, DType::i32);
    const std::int64_t tokens = step.token_ids.shape[0];
    const DecoderLayer &first = weights.layers[0];
    const Pages pages{first.k_cache, first.v_cache, step.block_tables, step.seq_index,
                      step.positions};
    const PageSizes found = check_pages(pages, tokens, widest_window(weights.layers));
    check_ids(step.token_ids, weights.embedding.shape[0]);
    check_rotary(step.cos, step.sin, step.positions, sizes.head_size);
    bool is_local = false;
    for (const DecoderLayer &layer : weights.layers) is_local |= layer.is_local;
    require(!is_local || (step.local_cos && step.local_sin), "local layers need local tables");
    if (is_local) check_rotary(*step.local_cos, *step.local_sin, step.positions, sizes.head_size);
    if (weights.positions) {
        check_ids(step.positions, weights.positions->shape[0] - weights.position_offset);
    }
    require_dense(step.logit_rows, 1, DType::i32);
    check_ids(step.logit_rows, tokens);
    require(step.logit_rows.shape[0] <= tokens, "logit_rows must not be more than the tokens");
    for (const AdapterTokens &group : step.adapters) {
        require_dense(group.tokens, 1, DType::i32);
        check_ids(group.tokens, tokens);
    }
    require_dense(step.logits, 2, DType::f32);
    require_size(step.logits, 0, step.logit_rows.shape[0]);
    require_size(step.logits, 1, weights.head.outputs());
    return found;
}

}  // namespace gearfall::cpu
