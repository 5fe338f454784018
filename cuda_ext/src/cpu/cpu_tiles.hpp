// The inner kernels over an instruction set `Isa`, in the canonical order of cpu_isa.hpp.
//
// Included by one source file for each instruction set, behind its target pragma: everything here
// has internal linkage, so that no linker can put one file's code in the place of another's. It is
// built with -ffp-contract=off: where products are rounded is written here, not a compiler's choice.
#pragma once

#include <cstring>

#include "cpu_columns.hpp"
#include "cpu_dots.hpp"

namespace gearfall::cpu {
namespace {

template <class Isa>
struct Tiles : Dots<Isa> {
    using Lanes = typename Isa::Lanes;

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
        most = Isa::set(largest(most));
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
            if (query == 0 && panel.later != nullptr) {
                for (int b = 0; b < B; ++b) {
                    __builtin_prefetch(panel.later[i] + offset + b * kLanes);
                }
            }
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

    static void layer_norm(const float *x, const float *weight, const float *bias, std::int64_t k,
                           float eps, float *out) {
        const float count = static_cast<float>(k);
        Lanes sum = Isa::zero();
        for (std::int64_t i = 0; i < k; i += kLanes) sum = Isa::add(sum, load_first(x + i, k - i));
        float total = 0.0f;
        Isa::template reduce<1>(&sum, &total);
        const Lanes mean = Isa::set(total / count);
        sum = Isa::zero();
        for (std::int64_t i = 0; i < k; i += kLanes) {
            float parts[kLanes];
            Isa::store(parts, Isa::sub(load_first(x + i, k - i), mean));
            const Lanes part = load_first(parts, k - i);
            sum = Isa::fma(part, part, sum);
        }
        Isa::template reduce<1>(&sum, &total);
        const Lanes inverse = Isa::set(1.0f / __builtin_sqrtf(total / count + eps));
        for (std::int64_t i = 0; i < k; i += kLanes) {
            const Lanes normed = Isa::mul(Isa::sub(load_first(x + i, k - i), mean), inverse);
            const Lanes scaled = Isa::mul(normed, load_first(weight + i, k - i));
            store_first(out + i, Isa::add(scaled, load_first(bias + i, k - i)), k - i);
        }
    }

    // x * sigmoid(y)
    static inline Lanes gated_by(Lanes x, Lanes y) {
        const Lanes one = Isa::set(1.0f);
        const Lanes negated = Isa::sub(Isa::zero(), y);
        const Lanes e = exp_negative(Isa::where_less(y, negated, y, negated));
        const Lanes numerator = Isa::where_less(y, Isa::zero(), e, one);
        return Isa::mul(x, Isa::div(numerator, Isa::add(one, e)));
    }

    template <Activation A>
    static inline Lanes activated(Lanes x) {
        if constexpr (A == Activation::silu) return gated_by(x, x);
        if constexpr (A == Activation::relu) {
            return Isa::where_less(x, Isa::zero(), Isa::zero(), x);
        }
        // (1 + tanh(z)) / 2 = sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3)
        const Lanes cube = Isa::mul(Isa::mul(x, x), x);
        const Lanes inner = Isa::fma(cube, Isa::set(0.044715f), x);
        return gated_by(x, Isa::mul(inner, Isa::set(1.5957691216057308f)));
    }

    template <Activation A>
    static void activate_as(const float *gate, const float *up, std::int64_t k, float *out) {
        for (std::int64_t i = 0; i < k; i += kLanes) {
            Lanes x = activated<A>(load_first(gate + i, k - i));
            if (up != nullptr) x = Isa::mul(x, load_first(up + i, k - i));
            store_first(out + i, x, k - i);
        }
    }

    static void activate(Activation activation, const float *gate, const float *up, std::int64_t k,
                         float *out) {
        switch (activation) {
            case Activation::silu: return activate_as<Activation::silu>(gate, up, k, out);
            case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh>(gate, up, k, out);
            case Activation::relu: return activate_as<Activation::relu>(gate, up, k, out);
        }
    }

    static void add(const float *x, std::int64_t k, float *out) {
        for (std::int64_t i = 0; i < k; i += kLanes) {
            store_first(out + i, Isa::add(load_first(out + i, k - i), load_first(x + i, k - i)),
                        k - i);
        }
    }

