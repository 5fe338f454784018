// Attention over the paged cache, cut into tiles of queries for the pool.
#include <algorithm>
#include <vector>

#include "cpu_attention_tile.hpp"
#include "cpu_kernels.hpp"
#include "cpu_pool.hpp"

namespace gearfall::cpu {

namespace {

// Multiply-adds below which another thread costs more than it brings.
constexpr std::int64_t kWorkPerThread = 1 << 18;
constexpr std::int64_t kPiecesPerThread = 3;
constexpr std::int64_t kQueriesPerTile = 24;
// Score rows that stay in a core's cache.
constexpr std::int64_t kScoresPerTile = 1 << 16;

PageSizes check(const TensorView &q, const Pages &pages, const TensorView &out,
                const AttentionOptions &options) {
    require_options(options);
    require_rows(q, 3);
    require_dtype(q, DType::f32);
    const PageSizes sizes = check_pages(pages, q.shape[0], options.sliding_window);
    require_size(q, 2, sizes.head_size);
    require(q.shape[1] >= sizes.heads && q.shape[1] % sizes.heads == 0,
            "q must have a multiple of the cache's heads");
    require(q.shape[1] / sizes.heads <= kMaxGroup,
            "q has more than 256 heads for one of the cache's");
    require_dense(out, 3, DType::f32);
    for (int i = 0; i < 3; ++i) require_size(out, i, q.shape[i]);
    return sizes;
}

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

// A tile's heads together as far as their score rows stay near and every thread gets its share.
std::vector<HeadRange> head_ranges(const Attention &call, const std::vector<Tile> &tiles,
                                   int threads) {
    const std::int64_t heads = call.sizes.heads;
    const std::int64_t wanted = threads == 1 ? 1 : kPiecesPerThread * threads;
    const std::int64_t share =
        std::max<std::int64_t>(1, static_cast<std::int64_t>(tiles.size()) * heads / wanted);
    std::vector<HeadRange> cut;
    for (const Tile &tile : tiles) {
        const std::int64_t scores = tile.tokens * call.group() * tile.keys();
        const std::int64_t near = std::max<std::int64_t>(1, kScoresPerTile / scores);
        const std::int64_t step = std::min({heads, share, near});
        for (std::int64_t head = 0; head < heads; head += step) {
            cut.push_back({tile, head, std::min(heads, head + step)});
        }
    }
    return cut;
}

}  // namespace

void require_options(const AttentionOptions &options) {
    require(options.scale > 0.0f, "scale must be above 0");
    require(options.sliding_window >= 0, "sliding_window must not be negative");
    require(options.softcap >= 0.0f, "softcap must not be negative");
}

AttentionPlan plan_attention(const Attention &call, int threads) {
    const std::vector<Tile> cut = tiles(call);
    std::int64_t work = 0;
    for (const Tile &tile : cut) {
        work += 2 * tile.tokens * tile.keys() * call.q.shape[1] * call.sizes.head_size;
    }
    const int useful =
        static_cast<int>(std::min<std::int64_t>(threads, 1 + work / kWorkPerThread));
    return {head_ranges(call, cut, useful), useful};
}

void run_attention(const Attention &call, const AttentionPlan &plan) {
    const ProductPieces ranges{static_cast<std::int64_t>(plan.ranges.size()), plan.threads,
                               [](std::int64_t) { return MemoryRange{}; }};
    parallel_for(ranges.count, ranges.threads, [&](std::int64_t index) {
        const HeadRange &range = plan.ranges[index];
        if (call.next != nullptr) {
            const MemoryRange after = rows_after(ranges, index, *call.next);
            ask_for_reading(after.begin, after.end);
        }
        attend_tile(call, range.tile, range.first_head, range.end_head);
    });
}

void paged_attention(const TensorView &q, const Pages &pages, const TensorView &out,
                     const AttentionOptions &options, int threads, const std::string &variant) {
    require_threads(threads);
    const PageSizes sizes = check(q, pages, out, options);
    const Attention call{q, pages, out, options, find_kernels(variant.c_str()), sizes};
    run_attention(call, plan_attention(call, threads));
}

}  // namespace gearfall::cpu
