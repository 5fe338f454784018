// What can go wrong below the binding; each becomes one Python exception in module.cpp.
#pragma once

#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>

namespace gearfall {

// A range that does not lie inside its file.
struct OutOfRange : std::out_of_range {
    using std::out_of_range::out_of_range;
};

// The file ended before the range did, though its size had promised more.
struct Truncated : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A chunk whose digest is not the expected one.
struct CorruptChunk : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A read that its caller gave up.
struct Cancelled : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A failed system call on a file.
struct IoError : std::runtime_error {
    IoError(int code, std::string file)
        : std::runtime_error(file), error_code(code), path(std::move(file)) {}

    int error_code;
    std::string path;
};

// The accelerator's driver is there and refuses to work.
struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace gearfall
