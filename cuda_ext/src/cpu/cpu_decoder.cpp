// Decoders, and their pass from token ids to logits: what is not attention and not products.
#include "cpu_decoder_pass.hpp"

namespace gearfall::cpu {

namespace {

std::int64_t aligned(std::int64_t floats) { return padded(floats, kLanes); }

}  // namespace

DecoderPass::DecoderPass(Decoder &decoder, const DecoderStep &step, const PageSizes &pages,
                         int threads, const Kernels &kernels,
                         std::vector<const DecoderAdapter *> adapters)
    : weights_(decoder.weights_),
      sizes_(decoder.sizes_),
      step_(step),
      page_sizes_(pages),
      threads_(threads),
      kernels_(kernels),
      adapters_(std::move(adapters)),
      seconds_(decoder.seconds_),
      tokens_(step.token_ids.shape[0]),
      tiles_(tokens_, kernels.tile_tokens) {
    const DecoderSizes &sizes = sizes_;
    const std::int64_t widest = std::max(sizes.width, sizes.q_floats());
    const std::int64_t parts[] = {tokens_ * sizes.width,        tokens_ * sizes.width,
                                  tokens_ * sizes.qkv_floats(), tokens_ * sizes.q_floats(),
                                  tokens_ * sizes.inner,        tokens_ * sizes.inner,
                                  tokens_ * padded(widest, 2 * kLanes),
                                  tokens_ * padded(sizes.inner, 2 * kLanes)};
    float **const places[] = {&x_,    &rows_, &qkv_,    &attended_,
                              &gate_, &up_,   &packed_, &inner_packed_};
    std::int64_t all = 0;
    for (const std::int64_t part : parts) all += aligned(part);
    float *next = decoder.buffers_->reserve(all);
    for (int i = 0; i < 8; ++i) {
        *places[i] = next;
        next += aligned(parts[i]);
    }
}

void DecoderPass::run() {
    began_ = Clock::now();
    embed();
    for (layer_ = 0; layer_ < weights_.layers.size(); ++layer_) {
        attend(weights_.layers[layer_]);
        transform(weights_.layers[layer_]);
    }
    compute_logits();
}

void DecoderPass::embed() {
    over_rows(sizes_.width, [&](std::int64_t t) {
        float *x = x_ + t * sizes_.width;
        const TensorView row = row_of(weights_.embedding, step_.token_ids.i32()[t]);
        for (std::int64_t i = 0; i < sizes_.width; ++i) {
            x[i] = float_at(row, i) * weights_.embedding_scale;
        }
        if (!weights_.positions) return;
        const std::int64_t place = step_.positions.i32()[t] + weights_.position_offset;
        const TensorView added = row_of(*weights_.positions, place);
        for (std::int64_t i = 0; i < sizes_.width; ++i) x[i] += float_at(added, i);
    });
}

TensorView DecoderPass::row_of(const TensorView &table, std::int64_t index) {
    TensorView row = table;
    row.data = static_cast<char *>(table.data) +
               index * table.stride[0] * element_bytes(table.dtype);
    return row;
}

void DecoderPass::compute_logits() {
    const std::int64_t wanted = step_.logit_rows.shape[0];
    if (wanted == 0 || weights_.head.outputs() == 0) return;
    for (std::int64_t i = 0; i < wanted; ++i) {
        const float *x = x_ + step_.logit_rows.i32()[i] * sizes_.width;
        norm_row(weights_.norm, weights_.norm_bias, x, sizes_.width, rows_ + i * sizes_.width);
    }
    const TokenTiles tiles(wanted, kernels_.tile_tokens);
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
        pack_tile(kernels_, operand(weights_.head), rows_, sizes_.width, wanted,
                  sizes_.width, tile, packed_);
    }
    const Product product{&weights_.head.weight, weights_.head.bias_or_null(),
                          step_.logits.f32(), weights_.head.outputs()};
    multiply(&product, 1, {packed_, wanted, sizes_.width, operand(weights_.head)});
    note(Phase::head);
}

void DecoderPass::norm_row(const TensorView &weight, const std::optional<TensorView> &bias,
                           const float *x, std::int64_t size, float *out) const {
    if (bias) {
        kernels_.layer_norm(x, weight.f32(), bias->f32(), size, weights_.eps, out);
    } else {
        kernels_.rms_norm(x, weight.f32(), size, weights_.eps, out);
    }
}

void DecoderPass::pack_normed(const TensorView &norm, const std::optional<TensorView> &bias,
                              const TokenPacking &packing, bool has_readers) {
    over_ranges(sizes_.width, [&](std::int64_t first, std::int64_t end) {
        const Scratch near(sizes_.width);
        ask_for_reading(x_ + first * sizes_.width, x_ + end * sizes_.width);
        for (std::int64_t t = first; t < end; ++t) {
            float *const row = has_readers ? rows_ + t * sizes_.width : near.data();
            norm_row(norm, bias, x_ + t * sizes_.width, sizes_.width, row);
            packing.put(t, 0, row, sizes_.width);
        }
    });
}

void DecoderPass::pack_rows(const float *rows, const TokenPacking &packing) {
    const std::int64_t k = packing.packed().k;
    over_rows(k, [&](std::int64_t t) { packing.put(t, 0, rows + t * k, k); });
}

bool DecoderPass::has_update(std::initializer_list<Site> sites) const {
    for (std::size_t i = 0; i < adapters_.size(); ++i) {
        for (const Site site : sites) {
            if (update_of(i, site)) return true;
        }
    }
    return false;
}

void DecoderPass::note(Phase phase) {
    const Clock::time_point now = Clock::now();
    seconds_[static_cast<int>(phase)] += std::chrono::duration<double>(now - began_).count();
    began_ = now;
}

Decoder::Decoder(DecoderWeights weights)
    : weights_(std::move(weights)),
      sizes_(check_weights(weights_)),
      buffers_(std::make_unique<Buffers>()) {}

Decoder::~Decoder() = default;

void Decoder::run(const DecoderStep &step, int threads, const std::string &variant) {
    require_threads(threads);
    const Kernels &kernels = find_kernels(variant.c_str());
    const PageSizes pages = check_step(weights_, sizes_, step);
    if (step.token_ids.shape[0] == 0) return;
    const std::lock_guard<std::mutex> held(busy_);
    std::vector<const DecoderAdapter *> adapters;
    for (const AdapterTokens &group : step.adapters) {
        const auto found = adapters_.find(group.adapter);
        require(found != adapters_.end(), "a step names an adapter that is not attached");
        adapters.push_back(&found->second);
    }
    DecoderPass(*this, step, pages, threads, kernels, std::move(adapters)).run();
}

void Decoder::attach(std::int64_t adapter, DecoderAdapter updates) {
    check_adapter(weights_, updates);
    const std::lock_guard<std::mutex> held(busy_);
    adapters_[adapter] = std::move(updates);
}

void Decoder::detach(std::int64_t adapter) {
    const std::lock_guard<std::mutex> held(busy_);
    adapters_.erase(adapter);
}

std::array<double, kPhases> Decoder::seconds() const {
    const std::lock_guard<std::mutex> held(busy_);
    return seconds_;
}

}  // namespace gearfall::cpu
