"""Divergences D(p, q) = sum_j q_j f(p_j / q_j), pointwise: (q f, q g) with g(r) = f(r) - r f'(r).

The Triton statement of the "generic" rows of python/logitless/divergences.py: one branch a row, of the same name and
formula; csrc/math/divergences.h is the C++ one. A kernel that drops one of the two results does not compute it.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import load_row
from logitless.kernels.elementary import exp, expm1, log1p, times

JSD = tl.constexpr(0)
SKEW_FORWARD_KL = tl.constexpr(1)
SKEW_REVERSE_KL = tl.constexpr(2)
TVD = tl.constexpr(3)
SQUARED_HELLINGER = tl.constexpr(4)
NUMBERS = {  # how kernels are told which: Triton takes no names in its tuples
    "jsd": 0,
    "skew_forward_kl": 1,
    "skew_reverse_kl": 2,
    "tvd": 3,
    "squared_hellinger": 4,
}


@triton.jit
def pointwise(DIVERGENCE: tl.constexpr, log_p, log_q, numbers, k, rows, inside, count):
    """``numbers`` [K, count] holds the parameters of each row from its row k on."""
    if DIVERGENCE == JSD:
        return _jsd(log_p, log_q, load_row(numbers, k, rows, inside, count))
    elif DIVERGENCE == SKEW_FORWARD_KL:
        return _skew_forward_kl(log_p, log_q, load_row(numbers, k, rows, inside, count))
    elif DIVERGENCE == SKEW_REVERSE_KL:
        return _skew_reverse_kl(log_p, log_q, load_row(numbers, k, rows, inside, count))
    elif DIVERGENCE == TVD:
        return _tvd(log_p, log_q)
    elif DIVERGENCE == SQUARED_HELLINGER:
        return _squared_hellinger(log_p, log_q)
    else:
        tl.static_assert(False, "no such divergence")


@triton.jit
def _log_mixture(log_p, log_q, of_p):
    """(log(p/m), log(q/m)) of m = of_p p + (1 - of_p) q.

    log(m / max(p, q)) = log1p(a expm1(-|log p - log q|)), a the weight of the smaller of the two.
    """
    d = log_p - log_q
    log_m = log1p(tl.where(d > 0.0, 1.0 - of_p, of_p) * expm1(-tl.abs(d)))
    return tl.where(d < 0.0, d, 0.0) - log_m, tl.where(d > 0.0, -d, 0.0) - log_m


@triton.jit
def _jsd(log_p, log_q, beta):
    """m = beta p + (1 - beta) q, qf = beta p log(p/m) + (1 - beta) q log(q/m), g = (1 - beta) log(q/m)."""
    log_p_m, log_q_m = _log_mixture(log_p, log_q, beta)
    q_term = (1.0 - beta) * times(exp(log_q), log_q_m)
    return beta * times(exp(log_p), log_p_m) + q_term, q_term


@triton.jit
def _skew_forward_kl(log_p, log_q, alpha):
    """m = alpha p + (1 - alpha) q, qf = p log(p/m) + m - p, g = (1 - alpha)(1 - p/m)."""
    log_p_m, _ = _log_mixture(log_p, log_q, alpha)
    p, q = exp(log_p), exp(log_q)
    return times(p, log_p_m) + (1.0 - alpha) * (q - p), times(q, (alpha - 1.0) * expm1(log_p_m))


@triton.jit
def _skew_reverse_kl(log_p, log_q, alpha):
    """m = (1 - alpha) p + alpha q, qf = q log(q/m) + m - q, g = log(q/m) + alpha (1 - q/m)."""
    _, log_q_m = _log_mixture(log_p, log_q, 1.0 - alpha)
    p, q = exp(log_p), exp(log_q)
    return times(q, log_q_m) + (1.0 - alpha) * (p - q), times(q, log_q_m - alpha * expm1(log_q_m))


@triton.jit
def _tvd(log_p, log_q):
    """qf = |p - q| / 2, g = sign(q - p) / 2."""
    d = log_p - log_q
    larger = exp(tl.where(d > 0.0, log_p, log_q))
    half = tl.where(d > 0.0, -0.5, tl.where(d == 0.0, 0.0, 0.5))
    return -0.5 * times(larger, expm1(-tl.abs(d))), times(exp(log_q), half)


@triton.jit
def _squared_hellinger(log_p, log_q):
    """qf = (sqrt(p) - sqrt(q))^2 / 2, g = (1 - sqrt(p/q)) / 2."""
    d = log_p - log_q
    less = expm1(-0.5 * tl.abs(d))  # sqrt(smaller / larger) - 1
    larger = exp(tl.where(d > 0.0, log_p, log_q))
    root = exp(tl.where(d > 0.0, 0.5 * (log_p + log_q), log_q))  # sqrt(p q), or q where that is the larger
    return 0.5 * times(larger, less * less), 0.5 * times(root, tl.where(d > 0.0, less, -less))
