// The attention half of a decoder's layers: heads into the cache, attention over its pages.
#include "cpu_decoder_pass.hpp"

namespace gearfall::cpu {

void DecoderPass::attend(const DecoderLayer &layer) {
    const bool is_updated = has_update({Site::q, Site::k, Site::v});
    const TokenPacking x(kernels_, operand(layer.q), tokens_, sizes_.width, packed_, threads_);
    pack_normed(layer.attention_norm, layer.attention_norm_bias, x, is_updated);
    note(Phase::row);
    const Pages pages{layer.k_cache, layer.v_cache, step_.block_tables, step_.seq_index,
                      step_.positions};
    if (is_updated || sizes_.head_size > kMaxChunkRows) {
        project_apart(layer, pages, x.packed());
    } else {
        project(layer, pages, x.packed());
    }
    note(Phase::projection);
    const std::int64_t attended = sizes_.q_floats();
    const TokenPacking out(kernels_, operand(layer.o), tokens_, attended, packed_, threads_);
    const bool is_apart = has_update({Site::o}) || !out.fits(sizes_.head_size);
    attend_pages(layer, pages, is_apart ? nullptr : &out, pieces_of(layer.o, cut_of(layer.o)));
    note(Phase::attention);
    if (is_apart) pack_rows(attended_, out);
    add_product(layer.o, Site::o, attended_, out.packed(), layer.post_attention_norm,
                pieces_of(layer.gate, inner_cut(layer)));
    note(Phase::projection);
}

void DecoderPass::project(const DecoderLayer &layer, const Pages &pages, const PackedTokens &x) {
    const ProductPieces pieces = head_pieces(layer);
    const std::int64_t parts = pieces.count / all_heads();
    parallel_for(pieces.count, pieces.threads, [&](std::int64_t index) {
        const std::int64_t head = index / parts, part = index % parts;
        const auto [linear, first] = projection_of(layer, head);
        const Factor factor{&linear->weight, linear->bias_or_null()};
        const OutputPiece piece{first * sizes_.head_size, sizes_.head_size,
                                tiles_.count * part / parts, tiles_.count * (part + 1) / parts};
        over_blocks(kernels_, &factor, 1, x, piece, sizes_.head_size,
                    rows_after(pieces, index, {}),
                    [&](const NearBlock &block) {
                        over_tokens(block, [&](std::int64_t t) {
                            place_head(layer, pages, t, head, block.row(0, t));
                        });
                    });
    });
}

ProductPieces DecoderPass::head_pieces(const DecoderLayer &layer) const {
    const int useful = useful_threads(layer.q, sizes_.qkv_floats());
    const std::int64_t parts = ProductCut::tile_chunks(tiles_.count, all_heads(), useful);
    return {all_heads() * parts, useful, [this, &layer, parts](std::int64_t index) {
                const auto [linear, head] = projection_of(layer, index / parts);
                return rows_of(linear->weight, head * sizes_.head_size, sizes_.head_size);
            }};
}

std::pair<const StoredLinear *, std::int64_t> DecoderPass::projection_of(
    const DecoderLayer &layer, std::int64_t head) const {
    if (head < sizes_.heads) return {&layer.q, head};
    head -= sizes_.heads;
    if (head < sizes_.kv_heads) return {&layer.k, head};
    return {&layer.v, head - sizes_.kv_heads};
}

void DecoderPass::project_apart(const DecoderLayer &layer, const Pages &pages,
                                const PackedTokens &x) {
    const std::int64_t all = sizes_.qkv_floats();
    float *const k = qkv_ + sizes_.q_floats();
    float *const v = k + sizes_.kv_floats();
    const Product products[] = {{&layer.q.weight, layer.q.bias_or_null(), qkv_, all},
                                {&layer.k.weight, layer.k.bias_or_null(), k, all},
                                {&layer.v.weight, layer.v.bias_or_null(), v, all}};
    multiply(products, 3, x);
    update(Site::q, rows_, sizes_.width, qkv_, all);
    update(Site::k, rows_, sizes_.width, k, all);
    update(Site::v, rows_, sizes_.width, v, all);
    over_rows(all, [&](std::int64_t t) {
        for (std::int64_t head = 0; head < sizes_.heads + 2 * sizes_.kv_heads; ++head) {
            place_head(layer, pages, t, head, qkv_ + t * all + head * sizes_.head_size);
        }
    });
}

void DecoderPass::place_head(const DecoderLayer &layer, const Pages &pages, std::int64_t t,
                             std::int64_t head, float *x) const {
    const std::int64_t key = head - sizes_.heads, value = key - sizes_.kv_heads;
    if (value >= 0) return store_head(pages.v_cache, pages, page_sizes_, t, value, x);
    if (key < 0 && layer.q_scale != 1.0f) {
        for (std::int64_t i = 0; i < sizes_.head_size; ++i) x[i] *= layer.q_scale;
    }
    const auto &norm = key < 0 ? layer.q_norm : layer.k_norm;
    if (norm) norm_row(*norm, std::nullopt, x, sizes_.head_size, x);
    const TensorView &cosines = layer.is_local ? *step_.local_cos : step_.cos;
    const TensorView &sines = layer.is_local ? *step_.local_sin : step_.sin;
    const std::int64_t rotated = cosines.shape[1];
    const std::int64_t row = step_.positions.i32()[t] * rotated;
    kernels_.rotate(cosines.f32() + row, sines.f32() + row, rotated, x);
    if (key >= 0) return store_head(pages.k_cache, pages, page_sizes_, t, key, x);
    float *const to = qkv_ + t * sizes_.qkv_floats() + head * sizes_.head_size;
    if (to != x) std::copy_n(x, sizes_.head_size, to);
}

void DecoderPass::attend_pages(const DecoderLayer &layer, const Pages &pages,
                               const TokenPacking *packing, const ProductPieces &next) {
    TensorView q{"q", qkv_, DType::f32, 3, {tokens_, sizes_.heads, sizes_.head_size}, {}};
    TensorView out = q;
    q.stride = {sizes_.qkv_floats(), sizes_.head_size, 1};
    out.data = attended_;
    out.stride = {sizes_.q_floats(), sizes_.head_size, 1};
    const Attention call{q, pages, out, layer.attention, kernels_, page_sizes_, packing, &next};
    if (!plan_ || plan_window_ != layer.attention.sliding_window) {
        plan_ = plan_attention(call, threads_);
        plan_window_ = layer.attention.sliding_window;
    }
    run_attention(call, *plan_);
}

}  // namespace gearfall::cpu
