// The forward pass of decoders over the paged cache, as one call.
//
// Every output has the bits that the single kernels give one after another: products, norms,
// attention and activations are theirs, and each sum between them is one float32 addition.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"
#include "cpu_low_rank.hpp"
#include "cpu_pages.hpp"

namespace gearfall::cpu {

struct StoredLinear {
    TensorView weight;               // [N, K]
    std::optional<TensorView> bias;  // [N]

    const TensorView *bias_or_null() const { return bias ? &*bias : nullptr; }
    std::int64_t outputs() const { return weight.shape[0]; }
};

// x += post_norm(o(attention(rotate(norm(q(a) q_scale), norm(k(a))), v(a)))), a = norm(x);
// x += post_norm(down(activation(gate(b)) * up(b))), b = norm(x). What is optional and missing is
// left out. A norm with a bias is a layer norm, one without a root mean square norm.
struct DecoderLayer {
    TensorView attention_norm;
    StoredLinear q;
    StoredLinear k;
    StoredLinear v;
    StoredLinear o;
    std::optional<TensorView> q_norm;  // of each head
    std::optional<TensorView> k_norm;
    TensorView mlp_norm;
    StoredLinear gate;
    std::optional<StoredLinear> up;
    StoredLinear down;
    TensorView k_cache;
    TensorView v_cache;
    AttentionOptions attention;
    std::optional<TensorView> attention_norm_bias;
    std::optional<TensorView> mlp_norm_bias;
    std::optional<TensorView> post_attention_norm;
    std::optional<TensorView> post_mlp_norm;
    bool is_local;  // rotated by the step's local tables
    float q_scale;
};

struct DecoderWeights {
    TensorView embedding;  // [V, K]
    std::vector<DecoderLayer> layers;
    TensorView norm;
    StoredLinear head;
    float eps;
    std::optional<TensorView> norm_bias;
    Activation activation;
    float embedding_scale;
    std::optional<TensorView> positions;  // [P, K]: row p + position_offset is added at position p
    std::int64_t position_offset;
};

// The products of a layer that an adapter may update.
enum class Site : int { q, k, v, o, gate, up, down };
constexpr int kSites = 7;

// A LoRA adapter: what it adds, by layer and site.
struct DecoderAdapter {
    std::vector<std::array<std::optional<LowRank>, kSites>> layers;
};

// Tokens of a step that run with one adapter.
struct AdapterTokens {
    std::int64_t adapter;
    TensorView tokens;  // i32[n]
};

// T tokens of S sequences side by side.
struct DecoderStep {
    TensorView token_ids;  // i32[T]
    TensorView cos;        // f32[P, R]: of position p; R elements of a head are rotated
    TensorView sin;
    TensorView block_tables;
    TensorView seq_index;
    TensorView positions;
    TensorView logit_rows;  // i32[L]: tokens whose logits are wanted
    TensorView logits;      // f32[L, N]
    std::optional<TensorView> local_cos;  // likewise, of local layers
    std::optional<TensorView> local_sin;
    bool is_rounded;        // tokens to bfloat16 before products with bfloat16 weights
    std::vector<AdapterTokens> adapters;
};

// Sizes that all layers share.
struct DecoderSizes {
    std::int64_t width;
    std::int64_t heads;
    std::int64_t kv_heads;
    std::int64_t head_size;
    std::int64_t inner;  // largest width of a layer's gate

    std::int64_t q_floats() const { return heads * head_size; }
    std::int64_t kv_floats() const { return kv_heads * head_size; }
    std::int64_t qkv_floats() const { return q_floats() + 2 * kv_floats(); }
};

enum class Phase : int { row, projection, attention, mlp, head };
constexpr int kPhases = 5;

class Decoder {
public:
    // Refuses (BadArgument) weights that don't fit each other. The caller keeps them alive.
    explicit Decoder(DecoderWeights weights);
    ~Decoder();
    Decoder(const Decoder &) = delete;
    Decoder &operator=(const Decoder &) = delete;

    // Makes steps able to name `adapter`; refuses one that does not fit. The caller keeps its
    // tensors alive until it is detached.
    void attach(std::int64_t adapter, DecoderAdapter updates);
    void detach(std::int64_t adapter);

    void run(const DecoderStep &step, int threads, const std::string &variant);
    // Seconds spent in each phase since the decoder was made.
    std::array<double, kPhases> seconds() const;

private:
    friend class DecoderPass;
    struct Buffers;

    DecoderWeights weights_;
    DecoderSizes sizes_;
    std::unique_ptr<Buffers> buffers_;
    std::map<std::int64_t, DecoderAdapter> adapters_;
    std::array<double, kPhases> seconds_{};
    mutable std::mutex busy_;  // buffers and times are one caller's at a time
};

DecoderSizes check_weights(const DecoderWeights &weights);
void check_adapter(const DecoderWeights &weights, const DecoderAdapter &adapter);
PageSizes check_step(const DecoderWeights &weights, const DecoderSizes &sizes,
                     const DecoderStep &step);

}  // namespace gearfall::cpu
