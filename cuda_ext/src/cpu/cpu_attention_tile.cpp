// Exact softmax in two passes over the cache, one score row for each query.
//
// The queries of a tile (tokens x grouped heads) share the reads of a head's keys and values, and
// all heads are served while the rows of some positions are near, because memory is read fastest in
// order. Scores are dot products of cpu_isa.hpp; the weighted sum over values runs by rising
// position. So a query's bits do not depend on its tile.
#include "cpu_attention_tile.hpp"

#include <vector>

#include "cpu_scratch.hpp"

namespace gearfall::cpu {

namespace {

// Four blocks of 16 are read side by side, each in order: streams that the hardware foresees.
constexpr std::int64_t kKeysAtOnce = 64;
// Values must be added in order. So many are near while the next ones are asked for.
constexpr std::int64_t kValuesAtOnce = 32;

// Rows of a cache (their head 0) for `count` positions from `first`, and as many to ask for
// meanwhile: those of the next positions, or at the end any.
struct Keys {
    std::int64_t first;
    std::int64_t count;
    const void *rows[kKeysAtOnce];
    const void *later[kKeysAtOnce];
};

// Goes over a tile's positions in order. Blocks are scattered over memory, so the hardware can't
// foresee the next rows; the kernels ask for them between their own.
class KeyWalk {
public:
    KeyWalk(const Attention &call, const Tile &tile, const TensorView &cache, std::int64_t at_once)
        : call_(call),
          tile_(tile),
          cache_(cache.f32()),
          at_once_(at_once),
          position_(tile.first_key) {}

    template <class Visit>
    void run(Visit visit) {
        Keys both[2];
        fill(both[0]);
        for (int now = 0; both[now].count > 0; now = 1 - now) {
            const Keys &next = both[1 - now];
            fill(both[1 - now]);
            for (std::int64_t i = 0; i < both[now].count; ++i) {
                both[now].later[i] = i < next.count ? next.rows[i] : both[now].rows[i];
            }
            visit(static_cast<const Keys &>(both[now]));
        }
    }

private:
    // Takes the next positions, none when the tile is through.
    void fill(Keys &keys) {
        keys.first = position_;
        keys.count = 0;
        while (keys.count < at_once_ && position_ < tile_.end_key) {
            const std::int64_t inside = position_ % call_.sizes.block_tokens;
            const std::int64_t count =
                std::min({call_.sizes.block_tokens - inside, at_once_ - keys.count,
                          tile_.end_key - position_});
            const float *row =
                cache_ + block_offset(call_.pages, call_.sizes, tile_.sequence, position_) +
                inside * call_.sizes.position_floats();
            for (std::int64_t i = 0; i < count; ++i, row += call_.sizes.position_floats()) {
                keys.rows[keys.count++] = row;
            }
            position_ += count;
        }
    }

    const Attention &call_;
    const Tile &tile_;
    const float *cache_;
    std::int64_t at_once_;
    std::int64_t position_;
};

// The queries, score rows and sums of one tile under one head.
class HeadWork {
public:
    static std::int64_t scratch_floats(const Attention &call, const Tile &tile) {
        const std::int64_t query = 2 * padded(call.sizes.head_size, kLanes) + row_floats(tile) + 1;
        return padded(tile.tokens * call.group() * query, kLanes);
    }

    HeadWork(const Attention &call, const Tile &tile, std::int64_t head, float *scratch)
        : call_(call),
          tile_(tile),
          head_(head),
          queries_(tile.tokens * call.group()),
          row_floats_(row_floats(tile)),
          query_floats_(padded(call.sizes.head_size, kLanes)),
          packed_(scratch),
          sums_(packed_ + queries_ * query_floats_),
          scores_(sums_ + queries_ * query_floats_),
          inverse_(scores_ + queries_ * row_floats_) {
        const float *rows[kMaxGroup];
        for (std::int64_t i = 0; i < queries_; ++i) {
            rows[i] = call.q.f32() + token(i) * call.q.stride[0] + query_head(i) * call.q.stride[1];
        }
        const TokenTiles tiles(queries_, call.kernels.tile_tokens);
        for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
            const std::int64_t first = tiles.begin(tile);
            call.kernels.pack(Operand::f32, rows + first, tiles.begin(tile + 1) - first,
                              call.sizes.head_size, packed_ + first * query_floats_);
        }
        std::fill_n(sums_, queries_ * query_floats_, 0.0f);
    }

    // The panel of this head's products with all keys.
    DotPanel panel(const Keys &keys) const {
        const TokenTiles tiles(queries_, call_.kernels.tile_tokens);
        return {keys.rows,
                keys.count,
                packed_,
                queries_,
                0,
                tiles.count,
                call_.sizes.head_size,
                scores(0, keys.first),
                row_floats_,
                head_ * call_.sizes.head_size};
    }

