// Products of packed tokens and stored weights, cut into pieces for the pool.
#pragma once

#include <cstdint>

#include "cpu_isa.hpp"
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

// out[t, n] = sum over k of x[t, k] * weight[n, k], plus bias[n] where there is one.
struct Product {
    const TensorView *weight;
    const TensorView *bias;  // or nullptr
    float *out;
    std::int64_t out_stride;
};

// Some outputs of a product: weight rows first_row.. and the tokens of tiles first_tile..end_tile.
struct OutputPiece {
    std::int64_t first_row;
    std::int64_t row_count;
    std::int64_t first_tile;
    std::int64_t end_tile;
};

// How a product over `rows` weight rows is cut; pieces differ in outputs, never in a sum's order.
class ProductCut {
public:
    ProductCut(std::int64_t rows, std::int64_t tiles, int threads);

    std::int64_t pieces() const { return row_chunks_ * tile_chunks_; }
    OutputPiece piece(std::int64_t index) const;

private:
    std::int64_t rows_;
    std::int64_t tiles_;
    std::int64_t chunk_rows_;
    std::int64_t row_chunks_;
    std::int64_t chunk_tiles_;
    std::int64_t tile_chunks_;
};

// Threads that a product pays for.
int product_threads(std::int64_t weights, std::int64_t weight_bytes, std::int64_t tokens,
                    int threads);

std::int64_t packed_floats(Operand operand, std::int64_t tokens, std::int64_t k);

// Packs the tokens of one tile, rows `stride` floats apart.
void pack_tile(const Kernels &kernels, Operand operand, const float *x, std::int64_t stride,
               std::int64_t tokens, std::int64_t k, std::int64_t tile, float *packed);

// `later`: a weight whose rows of the same piece are read next, or nullptr.
void compute_piece(const Kernels &kernels, const Product &product, const PackedTokens &x,
                   const OutputPiece &piece, const TensorView *later = nullptr);

}  // namespace gearfall::cpu
