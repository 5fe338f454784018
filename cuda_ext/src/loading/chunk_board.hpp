// Who reads and who checks which chunk: the one place where a read's threads meet.
//
//   not taken --take--> being read --arrived--> waits for its check --verified--> done
//
// Chunks are taken and checked lowest first, so that the front is complete early and the next tier
// can follow closely. Readers stay at most a window ahead of the checks. One thread checks, for as
// long as it keeps up: the processor time of others is missed where the bytes come from.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <queue>
#include <vector>

namespace gearfall {

class ChunkBoard {
public:
    ChunkBoard(std::uint64_t chunks, std::uint64_t window, std::size_t checkers)
        : chunks_(chunks), window_(window), work_(checkers), is_verified_(chunks) {}

    // The next chunk to read; nothing when all are taken or the read is over. A caller that has
    // reads of its own under way must not wait for the window.
    std::optional<std::uint64_t> take(bool may_wait);
    void arrived(std::uint64_t chunk);

    // The next chunk to check; nothing when none will come any more. Checkers are numbered from 0;
    // each has work only when those before it are a few chunks behind.
    std::optional<std::uint64_t> next_arrived(std::size_t checker);
    void verified(std::uint64_t chunk);

    // Ends the read. The first failure is kept; a cancelled read has none.
    void fail(std::exception_ptr failure);
    void cancel();

    // Waits until more than `seen` chunks from the front on are verified, or the read is over;
    // returns their number.
    std::uint64_t wait_beyond(std::uint64_t seen);
    bool is_over();

    // Throws the failure, or Cancelled when the read ended before its last chunk.
    void check_complete();

private:
    void end(std::exception_ptr failure);
    void wake_checkers();

    const std::uint64_t chunks_;
    const std::uint64_t window_;
    std::mutex mutex_;
    std::condition_variable room_, progress_;
    std::vector<std::condition_variable> work_;
    std::uint64_t taken_ = 0;
    std::uint64_t handed_out_ = 0;
    std::uint64_t verified_ = 0;
    std::uint64_t front_ = 0;  // all chunks below it are verified
    std::vector<bool> is_verified_;
    std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> waiting_;
    bool ended_early_ = false;
    std::exception_ptr failure_;
};

}  // namespace gearfall
