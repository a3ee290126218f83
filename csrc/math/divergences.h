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

// log(p/m) and log(q/m) of m = of_p p + of_q q, of_p + of_q = 1.
//
// With d = log p - log q, log(m / max(p, q)) = log1p(a expm1(-|d|)) where a is the weight of the smaller of the two:
// exact for p close to q, and finite wherever either is 0.
template <class T>
struct LogMixture {
    T p, q;
};

template <class T>
LL_FUNCTION LogMixture<T> log_mixture(T log_p, T log_q, T of_p, T of_q) {
    const T d = log_p - log_q;
    const T log_m = log1p(select(d > T(0.0f), of_q, of_p) * expm1(-abs(d)));  // relative to the larger
    return {min(T(0.0f), d) - log_m, min(T(0.0f), -d) - log_m};
}

// m = beta p + (1 - beta) q, qf = beta p log(p/m) + (1 - beta) q log(q/m), g = (1 - beta) log(q/m).
struct Jsd {
    static constexpr const char* name = "jsd";
    static constexpr int parameters = 1;  // beta

    template <class T>
    static LL_FUNCTION Pointwise<T> at(T log_p, T log_q, const float* parameter) {
        const T beta = T(parameter[0]), rest = T(1.0f - parameter[0]);
        const LogMixture<T> log = log_mixture(log_p, log_q, beta, rest);
        const T p_term = times(exp(log_p), log.p);
        const T q_term = rest * times(exp(log_q), log.q);
        return {fma(beta, p_term, q_term), q_term};
    }
};

// m = alpha p + (1 - alpha) q, qf = p log(p/m) + m - p, g = (1 - alpha)(1 - p/m).
struct SkewForwardKl {
    static constexpr const char* name = "skew_forward_kl";
    static constexpr int parameters = 1;  // alpha

    template <class T>
    static LL_FUNCTION Pointwise<T> at(T log_p, T log_q, const float* parameter) {
        const T rest = T(1.0f - parameter[0]), p = exp(log_p), q = exp(log_q);
        const T log_p_m = log_mixture(log_p, log_q, T(parameter[0]), rest).p;
        return {fma(rest, q - p, times(p, log_p_m)), times(q, -rest * expm1(log_p_m))};
    }
};

// m = (1 - alpha) p + alpha q, qf = q log(q/m) + m - q, g = log(q/m) + alpha (1 - q/m).
struct SkewReverseKl {
    static constexpr const char* name = "skew_reverse_kl";
    static constexpr int parameters = 1;  // alpha

    template <class T>
    static LL_FUNCTION Pointwise<T> at(T log_p, T log_q, const float* parameter) {
        const T alpha = T(parameter[0]), rest = T(1.0f - parameter[0]), p = exp(log_p), q = exp(log_q);
        const T log_q_m = log_mixture(log_p, log_q, rest, alpha).q;
        return {fma(rest, p - q, times(q, log_q_m)), times(q, log_q_m - alpha * expm1(log_q_m))};
    }
};

// qf = |p - q| / 2, g = sign(q - p) / 2.
struct Tvd {
    static constexpr const char* name = "tvd";
    static constexpr int parameters = 0;

    template <class T>
    static LL_FUNCTION Pointwise<T> at(T log_p, T log_q, const float*) {
        const T d = log_p - log_q, q = exp(log_q);
        const T larger = select(d > T(0.0f), exp(log_p), q);
        const T half = select(d > T(0.0f), T(-0.5f), select(d == T(0.0f), T(0.0f), T(0.5f)));
        return {T(-0.5f) * times(larger, expm1(-abs(d))), times(q, half)};
    }
};

// qf = (sqrt(p) - sqrt(q))^2 / 2, g = (1 - sqrt(p/q)) / 2.
struct SquaredHellinger {
    static constexpr const char* name = "squared_hellinger";
    static constexpr int parameters = 0;

    template <class T>
    static LL_FUNCTION Pointwise<T> at(T log_p, T log_q, const float*) {
        const T d = log_p - log_q;
        const T less = expm1(T(-0.5f) * abs(d));  // sqrt(smaller / larger) - 1
        const T larger = exp(select(d > T(0.0f), log_p, log_q));
        const T root = exp(select(d > T(0.0f), T(0.5f) * (log_p + log_q), log_q));  // sqrt(pq), or q if that is larger
        return {T(0.5f) * times(larger, less * less), T(0.5f) * times(root, select(d > T(0.0f), less, -less))};
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

using Divergences = List<Jsd, SkewForwardKl, SkewReverseKl, Tvd, SquaredHellinger>;

}  // namespace
}  // namespace logitless
