// Where the tokens of a step lie in the paged cache, checked.
#pragma once

#include <cstdint>

#include "cpu_kernels.hpp"

namespace gearfall::cpu {

// Sizes of a paged cache whose arguments were found sound.
struct PageSizes {
    std::int64_t num_blocks;
    std::int64_t block_tokens;
    std::int64_t heads;
    std::int64_t head_size;
    std::int64_t max_blocks;  // row length of the block tables

    std::int64_t position_floats() const { return heads * head_size; }
};

// Checks shapes and every index that a step over `tokens` tokens follows: token t reads the
// positions of its sequence from max(0, positions[t] + 1 - window) (window 0: from 0) to
// positions[t]. With `window` 1 only the token's own position is looked at.
PageSizes check_pages(const Pages &pages, std::int64_t tokens, std::int64_t window);

// Copies the keys and values of one token, [heads, head_size] heads `k_stride` and
// `v_stride` floats apart, to its place in the cache.
void store_token(const Pages &pages, const PageSizes &sizes, std::int64_t token, const float *k,
                 std::int64_t k_stride, const float *v, std::int64_t v_stride);

// Copies one head's keys or values of one token to its place in `cache`, one of the pages'.
void store_head(const TensorView &cache, const Pages &pages, const PageSizes &sizes,
                std::int64_t token, std::int64_t head, const float *values);

// Floats from the start of a cache to the block that holds `position` of sequence `sequence`.
inline std::int64_t block_offset(const Pages &pages, const PageSizes &sizes, std::int64_t sequence,
                                 std::int64_t position) {
    const std::int64_t block = position / sizes.block_tokens;
    const std::int64_t id = pages.block_tables.i32()[sequence * sizes.max_blocks + block];
    return id * sizes.block_tokens * sizes.position_floats();
}

}  // namespace gearfall::cpu
