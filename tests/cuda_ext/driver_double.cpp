// A CUDA driver without a device, for tests: built as libcuda.so.1 and found before any real one.
//
// Device memory is named shared memory, so that handles work between processes. Copies happen as
// late as the real driver's may: when their stream is waited for. Wrong use is an error or a count.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_driver.hpp"

using namespace gearfall::cuda;

namespace {

constexpr Result kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kInvalidDevice = 101;
constexpr Result kInvalidContext = 201, kAlreadyRegistered = 712, kNotRegistered = 713;
constexpr std::size_t kCapacity = std::size_t{256} << 20;

struct Allocation {
    std::size_t size;
    std::string name;
    bool is_owned;
};
struct Copy {
    DevicePointer to;
    const void *from;
    std::size_t size;
};

std::mutex mutex;
bool initialized = false;
int contexts = 0;
thread_local int current = 0;
int numbers = 0;
std::map<DevicePointer, Allocation> allocations;
std::map<std::uintptr_t, std::size_t> registrations;
std::map<Stream, std::vector<Copy>> streams;
std::map<std::string, Result> refusals;

std::size_t allocated() {
    std::size_t sum = 0;
    for (const auto &[address, allocation] : allocations) sum += allocation.size;
    return sum;
}

bool holds(DevicePointer address, std::size_t size) {
    const auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return false;
    const auto &[start, allocation] = *std::prev(after);
    return address - start <= allocation.size && size <= allocation.size - (address - start);
}

Result enter(const char *name, bool needs_context = true) {
    const auto refusal = refusals.find(name);
    if (refusal != refusals.end()) return refusal->second;
    if (!initialized) return kNotInitialized;
    return needs_context && current == 0 ? kInvalidContext : kSuccess;
}

Result map_shared(DevicePointer *address, const std::string &name, std::size_t size, bool create) {
    const int flags = O_RDWR | (create ? O_CREAT | O_EXCL : 0);
    const int descriptor = ::shm_open(name.c_str(), flags, 0600);
    if (descriptor < 0) return kInvalidValue;
    if (create && ::ftruncate(descriptor, static_cast<off_t>(size)) != 0) std::abort();
    if (!create) size = static_cast<std::size_t>(::lseek(descriptor, 0, SEEK_END));
    void *memory =
        ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    ::close(descriptor);
    if (memory == MAP_FAILED) return kOutOfMemory;
    *address = reinterpret_cast<std::uintptr_t>(memory);
    allocations[*address] = {size, name, create};
    return kSuccess;
}

Result unmap_shared(DevicePointer address, bool is_owned) {
    const auto found = allocations.find(address);
    if (found == allocations.end() || found->second.is_owned != is_owned) return kInvalidValue;
    ::munmap(reinterpret_cast<void *>(address), found->second.size);
    if (is_owned) ::shm_unlink(found->second.name.c_str());
    allocations.erase(found);
    return kSuccess;
}

}  // namespace

#define ENTER(...)                                                 \
    const std::lock_guard<std::mutex> lock(mutex);                 \
    if (const Result refused = enter(__VA_ARGS__)) return refused

extern "C" {

// What is held at this moment: 0 when everything was given back.
std::size_t double_held() {
    const std::lock_guard<std::mutex> lock(mutex);
    return allocations.size() + registrations.size() + streams.size() +
           static_cast<std::size_t>(contexts);
}

// Makes an entry point answer an error; 0 makes it work again.
void double_refuse(const char *name, Result code) {
    const std::lock_guard<std::mutex> lock(mutex);
    refusals.erase(name);
    if (code != kSuccess) refusals[name] = code;
}

Result cuInit(unsigned) {
    const std::lock_guard<std::mutex> lock(mutex);
    initialized = true;
    return enter("cuInit", false);
}

Result cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount", false);
    *count = 1;
    return kSuccess;
}

Result cuDeviceGet(Device *device, int ordinal) {
    ENTER("cuDeviceGet", false);
    *device = ordinal;
    return ordinal == 0 ? kSuccess : kInvalidDevice;
}

Result cuDevicePrimaryCtxRetain(Context *context, Device) {
    ENTER("cuDevicePrimaryCtxRetain", false);
    ++contexts;
    *context = &contexts;
    return kSuccess;
}

