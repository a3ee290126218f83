"""Half-iterations of Sinkhorn's, and doubly stochastic matrices.

    softmin             s_i = -epsilon log sum_j exp((c_j - C_ij) / epsilon), of a stored cost C [B, n, m], any strides
    softmin_of_points   the same of C_ij = |x_i - y_j|^2, 1 - x_i y_j, |x_i - y_j| or |x_i - y_j|_1, formed where read
    doubly_stochastic   [M, n, n] -> [M, n, n], rows and columns divided by their sums in turn; and its backward

A stored cost is read once: 4 n m bytes a problem. Of points 4 (n + m) d bytes are read, and again from the second-level
cache for every tile of the other side, for 2 n m d FLOP in float32 products; no [n, m] tensor is made. Small matrices
are read once (twice with a gradient), written once, and stay in registers meanwhile.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import finite
from logitless.kernels.elementary import LOWEST, exp, log_of_sum, times

COSTS = {"sqeuclidean": 0, "cosine": 1, "euclidean": 2, "l1": 3}  # COST of softmin_of_points
DIALECTS = {"exact": 0, "deepseek": 1, "megatron": 2}
SQEUCLIDEAN, COSINE, EUCLIDEAN = (tl.constexpr(COSTS[kind]) for kind in ("sqeuclidean", "cosine", "euclidean"))
EXACT, DEEPSEEK, MEGATRON = map(tl.constexpr, DIALECTS.values())
EPS = tl.constexpr(1e-6)


# ---- half-iterations: programs are tiles of rows of a problem x parts of the columns


@triton.jit
def _place(n, ROWS: tl.constexpr):
    """(problem, rows) of a program."""
    tiles = tl.cdiv(n, ROWS)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), program % tiles * ROWS + tl.arange(0, ROWS)


@triton.jit
def gather(x, m, total, rate):
    """Lanes' maxima m and sums of e^((x - m) rate) with an element more each; the difference goes first, so that no
    rate overflows."""
    d = (x - m) * rate
    up = d > 0.0
    e = exp(tl.where(up, -d, d))
    return tl.where(up, x, m), tl.where(up, total * e + 1.0, total + e)


@triton.jit
def softmin_of(m, total, epsilon, rate):
    """Of rows of lanes."""
    joint = tl.max(m, 1)
    sums = tl.sum(total * exp((m - joint[:, None]) * rate), 1)
    return tl.where(sums == 0.0, float("inf"), -(joint + epsilon * log_of_sum(sums)))


@triton.jit
def _store(s, m, total, epsilon, rate, problem, row, n, ROWS: tl.constexpr):
    """Joins lanes, into s [parts, B, n]."""
    problems = tl.num_programs(0) // tl.cdiv(n, ROWS)
    to = s + (tl.program_id(1).to(tl.int64) * problems + problem) * n + row
    tl.store(to, softmin_of(m, total, epsilon, rate), mask=row < n)


@triton.jit
def softmin(
    cost, problem_stride, row_stride, column_stride,
    c,  # [B, m]
    s,  # [parts, B, n]
    epsilon, n, m, part_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem, row = _place(n, ROWS)
    begin = tl.program_id(1) * part_columns
    end = tl.minimum(begin + part_columns, m)
    rate = 1.0 / epsilon
    top = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    at = cost + problem * problem_stride + row.to(tl.int64)[:, None] * row_stride
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = (row < n)[:, None] & (j < end)[None, :]
        values = tl.load(at + j.to(tl.int64)[None, :] * column_stride, mask=inside, other=float("inf"))
        potential = tl.load(c + problem * m + j, mask=j < end, other=0.0)
        top, total = gather(potential[None, :] - values, top, total, rate)
    _store(s, top, total, epsilon, rate, problem, row, n, ROWS)


@triton.jit
def _distances(
    at_x, at_y, live, valid, depth,
    COST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the cost [ROWS, BLOCK], between points that begin at ``at_x`` and ``at_y``."""
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    if COST == SQEUCLIDEAN or COST == COSINE:
        k = tl.arange(0, DEPTH)
        squares_x = tl.zeros([ROWS], tl.float32)
        squares_y = tl.zeros([BLOCK], tl.float32)
        for start in range(0, depth, DEPTH):
            inside = (start + k < depth)[None, :]
            x = tl.load(at_x[:, None] + (start + k)[None, :], mask=live[:, None] & inside, other=0.0)
            y = tl.load(at_y[:, None] + (start + k)[None, :], mask=valid[:, None] & inside, other=0.0)
            sums = tl.dot(x, tl.trans(y), sums, input_precision="ieee")
            if COST == SQEUCLIDEAN:
                squares_x += tl.sum(x * x, 1)
                squares_y += tl.sum(y * y, 1)
        if COST == COSINE:
            return 1.0 - sums
        squared = squares_x[:, None] + squares_y[None, :] - 2.0 * sums
        return tl.where(squared < 0.0, 0.0, squared)
    else:  # differences: the root of a small square that is wrong in its last digit is wrong in its middle one
        for k in range(depth):
            x = tl.load(at_x + k, mask=live, other=0.0)
            y = tl.load(at_y + k, mask=valid, other=0.0)
            d = x[:, None] - y[None, :]
            sums += d * d if COST == EUCLIDEAN else tl.abs(d)
        return tl.sqrt_rn(sums) if COST == EUCLIDEAN else sums


