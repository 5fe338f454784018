// A Python buffer held open for writing while no interpreter lock is held.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace gearfall {

// A writable, contiguous memoryview of bytes; whoever owns them cannot resize or free it meanwhile.
// Made, used for slices and destroyed under the interpreter lock.
class WritableBytes {
public:
    explicit WritableBytes(nanobind::memoryview owner) : owner_(std::move(owner)) {
        if (PyObject_GetBuffer(owner_.ptr(), &view_, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) != 0) {
            throw nanobind::python_error();
        }
    }
    ~WritableBytes() { PyBuffer_Release(&view_); }
    WritableBytes(const WritableBytes &) = delete;
    WritableBytes &operator=(const WritableBytes &) = delete;

    std::byte *data() const { return static_cast<std::byte *>(view_.buf); }
    std::uint64_t size() const { return static_cast<std::uint64_t>(view_.len); }

    // A part of it, as a memoryview that keeps the owner alive.
    nanobind::object slice(std::uint64_t begin, std::uint64_t end) const {
        return owner_[nanobind::slice(begin, end)];
    }

private:
    nanobind::memoryview owner_;
    Py_buffer view_{};
};

}  // namespace gearfall
