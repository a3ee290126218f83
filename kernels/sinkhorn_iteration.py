"""Both half-iterations of Sinkhorn's on a stored cost C [B, n, m], columns adjacent, in one reading of it.

    s_i = -epsilon log sum_j e^((c_j - C_ij) / epsilon)      f_i = damping s_i
    t_j = -epsilon log sum_i a_i e^((f_i - C_ij) / epsilon)

A program walks over rows, each of which it holds whole. With w_ij = e^((c_j - C_ij) / epsilon - top_i), top_i the row's
maximum, and total_i = sum_j w_ij, s_i = -epsilon (top_i + log total_i), and sums over rows want no other exponential:

    sum_i a_i e^((f_i - C_ij) / epsilon) = e^(-c_j / epsilon) sum_i w_ij e^(phi_i),
    phi_i = log a_i + f_i / epsilon + top_i.

They are kept relative to e^M, M the largest phi so far; ``columns`` joins those of the programs, and reads a column
anew, in the log domain, whose sum is so small that terms may have been lost. So any epsilon is stable; but for the
first iterations of a run no column needs it.

4 n m bytes, and 8 m for every program: n = m = 16384, 1.09 GB, some 17 instructions an element of the 41 that an H100
has time for meanwhile. The next rows are on their way while a row is computed.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import finite
from logitless.kernels.elementary import LOG2_E, LOWEST, exp, log, log_of_sum
from logitless.kernels.sinkhorn import gather, softmin_of

LEAST = tl.constexpr(1e-25)  # of a column's sum, relative to e^M


@triton.jit
def _load_rows(at, row_stride, row, end, valid):
    """Beyond the end the last row, again: there the weights are masked."""
    row = tl.minimum(row, end - 1)
    return tl.load(at + row.to(tl.int64)[:, None] * row_stride, mask=valid, other=0.0)


@triton.jit
def rows(
    cost, problem_stride, row_stride,
    c, log_a,  # [B, m], [B, n]
    s, weighted,  # [B, n], the latter f + epsilon log a
    sums, exponents,  # [B, parts, m], and M [B, parts]
    damping, epsilon, n, m, part_rows,
    STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, n)
    rate = 1.0 / epsilon
    j = tl.arange(0, BLOCK)
    at, valid = cost + problem * problem_stride + j[None, :], (j < m)[None, :]
    potential = tl.load(c + problem * m + j, mask=j < m, other=float("-inf"))
    top_phi = tl.full([], LOWEST, tl.float32)
    found = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        to = problem * n + row
        x = potential[None, :] - _load_rows(at, row_stride, row, end, valid)
        top = finite(tl.max(x, 1))
        w = tl.exp2((x - top[:, None]) * (rate * LOG2_E))  # wrong by a rounding of the exponent
        total = tl.sum(w, 1)
        softmin = tl.where(total == 0.0, float("inf"), -(top + epsilon * log_of_sum(total)))
        weight = tl.load(log_a + to, mask=row < end, other=float("-inf"))
        f = tl.where((weight > float("-inf")) & (softmin < float("inf")), damping * softmin, 0.0)
        tl.store(s + to, softmin, mask=row < end)
        tl.store(weighted + to, f + epsilon * weight, mask=row < end)

        phi = tl.where(total == 0.0, float("-inf"), weight + (f + top) * rate + 0.0 * total)  # NaN if that is
        highest = tl.maximum(top_phi, tl.max(phi, 0))
        found = tl.fma(w, exp(phi - highest)[:, None] + tl.zeros_like(w), found * exp(top_phi - highest))
        top_phi = highest
    place = problem * tl.num_programs(1) + part
    tl.store(sums + place * m + j, tl.sum(found, 0), mask=j < m)
    tl.store(exponents + place, top_phi)


@triton.jit
def columns(
    cost, problem_stride, row_stride,
    c, weighted, sums, exponents,  # as above
    t,  # [B, m]
    epsilon, n, m, parts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS columns of the cost, of BLOCK parts or rows at a time."""
    problem = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    rate = 1.0 / epsilon
    top = tl.full([BLOCK], LOWEST, tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + k
        top = tl.maximum(top, tl.load(exponents + problem * parts + part, mask=part < parts, other=LOWEST))
    top = tl.max(top, 0)
    found = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + k
        factor = exp(tl.load(exponents + problem * parts + part, mask=part < parts, other=LOWEST) - top)
        to = (problem * parts + part)[None, :] * m + j[:, None]
        found += tl.load(sums + to, mask=(j < m)[:, None] & (part < parts)[None, :], other=0.0) * factor[None, :]
    total = tl.sum(found, 1)
    potential = tl.load(c + problem * m + j, mask=j < m, other=float("-inf"))
    softmin = potential - epsilon * (top + log(total))

    lost = (potential != float("-inf")) & ~(total >= LEAST)
    if tl.max(lost.to(tl.int32), 0) > 0:
        highest = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
        found = tl.zeros([ROWS, BLOCK], tl.float32)
        at = cost + problem * problem_stride + j[:, None]
        for start in range(0, n, BLOCK):
            i = start + k
            inside = lost[:, None] & (i < n)[None, :]
            values = tl.load(at + i.to(tl.int64)[None, :] * row_stride, mask=inside, other=float("inf"))
            f = tl.load(weighted + problem * n + i, mask=i < n, other=0.0)
            highest, found = gather(f[None, :] - values, highest, found, rate)
        softmin = tl.where(lost, softmin_of(highest, found, epsilon, rate), softmin)
    tl.store(t + problem * m + j, tl.where(potential == float("-inf"), float("inf"), softmin), mask=j < m)
