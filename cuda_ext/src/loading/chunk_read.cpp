#include "chunk_read.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>

#include "chunk_board.hpp"
#include "errors.hpp"
#include "file.hpp"
#include "io_ring.hpp"
#include "read_plan.hpp"
#include "ring_reader.hpp"

namespace gearfall {

namespace {

constexpr int kMostThreads = 64;
// Chunks that were read and not yet checked: bounds what a failed check has read in vain.
constexpr std::uint64_t kWindow = 32;
constexpr std::uint64_t kPopulateBytes = std::uint64_t{32} << 20;

void require_threads(int threads, int least, const char *name) {
    if (threads >= least && threads <= kMostThreads) return;
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(least) + " to " +
                                std::to_string(kMostThreads));
}

void check_request(const ReadRequest &request, std::uint64_t destination_bytes) {
    if (request.chunk_bytes < 1) throw std::invalid_argument("chunk_bytes must be at least 1");
    require_threads(request.threads, 1, "threads");
    require_threads(request.populate_threads, 0, "populate_threads");
    if (request.size_bytes >= 0 &&
        static_cast<std::uint64_t>(request.size_bytes) > destination_bytes) {
        throw std::invalid_argument("the destination holds " + std::to_string(destination_bytes) +
                                    " of " + std::to_string(request.size_bytes) + " bytes");
    }
}

ReadPlan make_plan(const ReadRequest &request, const File &file, std::byte *destination) {
    check_range(file, request.offset_bytes, request.size_bytes);
    const ReadPlan plan{static_cast<std::uint64_t>(request.offset_bytes),
                        static_cast<std::uint64_t>(request.size_bytes),
                        static_cast<std::uint64_t>(request.chunk_bytes), destination};
    if (plan.chunks() > std::numeric_limits<std::uint32_t>::max()) {
        throw std::invalid_argument("chunk_bytes must be larger for a range of this size");
    }
    if (!request.expected.empty() && request.expected.size() != plan.chunks()) {
        throw std::invalid_argument("expected must be one digest for each of the " +
                                    std::to_string(plan.chunks()) + " chunks");
    }
    return plan;
}

std::string hex(std::uint64_t digest) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(digest));
    return text;
}

}  // namespace

class ChunkRead::Pipeline {
public:
    Pipeline(ReadRequest request, std::byte *destination, Digest digest)
        : request_(std::move(request)), digest_(std::move(digest)), buffered_(request_.path),
          plan_(make_plan(request_, buffered_, destination)),
          board_(plan_.chunks(), kWindow, static_cast<std::size_t>(request_.threads)),
          digests_(plan_.chunks()) {
        if (request_.device_buffer != nullptr && plan_.size_bytes > 0) {
            copy_.emplace(*request_.device_buffer, destination, plan_.size_bytes, false);
        }
        open_direct();
    }
    ~Pipeline() { stop(); }
    Pipeline(const Pipeline &) = delete;
    Pipeline &operator=(const Pipeline &) = delete;

    // Threads hold on to this object, so that they start when it is complete.
    void start() {
        const auto wanted = std::min<std::uint64_t>(request_.threads, plan_.chunks());
        for (int i = 0; i < request_.populate_threads; ++i) run([this] { populate(); });
        if (ring_reader_ && wanted > 0) run([this] { ring_reader_->run(); });
        for (std::uint64_t i = 0; i < wanted; ++i) {
            run([this, i] { ring_reader_ ? check_arrived(i) : read_and_check(); });
        }
    }

    std::vector<std::uint64_t> finish() {
        board_.wait_beyond(plan_.chunks());
        join();
        board_.check_complete();
        if (copy_) copy_->wait();
        return std::move(digests_);
    }

    void stop() {
        board_.cancel();
        join();
        copy_.reset();
    }

    ChunkBoard &board() { return board_; }

    const char *method() const {
        if (ring_reader_) return "io_uring";
        return is_direct() ? "direct" : "buffered";
    }

private:
    bool is_direct() const { return direct_ && direct_->is_direct(); }

    void open_direct() {
        if (!request_.direct || !plan_.is_aligned()) return;
        direct_ = std::make_unique<File>(request_.path, File::Mode::kDirect);
        if (!direct_->is_direct() || !request_.ring) return;
        ring_ = IoRing::open(RingReader::kDepth);
        if (ring_) ring_reader_.emplace(*ring_, *direct_, plan_, board_);
    }

