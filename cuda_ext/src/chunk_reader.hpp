// Reads a range of a file into memory with several readers that share one sequence of chunks.
//
// The readers take chunks in file order, so that the front of the range is complete early and the
// next tier can follow closely; a reader digests its chunk while the others keep the disk busy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace gearfall {

struct ReadRequest {
    std::string path;
    std::int64_t offset_bytes;
    std::int64_t size_bytes;
    std::int64_t chunk_bytes;
    int threads;
    // Asks for O_DIRECT; used where the file system and the alignment permit, else buffered.
    bool direct;
};

// Called once a chunk, from the reader's own thread; what it throws ends the whole read.
using Digest = std::function<std::uint64_t(std::uint64_t begin, std::uint64_t end)>;

// Returns one digest for each chunk, in order. Every bound is checked before the first read.
// Throws OutOfRange, Truncated, IoError, and std::invalid_argument for a request that no file
// could satisfy (no room in the destination, no chunk size, no threads).
std::vector<std::uint64_t> read_chunks(const ReadRequest &request, std::byte *destination,
                                       std::uint64_t destination_bytes, const Digest &digest);

}  // namespace gearfall
