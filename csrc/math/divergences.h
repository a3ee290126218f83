// Sums over a row in the teacher's distribution p and the student's q, pointwise.
//
// The C++ statement of SUMS in python/logitless/divergences.py, but for the moments: one functor each, of the same name
// and formula, made for a row of logits from the row's parameters. One more is one more functor, added to a list below.
// Kernels that need one of its two results simply drop the other; all is inlined, and what it alone needed is not
// computed.

#pragma once

#include "elementary.h"
#include "list.h"

namespace logitless {
namespace {

// Value f, D = sum_j f_j, and slope h, its derivative by log q. In a sum of q f(p/q), h = q g, g(r) = f(r) - r f'(r).
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

// m = beta p + (1 - beta) q, f = beta p log(p/m) + (1 - beta) q log(q/m), h = (1 - beta) q log(q/m).
struct Jsd {
    static constexpr const char* name = "jsd";
    static constexpr int parameters = 1;
    float beta, rest;

    LL_FUNCTION explicit Jsd(Parameters of) : beta(of[0]), rest(1.0f - beta) {}

    template <class T>
    LL_FUNCTION Pointwise<T> at(T log_p, T log_q) const {
        const LogMixture<T> log = log_mixture(log_p, log_q, T(beta), T(rest));
        const T p_term = times(exp(log_p), log.p);
        const T q_term = T(rest) * times(exp(log_q), log.q);
        return {fma(T(beta), p_term, q_term), q_term};
    }
};

// m = alpha p + (1 - alpha) q, f = p log(p/m) + m - p, h = (1 - alpha) q (1 - p/m).
struct SkewForwardKl {
    static constexpr const char* name = "skew_forward_kl";
    static constexpr int parameters = 1;
    float alpha, rest;

    LL_FUNCTION explicit SkewForwardKl(Parameters of) : alpha(of[0]), rest(1.0f - alpha) {}

    template <class T>
    LL_FUNCTION Pointwise<T> at(T log_p, T log_q) const {
        const T p = exp(log_p), q = exp(log_q);
        const T log_p_m = log_mixture(log_p, log_q, T(alpha), T(rest)).p;
        return {fma(T(rest), q - p, times(p, log_p_m)), times(q, T(-rest) * expm1(log_p_m))};
    }
};

// m = (1 - alpha) p + alpha q, f = q log(q/m) + m - q, h = q (log(q/m) + through (1 - q/m)). `through` is alpha, or 0
// where the student in the mixture is a constant.
struct SkewReverseKl {
    static constexpr const char* name = "skew_reverse_kl";
    static constexpr int parameters = 2;
    float alpha, rest, through;

    LL_FUNCTION explicit SkewReverseKl(Parameters of) : alpha(of[0]), rest(1.0f - alpha), through(of[1]) {}

    template <class T>
    LL_FUNCTION Pointwise<T> at(T log_p, T log_q) const {
        const T p = exp(log_p), q = exp(log_q);
        const T log_q_m = log_mixture(log_p, log_q, T(rest), T(alpha)).q;
        return {fma(T(rest), p - q, times(q, log_q_m)), times(q, log_q_m - T(through) * expm1(log_q_m))};
    }
};

// f = |p - q| / 2, h = q sign(q - p) / 2.
struct Tvd {
    static constexpr const char* name = "tvd";
    static constexpr int parameters = 0;

    LL_FUNCTION explicit Tvd(Parameters) {}

    template <class T>
    LL_FUNCTION Pointwise<T> at(T log_p, T log_q) const {
        const T d = log_p - log_q, q = exp(log_q);
        const T larger = select(d > T(0.0f), exp(log_p), q);
        const T half = select(d > T(0.0f), T(-0.5f), select(d == T(0.0f), T(0.0f), T(0.5f)));
        return {T(-0.5f) * times(larger, expm1(-abs(d))), times(q, half)};
    }
};

// f = (sqrt(p) - sqrt(q))^2 / 2, h = (q - sqrt(pq)) / 2.
struct SquaredHellinger {
    static constexpr const char* name = "squared_hellinger";
    static constexpr int parameters = 0;

    LL_FUNCTION explicit SquaredHellinger(Parameters) {}

    template <class T>
    LL_FUNCTION Pointwise<T> at(T log_p, T log_q) const {
        const T d = log_p - log_q;
        const T less = expm1(T(-0.5f) * abs(d));  // sqrt(smaller / larger) - 1
        const T larger = exp(select(d > T(0.0f), log_p, log_q));
        const T root = exp(select(d > T(0.0f), T(0.5f) * (log_p + log_q), log_q));  // sqrt(pq), or q if that is larger
        return {T(0.5f) * times(larger, less * less), T(0.5f) * times(root, select(d > T(0.0f), less, -less))};
    }
};

// f = ((a p^c + b q^c) / c - p^a q^b) / (a b), h = -(p^a q^b - q^c) / a, c = a + b, and their limits.
//
// With d = log p - log q, the powers q^c, p^a q^b and p^c are one exponential, e^(c log q + x d), at the places x = 0,
// a and c. h is minus the quotient of differences of the first two. f is the second quotient, of all three: in order
// of their places, the quotient above the middle less the one below it, divided by the distance of the outer ones. All
// of it is relative to the largest power, whose error the cancellation does not magnify.
struct AlphaBeta {
    static constexpr const char* name = "alpha_beta";
    static constexpr int parameters = 2;

