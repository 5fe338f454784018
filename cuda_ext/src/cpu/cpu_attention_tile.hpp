// Attention in tiles: a run of tokens of one sequence, under some of its key-value heads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"
#include "cpu_pages.hpp"
#include "cpu_products.hpp"

namespace gearfall::cpu {

constexpr std::int64_t kMaxGroup = 256;  // query heads for each key-value head

struct Attention {
    const TensorView &q;
    const Pages &pages;
    const TensorView &out;
    const AttentionOptions &options;
    const Kernels &kernels;
    PageSizes sizes;
    const TokenPacking *packing = nullptr;  // takes what would go to `out`
    const ProductPieces *next = nullptr;    // the task that follows

    std::int64_t group() const { return q.shape[1] / sizes.heads; }
    std::int64_t end_key(std::int64_t token) const {
        return static_cast<std::int64_t>(pages.positions.i32()[token]) + 1;
    }
    std::int64_t first_key(std::int64_t token) const {
        const std::int64_t window = options.sliding_window;
        return window == 0 ? 0 : std::max<std::int64_t>(0, end_key(token) - window);
    }
};

struct Tile {
    std::int64_t sequence;
    std::int64_t first_token;
    std::int64_t tokens;
    std::int64_t first_key;  // lowest position any of its tokens sees
    std::int64_t end_key;    // behind the highest

    std::int64_t keys() const { return end_key - first_key; }
};

// Writes the tile's output under key-value heads first_head..end_head. tokens * group <= kMaxGroup.
void attend_tile(const Attention &call, const Tile &tile, std::int64_t first_head,
                 std::int64_t end_head);

struct HeadRange {
    Tile tile;
    std::int64_t first_head;
    std::int64_t end_head;
};

// How a step's attention is cut; the same for every layer with the same window.
struct AttentionPlan {
    std::vector<HeadRange> ranges;
    int threads;
};

void require_options(const AttentionOptions &options);
AttentionPlan plan_attention(const Attention &call, int threads);
void run_attention(const Attention &call, const AttentionPlan &plan);

}  // namespace gearfall::cpu
