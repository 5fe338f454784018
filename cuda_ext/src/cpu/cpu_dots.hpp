// Dot products of stored weight rows and packed tokens, over an instruction set `Isa`.
//
// Included like cpu_tiles.hpp, by one source file for each instruction set.
#pragma once

#include <cstring>

#include "cpu_denormals.hpp"
#include "cpu_half.hpp"
#include "cpu_isa.hpp"

namespace gearfall::cpu {
namespace {

struct Bf16 {
    std::uint16_t bits;
};
struct F16 {
    std::uint16_t bits;
};
// A bfloat16 weight whose tokens are rounded to bfloat16.
struct Rounded : Bf16 {};

template <class W>
constexpr Operand kOperand = sizeof(W) == 4 ? Operand::f32 : Operand::f16;
template <>
constexpr Operand kOperand<Bf16> = Operand::bf16;
template <>
constexpr Operand kOperand<Rounded> = Operand::rounded;

// The bits of x rounded to bfloat16, in the upper half of a float's.
static inline std::uint32_t rounded_bits(float x) {
    const std::uint32_t bits = to_bits(x);
    const std::uint32_t nearest = bits + 0x7FFF + ((bits >> 16) & 1);
    const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    return (is_nan ? bits | 0x400000 : nearest) & 0xFFFF0000;
}

// Rows that stay in a core's cache while all tiles of tokens pass over them.
struct RowBlock {
    std::int64_t first_row;
    std::int64_t end_row;
    std::int64_t lines_a_group;  // cache lines to ask for beside each group of rows
};

constexpr std::int64_t kMostNearRows = 32;

// How many rows of a weight these are.
static inline std::int64_t near_rows(std::int64_t row_bytes) {
    const std::int64_t fitting = (96 << 10) / row_bytes / 4 * 4;
    return fitting < 4 ? 4 : fitting > kMostNearRows ? kMostNearRows : fitting;
}

// The memory of the rows behind a block, asked for line by line: the panel's own, or those to come
// after it.
class AheadRows {
public:
    AheadRows(const DotPanel &panel, std::int64_t first_row, std::int64_t most,
              std::int64_t row_bytes) {
        const std::int64_t there = panel.row_count - first_row;
        if (there <= 0) {
            next_ = panel.later.begin;
            end_ = panel.later.end;
            return;
        }
        const std::int64_t count = there < most ? there : most;
        next_ = static_cast<const char *>(panel.rows[first_row]);
        end_ = static_cast<const char *>(panel.rows[first_row + count - 1]) + row_bytes;
    }

    std::int64_t lines() const { return (end_ - next_ + kLineBytes - 1) / kLineBytes; }

    inline __attribute__((always_inline)) void ask(std::int64_t lines) {
        const std::int64_t bytes = lines * kLineBytes;
        const char *const stop = end_ - next_ < bytes ? end_ : next_ + bytes;
        for (; next_ < stop; next_ += kLineBytes) __builtin_prefetch(next_, 0, 2);
    }

private:
    static constexpr std::int64_t kLineBytes = 64;
    const char *next_ = nullptr;
    const char *end_ = nullptr;
};

template <class Isa>
struct Dots {
    using Lanes = typename Isa::Lanes;
    static constexpr int kRows = Isa::kRows;
    static constexpr int kTokens = Isa::kTokens;
    template <class W>
    static constexpr bool kIsRounded = kOperand<W> == Operand::rounded;
    // Whether tokens are packed as bfloat16 pairs for an instruction that takes them.
    template <class W>
    static constexpr bool kIsPaired = kIsRounded<W> && Isa::kHasPairDot;
    // Floats' worth of one token's packed step.
    template <class W>
    static constexpr std::int64_t kStepFloats =
        kIsPaired<W> ? kLanes : step_elements(kOperand<W>);

    template <class W, int R, int T>
    static inline __attribute__((always_inline)) void step(const W *const *rows,
                                                           std::int64_t offset, const float *x,
                                                           Lanes (&sums)[T][R]) {
        if constexpr (kIsPaired<W>) {
            typename Isa::Pairs w[R];
            for (int r = 0; r < R; ++r) w[r] = Isa::pairs(rows[r] + offset);
            for (int t = 0; t < T; ++t) {
                const typename Isa::Pairs token = Isa::pairs(x + t * kLanes);
                for (int r = 0; r < R; ++r) sums[t][r] = Isa::dot_pairs(w[r], token, sums[t][r]);
            }
            return;
        }
        constexpr int kStep = step_elements(kOperand<W>);
        constexpr int kParts = kStep / kLanes;
        for (int i = 0; i < kParts; ++i) {
            const int part = kIsRounded<W> ? kParts - 1 - i : i;
            Lanes w[R];
            for (int r = 0; r < R; ++r) w[r] = Isa::widen(rows[r] + offset, part);
            for (int t = 0; t < T; ++t) {
                const Lanes token = Isa::load(x + t * kStep + part * kLanes);
                for (int r = 0; r < R; ++r) sums[t][r] = Isa::fma(w[r], token, sums[t][r]);
            }
        }
    }

