"""The kernels in plain torch operations: any device, float32 and float64. A module is a ``SinkhornKernels``.

Costs are read in blocks [b, rows, m] whose temporaries stay in cache on a CPU and fill the device on a GPU. Products go
through ``out=``, which autocast leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from logitless.engine import scan
from logitless.ops.sinkhorn.kernels import Cost, Dense, Points, Probabilities


def half_iteration(cost: Cost, c: Tensor, epsilon: float) -> Tensor:
    s = c.new_empty(cost.shape[:2])
    for problems, rows in blocks(cost):
        _, top, total = _exponentials(_block(cost, problems, rows), c[problems], epsilon)
        s[problems, rows] = -(top + epsilon * total.log())[..., 0]
    return s


def half_iteration_backward(
    cost: Cost, c: Tensor, s: Tensor, upstream: Tensor, epsilon: float, wanted: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    of_c, gradients = torch.zeros_like(c), _gradients(cost, wanted)
    for problems, rows in blocks(cost):
        block = _block(cost, problems, rows)
        softmax, _, total = _exponentials(block, c[problems], epsilon)  # of s the last digits would be missed
        softmax.mul_(upstream[problems, rows, None] / torch.where(total == 0, 1, total))
        of_c[problems] -= softmax.sum(-2)
        if wanted:
            _add(gradients, softmax, block, cost, problems, rows)
    return of_c, gradients


def iterates(cost: Cost) -> bool:
    return False


def apply_plan(cost: Cost, r: Tensor, c: Tensor, values: Tensor, epsilon: float, power: int) -> Tensor:
    out = r.new_empty((*r.shape, values.shape[-1]))
    for problems, rows in blocks(cost):
        block = _block(cost, problems, rows)
        plan = _plan(block, r[problems, rows], c[problems], epsilon)
        out[problems, rows] = _product(_times(plan, block) if power else plan, values[problems])
    return out


def plan_backward(
    cost: Cost, r: Tensor, c: Tensor, left: Tensor, right: Tensor, epsilon: float, power: int, wanted: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    columns = c.new_zeros((*c.shape, left.shape[-1]))
    gradients = _gradients(cost, wanted)
    for problems, rows in blocks(cost):
        block, left_block = _block(cost, problems, rows), left[problems, rows]
        plan = _plan(block, r[problems, rows], c[problems], epsilon)
        weighted = _times(plan, block) if power else plan
        columns[problems] += _product(weighted.mT, left_block)
        if wanted:  # d (E C^power) / dC = E (power C^(power - 1) - C^power / epsilon)
            slope = plan - weighted / epsilon if power else plan.mul_(-1 / epsilon)
            slope *= _product(left_block, right[problems].mT)
            _add(gradients, slope, block, cost, problems, rows)
    return columns, gradients


def runs(cost: Cost) -> bool:
    return False


def forms(points: Points) -> bool:
    return False


def build(points: Points) -> Tensor:
    cost = points.x.new_empty(points.shape)
    for problems, rows in blocks(points):
        cost[problems, rows] = _block(points, problems, rows)
    return cost


def build_backward(points: Points, cost: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    gradients = _gradients(points, wanted=True)
    for problems, rows in blocks(points):
        _add(gradients, gradient[problems, rows], cost[problems, rows], points, problems, rows)
    return gradients


def l1(p: Probabilities, q: Probabilities, moments: bool) -> tuple[Tensor, Tensor | None]:
    (p, _), (q, _) = _softmax(p), _softmax(q)
    cost = p.new_empty((*p.shape[:2], q.shape[1]), dtype=torch.float64)
    found = torch.empty_like(cost) if moments else None
    for js in _slabs(p, q):
        difference = p[:, :, None] - q[:, None, js]
        cost[..., js] = difference.abs().sum(-1)
        if moments:
            found[..., js] = difference.sign_().mul_(p[:, :, None]).sum(-1)
    return cost, found


def l1_backward(gradient: Tensor, moments: Tensor, p: Probabilities, q: Probabilities, out: Tensor) -> None:
    (p, slope), (q, _) = _softmax(p), _softmax(q)
    bar = _signs(gradient, p, q).sub_((gradient * moments).sum(-1, keepdim=True).to(p.dtype))
    torch.mul(bar.mul_(p).flatten(0, 1), slope, out=out)


def doubly_stochastic(logits: Tensor, iterations: int, dialect: str) -> tuple[Tensor, Tensor]:
    out, residual = torch.empty_like(logits), logits.new_empty(len(logits))
    for matrices in _matrices(logits):
        found = _NORMALIZED[dialect](_across(logits[matrices]), iterations)
        out[matrices] = _across(found, back=True)
        residual[matrices] = (torch.cat([found.sum(0), found.sum(1)]) - 1).abs().amax(0)
    return out, residual


def doubly_stochastic_backward(logits: Tensor, gradient: Tensor, iterations: int, dialect: str) -> Tensor:
    out = torch.empty_like(logits)
    for matrices in _matrices(logits):  # the run is repeated, a few matrices at a time: no history outlives a block
        block = _across(logits[matrices]).requires_grad_()
        with torch.enable_grad():
            found = _NORMALIZED[dialect](block, iterations)
        out[matrices] = _across(*torch.autograd.grad(found, block, _across(gradient[matrices])), back=True)
    return out


# ---- blocks of a cost


def half_iteration_in_blocks(of_stored: Callable[..., Tensor], points: Points, c: Tensor, epsilon: float) -> Tensor:
    """By a half-iteration of stored costs, of blocks that are formed one by one."""
    s = c.new_empty(points.shape[:2])
    for problems, rows in blocks(points):
        s[problems, rows] = of_stored(Dense(_block(points, problems, rows)), c[problems], epsilon)
    return s


def blocks(cost: Cost) -> Iterator[tuple[slice, slice]]:
    """(problems, rows): several whole problems, or some rows of one."""
    count, n, m = cost.shape
    limit = _limit(cost.tensors[0])
    together, rows = max(1, limit // (n * m)), min(n, max(1, limit // m))
    for start in range(0, count, together):
        for row in range(0, n, rows):
            yield slice(start, min(start + together, count)), slice(row, min(row + rows, n))


def _softmax(of: Probabilities) -> tuple[Tensor, Tensor]:
    """p [B, tokens, columns], and ds/dz."""
    chunk, dtype = of.chunk, of.chunk.z.dtype
    s = scan.scale_(replace(chunk, z=chunk.z.clone()))
    slope = scan.slope(s, chunk.inner, chunk.outer)
    top = torch.where(of.max == -torch.inf, 0, of.max)
    p = s.sub_(top.to(dtype)[:, None]).exp_().mul_((1 / of.sum).to(dtype)[:, None])
    return p.unflatten(0, (-1, of.tokens)), slope


def _signs(gradient: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """sum_j gradient_ij sign(p_iv - q_jv), [B, n, V]."""
    out = torch.zeros_like(p)
    for js in _slabs(p, q):
        out += (p[:, :, None] - q[:, None, js]).sign_().mul_(gradient[..., js, None]).sum(-2)
    return out


def _slabs(p: Tensor, q: Tensor) -> Iterator[slice]:
    step = max(1, _limit(p) // max(1, p.numel()))
    for start in range(0, q.shape[1], step):
        yield slice(start, min(start + step, q.shape[1]))


def _limit(tensor: Tensor) -> int:
    return 1 << (17 if tensor.device.type == "cpu" else 24)


def _block(cost: Cost, problems: slice, rows: slice) -> Tensor:
    if isinstance(cost, Dense):
        return cost.cost[problems, rows]
    return _pairs(cost.x[problems, rows], cost.y[problems], cost.kind)


def _plan(block: Tensor, r: Tensor, c: Tensor, epsilon: float) -> Tensor:
    return (c[:, None] - block).add_(r[..., None]).mul_(1 / epsilon).clamp_(max=0).exp_()


def _exponentials(block: Tensor, c: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp((c - C - top) / epsilon), top, and their sums. The maximum goes first: then no epsilon overflows."""
    x = c[:, None] - block
    top = x.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    x.sub_(top).mul_(1 / epsilon).exp_()
    return x, top, x.sum(-1, keepdim=True)


