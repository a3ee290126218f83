// What the bindings have in common. Tensors come as addresses (Tensor.data_ptr()), 0 or a missing key for none; the
// modules of logitless.backends check them and keep them alive.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/rows.h"

namespace logitless {

namespace sinkhorn {
void bind(pybind11::module_ module);  // sinkhorn.cpp: optimal transport on a CPU
}
namespace transport {
void bind(pybind11::module_ module);  // transport.cpp: the L1 cost and doubly stochastic matrices on a CPU
}

namespace {

namespace py = pybind11;

using Address = std::uintptr_t;
using Addresses = py::dict;  // name -> address

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}
template <class T>
T* pointer(const Addresses& addresses, const char* name) {
    return addresses.contains(name) ? pointer<T>(addresses[name].cast<Address>()) : nullptr;
}

// One of an enum's names, as the enum.
template <class Enum, std::size_t size>
Enum number(const char* const (&names)[size], const std::string& name) {
    for (std::size_t i = 0; i < size; ++i)
        if (name == names[i]) return static_cast<Enum>(i);
    throw std::invalid_argument("'" + name + "' is not known to csrc/math");
}

inline int functor(const std::string& divergence) {
    const int found = RowSums::find(divergence.c_str());
    if (found < 0) throw std::invalid_argument("divergence '" + divergence + "' has no functor in csrc/math");
    return found;
}

// Addresses, as the call's `parameters` of a divergence.
inline void set_parameters(const float* (&to)[RowSums::most_parameters], const std::vector<Address>& addresses) {
    if (addresses.size() > RowSums::most_parameters) throw std::invalid_argument("too many parameters");
    for (std::size_t i = 0; i < addresses.size(); ++i) to[i] = pointer<const float>(addresses[i]);
}

inline Normalizers normalizers_of(const Addresses& of) {
    const auto get = [&](const char* name) { return pointer<const float>(of, name); };
    return {get("max"), get("log_sum"), get("teacher_max"), get("teacher_log_sum")};
}

}  // namespace
}  // namespace logitless
