// Reads a range of a file into memory as one pipeline over chunks: populate, read, digest,
// compare, copy to a device.
//
// Direct reads go through io_uring where the kernel permits it: one thread keeps many requests in
// flight, others digest what arrived. Elsewhere several readers take the chunks in turn, each
// digesting its own while the others keep the disk busy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "device_buffer.hpp"

namespace gearfall {

struct ReadRequest {
    std::string path;
    std::int64_t offset_bytes;
    std::int64_t size_bytes;
    std::int64_t chunk_bytes;
    int threads;
    // Asks for O_DIRECT; used where the file system and the alignment permit, else buffered.
    bool direct;
    // Permits io_uring for direct reads.
    bool ring;
    // Threads that fault the destination's pages in ahead of the reads; 0 for memory that is there.
    int populate_threads;
    // One digest for each chunk to compare with, or none at all.
    std::vector<std::uint64_t> expected;
    // Where each chunk is copied as soon as it is verified, or null. Outlives the read.
    DeviceBuffer *device_buffer;
};

// Called once a chunk, from a thread of the read; what it throws ends the whole read.
using Digest = std::function<std::uint64_t(std::uint64_t begin, std::uint64_t end)>;

// A read under way. Every bound is checked before the first byte is read; after an error the
// destination's content is undefined.
class ChunkRead {
public:
    // Throws OutOfRange, IoError, and std::invalid_argument for a request that no file could
    // satisfy (no room in the destination, no chunk size, no threads, not one digest a chunk).
    ChunkRead(ReadRequest request, std::byte *destination, std::uint64_t destination_bytes,
              Digest digest);
    ~ChunkRead();
    ChunkRead(const ChunkRead &) = delete;
    ChunkRead &operator=(const ChunkRead &) = delete;

    // Waits until more than `seen` chunks are verified or the read is over; returns their number.
    std::uint64_t wait_beyond(std::uint64_t seen);

    // Ends the read early, between chunks. May be called from any thread.
    void cancel();

    // Cancels and waits for what is in flight: the destination is nobody's any more. Idempotent.
    void stop();

    // Waits for the end and returns one digest for each chunk, in order. Once only.
    // Throws CorruptChunk, Truncated, IoError, Cancelled, or what the digest threw.
    std::vector<std::uint64_t> finish();

    // How the bytes come: "io_uring", "direct" or "buffered".
    const char *method() const;

private:
    class Pipeline;
    std::unique_ptr<Pipeline> pipeline_;
};

}  // namespace gearfall
