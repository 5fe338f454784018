// A read under way as Python holds it: the destination and the digest live as long as its threads.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "chunk_read.hpp"
#include "python_buffer.hpp"

namespace gearfall {

using PythonDigest = nanobind::typed<nanobind::callable, std::uint64_t(nanobind::memoryview)>;

// Made, closed and destroyed under the interpreter lock; waits without it.
class PythonChunkRead {
public:
    PythonChunkRead(ReadRequest request, nanobind::memoryview destination, PythonDigest digest)
        : bytes_(std::in_place, std::move(destination)), digest_(std::move(digest)) {
        const nanobind::gil_scoped_release released;
        read_ = std::make_shared<ChunkRead>(
            std::move(request), bytes_->data(), bytes_->size(),
            [this](std::uint64_t begin, std::uint64_t end) { return digest_chunk(begin, end); });
    }
    ~PythonChunkRead() { close(); }
    PythonChunkRead(const PythonChunkRead &) = delete;
    PythonChunkRead &operator=(const PythonChunkRead &) = delete;

    // Keeps the read alive while a thread waits in it and another one closes it.
    std::shared_ptr<ChunkRead> read() const {
        if (!read_) throw std::invalid_argument("the read is closed");
        return read_;
    }

    // Cancels what runs and lets go of the destination. Idempotent.
    void close() {
        if (const auto read = std::move(read_)) {
            const nanobind::gil_scoped_release released;
            read->stop();
        }
        bytes_.reset();
    }

private:
    std::uint64_t digest_chunk(std::uint64_t begin, std::uint64_t end) const {
        const nanobind::gil_scoped_acquire held;
        return nanobind::cast<std::uint64_t>(digest_(bytes_->slice(begin, end)));
    }

    std::optional<WritableBytes> bytes_;
    PythonDigest digest_;
    std::shared_ptr<ChunkRead> read_;
};

}  // namespace gearfall