@triton.jit
def softmin_of_points(
    x,  # [B, n, depth]
    y,  # [B, m, depth]
    c, s, epsilon, n, m, depth, part_columns,  # as above
    COST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    problem, row = _place(n, ROWS)
    begin = tl.program_id(1) * part_columns
    end = tl.minimum(begin + part_columns, m)
    rate = 1.0 / epsilon
    top = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    at_x = x + (problem * n + row) * depth
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        valid = j < end
        at_y = y + (problem * m + j) * depth
        values = _distances(at_x, at_y, row < n, valid, depth, COST, ROWS, BLOCK, DEPTH)
        potential = tl.load(c + problem * m + j, mask=valid, other=float("-inf"))
        top, total = gather(potential[None, :] - values, top, total, rate)
    _store(s, top, total, epsilon, rate, problem, row, n, ROWS)


# ---- doubly stochastic matrices, tiles [TILE, PADDED, PADDED] of them, N padded
#
# P = diag(u) K diag(v), in "exact" e^(x - u - v), after halves that each divide by a sum of the matrix:
#
#   exact      x = logits - maxima of rows, then columns          u_i = log sum_j e^(x_ij - v_j)
#   deepseek   K = softmax(logits) + eps, columns first           u_i <- u_i / (u_i sum_j K_ij v_j + eps)
#   megatron   K = e^(logits - maxima of rows)                    u_i <- u_i / max(u_i sum_j K_ij v_j, eps)
#
# and v alike. With A = dL/d log of the matrix, a half over rows that gave P passes A_ij - P_ij sum_j A_ij on (A where
# megatron's eps was the larger): backward needs u and v of every half, and no matrix.


@triton.jit
def _load_matrices(tensor, block, matrices, padding, TILE: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr):
    """([TILE, PADDED, PADDED], where it is, what of it is there)."""
    matrix = block * TILE + tl.arange(0, TILE)
    i = tl.arange(0, PADDED)
    inside = (matrix < matrices)[:, None, None] & (i < N)[None, :, None] & (i < N)[None, None, :]
    at = matrix.to(tl.int64)[:, None, None] * (N * N) + i[None, :, None] * N + i[None, None, :]
    return tl.load(tensor + at, mask=inside, other=padding), at, inside


@triton.jit
def _softmax(x):
    e = exp(x - finite(tl.max(x, 2))[:, :, None])
    return e / tl.sum(e, 2)[:, :, None]


@triton.jit
def _begin(x, inside, DIALECT: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr):
    """(K, u, v)."""
    if DIALECT == DEEPSEEK:
        x = tl.where(inside, _softmax(x) + EPS, 0.0)
        u = tl.full([TILE, PADDED], 1.0, tl.float32)
        return x, u, _half(x, u, u[:, :, None], 1, DIALECT)
    else:
        x = x - finite(tl.max(x, 2))[:, :, None]
        if DIALECT == MEGATRON:
            return exp(x), tl.full([TILE, PADDED], 1.0, tl.float32), tl.full([TILE, PADDED], 1.0, tl.float32)
        else:
            top = finite(tl.max(x, 1))
            return x - top[:, None, :], tl.zeros([TILE, PADDED], tl.float32), -top


@triton.jit
def _half(k, own, other, AXIS: tl.constexpr, DIALECT: tl.constexpr):
    """The new u (AXIS 2) or v (AXIS 1), from the old one and the other, of K's dimensions. Of nothing: no scaling."""
    if DIALECT == EXACT:
        x = k - other
        top = finite(tl.max(x, AXIS))
        total = tl.sum(exp(x - tl.expand_dims(top, AXIS)), AXIS)
        return tl.where(total == 0.0, 0.0, top + log_of_sum(total))
    else:
        total = tl.sum(k * other, AXIS)
        if DIALECT == DEEPSEEK:
            new = 1.0 / (total + EPS / own)
        else:
            new = tl.where(own * total < EPS, own / EPS, 1.0 / total)
        return tl.where(total < 1.2e-38, 1.0, new)


@triton.jit
def _entries(k, u, v, DIALECT: tl.constexpr):
    if DIALECT == EXACT:
        return exp(k - u[:, :, None] - v[:, None, :])
    else:
        return k * u[:, :, None] * v[:, None, :]


@triton.jit
def _before_half(a, p, k, own, other, AXIS: tl.constexpr, DIALECT: tl.constexpr):
    """A before a half that gave p, from A after it; ``own`` and ``other`` as the half was given them."""
    total = tl.sum(a, AXIS)
    if DIALECT == MEGATRON:
        total = tl.where(own * tl.sum(k * other, AXIS) < EPS, 0.0, total)
    return a - p * tl.expand_dims(total, AXIS)


@triton.jit
def _worst(sums, N: tl.constexpr, PADDED: tl.constexpr):
    """The largest distance from 1, NaN if one is."""
    off = tl.where(tl.arange(0, PADDED)[None, :] < N, tl.abs(sums - 1.0), 0.0)
    return tl.max(off, 1) + 0.0 * tl.sum(off, 1)


@triton.jit
def doubly_stochastic(
    logits, out,  # [M, N, N]
    residual,  # [M]
    matrices, pairs,
    DIALECT: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """``pairs`` of halves over rows and columns; "deepseek" has one over columns before them."""
    block = tl.program_id(0)
    x, at, inside = _load_matrices(logits, block, matrices, float("-inf"), TILE, N, PADDED)
    k, u, v = _begin(x, inside, DIALECT, TILE, PADDED)
    for _ in range(pairs):
        u = _half(k, u, v[:, None, :], 2, DIALECT)
        v = _half(k, v, u[:, :, None], 1, DIALECT)
    p = _entries(k, u, v, DIALECT)
    tl.store(out + at, p, mask=inside)
    rows, columns = _worst(tl.sum(p, 2), N, PADDED), _worst(tl.sum(p, 1), N, PADDED)
    matrix = block * TILE + tl.arange(0, TILE)
    tl.store(residual + matrix, tl.where(rows < columns, columns, rows + 0.0 * columns), mask=matrix < matrices)


@triton.jit
def doubly_stochastic_backward(
    logits, upstream, out,  # [M, N, N]
    history,  # [programs, pairs, 2, TILE, PADDED]: u and v of the matrices a program has in hand
    matrices, pairs,
    DIALECT: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE * PADDED
    lane = tl.arange(0, TILE)[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    kept = history + tl.program_id(0).to(tl.int64) * pairs * 2 * SIZE + lane
    for block in range(tl.program_id(0), tl.cdiv(matrices, TILE), tl.num_programs(0)):
        x, at, inside = _load_matrices(logits, block, matrices, float("-inf"), TILE, N, PADDED)
        k, first_u, first_v = _begin(x, inside, DIALECT, TILE, PADDED)
        u, v = first_u, first_v
        for pair in range(pairs):
            u = _half(k, u, v[:, None, :], 2, DIALECT)
            v = _half(k, v, u[:, :, None], 1, DIALECT)
            tl.store(kept + 2 * pair * SIZE, u)
            tl.store(kept + (2 * pair + 1) * SIZE, v)
        tl.debug_barrier()  # other threads may read what these have written

        p = _entries(k, u, v, DIALECT)
        a = times(p, tl.load(upstream + at, mask=inside, other=0.0))
        for back in range(pairs):
            pair = pairs - 2 - back  # the one before
            given = (lane >= 0) & (pair >= 0)
            old_u = tl.load(kept + 2 * pair * SIZE, mask=given, other=0.0)
            old_v = tl.load(kept + (2 * pair + 1) * SIZE, mask=given, other=0.0)
            old_u, old_v = tl.where(given, old_u, first_u), tl.where(given, old_v, first_v)
            a = _before_half(a, _entries(k, u, v, DIALECT), k, old_v, u[:, :, None], 1, DIALECT)
            a = _before_half(a, _entries(k, u, old_v, DIALECT), k, old_u, old_v[:, None, :], 2, DIALECT)
            u, v = old_u, old_v
        if DIALECT == DEEPSEEK:
            a = _before_half(a, _entries(k, u, v, DIALECT), k, v, u[:, :, None], 1, DIALECT)
            softmax = tl.where(inside, _softmax(x), 0.0)
            a = tl.where(inside, a / k, 0.0)
            a = softmax * (a - tl.sum(softmax * a, 2)[:, :, None])
        tl.store(out + at, a, mask=inside)
        tl.debug_barrier()
