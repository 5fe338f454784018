#include "device_buffer.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "errors.hpp"

namespace gearfall {

namespace {

// A multiple of every page size, so that no page is pinned twice.
constexpr std::uint64_t kSliceBytes = std::uint64_t{64} << 20;

}  // namespace

// Makes the device's context the calling thread's for as long as it lives.
class DeviceBuffer::Scope {
public:
    explicit Scope(const DeviceBuffer &buffer) : driver_(*buffer.driver_) {
        cuda::check(driver_.cuCtxPushCurrent_v2(buffer.context_), "cuCtxPushCurrent");
    }
    ~Scope() {
        cuda::Context last = nullptr;
        driver_.cuCtxPopCurrent_v2(&last);
    }
    Scope(const Scope &) = delete;
    Scope &operator=(const Scope &) = delete;

private:
    const cuda::Driver &driver_;
};

DeviceBuffer::DeviceBuffer(int device, std::int64_t size_bytes) {
    open(device, size_bytes);
    try {
        const Scope scope(*this);
        cuda::check(driver_->cuMemAlloc_v2(&address_, size_), "cuMemAlloc");
    } catch (...) {
        driver_->cuDevicePrimaryCtxRelease_v2(device_);
        throw;
    }
}

DeviceBuffer::DeviceBuffer(int device, std::int64_t size_bytes, const std::string &ipc_handle) {
    cuda::IpcHandle handle{};
    if (ipc_handle.size() != sizeof handle.bytes) {
        throw std::invalid_argument("a handle of device memory has 64 bytes");
    }
    std::memcpy(handle.bytes, ipc_handle.data(), sizeof handle.bytes);
    open(device, size_bytes);
    is_opened_ = true;
    try {
        const Scope scope(*this);
        cuda::check(driver_->cuIpcOpenMemHandle_v2(&address_, handle, cuda::kLazyPeerAccess),
                    "cuIpcOpenMemHandle");
    } catch (...) {
        driver_->cuDevicePrimaryCtxRelease_v2(device_);
        throw;
    }
}

void DeviceBuffer::open(int device, std::int64_t size_bytes) {
    if (size_bytes < 1) throw std::invalid_argument("a device buffer of less than one byte");
    driver_ = cuda::Driver::find();
    if (driver_ == nullptr) throw DeviceError("there is no CUDA device");
    ordinal_ = device;
    size_ = static_cast<std::uint64_t>(size_bytes);
    cuda::check(driver_->cuDeviceGet(&device_, device), "cuDeviceGet");
    cuda::check(driver_->cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

DeviceBuffer::~DeviceBuffer() {
    // In a process that ends the driver may be gone already: its refusals have no reader.
    if (driver_->cuCtxPushCurrent_v2(context_) == cuda::kSuccess) {
        is_opened_ ? driver_->cuIpcCloseMemHandle(address_) : driver_->cuMemFree_v2(address_);
        cuda::Context last = nullptr;
        driver_->cuCtxPopCurrent_v2(&last);
    }
    driver_->cuDevicePrimaryCtxRelease_v2(device_);
}

std::string DeviceBuffer::ipc_handle() const {
    const Scope scope(*this);
    cuda::IpcHandle handle{};
    cuda::check(driver_->cuIpcGetMemHandle(&handle, address_), "cuIpcGetMemHandle");
    return {handle.bytes, sizeof handle.bytes};
}

void DeviceBuffer::read(std::uint64_t offset, std::byte *into, std::uint64_t length) const {
    check_range(offset, length);
    const Scope scope(*this);
    cuda::check(driver_->cuMemcpyDtoH_v2(into, address_ + offset, length), "cuMemcpyDtoH");
}

void DeviceBuffer::check_range(std::uint64_t offset, std::uint64_t length) const {
    if (offset <= size_ && length <= size_ - offset) return;
    throw std::invalid_argument("the device buffer holds " + std::to_string(size_) + " bytes, not " +
                                std::to_string(length) + " at " + std::to_string(offset));
}

DeviceCopy::DeviceCopy(DeviceBuffer &buffer, const std::byte *host, std::uint64_t size,
                       bool read_only)
    : buffer_(buffer), host_(host), size_(size),
      flags_(cuda::kPortable | (read_only ? cuda::kReadOnly : 0U)),
      slices_(size / kSliceBytes + (size % kSliceBytes != 0), Slice::kNew) {
    buffer.check_range(0, size);
    const DeviceBuffer::Scope scope(buffer);
    cuda::check(buffer.driver_->cuStreamCreate(&stream_, cuda::kNonBlocking), "cuStreamCreate");
}

DeviceCopy::~DeviceCopy() {
    const auto &driver = *buffer_.driver_;
    if (driver.cuCtxPushCurrent_v2(buffer_.context_) != cuda::kSuccess) return;
    driver.cuStreamSynchronize(stream_);
    for (std::uint64_t i = 0; i < slices_.size(); ++i) {
        if (slices_[i] != Slice::kPinned) continue;
        driver.cuMemHostUnregister(const_cast<std::byte *>(host_ + i * kSliceBytes));
    }
    driver.cuStreamDestroy_v2(stream_);
    cuda::Context last = nullptr;
    driver.cuCtxPopCurrent_v2(&last);
}

void DeviceCopy::copy(std::uint64_t begin, std::uint64_t end) {
    if (begin > end || end > size_) throw std::invalid_argument("a copy past the host memory");
    const DeviceBuffer::Scope scope(buffer_);
    const std::lock_guard<std::mutex> lock(mutex_);
    // A copy may not run from one registration into another.
    while (begin < end) {
        const auto last = std::min(end, (begin / kSliceBytes + 1) * kSliceBytes);
        pin(begin / kSliceBytes);
        cuda::check(buffer_.driver_->cuMemcpyHtoDAsync_v2(buffer_.address_ + begin, host_ + begin,
                                                          last - begin, stream_),
                    "cuMemcpyHtoDAsync");
        begin = last;
    }
}

void DeviceCopy::pin(std::uint64_t index) {
    if (slices_[index] != Slice::kNew) return;
    const auto at = index * kSliceBytes;
    const auto length = std::min(kSliceBytes, size_ - at);
    const auto answer = buffer_.driver_->cuMemHostRegister_v2(
        const_cast<std::byte *>(host_ + at), length, flags_);
    slices_[index] = answer == cuda::kSuccess ? Slice::kPinned : Slice::kRefused;
    if (answer == cuda::kSuccess) pinned_bytes_ += length;
}

void DeviceCopy::wait() {
    const DeviceBuffer::Scope scope(buffer_);
    cuda::check(buffer_.driver_->cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

std::uint64_t copy_to_device(DeviceBuffer &buffer, const std::byte *host, std::uint64_t size) {
    DeviceCopy copy(buffer, host, size, true);
    copy.copy(0, size);
    copy.wait();
    return copy.pinned_bytes();
}

}  // namespace gearfall
