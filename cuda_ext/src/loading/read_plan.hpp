// A read's numbers after all of them were checked against the file and the memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace gearfall {

// The strictest alignment that direct I/O asks of memory, offset and length on common devices.
constexpr std::uint64_t kAlignment = 4096;

struct ReadPlan {
    std::uint64_t offset_bytes;
    std::uint64_t size_bytes;
    std::uint64_t chunk_bytes;
    std::byte *destination;

    std::uint64_t chunks() const {
        return size_bytes / chunk_bytes + (size_bytes % chunk_bytes != 0);
    }
    std::uint64_t begin(std::uint64_t chunk) const { return chunk * chunk_bytes; }
    std::uint64_t end(std::uint64_t chunk) const {
        return begin(chunk) + std::min(chunk_bytes, size_bytes - begin(chunk));
    }
    bool is_aligned() const {
        const auto address = reinterpret_cast<std::uintptr_t>(destination);
        return (address | offset_bytes | chunk_bytes) % kAlignment == 0;
    }
};

}  // namespace gearfall
