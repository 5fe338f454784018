// The inner kernels for AVX-512 (F, DQ, BW, VL).
#if defined(__x86_64__)
#include <cstring>

#include "cpu_denormals.hpp"
#include "cpu_half.hpp"
#include "cpu_isa.hpp"  // before the target: what others share must run everywhere
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
// GCC 12 warns of the don't-care operand inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu_avx512_lanes.hpp"
#include "cpu_tiles.hpp"

namespace gearfall::cpu {

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = Tiles<Avx512>::table("avx512");

}  // namespace gearfall::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
