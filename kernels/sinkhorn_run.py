"""Whole Sinkhorn runs of small problems, one launch for all: a program per problem, whose plan stays in registers, and
each problem stops by itself.

Stabilised scaling: a half-iteration from the potential h of one side, of weights w, is one product with

    K_ij = e^((phi_i + gamma_j - C_ij) / epsilon) <= 1 when formed,    S = sum K w e^((h - held) / epsilon),

held the phi or gamma of that side; the softmin is the other's less epsilon log S. K is formed anew, from h and the
least C - h of every row or column of the other side, where h has moved by 20 epsilon from what K holds, or a sum is so
small that entries which K cannot hold would count: so any epsilon is stable, and most halves take two operations per
entry and no exponential.

Backward walks the iterations back: with the softmax W_ij = K_ij w e^(..) / S of a half, dL/dC_ij grows by W_ij times
the cotangent of the half's softmin, and the cotangent of the potential that it came from is minus W's other sums of
those.

C [B, n, m] is read from memory once, and from the caches for another K; its gradient is written once, and an
iteration's potentials, n + m floats, if they are kept. B = 1024, n = m = 64, 20 iterations: 17 MB, 5.6 us; some 840
instructions of four warps an iteration, half of them a number's of a row or column, which many threads repeat: 75 us.
"""

import triton
import triton.language as tl

from logitless.kernels.chunk import finite
from logitless.kernels.elementary import LOG2_E, exp, log

FURTHEST = tl.constexpr(29.0)  # that a potential may move from what K holds, in units of epsilon log 2
LEAST = tl.constexpr(1e-20)  # of the weights' sum: entries that K cannot hold are lost in rounding then


