// The inner kernels for any machine. Without a fused multiply-add in hardware the C library
// computes it, slowly and with the same bits.
#include "cpu_half.hpp"
#include "cpu_tiles.hpp"

namespace gearfall::cpu {
namespace {

struct Portable {
    struct Lanes {
        float v[kLanes];
    };
    static constexpr int kRows = 2;
    static constexpr int kTokens = 2;
    static constexpr int kQueries = 1;
    static constexpr bool kHasPairDot = false;

    template <class Function>
    static Lanes each(Function function) {
        Lanes out;
        for (int i = 0; i < kLanes; ++i) out.v[i] = function(i);
        return out;
    }

    static Lanes zero() { return set(0.0f); }
    static Lanes set(float value) {
        return each([&](int) { return value; });
    }
    static Lanes load(const float *from) {
        return each([&](int i) { return from[i]; });
    }
    static void store(float *to, const Lanes &value) {
        for (int i = 0; i < kLanes; ++i) to[i] = value.v[i];
    }
    static Lanes fma(const Lanes &a, const Lanes &b, const Lanes &c) {
        return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
    }
    static Lanes add(const Lanes &a, const Lanes &b) {
        return each([&](int i) { return a.v[i] + b.v[i]; });
    }
    static Lanes sub(const Lanes &a, const Lanes &b) {
        return each([&](int i) { return a.v[i] - b.v[i]; });
    }
    static Lanes mul(const Lanes &a, const Lanes &b) {
        return each([&](int i) { return a.v[i] * b.v[i]; });
    }
    static Lanes div(const Lanes &a, const Lanes &b) {
        return each([&](int i) { return a.v[i] / b.v[i]; });
    }
    static Lanes max(const Lanes &a, const Lanes &b) {
        return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static Lanes where_less(const Lanes &a, const Lanes &b, const Lanes &yes, const Lanes &no) {
        return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
    }
    static Lanes scale_by_power(const Lanes &value, const Lanes &shifted) {
        return each([&](int i) {
            return from_bits(to_bits(value.v[i]) + (to_bits(shifted.v[i]) << 23));
        });
    }

    static Lanes widen(const float *from, int) { return load(from); }
    static Lanes widen(const F16 *from, int) {
        return each([&](int i) { return widened_f16(from[i].bits); });
    }
    // Even elements for part 0, odd ones for part 1.
    static Lanes widen(const Bf16 *from, int part) {
        return each([&](int i) { return widened_bf16(from[2 * i + part].bits); });
    }

    template <int R>
    static void reduce(const Lanes *sums, float *out) {
        for (int r = 0; r < R; ++r) {
            Lanes sum = sums[r];
            for (int half = kLanes / 2; half > 0; half /= 2) {
                for (int i = 0; i < half; ++i) sum.v[i] += sum.v[i + half];
            }
            out[r] = sum.v[0];
        }
    }
};

}  // namespace

extern const Kernels kPortableKernels;
const Kernels kPortableKernels = Tiles<Portable>::table("portable");

}  // namespace gearfall::cpu