    static void rotate(const float *cos, const float *sin, std::int64_t size, float *x) {
        const std::int64_t half = size / 2;
        for (std::int64_t i = 0; i < half; i += kLanes) {
            const std::int64_t width = half - i;
            const Lanes low = load_first(x + i, width);
            const Lanes high = load_first(x + half + i, width);
            const Lanes low_cos = Isa::mul(low, load_first(cos + i, width));
            const Lanes high_sin = Isa::mul(high, load_first(sin + i, width));
            const Lanes high_cos = Isa::mul(high, load_first(cos + half + i, width));
            const Lanes low_sin = Isa::mul(low, load_first(sin + half + i, width));
            store_first(x + i, Isa::sub(low_cos, high_sin), width);
            store_first(x + half + i, Isa::add(high_cos, low_sin), width);
        }
    }

    static std::int64_t summarize(const float *logits, std::int64_t count, float sharpness,
                                  float *numbers) {
        constexpr std::int64_t kBlock = 128 * kLanes;  // the largest is then looked for in one
        const Lanes lowest = Isa::set(-__builtin_inff());
        const Lanes infinite = Isa::set(__builtin_inff());
        Lanes most = lowest, second = lowest, bad = Isa::zero();
        float best = -__builtin_inff();
        std::int64_t best_block = -1;
        for (std::int64_t block = 0; block < count; block += kBlock) {
            Lanes block_most = lowest;
            const std::int64_t end = block + kBlock < count ? block + kBlock : count;
            for (std::int64_t i = block; i < end; i += kLanes) {
                const Lanes x = load_logits(logits + i, count - i);
                bad = Isa::where_less(x, infinite, bad, infinite);
                const Lanes lower = Isa::where_less(x, most, x, most);
                second = Isa::max(second, lower);
                most = Isa::max(most, x);
                block_most = Isa::max(block_most, x);
            }
            const float found = largest(block_most);
            if (found > best) {
                best = found;
                best_block = block;
            }
        }
        if (best_block < 0 || largest(bad) > 0.0f) return -1;
        std::int64_t place = best_block;
        while (logits[place] != best) ++place;
        numbers[0] = best;
        numbers[1] = runner_up(most, second, best);
        sum_powers(logits, count, best, sharpness, numbers + 2);
        return place;
    }

    // The second largest of all, given each lane's two largest.
    static inline float runner_up(Lanes most, Lanes second, float best) {
        float firsts[kLanes], seconds[kLanes];
        Isa::store(firsts, most);
        Isa::store(seconds, second);
        float found = -__builtin_inff();
        bool is_passed = false;
        for (int j = 0; j < kLanes; ++j) {
            const bool is_best = !is_passed && firsts[j] == best;
            is_passed |= is_best;
            const float candidate = is_best ? seconds[j] : firsts[j];
            found = candidate > found ? candidate : found;
        }
        return found;
    }

    static inline void sum_powers(const float *logits, std::int64_t count, float best,
                                  float sharpness, float *sums) {
        const Lanes top = Isa::set(best);
        const Lanes factor = Isa::set(sharpness);
        Lanes plain = Isa::zero(), sharpened = Isa::zero();
        for (std::int64_t i = 0; i < count; i += kLanes) {
            const Lanes below = Isa::sub(load_logits(logits + i, count - i), top);
            plain = Isa::add(plain, exp_negative(below));
            if (sharpness != 1.0f) {
                sharpened = Isa::add(sharpened, exp_negative(Isa::mul(below, factor)));
            }
        }
        Isa::template reduce<1>(&plain, sums);
        Isa::template reduce<1>(sharpness != 1.0f ? &sharpened : &plain, sums + 1);
    }

    static inline float largest(Lanes value) {
        float lanes[kLanes];
        Isa::store(lanes, value);
        for (int j = 1; j < kLanes; ++j) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
        return lanes[0];
    }

    // Beyond the end, logits are minus infinity.
    static inline Lanes load_logits(const float *from, std::int64_t count) {
        if (count >= kLanes) return Isa::load(from);
        float lanes[kLanes];
        for (int j = 0; j < kLanes; ++j) lanes[j] = j < count ? from[j] : -__builtin_inff();
        return Isa::load(lanes);
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
        using Base = Dots<Isa>;
        return {name,
                Isa::kTokens,
                Base::template kStepFloats<Rounded>,
                {Base::template dot<float>, Base::template dot<Bf16>, Base::template dot<F16>,
                 Base::template dot<Rounded>, Columns<Isa, float>::dot, Columns<Isa, Bf16>::dot,
                 Columns<Isa, F16>::dot},
                Base::dot_through,
                Base::template pack<false>,
                Base::template pack<false>,
                softmax,
                weigh,
                rms_norm,
                layer_norm,
                activate,
                add,
                rotate,
                summarize};
    }
};

}  // namespace
}  // namespace gearfall::cpu
