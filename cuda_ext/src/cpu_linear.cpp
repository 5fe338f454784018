// One linear layer.
#include <algorithm>

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

}  // namespace

void linear(const Linear &call, int threads, const std::string &variant) {
    require_threads(threads);
    check(call);
    const Kernels &kernels = find_kernels(variant.c_str());
    const std::int64_t tokens = call.x.shape[0];
    const std::int64_t k = call.x.shape[1];
    const std::int64_t rows = call.weight.shape[0];
    if (tokens == 0 || rows == 0) return;
    const Operand operand = operand_of(call.weight.dtype, call.is_rounded);
    const std::int64_t row_bytes = k * element_bytes(call.weight.dtype);
    const int useful = product_threads(rows * k, rows * row_bytes, tokens, threads);
    const TokenTiles tiles(tokens, kernels.tile_tokens);
    const Scratch packed(packed_floats(operand, tokens, k));
    parallel_for(tiles.count, product_threads(0, tokens * k, 0, useful), [&](std::int64_t tile) {
        pack_tile(kernels, operand, call.x.f32(), call.x.stride[0], tokens, k, tile, packed.data());
    });
    const Product product{&call.weight, call.bias, call.out.f32(), rows};
    const PackedTokens x{packed.data(), tokens, k, operand};
    const ProductCut cut(rows, tiles.count, useful);
    parallel_for(cut.pieces(), useful, [&](std::int64_t index) {
        compute_piece(kernels, product, x, cut.piece(index));
    });
}

}  // namespace gearfall::cpu
