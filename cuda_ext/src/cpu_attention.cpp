// Attention over the paged cache: exact softmax in two passes, one score row for each query.
//
// A tile is a run of tokens of one sequence under one key-value head; its queries (tokens x grouped
// heads) share the reads of keys and values. Scores come from the dot products of cpu_isa.hpp; the
// weighted sum over values runs by rising position. So a query's bits do not depend on its tile.
#include <algorithm>
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"
#include "cpu_pages.hpp"
#include "cpu_pool.hpp"
#include "cpu_scratch.hpp"

namespace gearfall::cpu {

namespace {

constexpr std::int64_t kWorkPerThread = 1 << 18;
constexpr std::int64_t kKeysAtOnce = 32;
constexpr std::int64_t kQueriesPerTile = 24;
constexpr std::int64_t kScoresPerTile = 1 << 16;

struct Tile {
    std::int64_t sequence;
    std::int64_t first_token;
    std::int64_t tokens;
    std::int64_t first_key;  // lowest position any of its tokens sees
    std::int64_t end_key;    // behind the highest
};

struct Attention {
    const TensorView &q;
    const Pages &pages;
    const TensorView &out;
    const AttentionOptions &options;
    const Kernels &kernels;
    PageSizes sizes;

    std::int64_t group() const { return q.shape[1] / sizes.heads; }
    std::int64_t end_key(std::int64_t token) const {
        return static_cast<std::int64_t>(pages.positions.i32()[token]) + 1;
    }
    std::int64_t first_key(std::int64_t token) const {
        const std::int64_t window = options.sliding_window;
        return window == 0 ? 0 : std::max<std::int64_t>(0, end_key(token) - window);
    }
};

// Tokens that lie side by side in one sequence, as many as a tile's score rows allow.
std::vector<Tile> tiles(const Attention &call) {
    std::vector<Tile> cut;
    std::int64_t room = 0;
    for (std::int64_t t = 0; t < call.q.shape[0]; ++t) {
        const std::int64_t sequence = call.pages.seq_index.i32()[t];
        const std::int64_t first = call.first_key(t);
        const std::int64_t end = call.end_key(t);
        if (room > 0 && cut.back().sequence == sequence) {
            Tile &tile = cut.back();
            ++tile.tokens;
            tile.first_key = std::min(tile.first_key, first);
            tile.end_key = std::max(tile.end_key, end);
            --room;
            continue;
        }
        cut.push_back({sequence, t, 1, first, end});
        const std::int64_t queries = std::min(kQueriesPerTile, kScoresPerTile / end);
        room = queries / call.group() - 1;
    }
    return cut;
}

// The score rows, queries and sums of one tile under one head.
class TileWork {
public:
    TileWork(const Attention &call, const Tile &tile, std::int64_t head)
        : call_(call),
          tile_(tile),
          head_(head),
          queries_(tile.tokens * call.group()),
          row_floats_(padded(tile.end_key - tile.first_key, kLanes) + kLanes),
          scores_(queries_ * row_floats_),
          packed_(queries_ * padded(call.sizes.head_size, kLanes)),
          sums_(queries_ * padded(call.sizes.head_size, kLanes)),
          inverse_(queries_) {}

    void run() {
        pack_queries();
        over_keys(call_.pages.k_cache, [&](auto first, auto count, auto rows) {
            score(first, count, rows);
        });
        for (std::int64_t i = 0; i < queries_; ++i) {
            const std::int64_t first = call_.first_key(token(i));
            inverse_[i] = call_.kernels.softmax(scores(i, first), call_.end_key(token(i)) - first,
                                                call_.options.scale, call_.options.softcap);
        }
        std::fill_n(sums_.data(), queries_ * padded(call_.sizes.head_size, kLanes), 0.0f);
        over_keys(call_.pages.v_cache, [&](auto first, auto count, auto rows) {
            weigh(first, count, rows);
        });
        finish();
    }

private:
    std::int64_t token(std::int64_t query) const {
        return tile_.first_token + query / call_.group();
    }
    std::int64_t query_head(std::int64_t query) const {
        return head_ * call_.group() + query % call_.group();
    }
    float *scores(std::int64_t query, std::int64_t position) const {
        return scores_.data() + query * row_floats_ + position - tile_.first_key;
    }
    float *sums(std::int64_t query) const {
        return sums_.data() + query * padded(call_.sizes.head_size, kLanes);
    }