    void normalise() const {
        for (std::int64_t i = 0; i < queries_; ++i) {
            const std::int64_t first = call_.first_key(token(i));
            inverse_[i] = call_.kernels.softmax(scores(i, first), call_.end_key(token(i)) - first,
                                                call_.options.scale, call_.options.softcap);
        }
    }

    // Queries side by side that see the same of these keys go together.
    void weigh(const Keys &keys) const {
        const float *rows[kKeysAtOnce];
        const float *later[kKeysAtOnce];
        for (std::int64_t j = 0; j < keys.count; ++j) {
            rows[j] = own_head(keys.rows[j]);
            later[j] = own_head(keys.later[j]);
        }
        for (std::int64_t i = 0; i < queries_;) {
            const std::int64_t begin = begin_in(keys, i);
            const std::int64_t end = end_in(keys, i);
            std::int64_t next = i + 1;
            while (next < queries_ && begin_in(keys, next) == begin && end_in(keys, next) == end) {
                ++next;
            }
            if (begin < end) {
                call_.kernels.weigh({rows + (begin - keys.first), end - begin,
                                     call_.sizes.head_size, scores(i, begin), row_floats_, next - i,
                                     sums_ + i * query_floats_, query_floats_,
                                     i == 0 ? later + (begin - keys.first) : nullptr});
            }
            i = next;
        }
    }

    void finish() const {
        const std::int64_t size = call_.sizes.head_size;
        for (std::int64_t i = 0; i < queries_; ++i) {
            float *const sums = sums_ + i * query_floats_;
            float *const out =
                call_.packing != nullptr
                    ? sums
                    : call_.out.f32() + (token(i) * call_.q.shape[1] + query_head(i)) * size;
            for (std::int64_t d = 0; d < size; ++d) out[d] = sums[d] * inverse_[i];
            if (call_.packing != nullptr) {
                call_.packing->put(token(i), query_head(i) * size, out, size);
            }
        }
    }

private:
    // The softmax rounds a row up to whole lanes, wherever in the tile's keys it begins.
    static std::int64_t row_floats(const Tile &tile) {
        return padded(tile.keys(), kLanes) + kLanes;
    }

    std::int64_t token(std::int64_t query) const {
        return tile_.first_token + query / call_.group();
    }
    std::int64_t query_head(std::int64_t query) const {
        return head_ * call_.group() + query % call_.group();
    }
    const float *own_head(const void *row) const {
        return static_cast<const float *>(row) + head_ * call_.sizes.head_size;
    }
    std::int64_t begin_in(const Keys &keys, std::int64_t query) const {
        return std::max(keys.first, call_.first_key(token(query)));
    }
    std::int64_t end_in(const Keys &keys, std::int64_t query) const {
        return std::min(keys.first + keys.count, call_.end_key(token(query)));
    }
    float *scores(std::int64_t query, std::int64_t position) const {
        return scores_ + query * row_floats_ + position - tile_.first_key;
    }

    const Attention &call_;
    const Tile &tile_;
    std::int64_t head_;
    std::int64_t queries_;
    std::int64_t row_floats_;
    std::int64_t query_floats_;
    float *packed_;
    float *sums_;
    float *scores_;
    float *inverse_;
};

}  // namespace

void attend_tile(const Attention &call, const Tile &tile, std::int64_t first_head,
                 std::int64_t end_head) {
    const std::int64_t floats = HeadWork::scratch_floats(call, tile);
    const Scratch scratch((end_head - first_head) * floats);
    std::vector<HeadWork> heads;
    heads.reserve(end_head - first_head);
    for (std::int64_t head = first_head; head < end_head; ++head) {
        heads.emplace_back(call, tile, head, scratch.data() + (head - first_head) * floats);
    }
    std::vector<DotPanel> panels;
    panels.reserve(heads.size());
    KeyWalk(call, tile, call.pages.k_cache, kKeysAtOnce).run([&](const Keys &keys) {
        panels.clear();
        for (const HeadWork &head : heads) panels.push_back(head.panel(keys));
        if (panels[0].tokens <= call.kernels.tile_tokens) {
            call.kernels.dot_through(panels.data(), static_cast<std::int64_t>(panels.size()));
        } else {
            for (const DotPanel &panel : panels) call.kernels.dot[0](panel);
        }
    });
    for (const HeadWork &head : heads) head.normalise();
    KeyWalk(call, tile, call.pages.v_cache, kValuesAtOnce).run([&](const Keys &keys) {
        for (const HeadWork &head : heads) head.weigh(keys);
    });
    for (const HeadWork &head : heads) head.finish();
}

}  // namespace gearfall::cpu
