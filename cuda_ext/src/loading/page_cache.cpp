#include "page_cache.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <vector>

#include "errors.hpp"
#include "file.hpp"

namespace gearfall {

namespace {

// A read-only mapping of whole pages of a file.
class Mapping {
public:
    Mapping(const File &file, std::uint64_t offset, std::uint64_t length) : length_(length) {
        address_ = ::mmap(nullptr, length, PROT_READ, MAP_SHARED, file.descriptor(),
                          static_cast<off_t>(offset));
        if (address_ == MAP_FAILED) throw IoError(errno, file.path());
    }
    ~Mapping() { ::munmap(address_, length_); }
    Mapping(const Mapping &) = delete;
    Mapping &operator=(const Mapping &) = delete;

    void *address() const { return address_; }
    std::uint64_t length() const { return length_; }

private:
    void *address_;
    std::uint64_t length_;
};

// The kernel's interface since 6.5, declared here for the headers of older systems.
constexpr long kCachestat = 451;
struct CachestatRange {
    std::uint64_t offset, length;
};
struct Cachestat {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

// Cached pages that the range touches, without a look at each; nothing where the kernel can't tell.
std::optional<std::uint64_t> count_pages(const File &file, std::uint64_t begin,
                                         std::uint64_t length) {
    const CachestatRange range{begin, length};
    Cachestat found{};
    if (::syscall(kCachestat, file.descriptor(), &range, &found, 0) != 0) return std::nullopt;
    return found.cached;
}

std::uint64_t look_at_each_page(const File &file, std::uint64_t begin, std::uint64_t end,
                                std::uint64_t page) {
    const auto first = begin - begin % page;
    const Mapping mapping(file, first, end - first);
    std::vector<unsigned char> pages((mapping.length() + page - 1) / page);
    if (::mincore(mapping.address(), mapping.length(), pages.data()) != 0) {
        throw IoError(errno, file.path());
    }
    std::uint64_t cached = 0;
    for (std::uint64_t i = 0; i < pages.size(); ++i) {
        if ((pages[i] & 1U) == 0) continue;
        const auto start = first + i * page;
        cached += std::min(start + page, end) - std::max(start, begin);
    }
    return cached;
}

}  // namespace

std::uint64_t page_cached_bytes(const std::string &path, std::int64_t offset, std::int64_t size) {
    const File file(path);
    check_range(file, offset, size);
    if (size == 0) return 0;
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    const auto begin = static_cast<std::uint64_t>(offset);
    const auto length = static_cast<std::uint64_t>(size);
    if (const auto pages = count_pages(file, begin, length)) {
        return std::min(*pages * page, length);
    }
    return look_at_each_page(file, begin, begin + length, page);
}

}  // namespace gearfall
