// Functors of one kind, told apart by their numbers in a list and by their names.

#pragma once

#include <cstdint>
#include <cstring>

#include "number.h"

namespace logitless {
namespace {

// What is given for a row: of arrays with one number per row. A null pointer is one not given, which nobody looks at.
struct Parameters {
    const float* const* arrays;
    std::int64_t row;

    LL_FUNCTION float operator[](int i) const { return arrays[i] ? arrays[i][row] : 0.0f; }
};

// Functors by number.
template <class... Functors>
struct List {
    template <class... More>
    using With = List<Functors..., More...>;

    static constexpr int size = sizeof...(Functors);
    static constexpr int most_parameters = [] {
        int most = 1;
        ((most = Functors::parameters > most ? Functors::parameters : most), ...);
        return most;
    }();

    // Calls visitor(functor) with the functor number `index`, made from its parameters.
    template <class From = Parameters, class Visitor>
    static LL_FUNCTION void visit(int index, const From& of, Visitor visitor) {
        int i = 0;
        (void)((i++ == index && (visitor(Functors(of)), true)) || ...);
    }

    static int parameters(int index) {
        const int counts[] = {Functors::parameters...};
        return counts[index];
    }

    // A name's number, or -1.
    static int find(const char* name) {
        int index = -1, i = 0;
        ((index = std::strcmp(name, Functors::name) == 0 ? i : index, ++i), ...);
        return index;
    }
};

}  // namespace
}  // namespace logitless
