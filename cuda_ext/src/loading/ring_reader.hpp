// Direct reads of whole chunks through io_uring, many requests in flight, in file order.
#pragma once

#include <cstdint>
#include <vector>

#include "chunk_board.hpp"
#include "file.hpp"
#include "io_ring.hpp"
#include "read_plan.hpp"

namespace gearfall {

class RingReader {
public:
    static constexpr unsigned kDepth = 32;

    RingReader(IoRing &ring, const File &file, const ReadPlan &plan, ChunkBoard &board)
        : ring_(ring), file_(file), plan_(plan), board_(board), states_(plan.chunks()) {}

    // Takes chunks from the board until there are none, and reports each whose reads came back.
    // Returns when nothing is in flight any more, also after a cancellation.
    void run();

    // Bytes at the chunk's front that were read; the rest (an unaligned tail, or all of a chunk
    // that the device refused) is for a buffered read, which also tells why. After `arrived`.
    std::uint64_t bytes_read(std::uint64_t chunk) const { return states_[chunk].read_bytes; }

private:
    struct State {
        std::uint32_t in_flight = 0;
        std::uint64_t read_bytes = 0;
    };

    bool take_next();
    void fill_ring(unsigned depth);
    void queue_request();
    void settle(const IoResult &result);
    void announce();

    IoRing &ring_;
    const File &file_;
    const ReadPlan &plan_;
    ChunkBoard &board_;
    std::vector<State> states_;
    std::vector<std::uint64_t> read_;  // whole, and not announced yet: the disk gets work first
    unsigned in_flight_ = 0;
    bool has_current_ = false;
    std::uint64_t current_ = 0;
    std::uint64_t next_byte_ = 0;
    std::uint64_t last_byte_ = 0;
};

}  // namespace gearfall
