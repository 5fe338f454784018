// The inner kernels, one table for each instruction set; all tables give the same bits.
//
// Canonical order, which every table keeps: a dot product over K runs in 16 float32 partial sums by
// fused multiply-add, partial sum j taking elements j, j+16, j+32, ... (for bfloat16 weights 2j,
// 2j+1, 2j+32, ...), the end padded with zeros; then lanes i and i+8, i and i+4, i and i+2, i and
// i+1 are added. Nothing in it depends on a neighbour row, so tiles may have any shape.
//
// Weights whose columns lie side by side, not the elements of a row, are multiplied as they lie: an
// output is one float32 sum by fused multiply-add, elements 0, 1, 2, ...
//
// Rounded products take bfloat16 weights and tokens rounded to bfloat16 (nearest, ties to even):
// partial sum j takes element 2j+1, then 2j, then 2j+33, 2j+32, ..., each by a fused multiply-add
// that reads and gives zero for numbers too small for a whole exponent, which is what AVX512_BF16's
// VDPBF16PS does; the lanes are added as above.
#pragma once

#include <cstdint>

namespace gearfall::cpu {

constexpr std::int64_t kLanes = 16;

// What a product's weights are, and for `rounded` what becomes of its tokens: the first three are
// the codes of DType, with tokens in float32, the last three the same with columns side by side.
enum class Operand : int {
    f32 = 0,
    bf16 = 1,
    f16 = 2,
    rounded = 3,
    f32_columns = 4,
    bf16_columns = 5,
    f16_columns = 6
};
constexpr int kOperands = 7;
constexpr bool has_columns(Operand operand) { return operand >= Operand::f32_columns; }

// Elements of one step over K: packed rows are padded with zeros to a multiple of it.
constexpr std::int64_t step_elements(Operand operand) {
    return operand == Operand::bf16 || operand == Operand::rounded ? 2 * kLanes : kLanes;
}
constexpr std::int64_t padded(std::int64_t count, std::int64_t step) {
    return (count + step - 1) / step * step;
}

// Tokens are packed in tiles of at most `most` tokens, as equal as they can be.
struct TokenTiles {
    std::int64_t tokens;
    std::int64_t count;

    TokenTiles(std::int64_t all, std::int64_t most)
        : tokens(all), count((all + most - 1) / most) {}
    std::int64_t begin(std::int64_t tile) const { return tokens * tile / count; }
    // The tile that holds `token`.
    std::int64_t of(std::int64_t token) const { return ((token + 1) * count - 1) / tokens; }
};

// Memory that is read next.
struct MemoryRange {
    const char *begin = nullptr;
    const char *end = nullptr;
};

// Dot products over k elements of `row_count` rows and the tokens of some tiles:
// out[(token - first token of the tiles) * out_stride + row].
struct DotPanel {
    const void *const *rows;
    std::int64_t row_count;
    const float *packed;  // all tiles, by Kernels::pack for the same operand
    std::int64_t tokens;  // in all tiles
    std::int64_t first_tile;
    std::int64_t end_tile;
    std::int64_t k;
    float *out;
    std::int64_t out_stride;
    std::int64_t first_element;  // of each row that is read
    MemoryRange later = {};  // what to ask for at the panel's end
    // Of weights with columns side by side: elements from one to the next of the same output. Then
    // rows[0] alone counts, where the panel's first output begins.
    std::int64_t element_stride = 1;
};

// sums[q][0..d) += weights[q][i] * rows[i][0..d), for each query q, i in order.
struct WeighPanel {
    const float *const *rows;
    std::int64_t row_count;
    std::int64_t d;
    const float *weights;
    std::int64_t weights_stride;
    std::int64_t query_count;
    float *sums;
    std::int64_t sums_stride;
    const float *const *later;  // rows to ask for meanwhile, as many; or nullptr
};

// x * sigmoid(x); gelu by its tanh approximation; max(x, 0).
enum class Activation : int { silu = 0, gelu_tanh = 1, relu = 2 };
constexpr int kActivations = 3;

struct Kernels {
    const char *name;
    // Most tokens of one packed tile.
    std::int64_t tile_tokens;
    // Floats' worth of one token's step, packed for `rounded`; of the others as many as elements.
    std::int64_t rounded_step_floats;
    // By operand.
    void (*dot[kOperands])(const DotPanel &panel);
    // Panels of f32 over other parts of the same rows, with at most tile_tokens tokens each: all
    // panels' products with a row stand side by side in time, so that rows are read through.
    void (*dot_through)(const DotPanel *panels, std::int64_t count);
    // Copies the token rows of one tile, interleaved by step, in the order that `dot` of the same
    // table reads. Tile i of a packing begins at its first token times padded(k,
    // step_elements(operand)).
    void (*pack)(Operand operand, const float *const *rows, std::int64_t tokens, std::int64_t k,
                 float *packed);
    // Likewise, for other threads to read: past the caches where the instruction set can.
    void (*pack_away)(Operand operand, const float *const *rows, std::int64_t tokens,
                      std::int64_t k, float *packed);
    // Replaces scores[0..count) by exp(s - max), s = the score scaled and capped, and returns the
    // reciprocal of their sum. Reads and writes up to the next multiple of kLanes.
    float (*softmax)(float *scores, std::int64_t count, float scale, float softcap);
    void (*weigh)(const WeighPanel &panel);
    void (*rms_norm)(const float *x, const float *weight, std::int64_t k, float eps, float *out);
    // (x - mean) / sqrt(variance + eps) * weight + bias
    void (*layer_norm)(const float *x, const float *weight, const float *bias, std::int64_t k,
                       float eps, float *out);
    // activation(gate), times up where that is not nullptr
    void (*activate)(Activation activation, const float *gate, const float *up, std::int64_t k,
                     float *out);
    // out[i] += x[i]
    void (*add)(const float *x, std::int64_t k, float *out);
    // Rotates the pairs (x[i], x[i + size / 2]) of size elements in place:
    // x[i] * cos[i] - x[i + size / 2] * sin[i], and x[i + size / 2] * cos[i + size / 2] +
    // x[i] * sin[i + size / 2], each product rounded.
    void (*rotate)(const float *cos, const float *sin, std::int64_t size, float *x);
    // Writes the largest logit, the largest of the others (minus infinity if there is none), and
    // the sums of exp(l - largest) and exp((l - largest) * sharpness); returns the first place of
    // the largest. -1, and nothing written, where one is no number or plus infinity, or all are
    // minus infinity.
    std::int64_t (*summarize)(const float *logits, std::int64_t count, float sharpness,
                              float *numbers);
};

struct KernelTables {
    const Kernels *tables;
    int count;
    const Kernels *begin() const { return tables; }
    const Kernels *end() const { return tables + count; }
};

// The tables this machine can run, fastest first.
KernelTables all_kernels();

// The table named `variant`, the fastest for "". Throws BadArgument for one this machine lacks.
const Kernels &find_kernels(const char *variant);

}  // namespace gearfall::cpu
