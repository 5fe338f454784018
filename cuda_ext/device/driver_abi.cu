// Holds cuda_driver.hpp against the toolkit's cuda.h: compiled by nvcc, linked into nothing.
#include <cuda.h>

#include <type_traits>

#include "cuda_driver.hpp"

namespace {

// What a value is to the calling convention: enums are integers, pointers are addresses.
template <typename T, bool IsEnum = std::is_enum<T>::value>
struct Passed {
    using type = T;
};
template <typename T>
struct Passed<T, true> {
    using type = std::make_signed_t<std::underlying_type_t<T>>;
};
template <typename T>
struct Passed<T *, false> {
    using type = void *;
};
template <>
struct Passed<CUipcMemHandle, false> {
    static_assert(sizeof(CUipcMemHandle) == sizeof(gearfall::cuda::IpcHandle));
    static_assert(alignof(CUipcMemHandle) == alignof(gearfall::cuda::IpcHandle));
    using type = gearfall::cuda::IpcHandle;
};

template <typename Function>
struct Call;
template <typename Result, typename... Arguments>
struct Call<Result (*)(Arguments...)> {
    using type = typename Passed<Result>::type (*)(typename Passed<Arguments>::type...);
};

#define GEARFALL_COMPARE(name, arguments)                                                        \
    static_assert(std::is_same_v<Call<decltype(&::name)>::type,                                  \
                                 Call<decltype(gearfall::cuda::Driver::name)>::type>,            \
                  #name);
GEARFALL_CUDA_DRIVER(GEARFALL_COMPARE)

static_assert(gearfall::cuda::kSuccess == CUDA_SUCCESS);
static_assert(gearfall::cuda::kNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(gearfall::cuda::kPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(gearfall::cuda::kReadOnly == CU_MEMHOSTREGISTER_READ_ONLY);
static_assert(gearfall::cuda::kNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(gearfall::cuda::kLazyPeerAccess == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);

}  // namespace
