// The inner kernels over an instruction set `Isa`, in the canonical order of cpu_isa.hpp.
//
// Included by one source file for each instruction set, behind its target pragma: everything here
// has internal linkage, so that no linker can put one file's code in the place of another's. A
// product is added by Isa::fma only, so that no compiler has a choice about rounding it.
#pragma once

#include <cstring>

#include "cpu_isa.hpp"

namespace gearfall::cpu {
namespace {

struct Bf16 {
    std::uint16_t bits;
};
struct F16 {
    std::uint16_t bits;
};

template <class W>
constexpr int kDtype = sizeof(W) == 4 ? 0 : 2;
template <>
constexpr int kDtype<Bf16> = 1;

template <class Isa>
struct Tiles {
    using Lanes = typename Isa::Lanes;
    static constexpr int kRows = Isa::kRows;
    static constexpr int kTokens = Isa::kTokens;

    template <class W, int R, int T>
    static inline __attribute__((always_inline)) void step(const W *const *rows,
                                                           std::int64_t offset, const float *x,
                                                           Lanes (&sums)[T][R]) {
        constexpr int kStep = step_elements(kDtype<W>);
        for (int part = 0; part < kStep / kLanes; ++part) {
            Lanes w[R];
            for (int r = 0; r < R; ++r) w[r] = Isa::widen(rows[r] + offset, part);
            for (int t = 0; t < T; ++t) {
                const Lanes token = Isa::load(x + t * kStep + part * kLanes);
                for (int r = 0; r < R; ++r) sums[t][r] = Isa::fma(w[r], token, sums[t][r]);
            }
        }
    }

    // R rows by T tokens; `out` takes R values for each token.
    template <class W, int R, int T>
    static void dot_tile(const W *const *rows, const float *x, std::int64_t k, float *out,
                         std::int64_t out_stride) {
        constexpr std::int64_t kStep = step_elements(kDtype<W>);
        Lanes sums[T][R];
        for (int t = 0; t < T; ++t) {
            for (int r = 0; r < R; ++r) sums[t][r] = Isa::zero();
        }
        std::int64_t offset = 0;
        for (; offset + kStep <= k; offset += kStep, x += kStep * T) {
            step<W, R, T>(rows, offset, x, sums);
        }
        if (offset < k) {
            W ends[R][kStep] = {};
            const W *end_rows[R];
            for (int r = 0; r < R; ++r) {
                std::memcpy(ends[r], rows[r] + offset, (k - offset) * sizeof(W));
                end_rows[r] = ends[r];
            }
            step<W, R, T>(end_rows, 0, x, sums);
        }
        for (int t = 0; t < T; ++t) Isa::template reduce<R>(sums[t], out + t * out_stride);
    }

