"""The kernels in vectorised C++ (csrc/sinkhorn.cpp): float32 on a CPU.

Costs between points are formed in blocks, by torch where they are products, and a block is read like a stored cost.
This module only passes addresses on, of tensors that it makes contiguous and keeps until the call returns; of a stored
cost either the columns or the rows must be adjacent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from logitless.backends.cpu import _C
from logitless.ops.sinkhorn import torch_kernels
from logitless.ops.sinkhorn.cpu_doubly_stochastic import (  # noqa: F401 (part of the kernels, as the next)
    doubly_stochastic,
    doubly_stochastic_backward,
)
from logitless.ops.sinkhorn.cpu_l1 import l1, l1_backward  # noqa: F401
from logitless.ops.sinkhorn.kernels import Cost, Dense, Points, Run, Schedule
from logitless.ops.sinkhorn.torch_kernels import blocks

DIRECT = {"l1", "euclidean"}  # kinds of points whose differences are taken here, not products
LARGEST = 1 << 28  # entries of a problem for whole runs: they keep another matrix of that size
Parts = tuple[Tensor | None, Tensor | None, Tensor | None]  # of rows [.., n, k], of columns [.., m, k], and a gradient


def half_iteration(cost: Cost, c: Tensor, epsilon: float) -> Tensor:
    def read(block: Tensor, problems: slice, rows: slice) -> Parts:
        top, total = _softmin(block, c[problems], epsilon)
        return top.add_(total.log_(), alpha=epsilon).neg_()[..., None], None, None

    return _read(cost, read)[0][..., 0]


def half_iteration_backward(
    cost: Cost, c: Tensor, s: Tensor, upstream: Tensor, epsilon: float, wanted: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    def read(block: Tensor, problems: slice, rows: slice) -> Parts:
        top, total = _softmin(block, c[problems], epsilon)  # of s the last digits would be missed
        left = (upstream[problems, rows] / total.masked_fill_(total == 0, 1))[..., None]
        product = (left, torch.ones_like(c[problems])[..., None]) if wanted else None
        return _plan(block, top.neg_(), c[problems], epsilon, down=left, product=product)

    _, columns, found = _read(cost, read)
    return columns[..., 0].neg_(), found


def apply_plan(cost: Cost, r: Tensor, c: Tensor, values: Tensor, epsilon: float, power: int) -> Tensor:
    def read(block: Tensor, problems: slice, rows: slice) -> Parts:
        return _plan(block, r[problems, rows], c[problems], epsilon, power, across=values[problems])

    return _read(cost, read)[0]


def plan_backward(
    cost: Cost, r: Tensor, c: Tensor, left: Tensor, right: Tensor, epsilon: float, power: int, wanted: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    slopes = (1.0, -1 / epsilon) if power else (-1 / epsilon, 0.0)

    def read(block: Tensor, problems: slice, rows: slice) -> Parts:
        down = left[problems, rows]
        product = (down, right[problems]) if wanted else None
        return _plan(block, r[problems, rows], c[problems], epsilon, power, down=down, product=product, slopes=slopes)

    return _read(cost, read)[1:]


def build(points: Points) -> Tensor:
    if points.kind not in DIRECT:
        return torch_kernels.build(points)
    return _pairs(points.x, points.y.mT.contiguous(), points.kind)


def build_backward(points: Points, cost: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    if points.kind != "l1":
        return torch_kernels.build_backward(points, cost, gradient)
    x, y = points.x, points.y
    return _signs(gradient, x, y.mT.contiguous()), _signs(gradient.mT, y, x.mT.contiguous())


def forms(points: Points) -> bool:
    return False


def runs(cost: Cost) -> bool:
    _, n, m = cost.shape
    return isinstance(cost, Dense) and n * m <= LARGEST


def run(cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, keep: bool) -> Run:
    count, n, m = cost.shape
    history = {}
    if keep:  # what no iteration writes to is never touched
        history = {
            "sums": a.new_empty((count, schedule.limit, n + m)),
            "logs": a.new_empty((count, schedule.limit), dtype=torch.bool),
            "returned": a.new_empty(count, dtype=torch.int64),
        }
    out = {
        "f": a.new_empty((count, n)),
        "g": a.new_empty((count, m)),
        "rows": a.new_empty((count, n)),
        "reached": a.new_empty((count, m), dtype=torch.bool),
        "iterations": a.new_empty(count, dtype=torch.int64),
        "stopped": a.new_empty(count, dtype=torch.bool),
    }
    given = _Given(cost.cost if cost.cost.stride(2) == 1 else cost.cost.contiguous())
    _C.sinkhorn.run(
        given.cost,
        *map(given.address, (a, b, g)),
        _numbers(schedule),
        history=_addresses(history),
        out=_addresses(out),
        threads=torch.get_num_threads(),
    )
    return Run(**out, history=(g, *history.values()) if keep else ())


def run_backward(
    cost: Dense, a: Tensor, b: Tensor, schedule: Schedule, history: tuple[Tensor, ...],
    of_f: Tensor, of_g: Tensor, wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    g, *history = history
    of_cost = a.new_empty(cost.shape) if wanted else None
    of_a, of_b = a.new_empty(a.shape), b.new_empty(b.shape)
    given = _Given(cost.cost if cost.cost.stride(2) == 1 else cost.cost.contiguous())
    _C.sinkhorn.run_backward(
        given.cost,
        *map(given.address, (a, b, g)),
        _numbers(schedule),
        history=_addresses(dict(zip(("sums", "logs", "returned"), history))),
        of_f=given.address(of_f),
        of_g=given.address(of_g),
        of_cost=of_cost.data_ptr() if wanted else 0,
        of_a=of_a.data_ptr(),
        of_b=of_b.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return of_cost, of_a, of_b


def transport(
    cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    out = {"value": a.new_empty(len(a))}
    if wanted[0]:
        out["of_cost"] = a.new_empty(cost.shape)
    if wanted[1]:
        out |= {"of_a": a.new_empty(a.shape), "of_b": b.new_empty(b.shape)}
    given = _Given(cost.cost if cost.cost.stride(2) == 1 else cost.cost.contiguous())
    _C.sinkhorn.transport(
        given.cost,
        *map(given.address, (a, b, g)),
        _numbers(schedule),
        out=_addresses(out),
        threads=torch.get_num_threads(),
    )
    return out["value"], out.get("of_cost"), (out["of_a"], out["of_b"]) if wanted[1] else None


class _Given:
    """Addresses of tensors, which live as long as this does; also that of a cost with adjacent columns."""

    def __init__(self, cost: Tensor | None = None) -> None:
        self._kept = [cost]
        self.cost = None if cost is None else (cost.data_ptr(), (*cost.shape, *cost.stride()[:2]))

    def address(self, tensor: Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _numbers(schedule: Schedule) -> tuple:
    return list(schedule.annealed), schedule.epsilon, schedule.limit, schedule.tolerance, schedule.rhos


def _read(
    cost: Cost, read: Callable[[Tensor, slice, slice], Parts]
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
    """What ``read`` gives of all of a cost: of rows, of columns, and gradients of the cost's tensors.

    It is given a block [problems, rows, m] and which those are; what it gives of columns is added up.
    """
    if isinstance(cost, Dense):
        of_rows, of_columns, gradient = read(cost.cost, slice(None), slice(None))
        return of_rows, of_columns, (gradient,)
    x, y = (tensor.contiguous() for tensor in cost.tensors)
    across = y.mT.contiguous() if cost.kind in DIRECT else None
    all_rows = all_columns = None
    gradients = (None, None)
    for problems, rows in blocks(cost):
        points = Points(x[problems, rows], y[problems], cost.kind)
        if across is None:
            block = torch_kernels.build(points)
        else:
            block = _pairs(points.x, across[problems], cost.kind)
        of_rows, of_columns, gradient = read(block, problems, rows)
        if of_rows is not None:
            if all_rows is None:
                all_rows = of_rows.new_empty((*cost.shape[:2], of_rows.shape[2]))
            all_rows[problems, rows] = of_rows
        if of_columns is not None:
            if all_columns is None:
                all_columns = of_columns.new_zeros((cost.shape[0], *of_columns.shape[1:]))
            all_columns[problems] += of_columns
        if gradient is not None:
            if gradients[0] is None:
                gradients = torch.empty_like(x), torch.zeros_like(y)
            gradients[0][problems, rows], of_y = build_backward(points, block, gradient)
            gradients[1][problems] += of_y
    return all_rows, all_columns, gradients


def _pairs(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """The cost between x [B, n, d] and y [B, d, m]."""
    (count, n, d), m = x.shape, y.shape[2]
    cost, given = x.new_empty((count, n, m)), _Given()
    _C.sinkhorn.pairs(
        given.address(x),
        given.address(y),
        (count, n, m, d),
        euclidean=kind == "euclidean",
        cost=cost.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return cost


def _signs(gradient: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum_j gradient_ij sign(x_ik - y_kj), [B, n, d]."""
    (count, n, d), m = x.shape, y.shape[2]
    out, given = x.new_empty(x.shape), _Given()
    _C.sinkhorn.signs(
        *map(given.address, (gradient, x, y)), (count, n, m, d), out=out.data_ptr(), threads=torch.get_num_threads()
    )
    return out


