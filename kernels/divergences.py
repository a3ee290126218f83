"""Divergences D(p, q) = sum_j q_j f(p_j / q_j), pointwise: (q f, q g) with g(r) = f(r) - r f'(r).

The Triton statement of the "generic" rows of python/logitless/divergences.py: one branch a row, of the same name and
formula; csrc/math/divergences.h is the C++ one. A kernel that drops one of the two results does not compute it.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import load_row
from logitless.kernels.elementary import exp, expm1, log1p, times

JSD = tl.constexpr(0)
NUMBERS = {"jsd": JSD.value}  # how kernels are told which: Triton takes no names in its tuples


@triton.jit
def pointwise(DIVERGENCE: tl.constexpr, log_p, log_q, numbers, k, rows, inside, count):
    """``numbers`` [K, count] holds the parameters of each row from its row k on."""
    if DIVERGENCE == JSD:
        return _jsd(log_p, log_q, load_row(numbers, k, rows, inside, count))
    else:
        tl.static_assert(False, "no such divergence")


@triton.jit
def _jsd(log_p, log_q, beta):
    """m = beta p + (1 - beta) q, qf = beta p log(p/m) + (1 - beta) q log(q/m), g = (1 - beta) log(q/m).

    log(m / max(p, q)) = log1p(a expm1(-|log p - log q|)), a the weight of the smaller of the two.
    """
    d = log_p - log_q
    log_m = log1p(tl.where(d > 0.0, 1.0 - beta, beta) * expm1(-tl.abs(d)))
    log_p_m = tl.where(d < 0.0, d, 0.0) - log_m
    log_q_m = tl.where(d > 0.0, -d, 0.0) - log_m
    p_term = times(exp(log_p), log_p_m)
    q_term = (1.0 - beta) * times(exp(log_q), log_q_m)
    return beta * p_term + q_term, q_term