    template <class W, int T>
    static void dot_tokens(const DotPanel &panel, const float *x, float *out) {
        const W *const *rows = reinterpret_cast<const W *const *>(panel.rows);
        std::int64_t row = 0;
        for (; row + kRows <= panel.row_count; row += kRows) {
            dot_tile<W, kRows, T>(rows + row, x, panel.k, out + row, panel.out_stride);
        }
        for (; row < panel.row_count; ++row) {
            dot_tile<W, 1, T>(rows + row, x, panel.k, out + row, panel.out_stride);
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
        const std::int64_t row_floats = padded(panel.k, step_elements(kDtype<W>));
        for (std::int64_t token = 0; token < panel.token_count; token += kTokens) {
            dot_at_most<W, kTokens>(panel, panel.token_count - token,
                                    panel.packed + token * row_floats,
                                    panel.out + token * panel.out_stride);
        }
    }

    static void pack(int dtype, const float *const *rows, std::int64_t tokens, std::int64_t k,
                     float *packed) {
        const std::int64_t step = step_elements(dtype);
        for (std::int64_t first = 0; first < tokens; first += kTokens) {
            const std::int64_t count = tokens - first < kTokens ? tokens - first : kTokens;
            for (std::int64_t offset = 0; offset < k; offset += step) {
                for (std::int64_t t = 0; t < count; ++t, packed += step) {
                    pack_step(step, rows[first + t] + offset, k - offset, packed);
                }
            }
        }
    }

    static void pack_step(std::int64_t step, const float *x, std::int64_t left, float *packed) {
        float end[2 * kLanes] = {};
        if (left < step) {
            std::memcpy(end, x, left * sizeof(float));
            x = end;
        }
        if (step == kLanes) {
            std::memcpy(packed, x, kLanes * sizeof(float));
            return;
        }
        for (int j = 0; j < kLanes; ++j) {
            packed[j] = x[2 * j];
            packed[kLanes + j] = x[2 * j + 1];
        }
    }

    // exp(x) for x <= 0 within 2 ulp; 0 below -87. Polynomial of the Cephes library.
    static inline Lanes exp_negative(Lanes x) {
        const Lanes shift = Isa::set(12582912.0f);  // 1.5 * 2^23: leaves an integer in the low bits
        const Lanes shifted = Isa::fma(x, Isa::set(1.44269504088896341f), shift);
        const Lanes n = Isa::sub(shifted, shift);
        Lanes r = Isa::fma(n, Isa::set(-0.693359375f), x);
        r = Isa::fma(n, Isa::set(2.12194440e-4f), r);
        Lanes p = Isa::set(1.9875691500e-4f);
        p = Isa::fma(p, r, Isa::set(1.3981999507e-3f));
        p = Isa::fma(p, r, Isa::set(8.3334519073e-3f));
        p = Isa::fma(p, r, Isa::set(4.1665795894e-2f));
        p = Isa::fma(p, r, Isa::set(1.6666665459e-1f));
        p = Isa::fma(p, r, Isa::set(5.0000001201e-1f));
        p = Isa::fma(p, Isa::mul(r, r), r);
        p = Isa::add(p, Isa::set(1.0f));
        return Isa::where_less(x, Isa::set(-87.0f), Isa::zero(), Isa::scale_by_power(p, shifted));
    }

    // cap * tanh(s / cap), by exp(-2 |s / cap|).
    static inline Lanes bounded(Lanes s, Lanes cap) {
        const Lanes y = Isa::div(s, cap);
        const Lanes size = Isa::max(y, Isa::sub(Isa::zero(), y));
        const Lanes e = exp_negative(Isa::mul(size, Isa::set(-2.0f)));
        const Lanes t = Isa::div(Isa::sub(Isa::set(1.0f), e), Isa::add(Isa::set(1.0f), e));
        const Lanes signed_t = Isa::where_less(y, Isa::zero(), Isa::sub(Isa::zero(), t), t);
        return Isa::mul(cap, signed_t);
    }

    static float softmax(float *scores, std::int64_t count, float scale, float softcap) {
        const std::int64_t whole = padded(count, kLanes);
        for (std::int64_t i = 0; i < whole; i += kLanes) {
            Lanes s = Isa::mul(Isa::load(scores + i), Isa::set(scale));
            if (softcap > 0.0f) s = bounded(s, Isa::set(softcap));
            Isa::store(scores + i, s);
        }
        for (std::int64_t i = count; i < whole; ++i) scores[i] = -__builtin_inff();
        Lanes most = Isa::load(scores);
        for (std::int64_t i = kLanes; i < whole; i += kLanes) {
            most = Isa::max(most, Isa::load(scores + i));
        }
        float lanes[kLanes];
        Isa::store(lanes, most);
        for (int j = 1; j < kLanes; ++j) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
        most = Isa::set(lanes[0]);
        Lanes sum = Isa::zero();
        for (std::int64_t i = 0; i < whole; i += kLanes) {
            const Lanes e = exp_negative(Isa::sub(Isa::load(scores + i), most));
            Isa::store(scores + i, e);
            sum = Isa::add(sum, e);
        }
        float total = 0.0f;
        Isa::template reduce<1>(&sum, &total);
        return 1.0f / total;
    }

    // Q queries by B * kLanes elements from `offset`; with B = 1, `width` elements.
    template <int Q, int B>
    static void weigh_tile(const WeighPanel &panel, std::int64_t query, std::int64_t offset,
                           std::int64_t width) {
        const float *weights = panel.weights + query * panel.weights_stride;
        float *out = panel.sums + query * panel.sums_stride + offset;
        Lanes sums[Q][B];
        for (int q = 0; q < Q; ++q) {
            for (int b = 0; b < B; ++b) {
                sums[q][b] = load_first(out + q * panel.sums_stride + b * kLanes, width);
            }
        }
        for (std::int64_t i = 0; i < panel.row_count; ++i) {
            Lanes row[B];
            for (int b = 0; b < B; ++b) {
                row[b] = load_first(panel.rows[i] + offset + b * kLanes, width);
            }
            for (int q = 0; q < Q; ++q) {
                const Lanes weight = Isa::set(weights[q * panel.weights_stride + i]);
                for (int b = 0; b < B; ++b) sums[q][b] = Isa::fma(weight, row[b], sums[q][b]);
            }
        }
        for (int q = 0; q < Q; ++q) {
            for (int b = 0; b < B; ++b) {
                store_first(out + q * panel.sums_stride + b * kLanes, sums[q][b], width);
            }
        }
    }

    template <int B>
    static void weigh_queries(const WeighPanel &panel, std::int64_t offset, std::int64_t width) {
        constexpr int kQueries = Isa::kQueries;
        std::int64_t query = 0;
        for (; query + kQueries <= panel.query_count; query += kQueries) {
            weigh_tile<kQueries, B>(panel, query, offset, width);
        }
        for (; query < panel.query_count; ++query) weigh_tile<1, B>(panel, query, offset, width);
    }

    static void weigh(const WeighPanel &panel) {
        std::int64_t offset = 0;
        for (; offset + 4 * kLanes <= panel.d; offset += 4 * kLanes) {
            weigh_queries<4>(panel, offset, kLanes);
        }
        for (; offset + 2 * kLanes <= panel.d; offset += 2 * kLanes) {
            weigh_queries<2>(panel, offset, kLanes);
        }
        for (; offset < panel.d; offset += kLanes) {
            weigh_queries<1>(panel, offset, panel.d - offset);
        }
    }

    static void rms_norm(const float *x, const float *weight, std::int64_t k, float eps,
                         float *out) {
        Lanes sum = Isa::zero();
        for (std::int64_t i = 0; i < k; i += kLanes) {
            const Lanes part = load_first(x + i, k - i);
            sum = Isa::fma(part, part, sum);
        }
        float total = 0.0f;
        Isa::template reduce<1>(&sum, &total);
        const float mean = total / static_cast<float>(k);
        const Lanes inverse = Isa::set(1.0f / __builtin_sqrtf(mean + eps));
        for (std::int64_t i = 0; i < k; i += kLanes) {
            const Lanes normed = Isa::mul(load_first(x + i, k - i), inverse);
            store_first(out + i, Isa::mul(normed, load_first(weight + i, k - i)), k - i);
        }
    }

    static void silu_mul(const float *gate, const float *up, std::int64_t k, float *out) {
        const Lanes one = Isa::set(1.0f);
        for (std::int64_t i = 0; i < k; i += kLanes) {
            const Lanes x = load_first(gate + i, k - i);
            const Lanes negated = Isa::sub(Isa::zero(), x);
            const Lanes e = exp_negative(Isa::where_less(x, negated, x, negated));
            const Lanes numerator = Isa::where_less(x, Isa::zero(), e, one);
            const Lanes sigmoid = Isa::div(numerator, Isa::add(one, e));
            const Lanes silu = Isa::mul(x, sigmoid);
            store_first(out + i, Isa::mul(silu, load_first(up + i, k - i)), k - i);
        }
    }

    static inline Lanes load_first(const float *from, std::int64_t count) {
        if (count >= kLanes) return Isa::load(from);
        float lanes[kLanes] = {};
        std::memcpy(lanes, from, count * sizeof(float));
        return Isa::load(lanes);
    }

    static inline void store_first(float *to, Lanes value, std::int64_t count) {
        if (count >= kLanes) return Isa::store(to, value);
        float lanes[kLanes];
        Isa::store(lanes, value);
        std::memcpy(to, lanes, count * sizeof(float));
    }

    static constexpr Kernels table(const char *name) {
        return {name,     kTokens,   {dot<float>, dot<Bf16>, dot<F16>}, pack,
                softmax,  weigh,     rms_norm,
                silu_mul};
    }
};

}  // namespace
}  // namespace gearfall::cpu
