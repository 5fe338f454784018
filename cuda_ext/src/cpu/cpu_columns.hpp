// Products of packed tokens and weights [N, K] whose N elements of one k lie side by side.
//
// Included like cpu_tiles.hpp, by one source file for each instruction set.
#pragma once

#include <cstring>

#include "cpu_dots.hpp"

namespace gearfall::cpu {
namespace {

template <class Isa, class W>
struct Columns {
    using Lanes = typename Isa::Lanes;
    // Outputs whose weights are widened from one place: even and odd ones apart for bfloat16.
    static constexpr int kParts = sizeof(W) == 4 || kOperand<W> == Operand::f16 ? 1 : 2;
    static constexpr std::int64_t kOutputs = kParts * kLanes;
    static constexpr int kPlaces = kParts == 1 ? Isa::kRows : Isa::kRows / 2;
    static constexpr std::int64_t kAhead = 12;  // elements of k asked for before their turn

    // T tokens by P places of outputs. x[k * T + t].
    template <int P, int T>
    static void tile(const W *weight, std::int64_t stride, std::int64_t k, const float *x,
                     float *out, std::int64_t out_stride) {
        Lanes sums[T][P * kParts];
        for (int t = 0; t < T; ++t) {
            for (int i = 0; i < P * kParts; ++i) sums[t][i] = Isa::zero();
        }
        for (std::int64_t e = 0; e < k; ++e, weight += stride, x += T) {
            if (e + kAhead < k) {
                const char *ahead = reinterpret_cast<const char *>(weight + kAhead * stride);
                for (std::size_t byte = 0; byte < P * kOutputs * sizeof(W); byte += 64) {
                    __builtin_prefetch(ahead + byte);
                }
            }
            Lanes w[P * kParts];
            for (int p = 0; p < P; ++p) {
                for (int part = 0; part < kParts; ++part) {
                    w[p * kParts + part] = Isa::widen(weight + p * kOutputs, part);
                }
            }
            for (int t = 0; t < T; ++t) {
                const Lanes token = Isa::set(x[t]);
                for (int i = 0; i < P * kParts; ++i) {
                    sums[t][i] = Isa::fma(w[i], token, sums[t][i]);
                }
            }
        }
        for (int t = 0; t < T; ++t) {
            for (int p = 0; p < P; ++p) {
                store(sums[t] + p * kParts, out + t * out_stride + p * kOutputs);
            }
        }
    }

    static void store(const Lanes *sums, float *out) {
        if constexpr (kParts == 1) {
            Isa::store(out, sums[0]);
        } else {
            float even[kLanes], odd[kLanes];
            Isa::store(even, sums[0]);
            Isa::store(odd, sums[1]);
            for (int j = 0; j < kLanes; ++j) {
                out[2 * j] = even[j];
                out[2 * j + 1] = odd[j];
            }
        }
    }

    // The last outputs, fewer than a place has: with zeros beside them.
    template <int T>
    static void end_tile(const W *weight, std::int64_t stride, std::int64_t k, const float *x,
                         float *out, std::int64_t out_stride, std::int64_t count) {
        Lanes sums[T][kParts];
        for (int t = 0; t < T; ++t) {
            for (int i = 0; i < kParts; ++i) sums[t][i] = Isa::zero();
        }
        for (std::int64_t e = 0; e < k; ++e, weight += stride, x += T) {
            W near[kOutputs] = {};
            std::memcpy(near, weight, count * sizeof(W));
            for (int t = 0; t < T; ++t) {
                const Lanes token = Isa::set(x[t]);
                for (int i = 0; i < kParts; ++i) {
                    sums[t][i] = Isa::fma(Isa::widen(near, i), token, sums[t][i]);
                }
            }
        }
        for (int t = 0; t < T; ++t) {
            float all[kOutputs];
            store(sums[t], all);
            std::memcpy(out + t * out_stride, all, count * sizeof(float));
        }
    }

    template <int T>
    static void outputs(const DotPanel &panel, std::int64_t first, std::int64_t end, const float *x,
                        float *out) {
        const W *const weight = static_cast<const W *>(panel.rows[0]) + panel.first_element;
        const std::int64_t stride = panel.element_stride;
        std::int64_t n = first;
        for (; n + kPlaces * kOutputs <= end; n += kPlaces * kOutputs) {
            tile<kPlaces, T>(weight + n, stride, panel.k, x, out + n, panel.out_stride);
        }
        for (; n + kOutputs <= end; n += kOutputs) {
            tile<1, T>(weight + n, stride, panel.k, x, out + n, panel.out_stride);
        }
        if (n < end) {
            end_tile<T>(weight + n, stride, panel.k, x, out + n, panel.out_stride, end - n);
        }
    }

    template <int T>
    static void at_most(const DotPanel &panel, std::int64_t tile, std::int64_t first,
                        std::int64_t end) {
        const TokenTiles tiles(panel.tokens, Isa::kTokens);
        const std::int64_t token = tiles.begin(tile);
        if constexpr (T > 1) {
            if (tiles.begin(tile + 1) - token < T) return at_most<T - 1>(panel, tile, first, end);
        }
        outputs<T>(panel, first, end, panel.packed + token * padded(panel.k, kLanes),
                   panel.out + (token - tiles.begin(panel.first_tile)) * panel.out_stride);
    }

    static void dot(const DotPanel &panel) {
        constexpr std::int64_t kNear = kPlaces * kOutputs;
        for (std::int64_t first = 0; first < panel.row_count; first += kNear) {
            const std::int64_t end =
                first + kNear < panel.row_count ? first + kNear : panel.row_count;
            for (std::int64_t tile = panel.first_tile; tile < panel.end_tile; ++tile) {
                at_most<Isa::kTokens>(panel, tile, first, end);
            }
        }
    }
};

}  // namespace
}  // namespace gearfall::cpu
