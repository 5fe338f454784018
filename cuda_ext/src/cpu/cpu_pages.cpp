// Checks of the paged cache, and the writing of a step's keys and values.
#include "cpu_pages.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace gearfall::cpu {

namespace {

// Cache positions of one sequence that a step touches; none if `last` is below `first`.
struct Span {
    std::int64_t first = std::numeric_limits<std::int64_t>::max();
    std::int64_t last = -1;
};

PageSizes check_shapes(const Pages &pages, std::int64_t tokens) {
    require_dense(pages.k_cache, 4, DType::f32);
    require_dense(pages.v_cache, 4, DType::f32);
    for (int i = 0; i < 4; ++i) require_size(pages.v_cache, i, pages.k_cache.shape[i]);
    for (int i = 1; i < 4; ++i) {
        require(pages.k_cache.shape[i] >= 1, "k_cache has an empty dimension");
    }
    require_dense(pages.block_tables, 2, DType::i32);
    for (const TensorView *tensor : {&pages.seq_index, &pages.positions}) {
        require_dense(*tensor, 1, DType::i32);
        require_size(*tensor, 0, tokens);
    }
    const auto &shape = pages.k_cache.shape;
    return {shape[0], shape[1], shape[2], shape[3], pages.block_tables.shape[1]};
}

std::vector<Span> spans(const Pages &pages, const PageSizes &sizes, std::int64_t tokens,
                        std::int64_t window) {
    const std::int64_t sequences = pages.block_tables.shape[0];
    const std::int64_t capacity = sizes.max_blocks * sizes.block_tokens;
    std::vector<Span> touched(sequences);
    for (std::int64_t t = 0; t < tokens; ++t) {
        const std::int64_t sequence = pages.seq_index.i32()[t];
        const std::int64_t position = pages.positions.i32()[t];
        if (sequence < 0 || sequence >= sequences) {
            refuse("seq_index[" + std::to_string(t) + "] is " + std::to_string(sequence) +
                   ", not one of " + std::to_string(sequences) + " sequences");
        }
        if (position < 0 || position >= capacity) {
            refuse("positions[" + std::to_string(t) + "] is " + std::to_string(position) +
                   ", outside a block table of " + std::to_string(capacity) + " positions");
        }
        Span &span = touched[sequence];
        const std::int64_t first =
            window == 0 ? 0 : std::max<std::int64_t>(0, position + 1 - window);
        span.first = std::min(span.first, first);
        span.last = std::max(span.last, position);
    }
    return touched;
}

void check_blocks(const Pages &pages, const PageSizes &sizes, std::int64_t sequence, Span span) {
    if (span.last < span.first) return;
    const std::int32_t *table = pages.block_tables.i32() + sequence * sizes.max_blocks;
    const std::int64_t last = span.last / sizes.block_tokens;
    for (std::int64_t block = span.first / sizes.block_tokens; block <= last; ++block) {
        if (table[block] < 0 || table[block] >= sizes.num_blocks) {
            refuse("block_tables[" + std::to_string(sequence) + ", " + std::to_string(block) +
                   "] is " + std::to_string(table[block]) + ", not one of " +
                   std::to_string(sizes.num_blocks) + " blocks");
        }
    }
}

std::int64_t token_offset(const Pages &pages, const PageSizes &sizes, std::int64_t token) {
    const std::int64_t position = pages.positions.i32()[token];
    return block_offset(pages, sizes, pages.seq_index.i32()[token], position) +
           position % sizes.block_tokens * sizes.position_floats();
}

void copy_heads(const float *heads, std::int64_t stride, const PageSizes &sizes, float *to) {
    for (std::int64_t h = 0; h < sizes.heads; ++h) {
        std::memcpy(to + h * sizes.head_size, heads + h * stride,
                    sizes.head_size * sizeof(float));
    }
}

}  // namespace

PageSizes check_pages(const Pages &pages, std::int64_t tokens, std::int64_t window) {
    const PageSizes sizes = check_shapes(pages, tokens);
    const std::vector<Span> touched = spans(pages, sizes, tokens, window);
    for (std::size_t sequence = 0; sequence < touched.size(); ++sequence) {
        check_blocks(pages, sizes, static_cast<std::int64_t>(sequence), touched[sequence]);
    }
    return sizes;
}

void write_kv(const TensorView &k, const TensorView &v, const Pages &pages) {
    require_rows(k, 3);
    require_dtype(k, DType::f32);
    require_rows(v, 3);
    require_dtype(v, DType::f32);
    const std::int64_t tokens = k.shape[0];
    const PageSizes sizes = check_pages(pages, tokens, 1);
    for (const TensorView *tensor : {&k, &v}) {
        require_size(*tensor, 0, tokens);
        require_size(*tensor, 1, sizes.heads);
        require_size(*tensor, 2, sizes.head_size);
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
        store_token(pages, sizes, t, k.f32() + t * k.stride[0], k.stride[1],
                    v.f32() + t * v.stride[0], v.stride[1]);
    }
}

void store_head(const TensorView &cache, const Pages &pages, const PageSizes &sizes,
                std::int64_t token, std::int64_t head, const float *values) {
    std::memcpy(cache.f32() + token_offset(pages, sizes, token) + head * sizes.head_size, values,
                sizes.head_size * sizeof(float));
}

void store_token(const Pages &pages, const PageSizes &sizes, std::int64_t token, const float *k,
                 std::int64_t k_stride, const float *v, std::int64_t v_stride) {
    const std::int64_t to = token_offset(pages, sizes, token);
    copy_heads(k, k_stride, sizes, pages.k_cache.f32() + to);
    copy_heads(v, v_stride, sizes, pages.v_cache.f32() + to);
}

}  // namespace gearfall::cpu
