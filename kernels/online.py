"""Sums over a row in one reading: every lane keeps a running maximum and sums relative to it; lanes are joined last.

With m the maximum that a lane has seen, its sums are of e^(x - m) times 1, (x - m), ...; a larger x rescales them.
Lanes need nothing of each other before the end, an element costs one exponential, and a lane that has seen nothing
but -inf keeps m = LOWEST and sums of 0. A factor e^(..) that is 0 makes its product 0, whatever the other factor.
"""

import triton
import triton.language as tl

from logitless.kernels.elementary import LOWEST, exp


@triton.jit
def step(x, m):
    """(new m, by what it rises, factor of the sums so far, factor of the new element) for elements x."""
    d = x - m
    up = d > 0.0
    e = exp(tl.where(up, -d, d))
    return tl.where(up, x, m), tl.where(up, d, 0.0), tl.where(up, e, 1.0), tl.where(up, 1.0, e)


@triton.jit
def join(m):
    """Of lanes [ROWS, BLOCK]: (joint maximum [ROWS], lane maxima relative to it, factors of their sums)."""
    joint = tl.max(m, 1)
    shift = m - joint[:, None]
    return joint, shift, exp(shift)


@triton.jit
def reported(m, total):
    """A maximum as the contract wants it: -inf for rows without anything, NaN for rows whose total is."""
    return tl.where(total != total, total, tl.where(m == LOWEST, float("-inf"), m))
