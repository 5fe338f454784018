// Linear layers: weight rows in chunks that stay in a core's cache while all tokens pass over them.
#include <algorithm>
#include <vector>

#include "cpu_isa.hpp"
#include "cpu_kernels.hpp"
#include "cpu_pool.hpp"
#include "cpu_scratch.hpp"

namespace gearfall::cpu {

namespace {

// Work below which another thread costs more than it brings: multiply-adds, a byte of weights from
// memory counted as two.
constexpr std::int64_t kWorkPerThread = 1 << 21;
constexpr std::int64_t kChunkBytes = 128 << 10;
constexpr std::int64_t kMaxChunkRows = 128;
constexpr std::int64_t kMinChunkRows = 8;
constexpr std::int64_t kPiecesPerThread = 3;

void check(const Linear &call) {
    require_rows(call.x, 2);
    require_dtype(call.x, DType::f32);
    require_rows(call.weight, 2);
    require_weight_dtype(call.weight);
    require(call.x.shape[1] >= 1, "x must have at least one column");
    require_size(call.weight, 1, call.x.shape[1]);
    if (call.bias != nullptr) {
        require_dense(*call.bias, 1, call.bias->dtype);
        require_weight_dtype(*call.bias);
        require_size(*call.bias, 0, call.weight.shape[0]);
    }
    require_dense(call.out, 2, DType::f32);
    require_size(call.out, 0, call.x.shape[0]);
    require_size(call.out, 1, call.weight.shape[0]);
}

Scratch packed_tokens(const Linear &call, const Kernels &kernels) {
    const int dtype = static_cast<int>(call.weight.dtype);
    const std::int64_t tokens = call.x.shape[0];
    const std::int64_t k = call.x.shape[1];
    Scratch packed(tokens * padded(k, step_elements(dtype)));
    std::vector<const float *> rows(tokens);
    for (std::int64_t t = 0; t < tokens; ++t) rows[t] = call.x.f32() + t * call.x.stride[0];
    kernels.pack(dtype, rows.data(), tokens, k, packed.data());
    return packed;
}

// How tokens and weight rows are cut; pieces differ in output elements, never in a sum's order.
struct Cut {
    std::int64_t chunk_rows;
    std::int64_t row_chunks;
    std::int64_t chunk_tokens;
    std::int64_t token_chunks;
};

std::int64_t chunks(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

Cut cut(const Linear &call, const Kernels &kernels, int threads) {
    const std::int64_t tokens = call.x.shape[0];
    const std::int64_t rows = call.weight.shape[0];
    const std::int64_t row_bytes = call.weight.shape[1] * element_bytes(call.weight.dtype);
    const std::int64_t fair = chunks(rows, kPiecesPerThread * threads);
    std::int64_t chunk_rows = std::min(kChunkBytes / row_bytes, fair);
    chunk_rows = std::clamp(padded(chunk_rows, kMinChunkRows), kMinChunkRows, kMaxChunkRows);
    const std::int64_t row_chunks = chunks(rows, chunk_rows);
    const std::int64_t wanted = chunks(kPiecesPerThread * threads, row_chunks);
    const std::int64_t chunk_tokens =
        threads == 1 ? tokens : padded(chunks(tokens, wanted), kernels.tile_tokens);
    return {chunk_rows, row_chunks, chunk_tokens, chunks(tokens, chunk_tokens)};
}

void add_bias(const TensorView &bias, const DotPanel &panel, std::int64_t first_row) {
    for (std::int64_t r = 0; r < panel.row_count; ++r) {
        const float value = float_at(bias, first_row + r);
        for (std::int64_t t = 0; t < panel.token_count; ++t) {
            panel.out[t * panel.out_stride + r] += value;
        }
    }
}

void run_piece(const Linear &call, const Kernels &kernels, const Cut &cut, const float *packed,
               std::int64_t piece) {
    const int dtype = static_cast<int>(call.weight.dtype);
    const std::int64_t k = call.x.shape[1];
    const std::int64_t first_row = piece / cut.token_chunks * cut.chunk_rows;
    const std::int64_t first_token = piece % cut.token_chunks * cut.chunk_tokens;
    const std::int64_t row_bytes = call.weight.stride[0] * element_bytes(call.weight.dtype);
    const char *weights = static_cast<const char *>(call.weight.data) + first_row * row_bytes;
    const void *rows[kMaxChunkRows];
    const std::int64_t row_count = std::min(cut.chunk_rows, call.weight.shape[0] - first_row);
    for (std::int64_t r = 0; r < row_count; ++r) rows[r] = weights + r * row_bytes;
    const DotPanel panel{rows,
                         row_count,
                         packed + first_token * padded(k, step_elements(dtype)),
                         std::min(cut.chunk_tokens, call.x.shape[0] - first_token),
                         k,
                         call.out.f32() + first_token * call.out.shape[1] + first_row,
                         call.out.shape[1]};
    kernels.dot[dtype](panel);
    if (call.bias != nullptr) add_bias(*call.bias, panel, first_row);
}

}  // namespace

void linear(const Linear &call, int threads, const std::string &variant) {
    require_threads(threads);
    check(call);
    const Kernels &kernels = find_kernels(variant.c_str());
    const std::int64_t tokens = call.x.shape[0];
    const std::int64_t rows = call.weight.shape[0];
    if (tokens == 0 || rows == 0) return;
    const std::int64_t elements = rows * call.x.shape[1];
    const std::int64_t work = elements * (tokens + 2 * element_bytes(call.weight.dtype));
    const int useful =
        static_cast<int>(std::min<std::int64_t>(threads, 1 + work / kWorkPerThread));
    const Scratch packed = packed_tokens(call, kernels);
    const Cut pieces = cut(call, kernels, useful);
    parallel_for(pieces.row_chunks * pieces.token_chunks, useful, [&](std::int64_t piece) {
        run_piece(call, kernels, pieces, packed.data(), piece);
    });
}

}  // namespace gearfall::cpu
