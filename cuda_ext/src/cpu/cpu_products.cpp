// Weight rows go to the threads in chunks, of which cpu_dots.hpp keeps a few near at a time.
#include "cpu_products.hpp"

#include <algorithm>

namespace gearfall::cpu {

namespace {

// Work below which another thread costs more than it brings: multiply-adds, a byte of weights from
// memory counted as two.
constexpr std::int64_t kWorkPerThread = 1 << 19;
constexpr std::int64_t kLineRows = 32;  // whole cache lines of weights with adjacent columns
constexpr std::int64_t kPiecesPerThread = 3;
constexpr std::int64_t kMaxTileTokens = 8;

std::int64_t chunks(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

void row_pointers(const TensorView &weight, std::int64_t first, std::int64_t count,
                  const void **rows) {
    const std::int64_t row_bytes = weight.stride[0] * element_bytes(weight.dtype);
    const char *row = static_cast<const char *>(weight.data) + first * row_bytes;
    for (std::int64_t r = 0; r < count; ++r, row += row_bytes) rows[r] = row;
}

void add_bias(const TensorView &bias, const DotPanel &panel, std::int64_t first_row,
              std::int64_t tokens) {
    for (std::int64_t r = 0; r < panel.row_count; ++r) {
        const float value = float_at(bias, first_row + r);
        for (std::int64_t t = 0; t < tokens; ++t) {
            panel.out[t * panel.out_stride + r] += value;
        }
    }
}

}  // namespace

ProductCut::ProductCut(std::int64_t rows, std::int64_t tiles, int threads, std::int64_t unit)
    : rows_(rows), tiles_(tiles), threads_(threads) {
    const std::int64_t fair = chunks(rows, kPiecesPerThread * threads);
    const std::int64_t whole = fair < kLineRows ? unit : kLineRows;
    chunk_rows_ = std::clamp(padded(fair, whole), unit, kMaxChunkRows);
    row_chunks_ = chunks(rows, chunk_rows_);
    tile_chunks_ = tile_chunks(tiles, row_chunks_, threads);
    chunk_tiles_ = chunks(tiles, tile_chunks_);
}

std::int64_t ProductCut::tile_chunks(std::int64_t tiles, std::int64_t row_chunks, int threads) {
    const std::int64_t wanted = chunks(kPiecesPerThread * threads, row_chunks);
    return threads == 1 ? 1 : chunks(tiles, chunks(tiles, wanted));
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

TokenPacking::Steps TokenPacking::steps(std::int64_t token, std::int64_t first) const {
    const TokenTiles tiles(packed_.tokens, kernels_->tile_tokens);
    const std::int64_t tile = tiles.of(token);
    const std::int64_t tokens = tiles.begin(tile + 1) - tiles.begin(tile);
    const std::int64_t inside = token - tiles.begin(tile);
    const bool is_columns = has_columns(packed_.operand);
    const std::int64_t elements = is_columns ? 1 : step_elements(packed_.operand);
    const std::int64_t floats =
        packed_.operand == Operand::rounded ? kernels_->rounded_step_floats : elements;
    float *const to = floats_ + packed_floats(packed_.operand, tiles.begin(tile), packed_.k);
    return {to + (first / elements * tokens + inside) * floats, elements, floats, tokens * floats};
}

void TokenPacking::put(std::int64_t token, std::int64_t first, const float *values,
                       std::int64_t count) const {
    const Steps steps = this->steps(token, first);
    float *to = steps.first;
    for (std::int64_t i = 0; i < count; i += steps.elements, to += steps.stride) {
        const float *const from = values + i;
        pack_(packed_.operand, &from, 1, std::min(steps.elements, count - i), to);
    }
}

namespace {

void compute(const Kernels &kernels, const Factor &factor, const PackedTokens &x,
             const OutputPiece &piece, MemoryRange later, float *out, std::int64_t stride) {
    const TensorView &weight = *factor.weight;
    const bool is_columns = has_columns(x.operand);
    const void *rows[kMaxChunkRows];
    row_pointers(weight, piece.first_row, is_columns ? 1 : piece.row_count, rows);
    const DotPanel panel{rows,
                         piece.row_count,
                         x.floats,
                         x.tokens,
                         piece.first_tile,
                         piece.end_tile,
                         x.k,
                         out,
                         stride,
                         0,
                         later,
                         is_columns ? weight.stride[1] : 1};
    kernels.dot[static_cast<int>(x.operand)](panel);
    if (factor.bias == nullptr) return;
    const TokenTiles tiles(x.tokens, kernels.tile_tokens);
    add_bias(*factor.bias, panel, piece.first_row,
             tiles.begin(piece.end_tile) - tiles.begin(piece.first_tile));
}

}  // namespace

MemoryRange rows_of(const TensorView &weight, std::int64_t first, std::int64_t count) {
    if (has_columns_adjacent(weight)) return {};
    const std::int64_t row_bytes = weight.stride[0] * element_bytes(weight.dtype);
    const char *const begin = static_cast<const char *>(weight.data) + first * row_bytes;
    const std::int64_t near = std::min(count, kBlockRows);
    return {begin, begin + (near - 1) * row_bytes + weight.shape[1] * element_bytes(weight.dtype)};
}

void compute_piece(const Kernels &kernels, const Product &product, const PackedTokens &x,
                   const OutputPiece &piece, MemoryRange after) {
    const TokenTiles tiles(x.tokens, kernels.tile_tokens);
    compute(kernels, {product.weight, product.bias}, x, piece, after,
            product.out + tiles.begin(piece.first_tile) * product.out_stride + piece.first_row,
            product.out_stride);
}

MemoryRange rows_after(const ProductPieces &now, std::int64_t piece, const ProductPieces &next) {
    const PieceRuns runs = now.runs();
    if (!runs.ends_with(piece)) {
        const MemoryRange rows = now.rows(piece + 1);
        return rows.begin == now.rows(piece).begin ? MemoryRange{} : rows;
    }
    if (next.count == 0 || runs.of(piece) >= next.runs().runs) return {};
    return next.rows(next.runs().begin(runs.of(piece)));
}

NearBlock compute_block(const Kernels &kernels, const Factor *factors, int count,
                        const PackedTokens &x, const OutputPiece &piece, std::int64_t first_row,
                        std::int64_t rows, MemoryRange after, float *values) {
    const TokenTiles tiles(x.tokens, kernels.tile_tokens);
    const std::int64_t left = piece.first_row + piece.row_count - first_row;
    const OutputPiece part{first_row, std::min(rows, left), piece.first_tile, piece.end_tile};
    NearBlock block{first_row,
                    part.row_count,
                    tiles.begin(piece.first_tile),
                    tiles.begin(piece.end_tile),
                    {},
                    rows};
    for (int i = 0; i < count; ++i) {
        block.values[i] = values + i * rows * (block.end_token - block.first_token);
        const bool is_last = i + 1 == count;
        const MemoryRange later =
            !is_last      ? rows_of(*factors[i + 1].weight, first_row, part.row_count)
            : left > rows ? rows_of(*factors[0].weight, first_row + rows, left - rows)
                          : after;
        compute(kernels, factors[i], x, part, later, block.values[i], rows);
    }
    return block;
}

}  // namespace gearfall::cpu
