// Weight rows go in chunks that stay in a core's cache while all tokens pass over them.
#include "cpu_products.hpp"

#include <algorithm>

namespace gearfall::cpu {

namespace {

// Work below which another thread costs more than it brings: multiply-adds, a byte of weights from
// memory counted as two.
constexpr std::int64_t kWorkPerThread = 1 << 19;
constexpr std::int64_t kChunkBytes = 256 << 10;
constexpr std::int64_t kMaxChunkRows = 512;
constexpr std::int64_t kMinChunkRows = 8;
constexpr std::int64_t kPiecesPerThread = 3;
constexpr std::int64_t kMaxTileTokens = 8;

std::int64_t chunks(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

void add_bias(const TensorView &bias, const DotPanel &panel, std::int64_t first_row,
              std::int64_t first_token, std::int64_t end_token) {
    for (std::int64_t r = 0; r < panel.row_count; ++r) {
        const float value = float_at(bias, first_row + r);
        for (std::int64_t t = first_token; t < end_token; ++t) {
            panel.out[t * panel.out_stride + r] += value;
        }
    }
}

}  // namespace

ProductCut::ProductCut(std::int64_t rows, std::int64_t row_bytes, std::int64_t tiles, int threads)
    : rows_(rows), tiles_(tiles) {
    const std::int64_t fair = chunks(rows, kPiecesPerThread * threads);
    // With one tile nothing is read twice, and nothing has to stay.
    const std::int64_t near = tiles == 1 ? kMaxChunkRows : kChunkBytes / row_bytes;
    chunk_rows_ = padded(std::min(near, fair), kMinChunkRows);
    chunk_rows_ = std::clamp(chunk_rows_, kMinChunkRows, kMaxChunkRows);
    row_chunks_ = chunks(rows, chunk_rows_);
    const std::int64_t wanted = chunks(kPiecesPerThread * threads, row_chunks_);
    chunk_tiles_ = threads == 1 ? tiles : chunks(tiles, wanted);
    tile_chunks_ = chunks(tiles, chunk_tiles_);
}

OutputPiece ProductCut::piece(std::int64_t index) const {
    const std::int64_t row = index / tile_chunks_ * chunk_rows_;
    const std::int64_t tile = index % tile_chunks_ * chunk_tiles_;
    return {row, std::min(chunk_rows_, rows_ - row), tile, std::min(tile + chunk_tiles_, tiles_)};
}

int product_threads(std::int64_t weights, std::int64_t weight_bytes, std::int64_t tokens,
                    int threads) {
    const std::int64_t work = weights * tokens + 2 * weight_bytes;
    return static_cast<int>(std::min<std::int64_t>(threads, 1 + work / kWorkPerThread));
}

std::int64_t packed_floats(Operand operand, std::int64_t tokens, std::int64_t k) {
    return tokens * padded(k, step_elements(operand));
}

void pack_tile(const Kernels &kernels, Operand operand, const float *x, std::int64_t stride,
               std::int64_t tokens, std::int64_t k, std::int64_t tile, float *packed) {
    const TokenTiles tiles(tokens, kernels.tile_tokens);
    const std::int64_t first = tiles.begin(tile);
    const std::int64_t count = tiles.begin(tile + 1) - first;
    const float *rows[kMaxTileTokens];
    for (std::int64_t t = 0; t < count; ++t) rows[t] = x + (first + t) * stride;
    kernels.pack(operand, rows, count, k, packed + packed_floats(operand, first, k));
}

void compute_piece(const Kernels &kernels, const Product &product, const PackedTokens &x,
                   const OutputPiece &piece) {
    const TensorView &weight = *product.weight;
    const std::int64_t row_bytes = weight.stride[0] * element_bytes(weight.dtype);
    const char *weights = static_cast<const char *>(weight.data) + piece.first_row * row_bytes;
    const void *rows[kMaxChunkRows];
    for (std::int64_t r = 0; r < piece.row_count; ++r) rows[r] = weights + r * row_bytes;
    const DotPanel panel{rows,
                         piece.row_count,
                         x.floats,
                         x.tokens,
                         piece.first_tile,
                         piece.end_tile,
                         x.k,
                         product.out + piece.first_row,
                         product.out_stride,
                         0};
    kernels.dot[static_cast<int>(x.operand)](panel);
    if (product.bias == nullptr) return;
    const TokenTiles tiles(x.tokens, kernels.tile_tokens);
    add_bias(*product.bias, panel, piece.first_row, tiles.begin(piece.first_tile),
             tiles.begin(piece.end_tile));
}

}  // namespace gearfall::cpu
