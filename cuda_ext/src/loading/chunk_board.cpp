#include "chunk_board.hpp"

#include "errors.hpp"

namespace gearfall {

using Lock = std::unique_lock<std::mutex>;

namespace {

// Chunks that a checker may be behind before the next one comes to help.
constexpr std::size_t kBacklog = 4;

}  // namespace

std::optional<std::uint64_t> ChunkBoard::take(bool may_wait) {
    Lock lock(mutex_);
    const auto has_room = [this] {
        return ended_early_ || taken_ == chunks_ || taken_ - verified_ < window_;
    };
    if (may_wait) room_.wait(lock, has_room);
    if (ended_early_ || taken_ == chunks_ || taken_ - verified_ >= window_) return std::nullopt;
    return taken_++;
}

void ChunkBoard::arrived(std::uint64_t chunk) {
    const Lock lock(mutex_);
    waiting_.push(chunk);
    const auto checker = (waiting_.size() - 1) / kBacklog;
    if (checker < work_.size()) work_[checker].notify_one();
}

std::optional<std::uint64_t> ChunkBoard::next_arrived(std::size_t checker) {
    Lock lock(mutex_);
    work_[checker].wait(lock, [this, checker] {
        return ended_early_ || waiting_.size() > checker * kBacklog || handed_out_ == chunks_;
    });
    if (ended_early_ || waiting_.empty()) return std::nullopt;
    const auto chunk = waiting_.top();
    waiting_.pop();
    if (++handed_out_ == chunks_) wake_checkers();
    return chunk;
}

void ChunkBoard::wake_checkers() {
    for (auto &checker : work_) checker.notify_all();
}

void ChunkBoard::verified(std::uint64_t chunk) {
    const Lock lock(mutex_);
    ++verified_;
    is_verified_[chunk] = true;
    room_.notify_one();
    if (verified_ == chunks_) room_.notify_all();
    if (chunk != front_) return;
    while (front_ < chunks_ && is_verified_[front_]) ++front_;
    progress_.notify_all();
}

void ChunkBoard::fail(std::exception_ptr failure) { end(std::move(failure)); }

void ChunkBoard::cancel() { end(nullptr); }

void ChunkBoard::end(std::exception_ptr failure) {
    const Lock lock(mutex_);
    if (ended_early_ || verified_ == chunks_) return;
    ended_early_ = true;
    failure_ = std::move(failure);
    room_.notify_all();
    wake_checkers();
    progress_.notify_all();
}

std::uint64_t ChunkBoard::wait_beyond(std::uint64_t seen) {
    Lock lock(mutex_);
    progress_.wait(lock, [this, seen] {
        return ended_early_ || front_ > seen || front_ == chunks_;
    });
    return front_;
}

bool ChunkBoard::is_over() {
    const Lock lock(mutex_);
    return ended_early_ || verified_ == chunks_;
}

void ChunkBoard::check_complete() {
    const Lock lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
    if (ended_early_) throw Cancelled("the read was cancelled");
}

}  // namespace gearfall
