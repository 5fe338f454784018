#include "pool_file.hpp"

#include <fcntl.h>
#include <linux/mount.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "errors.hpp"

namespace gearfall {

namespace {

constexpr char kName[] = "partition";

[[noreturn]] void fail(const char *call) { throw IoError(errno, call); }

bool configure(const Descriptor &context, unsigned command, const char *key, const char *value) {
    return ::syscall(SYS_fsconfig, context.get(), command, key, value, 0) == 0;
}

// A new tmpfs, mounted nowhere; empty where the kernel or our rights do not reach that far. Without
// a limit: its one file is as long as its owner makes it, which may be longer later.
Descriptor mount_tmpfs(bool no_swap) {
    const Descriptor context(static_cast<int>(::syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC)));
    const bool made = context && configure(context, FSCONFIG_SET_STRING, "size", "0") &&
                      configure(context, FSCONFIG_SET_STRING, "mode", "0700") &&
                      configure(context, FSCONFIG_SET_STRING, "huge", "within_size") &&
                      (!no_swap || configure(context, FSCONFIG_SET_FLAG, "noswap", nullptr)) &&
                      configure(context, FSCONFIG_CMD_CREATE, nullptr, nullptr);
    if (!made) return Descriptor();
    return Descriptor(static_cast<int>(::syscall(
        SYS_fsmount, context.get(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSUID)));
}

constexpr std::uintptr_t kStepBytes = std::uintptr_t{2} << 20;

void allocate_pages(void *at, std::size_t length) {
#ifdef MADV_POPULATE_WRITE
    while (::madvise(at, length, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        // What would be SIGBUS at an access: the file has no memory to be had.
        throw IoError(errno == EFAULT ? ENOSPC : errno, "madvise");
    }
#else
    throw IoError(ENOSYS, "madvise");
#endif
}

}  // namespace

PoolFile::PoolFile(std::int64_t size_bytes) {
    if (size_bytes < 1) throw std::invalid_argument("a pool file of less than one byte");
    if (!open_in_tmpfs()) {
        file_ = Descriptor(::memfd_create("gearfall", MFD_CLOEXEC | MFD_ALLOW_SEALING));
        if (!file_) fail("memfd_create");
    }
    if (::ftruncate(file_.get(), size_bytes) != 0) fail("ftruncate");
}

bool PoolFile::open_in_tmpfs() {
    mount_ = mount_tmpfs(true);
    if (!mount_) mount_ = mount_tmpfs(false);
    if (!mount_) return false;
    file_ = Descriptor(
        ::openat(mount_.get(), kName, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0400));
    if (!file_) fail("tmpfs");
    return true;
}

int PoolFile::seal() {
    if (!file_) throw std::invalid_argument("the pool file is sealed already");
    if (!mount_) {
        const int seals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
        if (::fcntl(file_.get(), F_ADD_SEALS, seals) != 0) fail("F_ADD_SEALS");
        return file_.release();
    }
    Descriptor reading(::openat(mount_.get(), kName, O_RDONLY | O_CLOEXEC));
    if (!reading) fail("tmpfs");
    file_ = Descriptor();
    // A read-only mount: the file can't be opened for writing by way of /proc either.
    mount_attr attributes{};
    attributes.attr_set = MOUNT_ATTR_RDONLY;
    if (::syscall(SYS_mount_setattr, mount_.get(), "", AT_EMPTY_PATH, &attributes,
                  sizeof attributes) != 0) {
        fail("mount_setattr");
    }
    return reading.release();
}

std::uint64_t fault_in(std::byte *memory, std::uint64_t size_bytes, const StopSign &stop) {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto first = reinterpret_cast<std::uintptr_t>(memory);
    const auto end = first + size_bytes;
    auto at = first / page * page;
    while (at < end && !stop.is_shown()) {
        const auto next = std::min(end, at / kStepBytes * kStepBytes + kStepBytes);
        allocate_pages(reinterpret_cast<void *>(at), next - at);
        at = next;
    }
    return std::max(at, first) - first;
}

}  // namespace gearfall