@triton.jit
def _load_cost(cost, row_stride, column_stride, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = i.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[None, :] * column_stride
    return tl.load(cost + at, mask=(i < n)[:, None] & (j < m)[None, :], other=float("inf"))


@triton.jit
def _load_side(tensor, problem, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    return tl.load(tensor + problem * n + i, mask=i < n, other=0.0)


@triton.jit
def _store_side(tensor, problem, n, values, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(tensor + problem * n + i, values, mask=i < n)


@triton.jit
def _live(cost, row_stride, column_stride, a, b, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(weights of rows, of columns, columns that any row reaches); weights count as 0 where no other is reached."""
    open = _load_cost(cost, row_stride, column_stride, n, m, ROWS, COLUMNS) != float("inf")
    reached_rows = tl.max((open & (b > 0.0)[None, :]).to(tl.int32), 1) > 0
    reached = tl.max((open & (a > 0.0)[:, None]).to(tl.int32), 0) > 0
    return tl.where(reached_rows, a, 0.0), tl.where(reached, b, 0.0), reached


@triton.jit
def _half(
    k, phi, gamma, potential, weights, others, least, stale, rate,
    cost, row_stride, column_stride, n, m,
    AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(K, phi, gamma, scaling, sums over AXIS) of a half-iteration from a potential of weights, to ``others`` weights.
    ``stale``: K holds nothing of this epsilon."""
    held = gamma if AXIS == 1 else phi
    moved = (potential - held) * (rate * LOG2_E)
    scaling = weights * tl.exp2(tl.minimum(moved, FURTHEST))  # wrong by no more than a rounding of how far it moved
    sums = tl.sum(k * tl.expand_dims(scaling, 1 - AXIS), AXIS)
    far = (weights > 0.0) & ~(tl.abs(moved) <= FURTHEST)
    small = (others > 0.0) & ~(sums >= least)
    if stale | (tl.max(far.to(tl.int32), 0) + tl.max(small.to(tl.int32), 0) > 0):
        x = tl.expand_dims(potential, 1 - AXIS) - _load_cost(cost, row_stride, column_stride, n, m, ROWS, COLUMNS)
        x = tl.where(tl.expand_dims(weights > 0.0, 1 - AXIS), x, float("-inf"))
        top = finite(tl.max(x, AXIS))
        k = exp((x - tl.expand_dims(top, AXIS)) * rate)
        scaling = weights
        sums = tl.sum(k * tl.expand_dims(scaling, 1 - AXIS), AXIS)
        if AXIS == 1:
            phi, gamma = -top, potential
        else:
            phi, gamma = potential, -top
    return k, phi, gamma, scaling, sums


@triton.jit
def _damping(rho, epsilon):
    return tl.where(rho == float("inf"), 1.0, rho / (rho + epsilon))


@triton.jit
def _potential(held, sums, weights, damping, epsilon):
    """damping (held - epsilon log sums), 0 where there is no point or the sum is NaN."""
    found = damping * (held - epsilon * log(sums))
    return tl.where((weights > 0.0) & (found < float("inf")), found, 0.0)


@triton.jit
def _optimal(weights, potential, rho):
    """What a marginal should be."""
    return weights * exp(-potential / rho)


@triton.jit
def run(
    cost, problem_stride, row_stride, column_stride,
    a, b, start,  # [B, n], [B, m], [B, m]
    annealed,  # [annealed_count]
    f_out, g_out, rows_out, reached_out,  # [B, n], [B, m], [B, n], [B, m]
    iterations, stopped,  # [B]
    history_f, history_g, returned,  # [B, limit, n], [B, limit, m], [B], if KEEP
    epsilon, rho_a, rho_b, tolerance, annealed_count, limit, n, m,
    JUDGED: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * problem_stride
    given_a, given_b = _load_side(a, problem, n, ROWS), _load_side(b, problem, m, COLUMNS)
    a, b, reached = _live(cost, row_stride, column_stride, given_a, given_b, n, m, ROWS, COLUMNS)
    missed = tl.sum(given_a - a, 0)  # rows that nothing reaches, in every residual
    least_a, least_b = tl.sum(a, 0) * LEAST, tl.sum(b, 0) * LEAST
    g = _load_side(start, problem, m, COLUMNS)
    k = tl.zeros([ROWS, COLUMNS], tl.float32)
    phi, gamma = tl.zeros([ROWS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    best_f, best_g = phi, gamma
    least = tl.full([], float("inf"), tl.float32)
    before = tl.full([], 0.0, tl.float32)
    iteration = tl.full([], 0, tl.int32)
    last = iteration
    done = iteration > 0
    while (iteration < limit) & ~done:
        e = tl.load(annealed + iteration, mask=iteration < annealed_count, other=epsilon)
        rate = 1.0 / e
        k, phi, gamma, v, sums = _half(
            k, phi, gamma, g, b, a, least_b, e != before, rate,
            cost, row_stride, column_stride, n, m, 1, ROWS, COLUMNS,
        )  # fmt: skip
        f = _potential(phi, sums, a, _damping(rho_a, e), e)
        k, phi, gamma, u, sums = _half(
            k, phi, gamma, f, a, b, least_a, False, rate,
            cost, row_stride, column_stride, n, m, 0, ROWS, COLUMNS,
        )  # fmt: skip
        new = _potential(gamma, sums, b, _damping(rho_b, e), e)
        if JUDGED:
            # b e^((g - t) / epsilon), t = gamma - epsilon log S
            marginal = tl.where(b > 0.0, b * exp((g - gamma) * rate) * sums, 0.0)
            off = tl.where(given_b > 0.0, tl.abs(marginal - _optimal(given_b, g, rho_b)), 0.0)
            residual = missed + tl.sum(off, 0)
            residual = tl.where(residual < 1e37, residual, float("inf"))
            better = (residual <= least) | (iteration <= annealed_count)
            least = tl.where(better, residual, least)
            best_f, best_g = tl.where(better, f, best_f), tl.where(better, new, best_g)
            last = tl.where(better, iteration, last)
            done = (iteration >= annealed_count) & (residual <= tolerance)
        else:
            best_f, best_g, last = f, new, iteration
        if KEEP:
            _store_side(history_f, problem * limit + iteration, n, f, ROWS)
            _store_side(history_g, problem * limit + iteration, m, new, COLUMNS)
        g = new
        before = e
        iteration += 1

    _store_side(f_out, problem, n, best_f, ROWS)
    _store_side(g_out, problem, m, best_g, COLUMNS)
    _store_side(reached_out, problem, m, reached, COLUMNS)
    # sum_j a_i e^((f_i + t_j - C_ij) / epsilon) columns_j: a column holds b_j e^(-g_j / rho), wherever it comes from
    t = best_g / _damping(rho_b, epsilon)
    x = (t[None, :] - _load_cost(cost, row_stride, column_stride, n, m, ROWS, COLUMNS)) + best_f[:, None]
    shares = tl.minimum(given_a[:, None] * exp(tl.minimum(x * (1.0 / epsilon), 88.0)), 1.0)
    _store_side(rows_out, problem, n, tl.sum(shares * _optimal(b, best_g, rho_b)[None, :], 1), ROWS)
    tl.store(iterations + problem, iteration.to(tl.int64))
    tl.store(stopped + problem, done)
    if KEEP:
        tl.store(returned + problem, last)


@triton.jit
def run_backward(
    cost, problem_stride, row_stride, column_stride,
    a, b, start, annealed, history_f, history_g, returned,  # as above
    of_f, of_g,  # [B, n], [B, m]
    of_cost, of_a, of_b,  # [B, n, m] if WANTED, [B, n], [B, m]
    epsilon, rho_a, rho_b, annealed_count, limit, n, m,
    WANTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * problem_stride
    a, b = _load_side(a, problem, n, ROWS), _load_side(b, problem, m, COLUMNS)
    a, b, _ = _live(cost, row_stride, column_stride, a, b, n, m, ROWS, COLUMNS)
    least_a, least_b = tl.sum(a, 0) * LEAST, tl.sum(b, 0) * LEAST
    of_row, of_column = _load_side(of_f, problem, n, ROWS), _load_side(of_g, problem, m, COLUMNS)
    of_log_a, of_log_b = tl.zeros([ROWS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    k, gradient = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    phi, gamma = tl.zeros([ROWS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    before = tl.full([], 0.0, tl.float32)
    last = tl.load(returned + problem)
    for back in range(0, last + 1):
        iteration = last - back
        at = problem * limit + iteration
        e = tl.load(annealed + iteration, mask=iteration < annealed_count, other=epsilon)
        rate = 1.0 / e
        f = _load_side(history_f, at, n, ROWS)
        if iteration > 0:
            g = _load_side(history_g, at - 1, m, COLUMNS)
        else:
            g = _load_side(start, problem, m, COLUMNS)

        k, phi, gamma, u, sums = _half(
            k, phi, gamma, f, a, b, least_a, e != before, rate,
            cost, row_stride, column_stride, n, m, 0, ROWS, COLUMNS,
        )  # fmt: skip
        share = tl.where(b > 0.0, _damping(rho_b, e) * of_column / sums, 0.0)
        flow = k * u[:, None] * share[None, :]
        y = tl.sum(flow, 1)
        gradient += flow
        of_row -= y
        of_log_a -= e * y

        k, phi, gamma, v, sums = _half(
            k, phi, gamma, g, b, a, least_b, False, rate,
            cost, row_stride, column_stride, n, m, 1, ROWS, COLUMNS,
        )  # fmt: skip
        share = tl.where(a > 0.0, _damping(rho_a, e) * of_row / sums, 0.0)
        flow = k * v[None, :] * share[:, None]
        y = tl.sum(flow, 0)
        gradient += flow
        of_row, of_column = tl.zeros([ROWS], tl.float32), -y
        of_log_b -= e * y
        before = e

    _store_side(of_a, problem, n, tl.where(a > 0.0, of_log_a / a, 0.0), ROWS)
    _store_side(of_b, problem, m, tl.where(b > 0.0, of_log_b / b, 0.0), COLUMNS)
    if WANTED:
        i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        to = of_cost + problem * n * m + (i[:, None] * m + j[None, :])
        tl.store(to, gradient, mask=(i < n)[:, None] & (j < m)[None, :])
