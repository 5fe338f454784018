// Weight rows go to the threads in chunks, of which cpu_dots.hpp keeps a few near at a time.
#include "cpu_products.hpp"

#include <algorithm>

namespace gearfall::cpu {

namespace {

// Work below which another thread costs more than it brings: multiply-adds, a byte of weights from
// memory counted as two.
constexpr std::int64_t kWorkPerThread = 1 << 19;
constexpr std::int64_t kMaxChunkRows = 512;
constexpr std::int64_t kMinChunkRows = 8;
constexpr std::int64_t kLineRows = 32;  // whole cache lines of weights with adjacent columns
constexpr std::int64_t kPiecesPerThread = 3;
constexpr std::int64_t kMaxTileTokens = 8;
constexpr std::int64_t kLaterRows = 32;

std::int64_t chunks(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

void row_pointers(const TensorView &weight, std::int64_t first, std::int64_t count,
                  const void **rows) {
    const std::int64_t row_bytes = weight.stride[0] * element_bytes(weight.dtype);
    const char *row = static_cast<const char *>(weight.data) + first * row_bytes;
    for (std::int64_t r = 0; r < count; ++r, row += row_bytes) rows[r] = row;
}

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

ProductCut::ProductCut(std::int64_t rows, std::int64_t tiles, int threads)
    : rows_(rows), tiles_(tiles) {
    const std::int64_t fair = chunks(rows, kPiecesPerThread * threads);
    const std::int64_t whole = fair < kLineRows ? kMinChunkRows : kLineRows;
    chunk_rows_ = std::clamp(padded(fair, whole), kMinChunkRows, kMaxChunkRows);
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
                   const OutputPiece &piece, const TensorView *later) {
    const TensorView &weight = *product.weight;
    const bool is_columns = has_columns(x.operand);
    const void *rows[kMaxChunkRows];
    row_pointers(weight, piece.first_row, is_columns ? 1 : piece.row_count, rows);
    if (is_columns) later = nullptr;
    const void *later_rows[kLaterRows];
    const std::int64_t later_count = later ? std::min(kLaterRows, piece.row_count) : 0;
    if (later) row_pointers(*later, piece.first_row, later_count, later_rows);
    const DotPanel panel{rows,
                         piece.row_count,
                         x.floats,
                         x.tokens,
                         piece.first_tile,
                         piece.end_tile,
                         x.k,
                         product.out + piece.first_row,
                         product.out_stride,
                         0,
                         later_rows,
                         later_count,
                         is_columns ? weight.stride[1] : 1};
    kernels.dot[static_cast<int>(x.operand)](panel);
    if (product.bias == nullptr) return;
    const TokenTiles tiles(x.tokens, kernels.tile_tokens);
    add_bias(*product.bias, panel, piece.first_row, tiles.begin(piece.first_tile),
             tiles.begin(piece.end_tile));
}

}  // namespace gearfall::cpu
