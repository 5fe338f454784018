// Two thin products for some rows of a batch.
#include "cpu_low_rank.hpp"

#include "cpu_pool.hpp"
#include "cpu_products.hpp"
#include "cpu_scratch.hpp"

namespace gearfall::cpu {

namespace {

// out [tokens, N] = rows of k elements, wherever they are, by the weight.
void multiply(const Kernels &kernels, const TensorView &weight, const std::vector<const float *> &x,
              bool is_rounded, int threads, float *out) {
    const std::int64_t tokens = static_cast<std::int64_t>(x.size());
    const std::int64_t rows = weight.shape[0], k = weight.shape[1];
    const Operand operand = operand_of(weight, is_rounded);
    const Scratch packed(packed_floats(operand, tokens, k));
    const TokenTiles tiles(tokens, kernels.tile_tokens);
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
        const std::int64_t first = tiles.begin(tile);
        kernels.pack(operand, x.data() + first, tiles.begin(tile + 1) - first, k,
                     packed.data() + packed_floats(operand, first, k));
    }
    const Product product{&weight, nullptr, out, rows};
    const int useful = product_threads(rows * k, rows * k * element_bytes(weight.dtype), tokens,
                                       threads);
    const ProductCut cut(rows, tiles.count, useful);
    parallel_for(cut.pieces(), useful, [&](std::int64_t index) {
        compute_piece(kernels, product, {packed.data(), tokens, k, operand}, cut.piece(index));
    });
}

}  // namespace

void add_low_rank(const Kernels &kernels, const LowRank &update, const std::vector<UpdateRow> &rows,
                  bool is_rounded, int threads) {
    const std::int64_t rank = update.a.shape[0], outputs = update.b.shape[0];
    const std::size_t tokens = rows.size();
    const Scratch inner(tokens * rank), added(tokens * outputs);
    std::vector<const float *> x(tokens);
    for (std::size_t i = 0; i < tokens; ++i) x[i] = rows[i].x;
    multiply(kernels, update.a, x, is_rounded, threads, inner.data());
    for (std::size_t i = 0; i < tokens; ++i) x[i] = inner.data() + i * rank;
    multiply(kernels, update.b, x, is_rounded, threads, added.data());
    for (std::size_t i = 0; i < tokens; ++i) {
        const float *const from = added.data() + i * outputs;
        for (std::int64_t n = 0; n < outputs; ++n) rows[i].out[n] += from[n] * update.scale;
    }
}

void check_low_rank(const LowRank &update, std::int64_t inputs, std::int64_t outputs) {
    require_weight(update.a, nullptr);
    require_weight(update.b, nullptr);
    require(update.a.shape[0] >= 1, "a must have at least one row");
    require_size(update.a, 1, inputs);
    require_size(update.b, 0, outputs);
    require_size(update.b, 1, update.a.shape[0]);
}

}  // namespace gearfall::cpu
