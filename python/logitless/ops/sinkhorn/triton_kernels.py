"""The kernels in Triton (kernels/sinkhorn*.py), float32 on a GPU. A module is a ``SinkhornKernels``; it has no
gradients of half-iterations and plans."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from logitless.backends import triton
from logitless.engine import plan as planning
from logitless.kernels import configs, sinkhorn_iteration, sinkhorn_run
from logitless.kernels import sinkhorn as compiled
from logitless.ops.sinkhorn import torch_kernels
from logitless.ops.sinkhorn.kernels import Cost, Dense, Points, Run, Schedule

RATE = 2e13  # FLOP/s of tl.dot in float32, 40% of what a product by itself reaches: a guess until it is measured
PRODUCTS = ("sqeuclidean", "cosine")  # kinds of points whose cost is made of products
WARPS = 16  # per multiprocessor, of the kernel that reads rows
PROGRAMS = 4  # per multiprocessor, of the backward kernel of matrices: its history is so often that of a tile


def half_iteration(cost: Cost, c: Tensor, epsilon: float) -> Tensor:
    c = c.contiguous()
    if isinstance(cost, Dense):
        return _of_stored(cost.cost, c, epsilon)
    if deep(cost):
        return torch_kernels.half_iteration_in_blocks(half_iteration, cost, c, epsilon)
    return formed(cost, c, epsilon)


def forms(points: Points) -> bool:
    depth, machine = points.x.shape[2], planning.gpu()
    return 4 * depth / RATE < 4 / machine.bandwidth


def deep(points: Points) -> bool:
    """Whether a half-iteration takes less time in blocks, of which each is a product, written and read, than by the
    kernel that forms entries where it reads them. Differences of coordinates are no product."""
    if points.kind not in PRODUCTS:
        return False
    depth, machine = points.x.shape[2], planning.gpu()
    return 2 * depth / RATE > 2 * depth / machine.flops + 8 / machine.bandwidth


def _of_stored(cost: Tensor, c: Tensor, epsilon: float) -> Tensor:
    tile = configs.cost_tile(cost.shape[1], cost.stride(1) == 1, triton.interpreted())
    return _softmin(compiled.softmin, [cost, *cost.stride(), c], cost.shape, tile, epsilon)


def formed(points: Points, c: Tensor, epsilon: float) -> Tensor:
    """A half-iteration that forms costs where it reads them."""
    x, y = points.x.contiguous(), points.y.contiguous()
    tile = configs.points_tile(points.kind in PRODUCTS, triton.interpreted())
    constants = {"COST": compiled.COSTS[points.kind], "DEPTH": tile.depth, "num_stages": tile.stages}
    return _softmin(compiled.softmin_of_points, [x, y, c], points.shape, tile, epsilon, [x.shape[2]], constants)


def _softmin(kernel, tensors: list, shape: tuple, tile, epsilon: float, depth=(), constants=None) -> Tensor:
    count, n, m = shape
    c = tensors[-1]
    parts, width = triton._parts(count * -(-n // tile.rows) * tile.rows, m, tile, c.device)
    s = c.new_empty(parts, count, n)
    with triton.on(c.device):
        kernel[count * -(-n // tile.rows), parts](
            *tensors,
            s,
            epsilon,
            n,
            m,
            *depth,
            width,
            **constants or {},
            ROWS=tile.rows,
            BLOCK=tile.block,
            **triton._options(tile),
        )
    if parts == 1:
        return s[0]
    return _of_stored(s.permute(1, 2, 0), c.new_zeros(count, parts), epsilon)  # parts are joined as columns are


def iterates(cost: Cost) -> bool:
    if not isinstance(cost, Dense) or cost.cost.stride(2) != 1:
        return False
    return 0 < cost.shape[2] <= _longest_row(cost.cost.device.index)


@functools.lru_cache
def _longest_row(index: int | None) -> int:
    shared = index is not None and not torch.version.hip
    return configs.longest_row(
        torch.cuda.get_device_properties(index).shared_memory_per_block_optin if shared else None
    )


def iteration(cost: Dense, c: Tensor, log_a: Tensor, damping: float, epsilon: float) -> tuple[Tensor, Tensor]:
    c, log_a = c.contiguous(), log_a.contiguous()
    count, n, m = cost.shape
    s, weighted, t = torch.empty_like(log_a), torch.empty_like(log_a), torch.empty_like(c)
    if not count * n:
        return s, t.fill_(torch.inf)
    tile = configs.iteration_tile(m)
    programs = triton.processors(c.device.index) * max(1, WARPS // tile.warps)
    width = -(-n // (tile.rows * max(1, programs // count))) * tile.rows
    parts = -(-n // width)
    sums, exponents = c.new_empty(count, parts, m), c.new_empty(count, parts)
    given = [cost.cost, *cost.cost.stride()[:2], c]
    with triton.on(c.device):
        sinkhorn_iteration.rows[count, parts](
            *given, log_a, s, weighted, sums, exponents, damping, epsilon, n, m, width,
            STAGES=configs.iteration_stages(bool(torch.version.hip)),
            ROWS=tile.rows, BLOCK=tile.block, **triton._options(tile),
        )  # fmt: skip
        tile = configs.columns_tile(triton.interpreted())
        sinkhorn_iteration.columns[count, -(-m // tile.rows)](
            *given, weighted, sums, exponents, t, epsilon, n, m, parts,
            ROWS=tile.rows, BLOCK=tile.block, **triton._options(tile),
        )  # fmt: skip
    return s, t


# ---- whole runs


def runs(cost: Cost) -> bool:
    return isinstance(cost, Dense) and max(cost.shape[1:]) <= configs.LARGEST_RUN


def run(cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, keep: bool) -> Run:
    a, b, g = (x.contiguous() for x in (a, b, g))
    count = len(a)
    history = ()
    if keep:
        history = (
            *(a.new_empty(count, schedule.limit, x.shape[1]) for x in (a, b)),
            a.new_empty(count, dtype=torch.int32),
        )
    found = Run(
        torch.empty_like(a),
        torch.empty_like(b),
        torch.empty_like(a),
        torch.empty_like(b, dtype=torch.bool),
        a.new_empty(count, dtype=torch.int64),
        a.new_empty(count, dtype=torch.bool),
        (*history, g) if keep else (),
    )
    _run(
        sinkhorn_run.run,
        [cost.cost, *cost.cost.stride(), a, b, g, _annealed(schedule, a)],
        [found.f, found.g, found.rows, found.reached, found.iterations, found.stopped, *(history or (a, b, a))],
        [schedule.epsilon, *schedule.rhos, schedule.tolerance or 0.0],
        schedule,
        cost.shape,
        JUDGED=schedule.tolerance is not None,
        KEEP=keep,
    )
    return found


def run_backward(
    cost: Dense, a: Tensor, b: Tensor, schedule: Schedule, history: tuple[Tensor, ...],
    of_f: Tensor, of_g: Tensor, wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    a, b, of_f, of_g = (x.contiguous() for x in (a, b, of_f, of_g))
    of_cost = a.new_empty(cost.shape) if wanted else None
    of_a, of_b = torch.empty_like(a), torch.empty_like(b)
    *history, g = history
    _run(
        sinkhorn_run.run_backward,
        [cost.cost, *cost.cost.stride(), a, b, g, _annealed(schedule, a), *history, of_f, of_g],
        [of_cost if wanted else a, of_a, of_b],
        [schedule.epsilon, *schedule.rhos],
        schedule,
        cost.shape,
        WANTED=wanted,
    )
    return of_cost, of_a, of_b


def _run(kernel, given: list, out: list, numbers: list, schedule: Schedule, shape: tuple, **flags: bool) -> None:
    count, n, m = shape
    tile = configs.run_tile(n, m)
    if count:
        with triton.on(out[1].device):
            kernel[(count,)](
                *given,
                *out,
                *numbers,
                len(schedule.annealed),
                schedule.limit,
                n,
                m,
                **flags,
                ROWS=tile.rows,
                COLUMNS=tile.block,
                **triton._options(tile),
            )


def _annealed(schedule: Schedule, like: Tensor) -> Tensor:
    return torch.tensor(schedule.annealed, dtype=like.dtype).to(like.device, non_blocking=True)


# ---- doubly stochastic matrices


def doubly_stochastic(logits: Tensor, iterations: int, dialect: str) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    out, residual = torch.empty_like(logits), logits.new_empty(len(logits))
    _matrices(compiled.doubly_stochastic, [logits, out, residual], iterations, dialect)
    return out, residual


def doubly_stochastic_backward(logits: Tensor, gradient: Tensor, iterations: int, dialect: str) -> Tensor:
    """Keeps u and v of the matrices that programs have in hand in a scratch tensor, 8 iterations n bytes each: of 4 x 4
    matrices and 20 iterations 41 KB a program, 22 MB on 132 multiprocessors, however many matrices there are."""
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    _matrices(compiled.doubly_stochastic_backward, [logits, gradient.contiguous(), out], iterations, dialect, kept=True)
    return out


def _matrices(kernel, tensors: list[Tensor], iterations: int, dialect: str, kept: bool = False) -> None:
    matrices, n = tensors[0].shape[:2]
    if not matrices:
        return
    tile = configs.matrices_tile(n)
    device, pairs, programs = tensors[0].device, iterations - (dialect == "deepseek"), -(-matrices // tile.rows)
    if kept:
        programs = min(programs, PROGRAMS * triton.processors(device.index))
        tensors = [*tensors, tensors[0].new_empty(programs, pairs, 2, tile.rows, tile.block)]
    with triton.on(device):
        kernel[(programs,)](
            *tensors,
            matrices,
            pairs,
            DIALECT=compiled.DIALECTS[dialect],
            TILE=tile.rows,
            N=n,
            PADDED=tile.block,
            **triton._options(tile),
        )
