// Elementary functions, to about one unit in the last place, on any number type of number.h.
//
// Masked logits are -inf and padding may hold anything, so the ends matter: exp(-inf) is exactly 0, NaN stays NaN.
// Results are exact to within the smallest normal float (1.2e-38) at best, and 0 below it: denormals cost a microcode
// assist each on most processors and add nothing to sums whose largest term is one.

#pragma once

#include "number.h"

namespace logitless {
namespace {

// factor * other, and 0 wherever factor is 0: masked columns, where other is infinite or NaN, contribute nothing.
template <class T>
LL_FUNCTION T times(T factor, T other) {
    return select(factor == T(0.0f), T(0.0f), factor * other);
}

template <class T>
LL_FUNCTION T abs(T x) {
    return as_float(as_int(x) & 0x7fffffff);
}

// 1 / x, and 0 at 0. For parameters: elements are multiplied with it.
LL_FUNCTION float reciprocal(float x) {
    if (x == 0.0f) return 0.0f;
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // to one unit in the last place, without a slow path
    return y;
#else
    return 1.0f / x;
#endif
}

template <class T>
LL_FUNCTION T copysign(T magnitude, T sign) {
    return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(sign) & ~0x7fffffff));
}

// e^x = power (1 + excess), power = 2^n with |x - n ln 2| <= ln(2)/2, excess = e^(x - n ln 2) - 1.
template <class T>
struct Exponential {
    T power, excess;
};

template <class T>
LL_FUNCTION Exponential<T> exponential(T x) {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum; with the exponent's bias added,
    // those bits moved up to the exponent are 2^n. n = -127 gives power 0. Above n = 127 the polynomial takes the rest.
    constexpr float round = 0x1.8p23f + 127;
    constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // n * ln2_high is exact
    x = max(T(-88.0f), x);
    const T shifted = min(T(round + 127), fma(x, T(0x1.715476p0f), T(round)));
    const T n = shifted - T(round);
    const T r = fma(n, T(-ln2_low), fma(n, T(-ln2_high), x));
    T p = T(0x1.6bebe2p-10f);  // minimax for (e^r - 1 - r) / r^2, relative to e^r - 1: 1.3e-8
    p = fma(p, r, T(0x1.122886p-7f));
    p = fma(p, r, T(0x1.555676p-5f));
    p = fma(p, r, T(0x1.5554aep-3f));
    p = fma(p, r, T(0x1.fffffep-2f));
    return {as_float(as_int(shifted) << 23), fma(p * r, r, r)};
}

template <class T>
LL_FUNCTION T exp(T x) {
    const Exponential<T> e = exponential(x);
    return fma(e.power, e.excess, e.power);
}

#if defined(__CUDACC__)
// On a GPU 2^x is an instruction (to 2 units in the last place; 0 below the smallest normal number). It gets x log2(e)
// rounded; the digits that the product lost are applied afterwards.
LL_FUNCTION float exp(float x) {
#if defined(__CUDA_ARCH__)
    x = max(-88.0f, x);
    const float high = x * 0x1.715476p0f;
    const float low = fma(x, 0x1.4ae0cp-26f, fma(x, 0x1.715476p0f, -high));
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(high));
    return fma(power, low * 0x1.62e430p-1f, power);
#else
    return exp<float>(x);
#endif
}
#endif

template <class T>
LL_FUNCTION T expm1(T x) {
    const Exponential<T> e = exponential(x);
    return fma(e.power, e.excess, e.power - T(1.0f));
}

// log(2^k (1 + m)), 1 + m in [2/3, 4/3), from k << 23.
template <class T, class Bits>
LL_FUNCTION T log_of(Bits exponent, T m) {
    T p = T(-0x1.080568p-3f);  // minimax for (log(1 + m) - m + m^2/2) / m^3, relative to log(1 + m): 4.6e-9
    p = fma(p, m, T(0x1.1e660ap-3f));
    p = fma(p, m, T(-0x1.f3111ep-4f));
    p = fma(p, m, T(0x1.1ed742p-3f));
    p = fma(p, m, T(-0x1.559dcep-3f));
    p = fma(p, m, T(0x1.99d026p-3f));
    p = fma(p, m, T(-0x1.fffef0p-3f));
    p = fma(p, m, T(0x1.555506p-2f));
    p = fma(p, m, T(-0.5f));
    return fma(to_float(exponent >> 23), T(0x1.62e430p-1f), fma(p * m, m, m));
}

// For -1 < x < 2^126; -88 at -1.
template <class T>
LL_FUNCTION T log1p(T x) {
    // 1 + x = 2^k (1 + m): k from the rounded sum, m from x itself, so that no digit is lost.
    const T u = T(1.0f) + x;
    const auto exponent = (as_int(u) - 0x3f2aaaab) & ~0x7fffff;
    const T power = as_float(0x3f800000 - exponent);  // 2^-k
    return log_of(exponent, fma(x, power, power - T(1.0f)));
}

// For normal x < 2^126.
template <class T>
LL_FUNCTION T log(T x) {
    const auto exponent = (as_int(x) - 0x3f2aaaab) & ~0x7fffff;
    return log_of(exponent, x * as_float(0x3f800000 - exponent) - T(1.0f));
}

template <class T>
LL_FUNCTION T tanh(T x) {
    const T size = abs(x);
    const T u = exp(T(-2.0f) * size);
    T r = T(0x1.5e902ap0f);  // minimax for 2 / (1 + u) on u <= e^-2, weighted with u: 4.3e-9; cheaper than a division
    r = fma(r, u, T(-0x1.e9fa7ep0f));
    r = fma(r, u, T(0x1.fe946cp0f));
    r = fma(r, u, T(-0x1.fff59ap0f));
    r = fma(r, u, T(0x1.ffffe8p0f));
    const T large = fma(-r, u, T(1.0f));  // 1 - 2u / (1 + u); loses digits towards 0, where the odd polynomial has them
    const T y = x * x;
    T p = T(-0x1.77dd2ap-12f);  // minimax for (tanh(x) - x) / x^3 on |x| <= 1, relative to tanh(x): 4.6e-9
    p = fma(p, y, T(0x1.2da4f2p-9f));
    p = fma(p, y, T(-0x1.0460c2p-7f));
    p = fma(p, y, T(0x1.600992p-6f));
    p = fma(p, y, T(-0x1.b96222p-5f));
    p = fma(p, y, T(0x1.110be2p-3f));
    p = fma(p, y, T(-0x1.55553cp-2f));
    return select(size > T(1.0f), copysign(large, x), fma(p * y, x, x));
}

}  // namespace
}  // namespace logitless
