// One linear layer.
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"
#include "cpu_pool.hpp"
#include "cpu_products.hpp"
#include "cpu_scratch.hpp"

namespace gearfall::cpu {

namespace {

void check(const Linear &call) {
    require_rows(call.x, 2);
    require_dtype(call.x, DType::f32);
    require_weight(call.weight, call.bias);
    require(call.x.shape[1] >= 1, "x must have at least one column");
    require_size(call.weight, 1, call.x.shape[1]);
    require_dense(call.out, 2, DType::f32);
    require_size(call.out, 0, call.x.shape[0]);
    require_size(call.out, 1, call.weight.shape[0]);
}

// Rows of x that are multiplied in one way.
struct Part {
    std::int64_t first;
    std::int64_t tokens;
    Operand operand;
};

std::vector<Part> parts_of(const Linear &call) {
    const std::int64_t tokens = call.x.shape[0];
    const Operand rest = operand_of(call.weight, call.is_rounded);
    const Operand exact = operand_of(call.weight, false);
    const std::int64_t exact_rows = rest == exact ? 0 : call.exact_rows;
    std::vector<Part> parts;
    if (exact_rows > 0) parts.push_back({0, exact_rows, exact});
    if (exact_rows < tokens) parts.push_back({exact_rows, tokens - exact_rows, rest});
    return parts;
}

// Both parts' products with a chunk of rows follow on each other, so that a weight is read once.
void multiply(const Linear &call, const std::vector<Part> &parts, const Kernels &kernels,
              int useful) {
    const std::int64_t k = call.x.shape[1];
    const std::int64_t rows = call.weight.shape[0];
    const std::int64_t row_floats = padded(k, 2 * kLanes);
    const Scratch packed(call.x.shape[0] * row_floats);
    const auto floats = [&](const Part &part) { return packed.data() + part.first * row_floats; };
    for (const Part &part : parts) {
        const TokenTiles tiles(part.tokens, kernels.tile_tokens);
        const float *x = call.x.f32() + part.first * call.x.stride[0];
        parallel_for(tiles.count, product_threads(0, part.tokens * k, 0, useful),
                     [&](std::int64_t tile) {
                         pack_tile(kernels, part.operand, x, call.x.stride[0], part.tokens, k,
                                   tile, floats(part));
                     });
    }
    const auto tile_count = [&](const Part &part) {
        return TokenTiles(part.tokens, kernels.tile_tokens).count;
    };
    const bool is_one = parts.size() == 1;
    const ProductCut cut(rows, is_one ? tile_count(parts[0]) : 1, useful);
    parallel_for(cut.pieces(), useful, [&](std::int64_t index) {
        for (const Part &part : parts) {
            OutputPiece piece = cut.piece(index);
            if (!is_one) piece.end_tile = tile_count(part);
            const Product product{&call.weight, call.bias, call.out.f32() + part.first * rows,
                                  rows};
            compute_piece(kernels, product, {floats(part), part.tokens, k, part.operand}, piece);
        }
    });
}

}  // namespace

void linear(const Linear &call, int threads, const std::string &variant) {
    require_threads(threads);
    check(call);
    const Kernels &kernels = find_kernels(variant.c_str());
    const std::int64_t tokens = call.x.shape[0];
    const std::int64_t k = call.x.shape[1];
    const std::int64_t rows = call.weight.shape[0];
    require(call.exact_rows >= 0 && call.exact_rows <= tokens,
            "exact_rows must be between 0 and the rows of x");
    if (tokens == 0 || rows == 0) return;
    const std::int64_t weight_bytes = rows * k * element_bytes(call.weight.dtype);
    multiply(call, parts_of(call), kernels,
             product_threads(rows * k, weight_bytes, tokens, threads));
}

}  // namespace gearfall::cpu
