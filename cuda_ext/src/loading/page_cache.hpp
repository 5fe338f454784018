// How much of a file the page cache already holds: direct reads win cold and lose warm.
#pragma once

#include <cstdint>
#include <string>

namespace gearfall {

// Bytes of the range in cached pages; where it ends within pages, up to a page more is counted.
// A kernel tells this only to who may write the file or owns it; to others every page looks
// cached. Throws OutOfRange and IoError.
std::uint64_t page_cached_bytes(const std::string &path, std::int64_t offset, std::int64_t size);

}  // namespace gearfall
