// The bindings of optimal transport on a CPU.

#pragma once

#include <pybind11/pybind11.h>

namespace logitless {
namespace sinkhorn {

void bind(pybind11::module_ module);
void use(const char* copy);  // of the instruction set of that name

}  // namespace sinkhorn
}  // namespace logitless
