// The binding of gearfall._cuda_ext: converts arguments, releases the interpreter lock, maps errors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "cuda_driver.hpp"
#include "device_buffer.hpp"
#include "errors.hpp"
#include "page_cache.hpp"
#include "pool_file.hpp"
#include "python_chunk_read.hpp"
#include "python_device_copy.hpp"

namespace nb = nanobind;
using namespace nb::literals;

using gearfall::DeviceBuffer;
using gearfall::PoolFile;
using gearfall::PythonChunkRead;
using gearfall::PythonDeviceCopy;
using gearfall::PythonDigest;
using gearfall::StopSign;

void bind_cpu(nb::module_ &module);

namespace {

void raise_io_error(const std::exception_ptr &failure, void *) {
    try {
        std::rethrow_exception(failure);
    } catch (const gearfall::IoError &error) {
        errno = error.error_code;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
    }
}

void start_read(PythonChunkRead *self, const nb::bytes &path, std::int64_t offset_bytes,
                std::int64_t size_bytes, nb::memoryview destination, std::int64_t chunk_bytes,
                int threads, bool direct, bool ring, int populate_threads,
                std::vector<std::uint64_t> expected, PythonDigest digest,
                DeviceBuffer *device_buffer) {
    new (self) PythonChunkRead({{path.c_str(), path.size()},
                                offset_bytes,
                                size_bytes,
                                chunk_bytes,
                                threads,
                                direct,
                                ring,
                                populate_threads,
                                std::move(expected),
                                device_buffer},
                               std::move(destination), std::move(digest));
}

std::uint64_t wait_beyond(const PythonChunkRead &self, std::uint64_t seen) {
    const auto read = self.read();
    const nb::gil_scoped_release released;
    return read->wait_beyond(seen);
}

std::vector<std::uint64_t> finish(const PythonChunkRead &self) {
    const auto read = self.read();
    const nb::gil_scoped_release released;
    return read->finish();
}

std::uint64_t page_cached_bytes(const nb::bytes &path, std::int64_t offset_bytes,
                                std::int64_t size_bytes) {
    const std::string file(path.c_str(), path.size());
    const nb::gil_scoped_release released;
    return gearfall::page_cached_bytes(file, offset_bytes, size_bytes);
}

std::uint64_t fault_in(nb::memoryview memory, const StopSign &stop) {
    const gearfall::WritableBytes bytes(std::move(memory));
    const nb::gil_scoped_release released;
    return gearfall::fault_in(bytes.data(), bytes.size(), stop);
}

void open_device_buffer(DeviceBuffer *self, int device, std::int64_t size_bytes,
                        const std::optional<nb::bytes> &ipc_handle) {
    if (!ipc_handle) {
        const nb::gil_scoped_release released;
        new (self) DeviceBuffer(device, size_bytes);
    } else {
        const std::string handle(ipc_handle->c_str(), ipc_handle->size());
        const nb::gil_scoped_release released;
        new (self) DeviceBuffer(device, size_bytes, handle);
    }
}

nb::bytes ipc_handle(const DeviceBuffer &self) {
    const auto handle = self.ipc_handle();
    return nb::bytes(handle.data(), handle.size());
}

std::uint64_t copy_to_device(DeviceBuffer &self, const nb::memoryview &source) {
    const gearfall::ReadableBytes bytes(source);
    const nb::gil_scoped_release released;
    return gearfall::copy_to_device(self, bytes.data(), bytes.size());
}

void read_device(const DeviceBuffer &self, std::uint64_t offset_bytes,
                 nb::memoryview destination) {
    const gearfall::WritableBytes bytes(std::move(destination));
    const nb::gil_scoped_release released;
    self.read(offset_bytes, bytes.data(), bytes.size());
}

}  // namespace

