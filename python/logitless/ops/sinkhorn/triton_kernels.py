"""The kernels in Triton (kernels/sinkhorn.py), float32 on a GPU. A module is a ``SinkhornKernels``; it has no whole
runs, and no gradients of half-iterations and plans."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.backends import triton
from logitless.kernels import configs
from logitless.kernels import sinkhorn as compiled
from logitless.ops.sinkhorn.kernels import Cost, Dense, Points

PROGRAMS = 4  # per multiprocessor, of the backward kernel of matrices: its history is so often that of a tile


def half_iteration(cost: Cost, c: Tensor, epsilon: float) -> Tensor:
    c = c.contiguous()
    return _of_stored(cost.cost, c, epsilon) if isinstance(cost, Dense) else _of_points(cost, c, epsilon)


def _of_stored(cost: Tensor, c: Tensor, epsilon: float) -> Tensor:
    tile = configs.cost_tile(cost.shape[1], cost.stride(1) == 1, triton.interpreted())
    return _softmin(compiled.softmin, [cost, *cost.stride(), c], cost.shape, tile, epsilon)


def _of_points(points: Points, c: Tensor, epsilon: float) -> Tensor:
    x, y = points.x.contiguous(), points.y.contiguous()
    tile = configs.points_tile(points.kind in ("sqeuclidean", "cosine"), triton.interpreted())
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
