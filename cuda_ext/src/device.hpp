// The CUDA driver, found at run time: one wheel serves machines with and without it.
#pragma once

namespace gearfall {

// Devices this process may use; 0 where there is no driver or no device. Starts the driver in
// this process, after which it must not fork. Throws DeviceError where the driver refuses.
int cuda_device_count();

}  // namespace gearfall
