"""Elementary functions to about one unit in the last place: those of csrc/math/elementary.h, in Triton.

Masked logits are -inf and padding may hold anything, so the ends matter: exp(-inf) is exactly 0, NaN stays NaN. The
polynomials are the C++ ones; they do not rely on ``fma`` being rounded once.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # stands for -inf where differences to it must not be NaN
LOG2_E = tl.constexpr(1.442695)


@triton.jit
def times(factor, other):
    """factor * other, and 0 wherever factor is 0."""
    return tl.where(factor == 0.0, 0.0, factor * other)


@triton.jit
def _exponential(x):
    """(2^n, e^(x - n ln 2) - 1) with |x - n ln 2| <= ln(2) / 2: e^x = power (1 + excess)."""
    x = tl.where(x < -88.0, -88.0, x)
    shifted = tl.fma(x, 1.442695, 12583039.0)  # 1.5 * 2^23 + 127: rounds, and leaves n + 127 in the low bits
    shifted = tl.where(shifted > 12583166.0, 12583166.0, shifted)
    n = shifted - 12583039.0
    r = tl.fma(n, 0.00021219444, tl.fma(n, -0.6933594, x))
    p = tl.fma(tl.full(r.shape, 0.00138825, tl.float32), r, 0.008366647)
    p = tl.fma(p, r, 0.041667204)
    p = tl.fma(p, r, 0.16666542)
    p = tl.fma(p, r, 0.49999997)
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return power, tl.fma(p * r, r, r)


@triton.jit
def exp(x):
    power, excess = _exponential(x)
    return tl.fma(power, excess, power)


@triton.jit
def expm1(x):
    power, excess = _exponential(x)
    return tl.fma(power, excess, power - 1.0)


@triton.jit
def _split(x):
    """(k, 2^-k) of which 2^-k x is in [2/3, 4/3), k as bits of an exponent; x > 0."""
    exponent = (x.to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
    return exponent, (0x3F800000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _logarithm(exponent, m):
    """log(2^k (1 + m))."""
    p = tl.fma(tl.full(m.shape, -0.12891656, tl.float32), m, 0.13984306)
    p = tl.fma(p, m, -0.121842496)
    p = tl.fma(p, m, 0.14005901)
    p = tl.fma(p, m, -0.1668049)
    p = tl.fma(p, m, 0.20010404)
    p = tl.fma(p, m, -0.24999797)
    p = tl.fma(p, m, 0.33333215)
    p = tl.fma(p, m, -0.5)
    return tl.fma((exponent >> 23).to(tl.float32), 0.6931472, tl.fma(p * m, m, m))


@triton.jit
def log1p(x):
    """For -1 < x < 2^126; -88 at -1."""
    exponent, power = _split(1.0 + x)
    return _logarithm(exponent, tl.fma(x, power, power - 1.0))


@triton.jit
def log(x):
    """For x from 2^-126 to 2^126."""
    exponent, power = _split(x)
    return _logarithm(exponent, tl.fma(x, power, -1.0))


@triton.jit
def log_of_sum(x):
    """The log of sums whose largest term is 1; -inf for 0."""
    return tl.where(x == 0.0, float("-inf"), log1p(x - 1.0))


@triton.jit
def tanh(x):
    size = tl.abs(x)
    u = exp(-2.0 * size)
    large = 1.0 - 2.0 * u / (1.0 + u)  # loses digits towards 0, where the odd polynomial has them
    y = x * x
    p = tl.fma(tl.full(y.shape, -0.00035845177, tl.float32), y, 0.0023013635)
    p = tl.fma(p, y, -0.007946105)
    p = tl.fma(p, y, 0.021486657)
    p = tl.fma(p, y, -0.0538798)
    p = tl.fma(p, y, 0.13332345)
    p = tl.fma(p, y, -0.33333296)
    return tl.where(size > 1.0, tl.where(x < 0.0, -large, large), tl.fma(p * y, x, x))
