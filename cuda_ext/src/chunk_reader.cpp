#include "chunk_reader.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "errors.hpp"
#include "file.hpp"

namespace gearfall {

namespace {

// The strictest alignment that direct I/O asks of memory, offset and length on common devices.
constexpr std::uint64_t kAlignment = 4096;
constexpr int kMostThreads = 64;

// The first failure of several threads; the others see it and stop.
class FirstFailure {
public:
    bool has_happened() const { return happened_.load(std::memory_order_acquire); }

    void record(std::exception_ptr failure) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::move(failure);
        happened_.store(true, std::memory_order_release);
    }

    void rethrow_if_any() const {
        if (failure_) std::rethrow_exception(failure_);
    }

private:
    std::atomic<bool> happened_{false};
    std::mutex mutex_;
    std::exception_ptr failure_;
};

class Threads {
public:
    ~Threads() {
        for (auto &thread : threads_) thread.join();
    }
    template <typename Body>
    void start(Body body) {
        threads_.emplace_back(std::move(body));
    }

private:
    std::vector<std::thread> threads_;
};

class ChunkReader {
public:
    ChunkReader(const ReadRequest &request, std::byte *destination, const Digest &digest)
        : buffered_(request.path), destination_(destination), digest_(digest),
          chunk_bytes_(static_cast<std::uint64_t>(request.chunk_bytes)) {
        check_range(buffered_, request.offset_bytes, request.size_bytes);
        offset_bytes_ = static_cast<std::uint64_t>(request.offset_bytes);
        size_bytes_ = static_cast<std::uint64_t>(request.size_bytes);
        digests_.resize(size_bytes_ / chunk_bytes_ + (size_bytes_ % chunk_bytes_ != 0));
        if (request.direct && is_aligned()) {
            direct_ = std::make_unique<File>(request.path, File::Mode::kDirect);
        }
    }

    std::vector<std::uint64_t> run(int threads) {
        {
            const auto wanted = std::min<std::uint64_t>(threads, digests_.size());
            Threads readers;
            for (std::uint64_t i = 0; i < wanted; ++i) readers.start([this] { read_until_done(); });
        }
        failure_.rethrow_if_any();
        return std::move(digests_);
    }

private:
    bool is_aligned() const {
        const auto address = reinterpret_cast<std::uintptr_t>(destination_);
        return (address | offset_bytes_ | chunk_bytes_) % kAlignment == 0;
    }

    void read_until_done() noexcept {
        try {
            while (!failure_.has_happened()) {
                const auto index = next_.fetch_add(1, std::memory_order_relaxed);
                if (index >= digests_.size()) return;
                const auto begin = index * chunk_bytes_;
                const auto end = begin + std::min(chunk_bytes_, size_bytes_ - begin);
                read(begin, end);
                digests_[index] = digest_(begin, end);
            }
        } catch (...) {
            failure_.record(std::current_exception());
        }
    }

    void read(std::uint64_t begin, std::uint64_t end) const {
        auto done = begin;
        if (direct_ && direct_->is_direct()) done = read_direct(begin, end);
        while (done < end) {
            const auto count =
                buffered_.read_some(destination_ + done, end - done, offset_bytes_ + done);
            if (count < 0) throw IoError(errno, buffered_.path());
            if (count == 0) throw Truncated(buffered_.path() + " became shorter while it was read");
            done += static_cast<std::uint64_t>(count);
        }
    }

    // Reads the whole blocks of a chunk; what is left (the tail, or all that the file system
    // refused to read directly) is for the buffered descriptor, which also tells why.
    std::uint64_t read_direct(std::uint64_t begin, std::uint64_t end) const {
        const auto last = end - (end - begin) % kAlignment;
        auto done = begin;
        while (done < last && (done - begin) % kAlignment == 0) {
            const auto count =
                direct_->read_some(destination_ + done, last - done, offset_bytes_ + done);
            if (count <= 0) break;
            done += static_cast<std::uint64_t>(count);
        }
        return done;
    }

    File buffered_;
    std::unique_ptr<File> direct_;
    std::byte *destination_;
    const Digest &digest_;
    std::uint64_t offset_bytes_ = 0;
    std::uint64_t size_bytes_ = 0;
    std::uint64_t chunk_bytes_;
    std::vector<std::uint64_t> digests_;
    std::atomic<std::uint64_t> next_{0};
    FirstFailure failure_;
};

void check_request(const ReadRequest &request, std::uint64_t destination_bytes) {
    if (request.chunk_bytes < 1) throw std::invalid_argument("chunk_bytes must be at least 1");
    if (request.threads < 1 || request.threads > kMostThreads) {
        throw std::invalid_argument("threads must be 1 to " + std::to_string(kMostThreads));
    }
    if (request.size_bytes >= 0 &&
        static_cast<std::uint64_t>(request.size_bytes) > destination_bytes) {
        throw std::invalid_argument("the destination holds " + std::to_string(destination_bytes) +
                                    " of " + std::to_string(request.size_bytes) + " bytes");
    }
}

}  // namespace

std::vector<std::uint64_t> read_chunks(const ReadRequest &request, std::byte *destination,
                                       std::uint64_t destination_bytes, const Digest &digest) {
    check_request(request, destination_bytes);
    return ChunkReader(request, destination, digest).run(request.threads);
}

}  // namespace gearfall
