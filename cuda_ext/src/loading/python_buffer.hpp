// Python buffers held open while no interpreter lock is held.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace gearfall {

// Made and destroyed under the interpreter lock.
class BufferView {
public:
    BufferView(const nanobind::memoryview &owner, int flags) {
        if (PyObject_GetBuffer(owner.ptr(), &view_, flags) != 0) throw nanobind::python_error();
    }
    ~BufferView() { PyBuffer_Release(&view_); }
    BufferView(const BufferView &) = delete;
    BufferView &operator=(const BufferView &) = delete;

    const Py_buffer &get() const { return view_; }

private:
    Py_buffer view_{};
};

// A writable, contiguous memoryview of bytes; whoever owns them cannot resize or free it meanwhile.
// Made, used for slices and destroyed under the interpreter lock.
class WritableBytes {
public:
    explicit WritableBytes(nanobind::memoryview owner)
        : owner_(std::move(owner)), view_(owner_, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) {}

    std::byte *data() const { return static_cast<std::byte *>(view_.get().buf); }
    std::uint64_t size() const { return static_cast<std::uint64_t>(view_.get().len); }

    // A part of it, as a memoryview that keeps the owner alive.
    nanobind::object slice(std::uint64_t begin, std::uint64_t end) const {
        return owner_[nanobind::slice(begin, end)];
    }

private:
    nanobind::memoryview owner_;
    BufferView view_;
};

// The same for reading only.
class ReadableBytes {
public:
    explicit ReadableBytes(const nanobind::memoryview &owner) : view_(owner, PyBUF_C_CONTIGUOUS) {}

    const std::byte *data() const { return static_cast<const std::byte *>(view_.get().buf); }
    std::uint64_t size() const { return static_cast<std::uint64_t>(view_.get().len); }

private:
    BufferView view_;
};

}  // namespace gearfall
