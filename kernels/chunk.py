"""How kernels read a chunk: s = outer * phi(inner * (z + bias)), phi the identity or tanh, in float32; s = -inf where
z + bias lies below the row's floor."""

import triton
import triton.language as tl

from logitless.kernels.elementary import tanh


@triton.jit
def scale(z, bias, inner, outer, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """(s, ds/dz) of raw products z [ROWS, BLOCK], given bias [1, BLOCK] and outer [ROWS, 1]."""
    if BIAS:
        z = z + bias
    if CAPPED:
        capped = tanh(inner * z)
        return outer * capped, outer * inner * (1.0 - capped * capped)
    else:
        return outer * z, outer + tl.zeros_like(z)


@triton.jit
def load_scaled(
    z, stride, bias, inner, outer, floor, rows, columns, inside,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """(s, ds/dz) [ROWS, BLOCK] of some rows and columns of a chunk; s is -inf where not ``inside``.

    outer and floor are [ROWS, 1]; with a floor ds/dz is 0 where s is -inf.
    """
    values = tl.load(z + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    added = 0.0
    if BIAS:
        added = tl.load(bias + columns[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)
    s, slope = scale(values, added, inner, outer, BIAS, CAPPED)
    if FILTERED:
        s = tl.where(values + added < floor, float("-inf"), s)
        slope = tl.where(s == float("-inf"), 0.0, slope)
    return tl.where(inside, s, float("-inf")), slope


@triton.jit
def load_floor(floor, rows, inside, FILTERED: tl.constexpr):
    """The floors of rows [ROWS, 1], if there are any."""
    if FILTERED:
        return tl.load(floor + rows, mask=inside, other=float("-inf"))[:, None]
    else:
        return 0.0


@triton.jit
def finite(maximum):
    """A maximum that may be subtracted: 0 for -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def load_row(numbers, k, rows, inside, count):
    """Number k of each row [ROWS, 1], from a matrix [K, count]."""
    return tl.load(numbers + k * count + rows, mask=inside, other=0.0)[:, None]
