#include "device.hpp"

#include <dlfcn.h>

#include <string>

#include "errors.hpp"

namespace gearfall {

namespace {

// Two entry points of the driver's C interface, declared here so that no toolkit is needed.
using CuInit = int (*)(unsigned int);
using CuDeviceGetCount = int (*)(int *);
constexpr int kSuccess = 0;
constexpr int kNoDevice = 100;

template <typename Function>
Function find(void *library, const char *name) {
    auto *symbol = ::dlsym(library, name);
    if (symbol == nullptr) throw DeviceError(std::string("the CUDA driver has no ") + name);
    return reinterpret_cast<Function>(symbol);
}

void check(int code, const char *call) {
    if (code == kSuccess) return;
    throw DeviceError(std::string(call) + " answered CUDA error " + std::to_string(code));
}

}  // namespace

int cuda_device_count() {
    // Never closed: the driver keeps threads of its own once it was started.
    static void *const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return 0;
    const int started = find<CuInit>(library, "cuInit")(0);
    if (started == kNoDevice) return 0;
    check(started, "cuInit");
    int count = 0;
    check(find<CuDeviceGetCount>(library, "cuDeviceGetCount")(&count), "cuDeviceGetCount");
    return count;
}

}  // namespace gearfall
