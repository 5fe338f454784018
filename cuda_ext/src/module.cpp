// The binding of gearfall._cuda_ext: converts arguments, releases the interpreter lock, maps errors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "chunk_reader.hpp"
#include "device.hpp"
#include "errors.hpp"
#include "page_cache.hpp"
#include "python_buffer.hpp"

namespace nb = nanobind;
using namespace nb::literals;

void bind_cpu(nb::module_ &module);

namespace {

using PythonDigest = nb::typed<nb::callable, std::uint64_t(nb::memoryview)>;

void raise_io_error(const std::exception_ptr &failure, void *) {
    try {
        std::rethrow_exception(failure);
    } catch (const gearfall::IoError &error) {
        errno = error.error_code;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
    }
}

std::vector<std::uint64_t> read_chunks(const nb::bytes &path, std::int64_t offset_bytes,
                                       std::int64_t size_bytes, nb::memoryview destination,
                                       std::int64_t chunk_bytes, int threads, bool direct,
                                       const PythonDigest &digest) {
    const gearfall::ReadRequest request{{path.c_str(), path.size()}, offset_bytes, size_bytes,
                                        chunk_bytes, threads, direct};
    const gearfall::WritableBytes bytes(std::move(destination));
    const nb::gil_scoped_release released;
    return gearfall::read_chunks(
        request, bytes.data(), bytes.size(), [&](std::uint64_t begin, std::uint64_t end) {
            const nb::gil_scoped_acquire held;
            return nb::cast<std::uint64_t>(digest(bytes.slice(begin, end)));
        });
}

std::uint64_t page_cached_bytes(const nb::bytes &path, std::int64_t offset_bytes,
                             std::int64_t size_bytes) {
    const std::string file(path.c_str(), path.size());
    const nb::gil_scoped_release released;
    return gearfall::page_cached_bytes(file, offset_bytes, size_bytes);
}

}  // namespace

NB_MODULE(_cuda_ext, module) {
    module.doc() = "Native reads, device access and kernels; use gearfall.infra.native instead.";
    nb::exception<gearfall::OutOfRange>(module, "OutOfRange", PyExc_ValueError);
    nb::exception<gearfall::Truncated>(module, "Truncated", PyExc_EOFError);
    nb::exception<gearfall::DeviceError>(module, "DeviceError", PyExc_RuntimeError);
    nb::register_exception_translator(raise_io_error);

    module.def("read_chunks", &read_chunks, "path"_a, "offset_bytes"_a, "size_bytes"_a,
               "destination"_a, "chunk_bytes"_a, "threads"_a, "direct"_a, "digest"_a,
               "Read a range of a file into a buffer; return one digest for each chunk.");
    module.def("page_cached_bytes", &page_cached_bytes, "path"_a, "offset_bytes"_a, "size_bytes"_a,
               "Return how many bytes of a range the page cache holds.");
    module.def("cuda_device_count", &gearfall::cuda_device_count,
               nb::call_guard<nb::gil_scoped_release>(),
               "Return how many CUDA devices this process may use.");
    bind_cpu(module);
}