NB_MODULE(_cuda_ext, module) {
    module.doc() = "Native reads, device access and kernels; use gearfall.infra.memory.native instead.";
    nb::exception<gearfall::OutOfRange>(module, "OutOfRange", PyExc_ValueError);
    nb::exception<gearfall::Truncated>(module, "Truncated", PyExc_EOFError);
    nb::exception<gearfall::CorruptChunk>(module, "CorruptChunk", PyExc_ValueError);
    nb::exception<gearfall::Cancelled>(module, "Cancelled", PyExc_RuntimeError);
    nb::exception<gearfall::DeviceError>(module, "DeviceError", PyExc_RuntimeError);
    nb::register_exception_translator(raise_io_error);

    nb::class_<PythonChunkRead>(module, "ChunkRead", "A read of a file's range under way.")
        .def("__init__", &start_read, "path"_a, "offset_bytes"_a, "size_bytes"_a, "destination"_a,
             "chunk_bytes"_a, "threads"_a, "direct"_a, "ring"_a, "populate_threads"_a,
             "expected"_a, "digest"_a, "device_buffer"_a.none(), nb::keep_alive<1, 13>())
        .def_prop_ro("method", [](const PythonChunkRead &self) { return self.read()->method(); })
        .def("wait_beyond", &wait_beyond, "seen"_a,
             "Wait until more than `seen` chunks are verified or the read is over.")
        .def("cancel", [](const PythonChunkRead &self) { self.read()->cancel(); })
        .def("finish", &finish, "Wait for the end; return one digest for each chunk.")
        .def("close", &PythonChunkRead::close, "Cancel, and let go of the destination.");
    nb::class_<PoolFile>(module, "PoolFile", "A file of shared memory that can be sealed.")
        .def(nb::init<std::int64_t>(), "size_bytes"_a)
        .def_prop_ro("kind", &PoolFile::kind)
        .def("fileno", &PoolFile::descriptor)
        .def("seal", &PoolFile::seal, "Return a descriptor to read it by, for good unchanged.");
    nb::class_<StopSign>(module, "StopSign", "Shown to end what another thread does.")
        .def(nb::init<>())
        .def("show", &StopSign::show);
    module.def("fault_in", &fault_in, "memory"_a, "stop"_a,
               "Allocate a mapping's pages until done or stopped; return how many bytes are there.");
    module.def("page_cached_bytes", &page_cached_bytes, "path"_a, "offset_bytes"_a, "size_bytes"_a,
               "Return how many bytes of a range the page cache holds.");
    module.def("cuda_device_count", &gearfall::cuda::device_count,
               nb::call_guard<nb::gil_scoped_release>(),
               "Return how many CUDA devices this process may use.");
    nb::class_<DeviceBuffer>(module, "DeviceBuffer", "Memory on a CUDA device.")
        .def("__init__", &open_device_buffer, "device"_a, "size_bytes"_a, "ipc_handle"_a.none())
        .def_prop_ro("address", &DeviceBuffer::address)
        .def("ipc_handle", &ipc_handle, "Return what another process opens this memory by.")
        .def("copy_from", &copy_to_device, "source"_a,
             "Copy to the front and wait; return the bytes that could be pinned.")
        .def("read", &read_device, "offset_bytes"_a, "destination"_a);
    nb::class_<PythonDeviceCopy>(module, "DeviceCopy", "Host memory on its way to a device.")
        .def(nb::init<DeviceBuffer &, const nb::memoryview &>(), "buffer"_a, "source"_a,
             nb::keep_alive<1, 2>())
        .def("copy", &PythonDeviceCopy::copy, "begin_bytes"_a, "end_bytes"_a,
             "Start the copy of a range to the same place of the buffer.")
        .def("wait", &PythonDeviceCopy::wait, "Wait until all that was started has arrived.")
        .def_prop_ro("pinned_bytes", &PythonDeviceCopy::pinned_bytes)
        .def("close", &PythonDeviceCopy::close, "Wait for all copies and unpin.");
    bind_cpu(module);
}
