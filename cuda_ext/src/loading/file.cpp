#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "errors.hpp"

namespace gearfall {

namespace {

// Linux moves at most 0x7ffff000 bytes a call; a power of two below keeps direct reads aligned.
constexpr std::uint64_t kLargestRead = std::uint64_t{1} << 30;

// O_NONBLOCK so that a named pipe in a checkpoint's place cannot hang the open.
constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;

}  // namespace

File::File(const std::string &path, Mode mode) : path_(path) {
    if (path.find('\0') != std::string::npos) throw std::invalid_argument("a path holds a NUL");
    if (mode == Mode::kDirect) descriptor_ = ::open(path.c_str(), kFlags | O_DIRECT);
    direct_ = descriptor_ >= 0;
    if (!direct_) descriptor_ = ::open(path.c_str(), kFlags);
    if (descriptor_ < 0) throw IoError(errno, path);
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) {
        const int code = errno;
        ::close(descriptor_);
        throw IoError(code, path);
    }
    if (!S_ISREG(status.st_mode)) {
        ::close(descriptor_);
        throw std::invalid_argument("not a regular file: " + path);
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
}

File::~File() { ::close(descriptor_); }

std::int64_t File::read_some(std::byte *into, std::uint64_t length, std::uint64_t offset) const {
    const auto wanted = static_cast<std::size_t>(std::min(length, kLargestRead));
    ssize_t count = 0;
    do {
        count = ::pread(descriptor_, into, wanted, static_cast<off_t>(offset));
    } while (count < 0 && errno == EINTR);
    return count;
}

void check_range(const File &file, std::int64_t offset, std::int64_t size) {
    const bool inside = offset >= 0 && size >= 0 &&
                        static_cast<std::uint64_t>(offset) <= file.size() &&
                        static_cast<std::uint64_t>(size) <=
                            file.size() - static_cast<std::uint64_t>(offset);
    if (inside) return;
    throw OutOfRange("offset " + std::to_string(offset) + ", size " + std::to_string(size) +
                     " lie outside " + file.path() + " of " + std::to_string(file.size()) +
                     " bytes");
}

}  // namespace gearfall
