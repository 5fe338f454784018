// One step through all layers: phases over the whole batch, each cut into pieces for the pool.
#include "cpu_decoder.hpp"

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <utility>

#include "cpu_attention_tile.hpp"
#include "cpu_pool.hpp"
#include "cpu_products.hpp"
#include "cpu_scratch.hpp"

namespace gearfall::cpu {

// Activations of one step, kept from step to step: fresh pages cost more than what is put there.
struct Decoder::Buffers {
    // Grows when a step needs more than any before; what was in it is lost then.
    float *reserve(std::int64_t floats) {
        if (floats > size_) {
            scratch_.emplace(floats);
            size_ = floats;
        }
        return scratch_->data();
    }

private:
    std::optional<Scratch> scratch_;
    std::int64_t size_ = 0;
};

namespace {

using Clock = std::chrono::steady_clock;

// Multiply-adds' worth of work that an element costs in the phases between products.
constexpr std::int64_t kRowWork = 256;

std::int64_t aligned(std::int64_t floats) { return padded(floats, kLanes); }

}  // namespace

// One call of run: the step's sizes, its buffers and what its phases do.
class DecoderPass {
public:
    DecoderPass(Decoder &decoder, const DecoderStep &step, const PageSizes &pages, int threads,
                const Kernels &kernels, std::vector<const DecoderAdapter *> adapters)
        : weights_(decoder.weights_),
          sizes_(decoder.sizes_),
          step_(step),
          page_sizes_(pages),
          threads_(threads),
          kernels_(kernels),
          adapters_(std::move(adapters)),
          seconds_(decoder.seconds_),
          tokens_(step.token_ids.shape[0]),
          tiles_(tokens_, kernels.tile_tokens) {
        const DecoderSizes &sizes = sizes_;
        const std::int64_t widest = std::max(sizes.width, sizes.q_floats());
        const std::int64_t parts[] = {tokens_ * sizes.width,        tokens_ * sizes.width,
                                      tokens_ * sizes.qkv_floats(), tokens_ * sizes.q_floats(),
                                      tokens_ * sizes.inner,        tokens_ * sizes.inner,
                                      tokens_ * padded(widest, 2 * kLanes),
                                      tokens_ * padded(sizes.inner, 2 * kLanes)};
        float **const places[] = {&x_,    &rows_, &qkv_,    &attended_,
                                  &gate_, &up_,   &packed_, &inner_packed_};
        std::int64_t all = 0;
        for (const std::int64_t part : parts) all += aligned(part);
        float *next = decoder.buffers_->reserve(all);
        for (int i = 0; i < 8; ++i) {
            *places[i] = next;
            next += aligned(parts[i]);
        }
    }

    void run() {
        began_ = Clock::now();
        embed();
        for (layer_ = 0; layer_ < weights_.layers.size(); ++layer_) {
            attend(weights_.layers[layer_]);
            transform(weights_.layers[layer_]);
        }
        compute_logits();
    }

private:
    void embed() {
        over_rows(sizes_.width, [&](std::int64_t t) {
            float *x = x_ + t * sizes_.width;
            const TensorView row = row_of(weights_.embedding, step_.token_ids.i32()[t]);
            for (std::int64_t i = 0; i < sizes_.width; ++i) {
                x[i] = float_at(row, i) * weights_.embedding_scale;
            }
            if (!weights_.positions) return;
            const std::int64_t place = step_.positions.i32()[t] + weights_.position_offset;
            const TensorView added = row_of(*weights_.positions, place);
            for (std::int64_t i = 0; i < sizes_.width; ++i) x[i] += float_at(added, i);
        });
    }

    static TensorView row_of(const TensorView &table, std::int64_t index) {
        TensorView row = table;
        row.data = static_cast<char *>(table.data) +
                   index * table.stride[0] * element_bytes(table.dtype);
        return row;
    }

