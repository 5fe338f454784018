// Files of shared memory for the DRAM pool: on huge pages where the machine lets us, never swapped
// where that may be asked for, and read-only for good once they are sealed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "descriptor.hpp"

namespace gearfall {

// An unnamed file of zeros, none of them allocated yet.
//
// First choice is a private tmpfs that is mounted nowhere and takes huge pages: faulting in,
// mapping and freeing cost a small part of what 4 KiB pages take. It needs CAP_SYS_ADMIN;
// elsewhere a memfd.
class PoolFile {
public:
    // Throws IoError, and std::invalid_argument for a size that no file has.
    explicit PoolFile(std::int64_t size_bytes);

    // "tmpfs" or "memfd".
    const char *kind() const { return mount_ ? "tmpfs" : "memfd"; }

    // To fill the file by; this object owns it.
    int descriptor() const { return file_.get(); }

    // Makes the content unchangeable and returns a descriptor to read it by, which the caller
    // owns. No writable mapping may be left. Once only. Throws IoError.
    int seal();

private:
    bool open_in_tmpfs();

    Descriptor mount_;
    Descriptor file_;
};

// Shown by one thread to end another one's `fault_in`.
class StopSign {
public:
    void show() { is_shown_.store(true, std::memory_order_relaxed); }
    bool is_shown() const { return is_shown_.load(std::memory_order_relaxed); }

private:
    std::atomic<bool> is_shown_{false};
};

// Allocates the pages of a mapping's part, from the front on, and fills the caller's page tables;
// the content stays. Returns the bytes that are there when it is done or the sign is shown: it looks
// after every 2 MiB. Throws IoError: ENOSPC or ENOMEM where there is no memory, never a signal.
std::uint64_t fault_in(std::byte *memory, std::uint64_t size_bytes, const StopSign &stop);

}  // namespace gearfall