    template <typename Body>
    void run(Body body) {
        threads_.emplace_back([this, body] {
            try {
                body();
            } catch (...) {
                board_.fail(std::current_exception());
            }
        });
    }

    void join() {
        const std::lock_guard<std::mutex> lock(joining_);
        for (auto &thread : threads_) thread.join();
        threads_.clear();
    }

    void check_arrived(std::size_t checker) {
        while (const auto chunk = board_.next_arrived(checker)) {
            read_buffered(plan_.begin(*chunk) + ring_reader_->bytes_read(*chunk),
                          plan_.end(*chunk));
            check(*chunk);
        }
    }

    void read_and_check() {
        while (const auto chunk = board_.take(true)) {
            const auto begin = plan_.begin(*chunk), end = plan_.end(*chunk);
            read_buffered(is_direct() ? read_direct(begin, end) : begin, end);
            check(*chunk);
        }
    }

    void check(std::uint64_t chunk) {
        const auto found = digest_(plan_.begin(chunk), plan_.end(chunk));
        if (!request_.expected.empty() && found != request_.expected[chunk]) {
            throw CorruptChunk(describe(chunk, found));
        }
        digests_[chunk] = found;
        if (copy_) copy_->copy(plan_.begin(chunk), plan_.end(chunk));
        board_.verified(chunk);
    }

    std::string describe(std::uint64_t chunk, std::uint64_t found) const {
        return request_.path + ": chunk " + std::to_string(chunk) + " is not what was expected (" +
               hex(found) + ", not " + hex(request_.expected[chunk]) + ")";
    }

    void read_buffered(std::uint64_t begin, std::uint64_t end) const {
        for (auto done = begin; done < end;) {
            const auto count = buffered_.read_some(plan_.destination + done, end - done,
                                                   plan_.offset_bytes + done);
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
            const auto count = direct_->read_some(plan_.destination + done, last - done,
                                                  plan_.offset_bytes + done);
            if (count <= 0) break;
            done += static_cast<std::uint64_t>(count);
        }
        return done;
    }

    // Advice throughout: a page that cannot be had here is missed by its read, which tells why.
    void populate() {
#ifdef MADV_POPULATE_WRITE
        const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
        const auto first = reinterpret_cast<std::uintptr_t>(plan_.destination);
        const auto begin = (first + page - 1) / page * page;
        const auto end = (first + plan_.size_bytes) / page * page;
        if (begin >= end) return;
        ::madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
        while (!board_.is_over()) {
            const auto at = begin + populated_.fetch_add(kPopulateBytes);
            if (at >= end) return;
            const auto length = std::min<std::uint64_t>(kPopulateBytes, end - at);
            ::madvise(reinterpret_cast<void *>(at), length, MADV_POPULATE_WRITE);
        }
#endif
    }

    const ReadRequest request_;
    const Digest digest_;
    const File buffered_;
    const ReadPlan plan_;
    ChunkBoard board_;
    std::vector<std::uint64_t> digests_;
    std::unique_ptr<File> direct_;
    std::unique_ptr<IoRing> ring_;
    std::optional<RingReader> ring_reader_;
    std::optional<DeviceCopy> copy_;
    std::atomic<std::uint64_t> populated_{0};
    std::mutex joining_;
    std::vector<std::thread> threads_;
};

ChunkRead::ChunkRead(ReadRequest request, std::byte *destination, std::uint64_t destination_bytes,
                     Digest digest) {
    check_request(request, destination_bytes);
    pipeline_ = std::make_unique<Pipeline>(std::move(request), destination, std::move(digest));
    pipeline_->start();
}

ChunkRead::~ChunkRead() = default;

std::uint64_t ChunkRead::wait_beyond(std::uint64_t seen) {
    return pipeline_->board().wait_beyond(seen);
}

void ChunkRead::cancel() { pipeline_->board().cancel(); }

void ChunkRead::stop() { pipeline_->stop(); }

std::vector<std::uint64_t> ChunkRead::finish() { return pipeline_->finish(); }

const char *ChunkRead::method() const { return pipeline_->method(); }

}  // namespace gearfall
