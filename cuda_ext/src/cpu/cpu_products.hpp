// Products of packed tokens and stored weights, cut into pieces for the pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "cpu_isa.hpp"
#include "cpu_pool.hpp"
#include "cpu_scratch.hpp"
#include "cpu_tensor.hpp"

namespace gearfall::cpu {

// How a weight is multiplied, tokens rounded to bfloat16 where they can be or not.
inline Operand operand_of(const TensorView &weight, bool is_rounded) {
    if (has_columns_adjacent(weight)) {
        return static_cast<Operand>(static_cast<int>(Operand::f32_columns) +
                                    static_cast<int>(weight.dtype));
    }
    return is_rounded && weight.dtype == DType::bf16 ? Operand::rounded
                                                     : static_cast<Operand>(weight.dtype);
}

// Token rows in the layout of Kernels::dot.
struct PackedTokens {
    const float *floats;
    std::int64_t tokens;
    std::int64_t k;
    Operand operand;
};

// Fills such a layout, part of a row by part: rows are packed by whoever computes them, so that no
// thread fetches them from another's cache only to copy them. Threads may put other parts at once.
//
// Every thread reads all of it, so each line is in all caches when it is written anew, and a store
// waits until the line is gone from them: 110 ns a line on Zen 4 between core complexes, one after
// the other. For several threads lines are therefore written past the caches.
class TokenPacking {
public:
    // `floats` begin a cache line.
    TokenPacking(const Kernels &kernels, Operand operand, std::int64_t tokens, std::int64_t k,
                 float *floats, int threads)
        : kernels_(&kernels),
          pack_(threads > 1 ? kernels.pack_away : kernels.pack),
          packed_{floats, tokens, k, operand},
          floats_(floats) {}

    const PackedTokens &packed() const { return packed_; }
    // Elements of a part that begins where another ended.
    bool fits(std::int64_t elements) const {
        return elements % step_elements(packed_.operand) == 0;
    }
    // `first` begins a step, and `count` elements end one or the row.
    void put(std::int64_t token, std::int64_t first, const float *values,
             std::int64_t count) const;

private:
    // Where the steps of a token lie from `first` on, and how far apart, in floats.
    struct Steps {
        float *first;
        std::int64_t elements;
        std::int64_t floats;
        std::int64_t stride;
    };
    Steps steps(std::int64_t token, std::int64_t first) const;

    const Kernels *kernels_;
    decltype(Kernels::pack) pack_;
    PackedTokens packed_;
    float *floats_;
};

// out[t, n] = sum over k of x[t, k] * weight[n, k], plus bias[n] where there is one.
struct Product {
    const TensorView *weight;
    const TensorView *bias;  // or nullptr
    float *out;
    std::int64_t out_stride;
};

constexpr std::int64_t kMaxChunkRows = 512;

// Some outputs of a product, at most kMaxChunkRows of a token: weight rows first_row.. and the
// tokens of tiles first_tile..end_tile.
struct OutputPiece {
    std::int64_t first_row;
    std::int64_t row_count;
    std::int64_t first_tile;
    std::int64_t end_tile;
};

// How a product over `rows` weight rows is cut; pieces differ in outputs, never in a sum's order.
class ProductCut {
public:
    // Pieces begin at multiples of `unit` rows, 8 or 32.
    ProductCut(std::int64_t rows, std::int64_t tiles, int threads, std::int64_t unit = 8);

    // Into how many parts of tiles products are cut that have `row_chunks` chunks of rows.
    static std::int64_t tile_chunks(std::int64_t tiles, std::int64_t row_chunks, int threads);

    int threads() const { return threads_; }
    std::int64_t pieces() const { return row_chunks_ * tile_chunks_; }
    OutputPiece piece(std::int64_t index) const;

private:
    std::int64_t rows_;
    std::int64_t tiles_;
    std::int64_t chunk_rows_;
    std::int64_t row_chunks_;
    std::int64_t chunk_tiles_;
    std::int64_t tile_chunks_;
    int threads_;
};

// Threads that a product pays for.
int product_threads(std::int64_t weights, std::int64_t weight_bytes, std::int64_t tokens,
                    int threads);

std::int64_t packed_floats(Operand operand, std::int64_t tokens, std::int64_t k);

// Packs the tokens of one tile, rows `stride` floats apart.
void pack_tile(const Kernels &kernels, Operand operand, const float *x, std::int64_t stride,
               std::int64_t tokens, std::int64_t k, std::int64_t tile, float *packed);

// Writes the piece's outputs. What the same thread reads `after` it is asked for at its end.
void compute_piece(const Kernels &kernels, const Product &product, const PackedTokens &x,
                   const OutputPiece &piece, MemoryRange after = {});

// A weight and its bias, which may be nullptr.
struct Factor {
    const TensorView *weight;
    const TensorView *bias;
};

constexpr std::int64_t kBlockRows = 32;  // whole steps of a product that follows

// Outputs of up to two weights of one shape, for the same rows and tokens, in memory of the
// thread's own.
struct NearBlock {
    std::int64_t first_row;
    std::int64_t row_count;
    std::int64_t first_token;
    std::int64_t end_token;
    float *values[2];  // [token - first_token, row - first_row], rows `stride` apart
    std::int64_t stride;

    float *row(int factor, std::int64_t token) const {
        return values[factor] + (token - first_token) * stride;
    }
};

NearBlock compute_block(const Kernels &kernels, const Factor *factors, int count,
                        const PackedTokens &x, const OutputPiece &piece, std::int64_t first_row,
                        std::int64_t rows, MemoryRange after, float *values);

// The first of `count` rows of a weight, no more than a block has; nothing where columns lie side
// by side.
MemoryRange rows_of(const TensorView &weight, std::int64_t first, std::int64_t count);

// The pieces of a task and the weights' rows that each reads first.
struct ProductPieces {
    std::int64_t count;
    int threads;
    std::function<MemoryRange(std::int64_t piece)> rows;

    PieceRuns runs() const { return {count, std::min<std::int64_t>(count, threads)}; }
};

// What the thread that computes `piece` reads next, if nobody helps it: rows of its next piece, or
// of its first one of the task that follows.
MemoryRange rows_after(const ProductPieces &now, std::int64_t piece, const ProductPieces &next);

// Computes a piece in blocks of `rows` rows, those of `count` weights together, and shows each to
// `visit` while it is near. A single tile of tokens reads all rows through, as one block. What the
// same thread reads `after` the piece is asked for at its end.
template <class Visit>
void over_blocks(const Kernels &kernels, const Factor *factors, int count, const PackedTokens &x,
                 const OutputPiece &piece, std::int64_t rows, MemoryRange after, Visit visit) {
    const bool is_one = piece.end_tile - piece.first_tile == 1;
    rows = is_one ? piece.row_count : std::min(rows, piece.row_count);
    const TokenTiles tiles(x.tokens, kernels.tile_tokens);
    const Scratch values(count * rows *
                         (tiles.begin(piece.end_tile) - tiles.begin(piece.first_tile)));
    const std::int64_t end = piece.first_row + piece.row_count;
    for (std::int64_t row = piece.first_row; row < end; row += rows) {
        visit(compute_block(kernels, factors, count, x, piece, row, rows, after, values.data()));
    }
}

}  // namespace gearfall::cpu