    void attend(const DecoderLayer &layer) {
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

    // Queries, keys and values head by head, each placed by the thread that computed it.
    void project(const DecoderLayer &layer, const Pages &pages, const PackedTokens &x) {
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

    std::int64_t all_heads() const { return sizes_.heads + 2 * sizes_.kv_heads; }

    // One for each head and some tiles of tokens.
    ProductPieces head_pieces(const DecoderLayer &layer) const {
        const int useful = useful_threads(layer.q, sizes_.qkv_floats());
        const std::int64_t parts = ProductCut::tile_chunks(tiles_.count, all_heads(), useful);
        return {all_heads() * parts, useful, [this, &layer, parts](std::int64_t index) {
                    const auto [linear, head] = projection_of(layer, index / parts);
                    return rows_of(linear->weight, head * sizes_.head_size, sizes_.head_size);
                }};
    }

    // Threads that the products with `outputs` rows like a weight's pay for.
    int useful_threads(const StoredLinear &linear, std::int64_t outputs) const {
        const std::int64_t weights = outputs * linear.weight.shape[1];
        return product_threads(weights, weights * element_bytes(linear.weight.dtype), tokens_,
                               threads_);
    }

    ProductCut cut_of(const StoredLinear &linear) const {
        return {linear.outputs(), tiles_.count, useful_threads(linear, linear.outputs())};
    }

    // Of the gate and what goes with it: whole blocks.
    ProductCut inner_cut(const DecoderLayer &layer) const {
        const std::int64_t inner = layer.gate.outputs();
        const int useful = useful_threads(layer.gate, layer.up ? 2 * inner : inner);
        return {inner, tiles_.count, useful, kBlockRows};
    }

    static ProductPieces pieces_of(const StoredLinear &linear, const ProductCut &cut) {
        return {cut.pieces(), cut.threads(), [&linear, cut](std::int64_t index) {
                    const OutputPiece piece = cut.piece(index);
                    return rows_of(linear.weight, piece.first_row, piece.row_count);
                }};
    }

    // The products that follow a layer.
    ProductPieces pieces_behind() const {
        if (layer_ + 1 < weights_.layers.size()) return head_pieces(weights_.layers[layer_ + 1]);
        return {};
    }

    // The weight of one of all heads, and the place of that head in it.
    std::pair<const StoredLinear *, std::int64_t> projection_of(const DecoderLayer &layer,
                                                                std::int64_t head) const {
        if (head < sizes_.heads) return {&layer.q, head};
        head -= sizes_.heads;
        if (head < sizes_.kv_heads) return {&layer.k, head};
        return {&layer.v, head - sizes_.kv_heads};
    }

    void project_apart(const DecoderLayer &layer, const Pages &pages, const PackedTokens &x) {
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

    void transform(const DecoderLayer &layer) {
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

    // gate_ and `out` = activation(gate) * up
    void multiply_apart(const DecoderLayer &layer, const PackedTokens &x, const TokenPacking &out) {
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

    // `out` alone.
    void multiply_activated(const DecoderLayer &layer, const PackedTokens &x,
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

    void compute_logits() {
        const std::int64_t wanted = step_.logit_rows.shape[0];
        if (wanted == 0 || weights_.head.outputs() == 0) return;
        for (std::int64_t i = 0; i < wanted; ++i) {
            const float *x = x_ + step_.logit_rows.i32()[i] * sizes_.width;
            norm_row(weights_.norm, weights_.norm_bias, x, sizes_.width, rows_ + i * sizes_.width);
        }
        const TokenTiles tiles(wanted, kernels_.tile_tokens);
        for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
            pack_tile(kernels_, operand(weights_.head), rows_, sizes_.width, wanted,
                      sizes_.width, tile, packed_);
        }
        const Product product{&weights_.head.weight, weights_.head.bias_or_null(),
                              step_.logits.f32(), weights_.head.outputs()};
        multiply(&product, 1, {packed_, wanted, sizes_.width, operand(weights_.head)});
        note(Phase::head);
    }

    // Normalises and rotates one of a token's heads of queries, keys and values, at `x`, and puts
    // it in its place.
    void place_head(const DecoderLayer &layer, const Pages &pages, std::int64_t t,
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

    void attend_pages(const DecoderLayer &layer, const Pages &pages, const TokenPacking *packing,
                      const ProductPieces &next) {
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

    void norm_row(const TensorView &weight, const std::optional<TensorView> &bias, const float *x,
                  std::int64_t size, float *out) const {
        if (bias) {
            kernels_.layer_norm(x, weight.f32(), bias->f32(), size, weights_.eps, out);
        } else {
            kernels_.rms_norm(x, weight.f32(), size, weights_.eps, out);
        }
    }

    // Into `packing`, and into rows_ where something else asks for them.
    void pack_normed(const TensorView &norm, const std::optional<TensorView> &bias,
                     const TokenPacking &packing, bool has_readers) {
        over_ranges(sizes_.width, [&](std::int64_t first, std::int64_t end) {
            const Scratch near(sizes_.width);
            ask_for_reading(x_ + first * sizes_.width, x_ + end * sizes_.width);
            for (std::int64_t t = first; t < end; ++t) {
                float *const row = has_readers ? rows_ + t * sizes_.width : near.data();
                norm_row(norm, bias, x_ + t * sizes_.width, sizes_.width, row);
                packing.put(t, 0, row, sizes_.width);
            }
        });
    }

    void pack_rows(const float *rows, const TokenPacking &packing) {
        const std::int64_t k = packing.packed().k;
        over_rows(k, [&](std::int64_t t) { packing.put(t, 0, rows + t * k, k); });
    }

    Operand operand(const StoredLinear &linear) const {
        return operand_of(linear.weight, step_.is_rounded);
    }

    // Products of the same tokens, cut as if their rows were one weight's.
    void multiply(const Product *products, int count, const PackedTokens &x) {
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

    // x += norm(linear(packed tokens, which are `from`))
    void add_product(const StoredLinear &linear, Site site, const float *from,
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

    const std::optional<LowRank> &update_of(std::size_t group, Site site) const {
        return adapters_[group]->layers[layer_][static_cast<int>(site)];
    }

    bool has_update(std::initializer_list<Site> sites) const {
        for (std::size_t i = 0; i < adapters_.size(); ++i) {
            for (const Site site : sites) {
                if (update_of(i, site)) return true;
            }
        }
        return false;
    }

    // Adds to rows of `to`, a product of those of `from`, what their adapters have for it.
    void update(Site site, const float *from, std::int64_t k, float *to, std::int64_t stride) {
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

    template <class Visit>
    void over_tokens(const OutputPiece &piece, Visit visit) const {
        const std::int64_t end = tiles_.begin(piece.end_tile);
        for (std::int64_t t = tiles_.begin(piece.first_tile); t < end; ++t) visit(t);
    }

    template <class Visit>
    static void over_tokens(const NearBlock &block, Visit visit) {
        for (std::int64_t t = block.first_token; t < block.end_token; ++t) visit(t);
    }

    // Tokens in runs, as equal as they can be.
    template <class Visit>
    void over_ranges(std::int64_t floats, Visit visit) const {
        const int useful = row_threads(floats);
        const std::int64_t runs = std::min<std::int64_t>(tokens_, useful == 1 ? 1 : 2 * useful);
        parallel_for(runs, useful, [&](std::int64_t run) {
            visit(tokens_ * run / runs, tokens_ * (run + 1) / runs);
        });
    }

    template <class Visit>
    void over_rows(std::int64_t floats, Visit visit) const {
        over_ranges(floats, [&](std::int64_t first, std::int64_t end) {
            for (std::int64_t t = first; t < end; ++t) visit(t);
        });
    }

    int row_threads(std::int64_t floats) const {
        return product_threads(kRowWork * floats, 0, tokens_, threads_);
    }

    void note(Phase phase) {
        const Clock::time_point now = Clock::now();
        seconds_[static_cast<int>(phase)] += std::chrono::duration<double>(now - began_).count();
        began_ = now;
    }

    const DecoderWeights &weights_;
    const DecoderSizes &sizes_;
    const DecoderStep &step_;
    const PageSizes &page_sizes_;
    int threads_;
    const Kernels &kernels_;
    std::vector<const DecoderAdapter *> adapters_;  // of the step's groups
    std::size_t layer_ = 0;                         // under way
    std::array<double, kPhases> &seconds_;
    std::int64_t tokens_;
    TokenTiles tiles_;
    float *x_;
    float *rows_;
    float *qkv_;
    float *attended_;
    float *gate_;
    float *up_;
    float *packed_;
    float *inner_packed_;
    std::optional<AttentionPlan> plan_;
    std::int64_t plan_window_ = 0;
    Clock::time_point began_;
};

Decoder::Decoder(DecoderWeights weights)
    : weights_(std::move(weights)),
      sizes_(check_weights(weights_)),
      buffers_(std::make_unique<Buffers>()) {}

Decoder::~Decoder() = default;

void Decoder::run(const DecoderStep &step, int threads, const std::string &variant) {
    require_threads(threads);
    const Kernels &kernels = find_kernels(variant.c_str());
    const PageSizes pages = check_step(weights_, sizes_, step);
    if (step.token_ids.shape[0] == 0) return;
    const std::lock_guard<std::mutex> held(busy_);
    std::vector<const DecoderAdapter *> adapters;
    for (const AdapterTokens &group : step.adapters) {
        const auto found = adapters_.find(group.adapter);
        require(found != adapters_.end(), "a step names an adapter that is not attached");
        adapters.push_back(&found->second);
    }
    DecoderPass(*this, step, pages, threads, kernels, std::move(adapters)).run();
}

void Decoder::attach(std::int64_t adapter, DecoderAdapter updates) {
    check_adapter(weights_, updates);
    const std::lock_guard<std::mutex> held(busy_);
    adapters_[adapter] = std::move(updates);
}

void Decoder::detach(std::int64_t adapter) {
    const std::lock_guard<std::mutex> held(busy_);
    adapters_.erase(adapter);
}

std::array<double, kPhases> Decoder::seconds() const {
    const std::lock_guard<std::mutex> held(busy_);
    return seconds_;
}

}  // namespace gearfall::cpu