def _adjacent(cost: Tensor) -> tuple[Tensor, bool]:
    """The cost, transposed if its rows are what lies together."""
    if cost.stride(2) != 1 and cost.stride(1) == 1:
        return cost.mT, True
    return cost if cost.stride(2) == 1 else cost.contiguous(), False


def _softmin(cost: Tensor, c: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """top_i = max_j (c_j - C_ij), 0 where nothing is allowed, and sum_j exp((c_j - C_ij - top_i) / epsilon)."""
    stored, down = _adjacent(cost)
    given = _Given(stored)
    top, total = c.new_empty((2, *cost.shape[:2]))
    _C.sinkhorn.softmin(
        given.cost,
        given.address(c),
        epsilon,
        down=down,
        top=top.data_ptr(),
        total=total.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return top, total


def _plan(
    cost: Tensor,
    r: Tensor,
    c: Tensor,
    epsilon: float,
    power: int = 0,
    across: Tensor | None = None,
    down: Tensor | None = None,
    product: tuple[Tensor, Tensor] | None = None,
    slopes: tuple[float, float] = (1.0, 0.0),
) -> Parts:
    """With E_ij = exp((r_i + c_j - C_ij) / epsilon) and M = E C^power, in one reading of the cost:

    sum_j M_ij across_jk, [B, n, k]; sum_i M_ij down_ik, [B, m, k]; and of (left, right) = product, a gradient
    (slopes_0 E_ij + slopes_1 E_ij C_ij) sum_k left_ik right_jk.
    """
    stored, transposed = _adjacent(cost)
    if transposed:
        product = None if product is None else product[::-1]
        of_columns, of_rows, gradient = _plan(stored, c, r, epsilon, power, down, across, product, slopes)
        return of_rows, of_columns, None if gradient is None else gradient.mT
    given, of, found = _Given(stored), {}, [None, None, None]
    count = next(x for x in (across, down) if x is not None).shape[-1]
    if across is not None:
        found[0] = r.new_empty((*r.shape, count))
        of |= {"across": given.address(across.mT), "row_sums": found[0].data_ptr()}
    if down is not None:
        sums = c.new_empty((len(c), count, c.shape[1]))
        found[1] = sums.mT
        of |= {"down": given.address(down), "column_sums": sums.data_ptr()}
    if product is not None:
        left, right = product
        found[2] = r.new_empty(stored.shape)
        of |= {"left": given.address(left), "right": given.address(right.mT), "gradient": found[2].data_ptr()}
    _C.sinkhorn.plan(
        given.cost,
        given.address(r),
        given.address(c),
        epsilon,
        power=power,
        count=count,
        slopes=slopes,
        of=of,
        threads=torch.get_num_threads(),
    )
    return tuple(found)