    // The R rows first_row, first_row + row_step, ... by T tokens.
    template <class W, int R, int T, bool kHasEnd>
    static void dot_tile(const DotPanel &panel, std::int64_t first_row, std::int64_t row_step,
                         const float *x, float *out) {
        constexpr std::int64_t kStep = step_elements(kOperand<W>);
        const W *rows[R];
        for (int r = 0; r < R; ++r) {
            rows[r] = static_cast<const W *>(panel.rows[first_row + r * row_step]) +
                      panel.first_element;
        }
        Lanes sums[T][R];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            for (int r = 0; r < R; ++r) sums[t][r] = Isa::zero();
        }
        std::int64_t offset = 0;
        for (; offset + kStep <= panel.k; offset += kStep, x += kStepFloats<W> * T) {
            step<W, R, T>(rows, offset, x, sums);
        }
        if constexpr (kHasEnd) {
            W ends[R][kStep] = {};
            const W *end_rows[R];
            for (int r = 0; r < R; ++r) {
                std::memcpy(ends[r], rows[r] + offset, (panel.k - offset) * sizeof(W));
                end_rows[r] = ends[r];
            }
            step<W, R, T>(end_rows, 0, x, sums);
        }
        if (row_step == 1) {
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                Isa::template reduce<R>(sums[t], out + t * panel.out_stride + first_row);
            }
            return;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            float dots[R];
            Isa::template reduce<R>(sums[t], dots);
            float *const to = out + t * panel.out_stride + first_row;
            for (int r = 0; r < R; ++r) to[r * row_step] = dots[r];
        }
    }

    // All rows by the tokens of one tile. A group's rows are `part` apart, so that each of them is
    // read in order over the end of one row into the next: short rows side by side are no stream
    // that the hardware foresees. Measured on Zen 4, rows of 1152 bytes from memory: 11 against 20
    // GB/s.
    template <class W, int T, bool kHasEnd>
    static void dot_apart(const DotPanel &panel, const float *x, float *out) {
        const std::int64_t part = panel.row_count / kRows;
        for (std::int64_t row = 0; row < part; ++row) {
            dot_tile<W, kRows, T, kHasEnd>(panel, row, part, x, out);
        }
        for (std::int64_t row = part * kRows; row < panel.row_count; ++row) {
            dot_tile<W, 1, T, kHasEnd>(panel, row, 1, x, out);
        }
    }

    // Rows that stay near, from first_row to end_row, by the tokens of one of several tiles; a
    // share of the rows behind them is asked for meanwhile. The products of a token go to memory
    // together: its lines and those of other tokens may be one another's in a cache.
    template <class W, int T, bool kHasEnd>
    static void dot_near(const DotPanel &panel, const RowBlock &block, AheadRows &ahead,
                         const float *x, float *out) {
        float dots[T * kMostNearRows];
        DotPanel near = panel;
        near.rows += block.first_row;
        near.out_stride = kMostNearRows;
        const std::int64_t count = block.end_row - block.first_row;
        std::int64_t row = 0;
        for (; row + kRows <= count; row += kRows) {
            ahead.ask(block.lines_a_group);
            dot_tile<W, kRows, T, kHasEnd>(near, row, 1, x, dots);
        }
        for (; row < count; ++row) dot_tile<W, 1, T, kHasEnd>(near, row, 1, x, dots);
        for (int t = 0; t < T; ++t) {
            std::memcpy(out + t * panel.out_stride + block.first_row, dots + t * kMostNearRows,
                        count * sizeof(float));
        }
    }

    template <class W, int T>
    static void dot_tokens(const DotPanel &panel, const RowBlock *block, AheadRows *ahead,
                           const float *x, float *out) {
        const bool has_end = panel.k % step_elements(kOperand<W>) != 0;
        if (block == nullptr) {
            (has_end ? dot_apart<W, T, true> : dot_apart<W, T, false>)(panel, x, out);
        } else {
            (has_end ? dot_near<W, T, true> : dot_near<W, T, false>)(panel, *block, *ahead, x,
                                                                     out);
        }
    }

    template <class W, int T>
    static void dot_at_most(const DotPanel &panel, std::int64_t tile, const RowBlock *block,
                            AheadRows *ahead) {
        const TokenTiles tiles(panel.tokens, kTokens);
        const std::int64_t token = tiles.begin(tile);
        if constexpr (T > 1) {
            if (tiles.begin(tile + 1) - token < T) {
                return dot_at_most<W, T - 1>(panel, tile, block, ahead);
            }
        }
        const std::int64_t row_floats = padded(panel.k, step_elements(kOperand<W>));
        const std::int64_t place = token - tiles.begin(panel.first_tile);
        dot_tokens<W, T>(panel, block, ahead, panel.packed + token * row_floats,
                         panel.out + place * panel.out_stride);
    }

