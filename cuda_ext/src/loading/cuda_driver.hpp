// The CUDA driver, found at run time: one wheel serves machines with and without it.
//
// Its C interface is declared here, so that no toolkit is needed to build;
// cuda_ext/device/driver_abi.cu holds these declarations against the toolkit's own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gearfall::cuda {

using Result = int;
using Device = int;
using DevicePointer = unsigned long long;
using Context = void *;
using Stream = void *;

// Names device memory to other processes.
struct IpcHandle {
    char bytes[64];
};

constexpr Result kSuccess = 0;
constexpr Result kNoDevice = 100;
constexpr unsigned kPortable = 1;
constexpr unsigned kReadOnly = 8;
constexpr unsigned kNonBlocking = 1;
constexpr unsigned kLazyPeerAccess = 1;

// Every entry point that is used, by the name that it has in the library.
#define GEARFALL_CUDA_DRIVER(entry)                                                              \
    entry(cuInit, (unsigned))                                                                    \
    entry(cuDeviceGetCount, (int *))                                                             \
    entry(cuDeviceGet, (Device *, int))                                                          \
    entry(cuDevicePrimaryCtxRetain, (Context *, Device))                                         \
    entry(cuDevicePrimaryCtxRelease_v2, (Device))                                                \
    entry(cuCtxPushCurrent_v2, (Context))                                                        \
    entry(cuCtxPopCurrent_v2, (Context *))                                                       \
    entry(cuMemAlloc_v2, (DevicePointer *, std::size_t))                                         \
    entry(cuMemFree_v2, (DevicePointer))                                                         \
    entry(cuMemHostRegister_v2, (void *, std::size_t, unsigned))                                 \
    entry(cuMemHostUnregister, (void *))                                                         \
    entry(cuMemcpyHtoDAsync_v2, (DevicePointer, const void *, std::size_t, Stream))              \
    entry(cuMemcpyDtoH_v2, (void *, DevicePointer, std::size_t))                                 \
    entry(cuStreamCreate, (Stream *, unsigned))                                                  \
    entry(cuStreamSynchronize, (Stream))                                                         \
    entry(cuStreamDestroy_v2, (Stream))                                                          \
    entry(cuIpcGetMemHandle, (IpcHandle *, DevicePointer))                                       \
    entry(cuIpcOpenMemHandle_v2, (DevicePointer *, IpcHandle, unsigned))                         \
    entry(cuIpcCloseMemHandle, (DevicePointer))

struct Driver {
#define GEARFALL_DECLARE(name, arguments) Result(*name) arguments = nullptr;
    GEARFALL_CUDA_DRIVER(GEARFALL_DECLARE)
#undef GEARFALL_DECLARE

    // The driver, started in this process, which must not fork any more; null where there is no
    // driver or no device. Throws DeviceError where the driver is there and refuses.
    static const Driver *find();
};

// Throws DeviceError unless `code` says success.
void check(Result code, const char *call);

// Devices this process may use; 0 without a driver. Starts the driver, see Driver::find.
int device_count();

}  // namespace gearfall::cuda
