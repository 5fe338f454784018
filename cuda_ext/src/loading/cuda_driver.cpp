#include "cuda_driver.hpp"

#include <dlfcn.h>

#include <string>

#include "errors.hpp"

namespace gearfall::cuda {

namespace {

template <typename Function>
void look_up(void *library, const char *name, Function &into) {
    auto *symbol = ::dlsym(library, name);
    if (symbol == nullptr) throw DeviceError(std::string("the CUDA driver has no ") + name);
    into = reinterpret_cast<Function>(symbol);
}

Driver load(void *library) {
    Driver driver;
#define GEARFALL_LOOK_UP(name, arguments) look_up(library, #name, driver.name);
    GEARFALL_CUDA_DRIVER(GEARFALL_LOOK_UP)
#undef GEARFALL_LOOK_UP
    return driver;
}

}  // namespace

const Driver *Driver::find() {
    // Never closed: the driver keeps threads of its own once it was started.
    static void *const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    static const Driver driver = load(library);
    const auto started = driver.cuInit(0);
    if (started == kNoDevice) return nullptr;
    check(started, "cuInit");
    return &driver;
}

void check(Result code, const char *call) {
    if (code == kSuccess) return;
    throw DeviceError(std::string(call) + " answered CUDA error " + std::to_string(code));
}

int device_count() {
    const auto *driver = Driver::find();
    if (driver == nullptr) return 0;
    int count = 0;
    check(driver->cuDeviceGetCount(&count), "cuDeviceGetCount");
    return count;
}

}  // namespace gearfall::cuda
