#include "ring_reader.hpp"

#include <algorithm>

namespace gearfall {

namespace {

// Small enough for many to be in flight within few chunks, large enough to cost the kernel little.
constexpr std::uint64_t kRequestBytes = std::uint64_t{1} << 20;

// Handed over by themselves: the disk is at work on them while the others are being queued. A
// virtual disk may report nothing before it has done all it was given, and stand still until then.
constexpr unsigned kFirst = 2;

}  // namespace

void RingReader::run() {
    for (;;) {
        if (in_flight_ == 0) announce();  // or the checks that make room would never come
        fill_ring(std::min(in_flight_ + kFirst, kDepth));
        if (in_flight_ == 0) return;
        ring_.submit();
        fill_ring(kDepth);
        ring_.submit();
        announce();
        for (const auto &result : ring_.wait()) settle(result);
    }
}

void RingReader::announce() {
    for (const auto chunk : read_) board_.arrived(chunk);
    read_.clear();
}

void RingReader::fill_ring(unsigned depth) {
    while (in_flight_ < depth && (has_current_ || take_next())) queue_request();
}

bool RingReader::take_next() {
    while (const auto chunk = board_.take(in_flight_ == 0)) {
        current_ = *chunk;
        next_byte_ = plan_.begin(current_);
        last_byte_ = plan_.end(current_) - (plan_.end(current_) - next_byte_) % kAlignment;
        states_[current_].read_bytes = last_byte_ - next_byte_;
        has_current_ = next_byte_ < last_byte_;
        if (has_current_) return true;
        board_.arrived(current_);
    }
    return false;
}

void RingReader::queue_request() {
    const auto length = std::min(kRequestBytes, last_byte_ - next_byte_);
    // The tag tells the chunk and how many bytes must come; a chunk's number fits, see ChunkRead.
    const auto tag = current_ << 32 | length;
    ring_.queue_read(file_.descriptor(), plan_.destination + next_byte_,
                     static_cast<std::uint32_t>(length), plan_.offset_bytes + next_byte_, tag);
    ++states_[current_].in_flight;
    ++in_flight_;
    next_byte_ += length;
    has_current_ = next_byte_ < last_byte_;
}

void RingReader::settle(const IoResult &result) {
    const auto chunk = result.tag >> 32;
    auto &state = states_[chunk];
    --in_flight_;
    --state.in_flight;
    if (result.result != static_cast<std::int32_t>(result.tag & 0xffffffffU)) state.read_bytes = 0;
    const bool is_queued_whole = !has_current_ || current_ != chunk;
    if (state.in_flight == 0 && is_queued_whole) read_.push_back(chunk);
}

}  // namespace gearfall
