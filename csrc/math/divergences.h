// Divergences D(p, q) = sum_j q_j f(p_j / q_j), pointwise: value q f and slope q g, g(r) = f(r) - r f'(r).
//
// The C++ statement of the "generic" rows of python/logitless/divergences.py: one functor a row, of the same name and
// formula. One more divergence is one more functor, added to Divergences below. Kernels that need one of the two
// results simply drop the other; all is inlined, and what it alone needed is not computed.

#pragma once

#include <cstring>

#include "elementary.h"

namespace logitless {
namespace {

template <class T>
struct Pointwise {
    T value, slope;
};

// m = beta p + (1 - beta) q, qf = beta p log(p/m) + (1 - beta) q log(q/m), g = (1 - beta) log(q/m).
//
// With d = log p - log q, log(m / max(p, q)) = log1p(a expm1(-|d|)) where a is the weight of the smaller of the two:
// exact for p close to q, and finite wherever either is 0.
struct Jsd {
    static constexpr const char* name = "jsd";
    static constexpr int parameters = 1;  // beta

    template <class T>
    static LL_FUNCTION Pointwise<T> at(T log_p, T log_q, const float* parameter) {
        const T beta = T(parameter[0]), rest = T(1.0f - parameter[0]);
        const T d = log_p - log_q;
        const T log_m = log1p(select(d > T(0.0f), rest, beta) * expm1(-abs(d)));  // relative to the larger
        const T log_p_m = min(T(0.0f), d) - log_m;
        const T log_q_m = min(T(0.0f), -d) - log_m;
        const T p_term = times(exp(log_p), log_p_m);
        const T q_term = rest * times(exp(log_q), log_q_m);
        return {fma(beta, p_term, q_term), q_term};
    }
};

// Calls visitor(functor) with the functor number `index` of the list; find() gives a name's number, or -1.
template <class... Functors>
struct List {
    static constexpr int most_parameters = [] {
        int most = 1;
        ((most = Functors::parameters > most ? Functors::parameters : most), ...);
        return most;
    }();

    template <class Visitor>
    static LL_FUNCTION void visit(int index, Visitor visitor) {
        int i = 0;
        (void)((i++ == index && (visitor(Functors{}), true)) || ...);
    }

    static int find(const char* name) {
        int index = -1, i = 0;
        ((index = std::strcmp(name, Functors::name) == 0 ? i : index, ++i), ...);
        return index;
    }
};

using Divergences = List<Jsd>;

}  // namespace
}  // namespace logitless