    struct Power {
        float of_p, of_q;  // p^of_p q^of_q
    };
    struct Gap {
        float size, reciprocal;
    };
    Power of_q, of_both, lowest, highest;
    Gap between, below, above;  // of_q and of_both; the middle and lowest, highest
    float per_range;            // 0 for a = b = 0

    LL_FUNCTION explicit AlphaBeta(Parameters of) {
        const float a = of[0], b = of[1], c = a + b;
        const Gap gap_a = gap(a), gap_b = gap(b), gap_c = gap(c);
        of_q = {0.0f, c};
        of_both = {a, b};
        between = gap_a;
        const bool opposite = a * b < 0.0f, q_between = opposite && gap_b.size > gap_a.size;
        const bool p_between = opposite && !q_between;
        lowest = q_between ? of_both : of_q;
        highest = p_between ? of_both : Power{c, 0.0f};
        below = p_between ? gap_c : gap_a;
        above = q_between ? gap_c : gap_b;
        per_range = (q_between ? gap_b : p_between ? gap_a : gap_c).reciprocal;
        if (lowest.of_p > highest.of_p) {
            exchange(lowest, highest);
            exchange(below, above);
        }
    }

    template <class T>
    LL_FUNCTION Pointwise<T> at(T log_p, T log_q) const {
        const T d = select(log_p == log_q, T(0.0f), log_p - log_q), size = abs(d);
        const auto up = d > T(0.0f), both = T(of_both.of_p) * d > T(0.0f);  // which power is the larger
        const Step<T> under = step(below, size), over = step(above, size);
        const T less = times(select(up, over.ratio, T(1.0f)), under.quotient);
        const T more = times(select(up, T(1.0f), under.ratio), over.quotient);
        const T difference = select(up, more - less, less - more);
        const T second = select(T(per_range) == T(0.0f), T(0.5f) * (d * d), T(per_range) * difference);
        const T value = product(second, larger(up, highest, lowest, log_p, log_q));

        const T first = product(step(between, size).quotient, larger(both, of_both, of_q, log_p, log_q));
        return {value, select(up, -first, first)};
    }

private:
    static LL_FUNCTION Gap gap(float k) { return {abs(k), reciprocal(abs(k))}; }

    template <class U>
    static LL_FUNCTION void exchange(U& a, U& b) {
        const U other = a;
        a = b;
        b = other;
    }

    // 0 where either is 0; the other may be infinite, or NaN.
    template <class T>
    static LL_FUNCTION T product(T quotient, T power) {
        return select(quotient == T(0.0f), quotient, times(power, quotient));
    }

    // One power or the other; x^0 = 1 for all x. Not exp(float) of a GPU, which is NaN where the result is infinite.
    template <class M, class T>
    static LL_FUNCTION T larger(M mask, Power yes, Power no, T log_p, T log_q) {
        return exp<T>(times(select(mask, T(yes.of_p), T(no.of_p)), log_p) +
                      times(select(mask, T(yes.of_q), T(no.of_q)), log_q));
    }

    // From 1 down a gap: where that leads, and the quotient of differences.
    template <class T>
    struct Step {
        T ratio, quotient;
    };
    template <class T>
    static LL_FUNCTION Step<T> step(Gap gap, T size) {
        const Exponential<T> e = exponential(times(T(-gap.size), size));
        const T less = fma(e.power, e.excess, e.power - T(1.0f));
        return {fma(e.power, e.excess, e.power), select(T(gap.size) == T(0.0f), size, T(-gap.reciprocal) * less)};
    }
};

// x = a log p + b log q, of L = log sum_j e^(x_j); h = b e^(x - L), for which L must be given.
struct LogSum {
    static constexpr const char* name = "log_sum";
    static constexpr int parameters = 3;
    float a, b, log_sum;

    LL_FUNCTION explicit LogSum(Parameters of) : a(of[0]), b(of[1]), log_sum(of[2]) {}

    template <class T>
    LL_FUNCTION Pointwise<T> at(T log_p, T log_q) const {
        const T nothing(-__builtin_inff());
        const T x = times(T(a), log_p) + times(T(b), log_q);
        const T summand = select(max(log_p, log_q) == nothing, nothing, x);
        return {summand, select(summand == nothing, T(0.0f), T(b) * exp(summand - T(log_sum)))};
    }
};

using Divergences = List<Jsd, SkewForwardKl, SkewReverseKl, Tvd, SquaredHellinger, AlphaBeta>;  // sums of f
using RowSums = Divergences::With<LogSum>;

}  // namespace
}  // namespace logitless
