// Binds the CPU kernels of the engine.
#include <nanobind/nanobind.h>

void bind_cpu(nanobind::module_ &) {}
