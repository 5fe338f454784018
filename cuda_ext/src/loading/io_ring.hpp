// An io_uring instance for reads: raw system calls, so that no library is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace gearfall {

// One finished read: the tag it was queued with, and bytes read or a negated errno.
struct IoResult {
    std::uint64_t tag;
    std::int32_t result;
};

// Used by one thread. Whoever queues a read keeps its memory until its result came.
class IoRing {
public:
    // Null where the kernel has no io_uring or does not permit it, as in many containers.
    static std::unique_ptr<IoRing> open(unsigned depth);
    ~IoRing();
    IoRing(const IoRing &) = delete;
    IoRing &operator=(const IoRing &) = delete;

    // At most `depth` reads may be queued and not yet returned by `wait`.
    void queue_read(int descriptor, std::byte *into, std::uint32_t length, std::uint64_t offset,
                    std::uint64_t tag);

    // Hands the queued reads to the kernel. Throws IoError when it refuses.
    void submit();

    // The same, then waits for at least one result and returns all there are. The reference is good
    // until the next call.
    const std::vector<IoResult> &wait();

private:
    struct Memory;
    IoRing();
    void enter(unsigned least_results);

    int descriptor_ = -1;
    unsigned queued_ = 0;
    std::unique_ptr<Memory> memory_;
    std::vector<IoResult> results_;
};

}  // namespace gearfall
