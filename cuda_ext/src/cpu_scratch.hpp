// Working memory of one call: floats on a cache line's boundary, not initialised.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace gearfall::cpu {

class Scratch {
public:
    explicit Scratch(std::int64_t count)
        : floats_(static_cast<float *>(std::aligned_alloc(kLine, bytes(count)))) {
        if (floats_ == nullptr) throw std::bad_alloc();
    }
    float *data() const { return floats_.get(); }

private:
    struct Free {
        void operator()(float *floats) const { std::free(floats); }
    };
    static constexpr std::size_t kLine = 64;
    static std::size_t bytes(std::int64_t count) {
        return (static_cast<std::size_t>(count) * sizeof(float) / kLine + 1) * kLine;
    }
    std::unique_ptr<float, Free> floats_;
};

}  // namespace gearfall::cpu
