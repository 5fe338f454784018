// Memory on a device and the way of chunks into it, on a stream of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_driver.hpp"

namespace gearfall {

// Device memory that this process allocated, or opened by another process's handle.
class DeviceBuffer {
public:
    // Throws DeviceError (no such device, no room) and std::invalid_argument.
    DeviceBuffer(int device, std::int64_t size_bytes);
    DeviceBuffer(int device, std::int64_t size_bytes, const std::string &ipc_handle);
    ~DeviceBuffer();
    DeviceBuffer(const DeviceBuffer &) = delete;
    DeviceBuffer &operator=(const DeviceBuffer &) = delete;

    std::uint64_t address() const { return address_; }
    std::uint64_t size() const { return size_; }
    int device() const { return ordinal_; }

    // 64 bytes by which another process opens this memory while this one keeps it.
    std::string ipc_handle() const;

    // Copies to the host and waits. Throws std::invalid_argument for a range that is not here.
    void read(std::uint64_t offset, std::byte *into, std::uint64_t length) const;

private:
    friend class DeviceCopy;
    class Scope;
    void open(int device, std::int64_t size_bytes);
    void check_range(std::uint64_t offset, std::uint64_t length) const;

    const cuda::Driver *driver_ = nullptr;
    cuda::Device device_ = 0;
    cuda::Context context_ = nullptr;
    cuda::DevicePointer address_ = 0;
    std::uint64_t size_ = 0;
    int ordinal_ = 0;
    bool is_opened_ = false;
};

// Copies parts of one piece of host memory to the same offsets of a buffer.
//
// Host memory is pinned slice by slice, when its first part is copied: pinning the next slice
// overlaps the copies of the last. May be used by several threads.
class DeviceCopy {
public:
    // The host memory must outlive this object. `read_only`: it can't be written by this process.
    DeviceCopy(DeviceBuffer &buffer, const std::byte *host, std::uint64_t size, bool read_only);
    // Waits for all copies and unpins.
    ~DeviceCopy();
    DeviceCopy(const DeviceCopy &) = delete;
    DeviceCopy &operator=(const DeviceCopy &) = delete;

    // Starts the copy of [begin, end). Throws DeviceError.
    void copy(std::uint64_t begin, std::uint64_t end);

    // Waits until all that was started has arrived. Throws DeviceError.
    void wait();

    // Bytes that the driver pinned; it copies others by way of memory of its own, more slowly.
    std::uint64_t pinned_bytes() const { return pinned_bytes_; }

private:
    void pin(std::uint64_t index);

    DeviceBuffer &buffer_;
    const std::byte *host_;
    std::uint64_t size_;
    unsigned flags_;
    cuda::Stream stream_ = nullptr;
    std::mutex mutex_;
    // Of each slice of the host memory: untouched, pinned, or refused by the driver.
    enum class Slice : char { kNew, kPinned, kRefused };
    std::vector<Slice> slices_;
    std::uint64_t pinned_bytes_ = 0;
};

// Copies host memory to the buffer's front and waits; returns the bytes that could be pinned.
std::uint64_t copy_to_device(DeviceBuffer &buffer, const std::byte *host, std::uint64_t size);

}  // namespace gearfall