Result cuDevicePrimaryCtxRelease_v2(Device) {
    ENTER("cuDevicePrimaryCtxRelease_v2", false);
    return contexts-- > 0 ? kSuccess : kInvalidContext;
}

Result cuCtxPushCurrent_v2(Context) {
    ENTER("cuCtxPushCurrent_v2", false);
    if (contexts == 0) return kInvalidContext;
    ++current;
    return kSuccess;
}

Result cuCtxPopCurrent_v2(Context *) {
    ENTER("cuCtxPopCurrent_v2");
    --current;
    return kSuccess;
}

Result cuMemAlloc_v2(DevicePointer *address, std::size_t size) {
    ENTER("cuMemAlloc_v2");
    if (size > kCapacity - allocated()) return kOutOfMemory;
    return map_shared(
        address, "/gearfall-double-" + std::to_string(::getpid()) + "-" + std::to_string(++numbers),
        size, true);
}

Result cuMemFree_v2(DevicePointer address) {
    ENTER("cuMemFree_v2");
    return unmap_shared(address, true);
}

Result cuMemHostRegister_v2(void *host, std::size_t size, unsigned) {
    ENTER("cuMemHostRegister_v2");
    const auto begin = reinterpret_cast<std::uintptr_t>(host);
    for (const auto &[other, length] : registrations) {
        if (begin < other + length && other < begin + size) return kAlreadyRegistered;
    }
    registrations[begin] = size;
    return kSuccess;
}

Result cuMemHostUnregister(void *host) {
    ENTER("cuMemHostUnregister");
    return registrations.erase(reinterpret_cast<std::uintptr_t>(host)) == 1 ? kSuccess
                                                                           : kNotRegistered;
}

Result cuMemcpyHtoDAsync_v2(DevicePointer to, const void *from, std::size_t size, Stream stream) {
    ENTER("cuMemcpyHtoDAsync_v2");
    if (!holds(to, size) || streams.count(stream) == 0) return kInvalidValue;
    // As with a device: memory from more than one registration can't be copied at once.
    const auto begin = reinterpret_cast<std::uintptr_t>(from);
    for (const auto &[other, length] : registrations) {
        const bool touches = begin < other + length && other < begin + size;
        const bool inside = begin >= other && begin + size <= other + length;
        if (touches && !inside) return kInvalidValue;
    }
    streams[stream].push_back({to, from, size});
    return kSuccess;
}

Result cuMemcpyDtoH_v2(void *to, DevicePointer from, std::size_t size) {
    ENTER("cuMemcpyDtoH_v2");
    if (!holds(from, size)) return kInvalidValue;
    std::memcpy(to, reinterpret_cast<const void *>(from), size);
    return kSuccess;
}

Result cuStreamCreate(Stream *stream, unsigned) {
    ENTER("cuStreamCreate");
    *stream = reinterpret_cast<Stream>(static_cast<std::uintptr_t>(++numbers));
    streams[*stream];
    return kSuccess;
}

Result cuStreamSynchronize(Stream stream) {
    ENTER("cuStreamSynchronize");
    if (streams.count(stream) == 0) return kInvalidValue;
    for (const auto &copy : streams[stream]) {
        std::memcpy(reinterpret_cast<void *>(copy.to), copy.from, copy.size);
    }
    streams[stream].clear();
    return kSuccess;
}

Result cuStreamDestroy_v2(Stream stream) {
    ENTER("cuStreamDestroy_v2");
    return streams.erase(stream) == 1 ? kSuccess : kInvalidValue;
}

Result cuIpcGetMemHandle(IpcHandle *handle, DevicePointer address) {
    ENTER("cuIpcGetMemHandle");
    if (allocations.count(address) == 0) return kInvalidValue;
    std::snprintf(handle->bytes, sizeof handle->bytes, "%s", allocations[address].name.c_str());
    return kSuccess;
}

Result cuIpcOpenMemHandle_v2(DevicePointer *address, IpcHandle handle, unsigned) {
    ENTER("cuIpcOpenMemHandle_v2");
    handle.bytes[sizeof handle.bytes - 1] = '\0';
    return map_shared(address, handle.bytes, 0, false);
}

Result cuIpcCloseMemHandle(DevicePointer address) {
    ENTER("cuIpcCloseMemHandle");
    return unmap_shared(address, false);
}

}  // extern "C"