    void pack_queries() {
        std::vector<const float *> rows(queries_);
        for (std::int64_t i = 0; i < queries_; ++i) {
            rows[i] = call_.q.f32() + token(i) * call_.q.stride[0] +
                      query_head(i) * call_.q.stride[1];
        }
        call_.kernels.pack(0, rows.data(), queries_, call_.sizes.head_size, packed_.data());
    }

    // Calls visit(first position, count, rows) for the tile's positions in order.
    template <class Visit>
    void over_keys(const TensorView &cache, Visit visit) const {
        const float *rows[kKeysAtOnce];
        for (std::int64_t first = tile_.first_key; first < tile_.end_key; first += kKeysAtOnce) {
            const std::int64_t count = std::min(kKeysAtOnce, tile_.end_key - first);
            for (std::int64_t j = 0; j < count; ++j) {
                rows[j] = cache.f32() + head_ * call_.sizes.head_size +
                          position_offset(call_.pages, call_.sizes, tile_.sequence, first + j);
            }
            visit(first, count, static_cast<const float *const *>(rows));
        }
    }

    void score(std::int64_t first, std::int64_t count, const float *const *rows) {
        call_.kernels.dot[0]({reinterpret_cast<const void *const *>(rows), count, packed_.data(),
                              queries_, call_.sizes.head_size, scores(0, first), row_floats_});
    }

    void weigh(std::int64_t first, std::int64_t count, const float *const *rows) {
        for (std::int64_t i = 0; i < queries_; ++i) {
            const std::int64_t begin = std::max(first, call_.first_key(token(i)));
            const std::int64_t end = std::min(first + count, call_.end_key(token(i)));
            if (begin >= end) continue;
            call_.kernels.weigh(sums(i), scores(i, begin), rows + (begin - first), end - begin,
                                call_.sizes.head_size);
        }
    }

    void finish() {
        const std::int64_t size = call_.sizes.head_size;
        for (std::int64_t i = 0; i < queries_; ++i) {
            float *out = call_.out.f32() + (token(i) * call_.q.shape[1] + query_head(i)) * size;
            for (std::int64_t d = 0; d < size; ++d) out[d] = sums(i)[d] * inverse_[i];
        }
    }

    const Attention &call_;
    const Tile &tile_;
    std::int64_t head_;
    std::int64_t queries_;
    std::int64_t row_floats_;
    Scratch scores_;
    Scratch packed_;
    Scratch sums_;
    std::vector<float> inverse_;
};

void check_options(const AttentionOptions &options) {
    require(options.scale > 0.0f, "scale must be above 0");
    require(options.sliding_window >= 0, "sliding_window must not be negative");
    require(options.softcap >= 0.0f, "softcap must not be negative");
}

}  // namespace

void paged_attention(const TensorView &q, const Pages &pages, const TensorView &out,
                     const AttentionOptions &options, int threads, const std::string &variant) {
    require_threads(threads);
    check_options(options);
    require_rows(q, 3);
    require_dtype(q, DType::f32);
    const PageSizes sizes = check_pages(pages, q.shape[0], options.sliding_window);
    require_size(q, 2, sizes.head_size);
    require(q.shape[1] >= sizes.heads && q.shape[1] % sizes.heads == 0,
            "q must have a multiple of the cache's heads");
    require_dense(out, 3, DType::f32);
    for (int i = 0; i < 3; ++i) require_size(out, i, q.shape[i]);
    const Attention call{q, pages, out, options, find_kernels(variant.c_str()), sizes};
    const std::vector<Tile> cut = tiles(call);
    std::int64_t work = 0;
    for (const Tile &tile : cut) {
        work += tile.tokens * (tile.end_key - tile.first_key) * q.shape[1] * sizes.head_size * 2;
    }
    const int useful =
        static_cast<int>(std::min<std::int64_t>(threads, 1 + work / kWorkPerThread));
    parallel_for(static_cast<std::int64_t>(cut.size()) * sizes.heads, useful,
                 [&](std::int64_t piece) {
                     TileWork(call, cut[piece / sizes.heads], piece % sizes.heads).run();
                 });
}

}  // namespace gearfall::cpu
