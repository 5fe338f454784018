#include "io_ring.hpp"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "errors.hpp"

namespace gearfall {

namespace {

class SharedPages {
public:
    SharedPages(int descriptor, std::size_t size, std::uint64_t at) : size_(size) {
        address_ = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                          descriptor, static_cast<off_t>(at));
        if (address_ == MAP_FAILED) throw IoError(errno, "io_uring");
    }
    ~SharedPages() { ::munmap(address_, size_); }
    SharedPages(const SharedPages &) = delete;
    SharedPages &operator=(const SharedPages &) = delete;

    template <typename Item>
    Item *at(std::size_t offset) const {
        return reinterpret_cast<Item *>(static_cast<std::byte *>(address_) + offset);
    }

private:
    void *address_;
    std::size_t size_;
};

std::size_t rings_bytes(const io_uring_params &setup) {
    return std::max<std::size_t>(setup.sq_off.array + setup.sq_entries * sizeof(unsigned),
                                 setup.cq_off.cqes + setup.cq_entries * sizeof(io_uring_cqe));
}

}  // namespace

// What the kernel and this process share: both rings in one mapping, and the requests.
struct IoRing::Memory {
    Memory(int descriptor, const io_uring_params &setup)
        : rings(descriptor, rings_bytes(setup), IORING_OFF_SQ_RING),
          entries(descriptor, setup.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES),
          requests(entries.at<io_uring_sqe>(0)), results(rings.at<io_uring_cqe>(setup.cq_off.cqes)),
          order(rings.at<unsigned>(setup.sq_off.array)),
          request_tail(rings.at<unsigned>(setup.sq_off.tail)),
          request_mask(*rings.at<unsigned>(setup.sq_off.ring_mask)),
          result_head(rings.at<unsigned>(setup.cq_off.head)),
          result_tail(rings.at<unsigned>(setup.cq_off.tail)),
          result_mask(*rings.at<unsigned>(setup.cq_off.ring_mask)) {}

    SharedPages rings;
    SharedPages entries;
    io_uring_sqe *requests;
    io_uring_cqe *results;
    unsigned *order;
    unsigned *request_tail;
    unsigned request_mask;
    unsigned *result_head;
    unsigned *result_tail;
    unsigned result_mask;
};

IoRing::IoRing() = default;

std::unique_ptr<IoRing> IoRing::open(unsigned depth) {
    io_uring_params setup{};
    const auto descriptor = static_cast<int>(::syscall(SYS_io_uring_setup, depth, &setup));
    if (descriptor < 0) return nullptr;
    auto ring = std::unique_ptr<IoRing>(new IoRing);
    ring->descriptor_ = descriptor;
    // Kernels before 5.6 lack plain reads, those before 5.4 the common mapping of both rings.
    const auto needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS;
    if ((setup.features & needed) != needed) return nullptr;
    ring->memory_ = std::make_unique<Memory>(descriptor, setup);
    return ring;
}

IoRing::~IoRing() {
    memory_.reset();
    if (descriptor_ >= 0) ::close(descriptor_);
}

void IoRing::queue_read(int descriptor, std::byte *into, std::uint32_t length,
                        std::uint64_t offset, std::uint64_t tag) {
    const unsigned tail = *memory_->request_tail;
    const unsigned slot = tail & memory_->request_mask;
    io_uring_sqe request{};
    request.opcode = IORING_OP_READ;
    request.fd = descriptor;
    request.addr = reinterpret_cast<std::uintptr_t>(into);
    request.len = length;
    request.off = offset;
    request.user_data = tag;
    memory_->requests[slot] = request;
    memory_->order[slot] = slot;
    __atomic_store_n(memory_->request_tail, tail + 1, __ATOMIC_RELEASE);
    ++queued_;
}

void IoRing::enter(unsigned least_results) {
    const unsigned flags = least_results > 0 ? IORING_ENTER_GETEVENTS : 0;
    const auto taken = ::syscall(SYS_io_uring_enter, descriptor_, queued_, least_results, flags,
                                 nullptr, 0);
    if (taken >= 0) {
        queued_ -= static_cast<unsigned>(taken);
    } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
        throw IoError(errno, "io_uring");
    }
}

void IoRing::submit() {
    if (queued_ > 0) enter(0);
}

const std::vector<IoResult> &IoRing::wait() {
    submit();
    results_.clear();
    for (;;) {
        unsigned head = *memory_->result_head;
        const unsigned tail = __atomic_load_n(memory_->result_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; ++head) {
            const auto &done = memory_->results[head & memory_->result_mask];
            results_.push_back({done.user_data, done.res});
        }
        __atomic_store_n(memory_->result_head, head, __ATOMIC_RELEASE);
        if (!results_.empty()) return results_;
        enter(1);
    }
}

}  // namespace gearfall
