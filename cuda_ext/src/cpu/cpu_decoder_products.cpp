// The MLP half of a decoder's layers, and products with what goes before and behind them.
#include "cpu_decoder_pass.hpp"

namespace gearfall::cpu {

int DecoderPass::useful_threads(const StoredLinear &linear, std::int64_t outputs) const {
    const std::int64_t weights = outputs * linear.weight.shape[1];
    return product_threads(weights, weights * element_bytes(linear.weight.dtype), tokens_,
                           threads_);
}

ProductCut DecoderPass::inner_cut(const DecoderLayer &layer) const {
    const std::int64_t inner = layer.gate.outputs();
    const int useful = useful_threads(layer.gate, layer.up ? 2 * inner : inner);
    return {inner, tiles_.count, useful, kBlockRows};
}

ProductPieces DecoderPass::pieces_of(const StoredLinear &linear, const ProductCut &cut) {
    return {cut.pieces(), cut.threads(), [&linear, cut](std::int64_t index) {
                const OutputPiece piece = cut.piece(index);
                return rows_of(linear.weight, piece.first_row, piece.row_count);
            }};
}

ProductPieces DecoderPass::pieces_behind() const {
    if (layer_ + 1 < weights_.layers.size()) return head_pieces(weights_.layers[layer_ + 1]);
    return {};
}

void DecoderPass::transform(const DecoderLayer &layer) {
    const TokenPacking x(kernels_, operand(layer.gate), tokens_, sizes_.width, packed_,
                         threads_);
    const bool is_updated = has_update({Site::gate, Site::up});
    pack_normed(layer.mlp_norm, layer.mlp_norm_bias, x, is_updated);
    note(Phase::row);
    const std::int64_t inner = layer.gate.outputs();
    const TokenPacking out(kernels_, operand(layer.down), tokens_, inner, inner_packed_,
                           threads_);
    if (is_updated || has_update({Site::down})) {
        multiply_apart(layer, x.packed(), out);
    } else {
        multiply_activated(layer, x.packed(), out);
    }
    add_product(layer.down, Site::down, gate_, out.packed(), layer.post_mlp_norm,
                pieces_behind());
    note(Phase::mlp);
}

void DecoderPass::multiply_apart(const DecoderLayer &layer, const PackedTokens &x,
                                 const TokenPacking &out) {
    const std::int64_t inner = layer.gate.outputs();
    const Product gate{&layer.gate.weight, layer.gate.bias_or_null(), gate_, inner};
    multiply(&gate, 1, x);
    update(Site::gate, rows_, sizes_.width, gate_, inner);
    if (layer.up) {
        const Product up{&layer.up->weight, layer.up->bias_or_null(), up_, inner};
        multiply(&up, 1, x);
        update(Site::up, rows_, sizes_.width, up_, inner);
    }
    over_rows(inner, [&](std::int64_t t) {
        float *const row = gate_ + t * inner;
        kernels_.activate(weights_.activation, row, layer.up ? up_ + t * inner : nullptr,
                          inner, row);
        out.put(t, 0, row, inner);
    });
}

void DecoderPass::multiply_activated(const DecoderLayer &layer, const PackedTokens &x,
                                     const TokenPacking &out) {
    const int count = layer.up ? 2 : 1;
    Factor factors[2] = {{&layer.gate.weight, layer.gate.bias_or_null()}, {}};
    if (layer.up) factors[1] = {&layer.up->weight, layer.up->bias_or_null()};
    const ProductCut cut = inner_cut(layer);
    const ProductPieces pieces = pieces_of(layer.gate, cut);
    const ProductPieces next = pieces_of(layer.down, cut_of(layer.down));
    parallel_for(pieces.count, pieces.threads, [&](std::int64_t index) {
        const OutputPiece piece = cut.piece(index);
        over_blocks(kernels_, factors, count, x, piece, kBlockRows,
                    rows_after(pieces, index, next),
                    [&](const NearBlock &block) {
                        over_tokens(block, [&](std::int64_t t) {
                            float *const row = block.row(0, t);
                            kernels_.activate(weights_.activation, row,
                                              count == 2 ? block.row(1, t) : nullptr,
                                              block.row_count, row);
                            out.put(t, block.first_row, row, block.row_count);
                        });
                    });
    });
}

void DecoderPass::multiply(const Product *products, int count, const PackedTokens &x) {
    std::int64_t rows = 0;
    for (int i = 0; i < count; ++i) rows += products[i].weight->shape[0];
    const std::int64_t row_bytes = x.k * element_bytes(products[0].weight->dtype);
    const int useful = product_threads(rows * x.k, rows * row_bytes, x.tokens, threads_);
    const TokenTiles tiles(x.tokens, kernels_.tile_tokens);
    std::vector<ProductCut> cuts;
    std::int64_t pieces = 0;
    for (int i = 0; i < count; ++i) {
        cuts.emplace_back(products[i].weight->shape[0], tiles.count, useful);
        pieces += cuts.back().pieces();
    }
    parallel_for(pieces, useful, [&](std::int64_t index) {
        int i = 0;
        for (; index >= cuts[i].pieces(); ++i) index -= cuts[i].pieces();
        compute_piece(kernels_, products[i], x, cuts[i].piece(index));
    });
}

void DecoderPass::add_product(const StoredLinear &linear, Site site, const float *from,
                              const PackedTokens &tokens, const std::optional<TensorView> &norm,
                              const ProductPieces &next) {
    if (has_update({site}) || norm) {
        const Product product{&linear.weight, linear.bias_or_null(), rows_, sizes_.width};
        multiply(&product, 1, tokens);
        update(site, from, tokens.k, rows_, sizes_.width);
        over_rows(sizes_.width, [&](std::int64_t t) {
            float *const row = rows_ + t * sizes_.width;
            if (norm) norm_row(*norm, std::nullopt, row, sizes_.width, row);
            kernels_.add(row, sizes_.width, x_ + t * sizes_.width);
        });
        return;
    }
    const Factor factor{&linear.weight, linear.bias_or_null()};
    const ProductCut cut = cut_of(linear);
    const ProductPieces pieces = pieces_of(linear, cut);
    parallel_for(pieces.count, pieces.threads, [&](std::int64_t index) {
        const OutputPiece piece = cut.piece(index);
        over_tokens(piece, [&](std::int64_t t) {
            ask_for_writing(x_ + t * sizes_.width + piece.first_row, piece.row_count);
        });
        over_blocks(kernels_, &factor, 1, tokens, piece, kBlockRows,
                    rows_after(pieces, index, next),
                    [&](const NearBlock &block) {
                        over_tokens(block, [&](std::int64_t t) {
                            kernels_.add(block.row(0, t), block.row_count,
                                         x_ + t * sizes_.width + block.first_row);
                        });
                    });
    });
}

void DecoderPass::update(Site site, const float *from, std::int64_t k, float *to,
                         std::int64_t stride) {
    for (std::size_t i = 0; i < adapters_.size(); ++i) {
        const TensorView &tokens = step_.adapters[i].tokens;
        if (!update_of(i, site) || tokens.shape[0] == 0) continue;
        std::vector<UpdateRow> rows;
        for (std::int64_t n = 0; n < tokens.shape[0]; ++n) {
            const std::int64_t t = tokens.i32()[n];
            rows.push_back({from + t * k, to + t * stride});
        }
        add_low_rank(kernels_, *update_of(i, site), rows, step_.is_rounded, threads_);
    }
}

}  // namespace gearfall::cpu
