// Copies to a device as Python holds them: the host memory lives as long as they may run.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>

#include "device_buffer.hpp"
#include "python_buffer.hpp"

namespace gearfall {

class PythonDeviceCopy {
public:
    // The buffer must outlive this object; `source` can't be written by this process.
    PythonDeviceCopy(DeviceBuffer &buffer, const nanobind::memoryview &source)
        : source_(std::in_place, source) {
        copy_.emplace(buffer, source_->data(), source_->size(), true);
    }
    ~PythonDeviceCopy() { close(); }
    PythonDeviceCopy(const PythonDeviceCopy &) = delete;
    PythonDeviceCopy &operator=(const PythonDeviceCopy &) = delete;

    void copy(std::uint64_t begin, std::uint64_t end) {
        const nanobind::gil_scoped_release released;
        open().copy(begin, end);
    }

    void wait() {
        const nanobind::gil_scoped_release released;
        open().wait();
    }

    std::uint64_t pinned_bytes() const { return copy_ ? copy_->pinned_bytes() : 0; }

    // Waits for all copies, unpins, and lets go of the source. Idempotent.
    void close() {
        {
            const nanobind::gil_scoped_release released;
            copy_.reset();
        }
        source_.reset();
    }

private:
    DeviceCopy &open() {
        if (!copy_) throw std::invalid_argument("the copy is closed");
        return *copy_;
    }

    std::optional<ReadableBytes> source_;
    std::optional<DeviceCopy> copy_;
};

}  // namespace gearfall
