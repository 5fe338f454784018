// A regular file opened for reading, with its size as it was at opening.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gearfall {

class File {
public:
    enum class Mode { kBuffered, kDirect };

    // Throws IoError, and std::invalid_argument for what is not a regular file.
    explicit File(const std::string &path, Mode mode = Mode::kBuffered);
    ~File();
    File(const File &) = delete;
    File &operator=(const File &) = delete;

    const std::string &path() const { return path_; }
    std::uint64_t size() const { return size_; }
    int descriptor() const { return descriptor_; }

    // False where direct I/O was asked for and the file system has none.
    bool is_direct() const { return direct_; }

    // One pread, repeated when interrupted; returns the bytes read, or -1 with errno set.
    std::int64_t read_some(std::byte *into, std::uint64_t length, std::uint64_t offset) const;

private:
    std::string path_;
    int descriptor_ = -1;
    std::uint64_t size_ = 0;
    bool direct_ = false;
};

// Throws OutOfRange unless [offset, offset + size) lies inside the file; never overflows.
void check_range(const File &file, std::int64_t offset, std::int64_t size);

}  // namespace gearfall
