// The binding of gearfall._cuda_ext: converts arguments, releases the interpreter lock, maps errors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "device.hpp"
#include "errors.hpp"
#include "page_cache.hpp"
#include "pool_file.hpp"
#include "python_chunk_read.hpp"

namespace nb = nanobind;
using namespace nb::literals;

using gearfall::PoolFile;
using gearfall::PythonChunkRead;
using gearfall::PythonDigest;

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
                std::vector<std::uint64_t> expected, PythonDigest digest) {
    new (self) PythonChunkRead({{path.c_str(), path.size()},
                                offset_bytes,
                                size_bytes,
                                chunk_bytes,
                                threads,
                                direct,
                                ring,
                                populate_threads,
                                std::move(expected)},
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

}  // namespace

NB_MODULE(_cuda_ext, module) {
    module.doc() = "Native reads, device access and kernels; use gearfall.infra.native instead.";
    nb::exception<gearfall::OutOfRange>(module, "OutOfRange", PyExc_ValueError);
    nb::exception<gearfall::Truncated>(module, "Truncated", PyExc_EOFError);
    nb::exception<gearfall::CorruptChunk>(module, "CorruptChunk", PyExc_ValueError);
    nb::exception<gearfall::Cancelled>(module, "Cancelled", PyExc_RuntimeError);
    nb::exception<gearfall::DeviceError>(module, "DeviceError", PyExc_RuntimeError);
    nb::register_exception_translator(raise_io_error);

    nb::class_<PythonChunkRead>(module, "ChunkRead", "A read of a file's range under way.")
        .def("__init__", &start_read, "path"_a, "offset_bytes"_a, "size_bytes"_a, "destination"_a,
             "chunk_bytes"_a, "threads"_a, "direct"_a, "ring"_a, "populate_threads"_a,
             "expected"_a, "digest"_a)
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
    module.def("page_cached_bytes", &page_cached_bytes, "path"_a, "offset_bytes"_a, "size_bytes"_a,
               "Return how many bytes of a range the page cache holds.");
    module.def("cuda_device_count", &gearfall::cuda_device_count,
               nb::call_guard<nb::gil_scoped_release>(),
               "Return how many CUDA devices this process may use.");
    bind_cpu(module);
}
