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
    template <class W, int R, int T>
    static void dot_tile(const DotPanel &panel, std::int64_t first_row, std::int64_t row_step,
                         const float *x, float *out) {
        constexpr std::int64_t kStep = step_elements(kOperand<W>);
        const W *rows[R];
        for (int r = 0; r < R; ++r) {
            rows[r] = static_cast<const W *>(panel.rows[first_row + r * row_step]) +
                      panel.first_element;
        }
        Lanes sums[T][R];
        for (int t = 0; t < T; ++t) {
            for (int r = 0; r < R; ++r) sums[t][r] = Isa::zero();
        }
        std::int64_t offset = 0;
        for (; offset + kStep <= panel.k; offset += kStep, x += kStepFloats<W> * T) {
            step<W, R, T>(rows, offset, x, sums);
        }
        if (offset < panel.k) {
            W ends[R][kStep] = {};
            const W *end_rows[R];
            for (int r = 0; r < R; ++r) {
                std::memcpy(ends[r], rows[r] + offset, (panel.k - offset) * sizeof(W));
                end_rows[r] = ends[r];
            }
            step<W, R, T>(end_rows, 0, x, sums);
        }
        for (int t = 0; t < T; ++t) {
            float dots[R];
            Isa::template reduce<R>(sums[t], dots);
            float *to = out + t * panel.out_stride + first_row;
            for (int r = 0; r < R; ++r) to[r * row_step] = dots[r];
        }
    }

    // A tile's rows come from kRows places of the panel, so that each of them is read in order over
    // the end of one row into the next: short rows side by side are no stream that the hardware
    // foresees. Measured on Zen 4, rows of 1152 bytes from memory: 11 against 20 GB/s.
    template <class W, int T>
    static void dot_tokens(const DotPanel &panel, const float *x, float *out) {
        const std::int64_t part = panel.row_count / kRows;
        for (std::int64_t row = 0; row < part; ++row) {
            dot_tile<W, kRows, T>(panel, row, part, x, out);
        }
        for (std::int64_t row = part * kRows; row < panel.row_count; ++row) {
            dot_tile<W, 1, T>(panel, row, 1, x, out);
        }
    }

    template <class W, int T>
    static void dot_at_most(const DotPanel &panel, std::int64_t tokens, const float *x,
                            float *out) {
        if constexpr (T > 1) {
            if (tokens < T) return dot_at_most<W, T - 1>(panel, tokens, x, out);
        }
        dot_tokens<W, T>(panel, x, out);
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
        const std::int64_t row_floats = padded(panel.k, step_elements(kOperand<W>));
        const TokenTiles tiles(panel.tokens, kTokens);
        for (std::int64_t tile = panel.first_tile; tile < panel.end_tile; ++tile) {
            const std::int64_t token = tiles.begin(tile);
            dot_at_most<W, kTokens>(panel, tiles.begin(tile + 1) - token,
                                    panel.packed + token * row_floats,
                                    panel.out + token * panel.out_stride);
        }
    }

    template <int T>
    static void dot_through_tokens(const DotPanel *panels, std::int64_t count) {
        const std::int64_t rows = panels[0].row_count;
        const std::int64_t part = rows / kRows;
        for (std::int64_t row = 0; row < part; ++row) {
            for (std::int64_t i = 0; i < count; ++i) {
                dot_tile<float, kRows, T>(panels[i], row, part, panels[i].packed, panels[i].out);
            }
        }
        for (std::int64_t row = part * kRows; row < rows; ++row) {
            for (std::int64_t i = 0; i < count; ++i) {
                dot_tile<float, 1, T>(panels[i], row, 1, panels[i].packed, panels[i].out);
            }
        }
    }

    template <int T>
    static void dot_through_at_most(const DotPanel *panels, std::int64_t count) {
        if constexpr (T > 1) {
            if (panels[0].tokens < T) return dot_through_at_most<T - 1>(panels, count);
        }
        dot_through_tokens<T>(panels, count);
    }

    static void dot_through(const DotPanel *panels, std::int64_t count) {
        dot_through_at_most<kTokens>(panels, count);
    }

    static void pack(Operand operand, const float *const *rows, std::int64_t tokens,
                     std::int64_t k, float *packed) {
        const std::int64_t step = step_elements(operand);
        const bool is_rounded = operand == Operand::rounded;
        const std::int64_t step_floats = is_rounded ? kStepFloats<Rounded> : step;
        for (std::int64_t offset = 0; offset < k; offset += step) {
            for (std::int64_t t = 0; t < tokens; ++t, packed += step_floats) {
                float end[2 * kLanes] = {};
                const float *x = rows[t] + offset;
                if (k - offset < step) {
                    std::memcpy(end, x, (k - offset) * sizeof(float));
                    x = end;
                }
                if (is_rounded) {
                    pack_rounded(x, packed);
                } else {
                    pack_step(step, x, packed);
                }
            }
        }
    }

    static void pack_step(std::int64_t step, const float *x, float *packed) {
        if (step == kLanes) {
            std::memcpy(packed, x, kLanes * sizeof(float));
            return;
        }
        for (int j = 0; j < kLanes; ++j) {
            packed[j] = x[2 * j];
            packed[kLanes + j] = x[2 * j + 1];
        }
    }

    static void pack_rounded(const float *x, float *packed) {
        for (int j = 0; j < kLanes; ++j) {
            const std::uint32_t even = rounded_bits(x[2 * j]);
            const std::uint32_t odd = rounded_bits(x[2 * j + 1]);
            if constexpr (kIsPaired<Rounded>) {
                packed[j] = from_bits(odd | even >> 16);
            } else {
                packed[j] = from_bits(even);
                packed[kLanes + j] = from_bits(odd);
            }
        }
    }
};

}  // namespace
}  // namespace gearfall::cpu
