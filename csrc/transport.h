// The bindings of the L1 cost and of doubly stochastic matrices on a CPU.

#pragma once

#include <pybind11/pybind11.h>

namespace logitless {
namespace transport {

void bind(pybind11::module_ module);
void use(const char* copy);  // of the instruction set of that name

}  // namespace transport
}  // namespace logitless
