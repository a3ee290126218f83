// What the bindings have in common. Tensors come as addresses (Tensor.data_ptr()), 0 or a missing key for none; the
// modules of logitless.backends check them and keep them alive.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/rows.h"
#include "math/divergences.h"

namespace logitless {
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

inline int functor(const std::string& divergence) {
    const int found = Divergences::find(divergence.c_str());
    if (found < 0) throw std::invalid_argument("divergence '" + divergence + "' has no functor in csrc/math");
    return found;
}

inline Normalizers normalizers_of(const Addresses& of) {
    const auto get = [&](const char* name) { return pointer<const float>(of, name); };
    return {get("max"), get("log_sum"), get("teacher_max"), get("teacher_log_sum")};
}

}  // namespace
}  // namespace logitless