def _gradients(cost: Cost, wanted: bool) -> tuple[Tensor | None, ...]:
    return tuple(torch.zeros_like(tensor) if wanted else None for tensor in cost.tensors)


def _add(
    gradients: tuple[Tensor, ...], gradient: Tensor, block: Tensor, cost: Cost, problems: slice, rows: slice
) -> None:
    """To the gradients of a cost's tensors, what a block's gives; every block comes once."""
    if isinstance(cost, Dense):
        gradients[0][problems, rows] = gradient
        return
    of_x, of_y = _pairs_backward(gradient, block, cost.x[problems, rows], cost.y[problems], cost.kind)
    gradients[0][problems, rows] = of_x
    gradients[1][problems] += of_y


def _times(plan: Tensor, block: Tensor) -> Tensor:
    return torch.where(plan == 0, 0, plan * block)  # 0 of an infinite cost costs nothing


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b, out=a.new_empty((*a.shape[:2], b.shape[2])))


# ---- costs between points


def _pairs(x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - _product(x, y.mT)
    if kind == "sqeuclidean":
        squares = (x * x).sum(-1)[..., None] + (y * y).sum(-1)[:, None]
        return squares.sub_(_product(x, y.mT), alpha=2).clamp_(min=0)
    # differences, not products: the root of a small square that is wrong in its last digit is wrong in its middle one
    return torch.cdist(x, y, p=1 if kind == "l1" else 2, compute_mode="donot_use_mm_for_euclid_dist")


def _pairs_backward(gradient: Tensor, cost: Tensor, x: Tensor, y: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "cosine":
        return -_product(gradient, y), -_product(gradient.mT, x)
    if kind == "l1":
        return _signs(gradient, x, y), _signs(gradient.mT, y, x)
    if kind == "sqeuclidean":
        gradient = 2 * gradient
    else:  # at distance 0 the subgradient 0
        gradient = torch.where(cost == 0, 0, gradient / cost)
    of_x = x * gradient.sum(-1)[..., None] - _product(gradient, y)
    of_y = y * gradient.sum(-2)[..., None] - _product(gradient.mT, x)
    return of_x, of_y


# ---- doubly stochastic matrices, [n, n, M]: with the matrices last, sums over small dimensions are vectorised


def _exact(x: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        for dim in (1, 0):
            top = x.detach().amax(dim, keepdim=True)
            top = torch.where(top == -torch.inf, 0, top)
            total = (x - top).exp().sum(dim, keepdim=True)
            x = x - (top + torch.where(total == 0, 1, total).log())
    return x.exp()


def _deepseek(x: Tensor, iterations: int, eps: float = 1e-6) -> Tensor:
    x = x.softmax(1) + eps
    x = x / (x.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        x = x / (x.sum(1, keepdim=True) + eps)
        x = x / (x.sum(0, keepdim=True) + eps)
    return x


def _megatron(x: Tensor, iterations: int, eps: float = 1e-6) -> Tensor:
    x = (x - x.amax(1, keepdim=True)).exp()
    for _ in range(iterations):
        for dim in (1, 0):
            x = x / x.sum(dim, keepdim=True).clamp(min=eps)
    return x


_NORMALIZED = {"exact": _exact, "deepseek": _deepseek, "megatron": _megatron}


def _matrices(logits: Tensor) -> Iterator[slice]:
    step = max(1, _limit(logits) // logits[0].numel()) if len(logits) else 1
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _across(x: Tensor, back: bool = False) -> Tensor:
    return x.movedim(-1, 0) if back else x.detach().movedim(0, -1).contiguous()
