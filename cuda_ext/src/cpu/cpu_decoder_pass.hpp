// One call of Decoder::run: the step's sizes, its buffers and what its phases do over the whole
// batch, each cut into pieces for the pool.
#pragma once

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <utility>

#include "cpu_attention_tile.hpp"
#include "cpu_decoder.hpp"
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

class DecoderPass {
public:
    DecoderPass(Decoder &decoder, const DecoderStep &step, const PageSizes &pages, int threads,
                const Kernels &kernels, std::vector<const DecoderAdapter *> adapters);

    void run();

private:
    using Clock = std::chrono::steady_clock;

    // Multiply-adds' worth of work that an element costs in the phases between products.
    static constexpr std::int64_t kRowWork = 256;

    void embed();

    static TensorView row_of(const TensorView &table, std::int64_t index);

    void attend(const DecoderLayer &layer);

    // Queries, keys and values head by head, each placed by the thread that computed it.
    void project(const DecoderLayer &layer, const Pages &pages, const PackedTokens &x);

    std::int64_t all_heads() const { return sizes_.heads + 2 * sizes_.kv_heads; }

    // One for each head and some tiles of tokens.
    ProductPieces head_pieces(const DecoderLayer &layer) const;

    // Threads that the products with `outputs` rows like a weight's pay for.
    int useful_threads(const StoredLinear &linear, std::int64_t outputs) const;

    ProductCut cut_of(const StoredLinear &linear) const {
        return {linear.outputs(), tiles_.count, useful_threads(linear, linear.outputs())};
    }

    // Of the gate and what goes with it: whole blocks.
    ProductCut inner_cut(const DecoderLayer &layer) const;

    static ProductPieces pieces_of(const StoredLinear &linear, const ProductCut &cut);

    // The products that follow a layer.
    ProductPieces pieces_behind() const;

    // The weight of one of all heads, and the place of that head in it.
    std::pair<const StoredLinear *, std::int64_t> projection_of(const DecoderLayer &layer,
                                                                std::int64_t head) const;

    void project_apart(const DecoderLayer &layer, const Pages &pages, const PackedTokens &x);

    void transform(const DecoderLayer &layer);

    // gate_ and `out` = activation(gate) * up
    void multiply_apart(const DecoderLayer &layer, const PackedTokens &x, const TokenPacking &out);

    // `out` alone.
    void multiply_activated(const DecoderLayer &layer, const PackedTokens &x,
                            const TokenPacking &out);

    void compute_logits();

    // Normalises and rotates one of a token's heads of queries, keys and values, at `x`, and puts
    // it in its place.
    void place_head(const DecoderLayer &layer, const Pages &pages, std::int64_t t,
                    std::int64_t head, float *x) const;

    void attend_pages(const DecoderLayer &layer, const Pages &pages, const TokenPacking *packing,
                      const ProductPieces &next);

    void norm_row(const TensorView &weight, const std::optional<TensorView> &bias, const float *x,
                  std::int64_t size, float *out) const;

    // Into `packing`, and into rows_ where something else asks for them.
    void pack_normed(const TensorView &norm, const std::optional<TensorView> &bias,
                     const TokenPacking &packing, bool has_readers);

    void pack_rows(const float *rows, const TokenPacking &packing);

    Operand operand(const StoredLinear &linear) const {
        return operand_of(linear.weight, step_.is_rounded);
    }

    // Products of the same tokens, cut as if their rows were one weight's.
    void multiply(const Product *products, int count, const PackedTokens &x);

    // x += norm(linear(packed tokens, which are `from`))
    void add_product(const StoredLinear &linear, Site site, const float *from,
                     const PackedTokens &tokens, const std::optional<TensorView> &norm,
                     const ProductPieces &next);

    const std::optional<LowRank> &update_of(std::size_t group, Site site) const {
        return adapters_[group]->layers[layer_][static_cast<int>(site)];
    }

    bool has_update(std::initializer_list<Site> sites) const;

    // Adds to rows of `to`, a product of those of `from`, what their adapters have for it.
    void update(Site site, const float *from, std::int64_t k, float *to, std::int64_t stride);

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

    void note(Phase phase);

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

}  // namespace gearfall::cpu