    template <class W>
    static void dot(const DotPanel &panel) {
        if constexpr (kIsRounded<W> && !kIsPaired<W>) {
            const DenormalsFlushed flushed;
            dot_tiles<W>(panel);
        } else {
            dot_tiles<W>(panel);
        }
    }

    template <class W>
    static void dot_tiles(const DotPanel &panel) {
        const std::int64_t tiles = panel.end_tile - panel.first_tile;
        if (tiles == 1) return dot_at_most<W, kTokens>(panel, panel.first_tile, nullptr, nullptr);
        const std::int64_t row_bytes = panel.k * sizeof(W);
        const std::int64_t near = near_rows(row_bytes);
        for (std::int64_t row = 0; row < panel.row_count; row += near) {
            const std::int64_t end = row + near < panel.row_count ? row + near : panel.row_count;
            AheadRows ahead(panel, end, near, row_bytes);
            const RowBlock block{row, end, ahead.lines() / (tiles * (near / kRows)) + 1};
            for (std::int64_t tile = panel.first_tile; tile < panel.end_tile; ++tile) {
                dot_at_most<W, kTokens>(panel, tile, &block, &ahead);
            }
        }
    }

    template <int T, bool kHasEnd>
    static void dot_through_tokens(const DotPanel *panels, std::int64_t count) {
        const std::int64_t rows = panels[0].row_count;
        const std::int64_t part = rows / kRows;
        for (std::int64_t row = 0; row < part; ++row) {
            for (std::int64_t i = 0; i < count; ++i) {
                const DotPanel &panel = panels[i];
                dot_tile<float, kRows, T, kHasEnd>(panel, row, part, panel.packed, panel.out);
            }
        }
        for (std::int64_t row = part * kRows; row < rows; ++row) {
            for (std::int64_t i = 0; i < count; ++i) {
                const DotPanel &panel = panels[i];
                dot_tile<float, 1, T, kHasEnd>(panel, row, 1, panel.packed, panel.out);
            }
        }
    }

    template <int T>
    static void dot_through_at_most(const DotPanel *panels, std::int64_t count) {
        if constexpr (T > 1) {
            if (panels[0].tokens < T) return dot_through_at_most<T - 1>(panels, count);
        }
        if (panels[0].k % kLanes != 0) return dot_through_tokens<T, true>(panels, count);
        dot_through_tokens<T, false>(panels, count);
    }

    static void dot_through(const DotPanel *panels, std::int64_t count) {
        dot_through_at_most<kTokens>(panels, count);
    }

    // kIsAway: where that is possible, past the caches.
    template <bool kIsAway>
    static void pack(Operand operand, const float *const *rows, std::int64_t tokens,
                     std::int64_t k, float *packed) {
        if (has_columns(operand)) {
            for (std::int64_t e = 0; e < k; ++e) {
                for (std::int64_t t = 0; t < tokens; ++t) *packed++ = rows[t][e];
            }
            return;
        }
        const std::int64_t step = step_elements(operand);
        const bool is_rounded = operand == Operand::rounded;
        const std::int64_t step_floats = is_rounded ? kStepFloats<Rounded> : step;
        for (std::int64_t offset = 0; offset < k; offset += step) {
            for (std::int64_t t = 0; t < tokens; ++t, packed += step_floats) {
                const float *x = rows[t] + offset;
                if (k - offset < step) {
                    float end[2 * kLanes] = {};
                    std::memcpy(end, x, (k - offset) * sizeof(float));
                    pack_step<kIsAway>(is_rounded, step, end, packed);
                } else {
                    pack_step<kIsAway>(is_rounded, step, x, packed);
                }
            }
        }
    }

    template <bool kIsAway>
    static inline void pack_step(bool is_rounded, std::int64_t step, const float *x,
                                 float *packed) {
        if (is_rounded) return pack_rounded<kIsAway>(x, packed);
        if (step == kLanes) {
            std::memcpy(packed, x, kLanes * sizeof(float));
            return;
        }
        for (int j = 0; j < kLanes; ++j) {
            packed[j] = x[2 * j];
            packed[kLanes + j] = x[2 * j + 1];
        }
    }

    template <bool kIsAway>
    static void pack_rounded(const float *x, float *packed) {
        if constexpr (kIsPaired<Rounded>) {
            Isa::template pack_pairs<kIsAway>(x, packed);
        } else {
            for (int j = 0; j < kLanes; ++j) {
                packed[j] = from_bits(rounded_bits(x[2 * j]));
                packed[kLanes + j] = from_bits(rounded_bits(x[2 * j + 1]));
            }
        }
    }
};

}  // namespace
}  // namespace gearfall::cpu
