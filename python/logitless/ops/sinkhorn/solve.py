"""The solver: half-iterations until every problem of a batch has stopped on its own residual."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.engine import plan as planning
from logitless.logits import check_floating, check_number
from logitless.losses.checks import check_choice, check_count
from logitless.ops.loss import check_execution
from logitless.ops.sinkhorn import kernels
from logitless.ops.sinkhorn.cost import PointCost, ProbabilityCost, TensorCost
from logitless.ops.sinkhorn.gradients import (
    FixedPoint,
    Linearized,
    apply_plan,
    done,
    iteration,
    softmin,
    whole_run,
    whole_transport,
)
from logitless.ops.sinkhorn.kernels import Run, Schedule
from logitless.ops.sinkhorn.problem import Problem, Side
from logitless.ops.sinkhorn.result import SinkhornResult

METHODS = ("alternating", "symmetric", "anderson", "over_relaxed")
GRADIENTS = ("unrolled", "implicit", "envelope")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
MEMORY = 5  # steps that Anderson acceleration combines


def sinkhorn(
    cost: Tensor | PointCost | ProbabilityCost,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    rho_a: float | None = None,
    rho_b: float | None = None,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    iterations: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 2000,
    method: str = "alternating",
    relaxation: float = 1.5,
    annealing: tuple[float, float] | None = None,
    warm_start: tuple[Tensor, Tensor] | None = None,
    gradient: str | None = None,
    workspace: int | str = "auto",
) -> SinkhornResult:
    """Entropic optimal transport, many problems at once.

        min_P <P, C> + epsilon KL(P | a b^T)     where P 1 = a and P^T 1 = b
        P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)

    Everything is in the log domain, or by scalings of a plan in which potentials are absorbed before those overflow
    (Schmitzer 2019), so that any epsilon is stable; one with which a problem does not converge in ``max_iterations``
    gives ``converged`` False and the residual that was reached, not NaN. An iteration is a half-iteration over rows and
    one over columns (Cuturi 2013; unbalanced: Chizat et al. 2018, Sejourne et al. 2019), and the last half-iteration is
    a plain one over columns whatever the method: columns are met exactly, rows to
    ``residual``. Balanced problems whose masses differ have no solution: they come out as not converged.

    Args:
        cost: [..., n, m] floating point, +inf where transport is forbidden; or :class:`PointCost`, or
            :class:`ProbabilityCost`. Low precision is computed in float32.
        a: [..., n] or [n] weights >= 0, with gradient if wanted; None: 1/n. Points of weight 0 have no part, and no
            gradient. That of a balanced value is defined up to a constant: take it through a softmax, or the like.
        b: [..., m] or [m], alike.
        epsilon: > 0, in units of the cost.
        rho_a, rho_b: > 0: instead of the constraint P 1 = a (P^T 1 = b) the penalty rho_a KL(P 1 | a). None: the
            constraint. One of both gives the semi-unbalanced problem.
        mask_a: bool [..., n], False where a point does not exist, whatever its cost is; or integers [...], how many
            points, the first ones, exist (ragged sizes in a batch). Without ``a``, those share the mass 1.
        mask_b: alike.
        iterations: exactly so many; excludes ``tolerance``. Nothing waits for the device then.
        tolerance: each problem stops where the L1 distance between the plan's marginals and what they should be is at
            most that. Default 1e-5, and 1e-9 for float64.
        max_iterations: where it stops anyway.
        method: "alternating"; "symmetric" (both half-iterations from the old potentials, averaged with those: that of
            GeomLoss, about four times the iterations); "anderson" (combines the last 5 iterations; 2 to 20 times fewer
            where epsilon is small); "over_relaxed" (steps longer by ``relaxation``; Thibault et al. 2021). The latter
            two take a plain step after each that has not lowered the residual.
        relaxation: in (0, 2).
        annealing: (start, factor): iteration k uses the larger of start * factor^k and epsilon, factor in (0, 1).
            Start is about the largest cost.
        warm_start: potentials (f, g) to start from, [..., n] and [..., m], in units of the cost; without gradient.
        gradient: "unrolled": of the finite run, exact, through O(iterations (n + m)) memory; the default with
            ``iterations``. "implicit": of the fixed point, by conjugate gradients, as exact as the run is converged,
            O(n + m) memory; the default otherwise. "envelope": of ``kl_value`` at the fixed point (Danskin), and in the
            cost of a balanced ``entropy_value``; one reading of the cost, and potentials and plans are constants.
        workspace: bytes. Costs between points that need more with their gradient are formed anew where they are read,
            on a GPU also those of a few coordinates, where that is faster; those of probabilities in slices.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    cost = cost if isinstance(cost, (PointCost, ProbabilityCost)) else TensorCost(cost)
    device, dtype = cost.tensor.device, cost.tensor.dtype
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lead, (n, m) = cost.shape[:-2], cost.shape[-2:]
    _check_epsilon(epsilon, dtype)
    for name, rho in (("rho_a", rho_a), ("rho_b", rho_b)):
        if rho is not None:
            check_number(name, rho, above=0)
    check_choice("method", method, METHODS)
    check_number("relaxation", relaxation, above=0)
    if relaxation >= 2:
        raise ValueError(f"relaxation: must be less than 2, got {relaxation}")
    check_count("max_iterations", max_iterations)
    if iterations is not None:
        check_count("iterations", iterations)
        if tolerance is not None:
            raise ValueError("tolerance: excluded by iterations; max_iterations goes with it")
    if tolerance is not None:
        check_number("tolerance", tolerance, above=0)
    gradient = gradient or ("implicit" if iterations is None else "unrolled")
    check_choice("gradient", gradient, GRADIENTS)
    options = Options(
        iterations or max_iterations,
        tolerance or TOLERANCE[dtype],
        iterations is None,
        method,
        relaxation,
        _annealed(annealing, epsilon, iterations or max_iterations),
    )
    workspace_bytes = check_execution(-100, None, "auto", "auto", workspace) or planning.machine(device).cap

    masks = [mask_of(*x, lead, device) for x in (("mask_a", mask_a, n), ("mask_b", mask_b, m))]
    weights = [weights_of(*x, lead, device, dtype) for x in (("a", a, n, masks[0]), ("b", b, m, masks[1]))]
    start = _start(warm_start, lead, (n, m), device, dtype)
    rhos = (math.inf if rho is None else float(rho) for rho in (rho_a, rho_b))
    sides = [Side(*x) for x in zip(weights, rhos, strict=True)]
    with _without_autocast(device):
        problem = Problem(cost.lowered(*masks, workspace_bytes), *sides, float(epsilon))
        return solve(problem, options, start, gradient, lead)


def transport_cost(
    cost: Tensor | PointCost | ProbabilityCost,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    iterations: int,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    unit: bool = False,
    workspace: int | str = "auto",
) -> Tensor:
    """``sinkhorn(...).transport_cost`` of balanced problems after so many iterations, [...], with the gradient of the
    finite run: where the backend can, both in one call. ``unit``: weights that are not given are 1 each, not 1 in all.
    """
    cost = cost if isinstance(cost, (PointCost, ProbabilityCost)) else TensorCost(cost)
    device, dtype = cost.tensor.device, cost.tensor.dtype
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lead, (n, m) = cost.shape[:-2], cost.shape[-2:]
    _check_epsilon(epsilon, dtype)
    check_count("iterations", iterations)
    workspace_bytes = check_execution(-100, None, "auto", "auto", workspace) or planning.machine(device).cap
    masks = [mask_of(*x, lead, device) for x in (("mask_a", mask_a, n), ("mask_b", mask_b, m))]
    sides = (("a", a, n, masks[0]), ("b", b, m, masks[1]))
    a, b = (weights_of(*x, lead, device, dtype, unit) for x in sides)
    with _without_autocast(device):
        lowered, g = cost.lowered(*masks, workspace_bytes), b.new_zeros(b.shape)
        on = kernels.select(device, dtype)
        if on.runs(lowered) and hasattr(on, "transport"):
            schedule = Schedule(float(epsilon), (), iterations, None, (math.inf, math.inf))
            return whole_transport(lowered, a, b, g, schedule, lead)
        options = Options(iterations, TOLERANCE[dtype], False, "alternating", 1.0, ())
        problem = Problem(lowered, Side(a, math.inf), Side(b, math.inf), float(epsilon))
        return solve(problem, options, (a.new_zeros(a.shape), g), "unrolled", lead).transport_cost


@dataclass(frozen=True)
class Options:
    limit: int
    tolerance: float
    stops: bool  # at the tolerance
    method: str
    relaxation: float
    annealed: tuple[float, ...]  # the epsilons before the last


def solve(
    problem: Problem, options: Options, start: tuple[Tensor, Tensor], gradient: str, lead: torch.Size
) -> SinkhornResult:
    """Runs a problem, and gives its potentials the gradient asked for."""
    with nullcontext() if gradient == "unrolled" else torch.no_grad():
        found = run(problem, options, start)
    f, g = found.f, found.g
    with torch.no_grad():
        r, c, columns = problem.factors(f, g, found.reached)
        residual = problem.a.residual(f, found.rows) + problem.b.residual(g, columns)
    if gradient == "implicit" and torch.is_grad_enabled():
        f, g = _fixed_point(problem, f, g, (r, c), (found.rows.sqrt(), columns.sqrt()))
    return SinkhornResult(
        f.view(*lead, f.shape[1]),
        g.view(*lead, g.shape[1]),
        found.iterations.view(lead),
        residual.view(lead),
        (found.stopped | (residual <= options.tolerance)).view(lead),
        problem,
        found.reached,
        gradient,
    )


def run(problem: Problem, options: Options, start: tuple[Tensor, Tensor]) -> Run:
    """Of the backend in one call where it can, else of half-iterations one by one."""
    cost, a, b = problem.cost, problem.a, problem.b
    if options.method == "alternating" and kernels.select(a.weights.device, a.weights.dtype).runs(cost):
        tolerance = options.tolerance if options.stops else None
        schedule = Schedule(problem.epsilon, options.annealed, options.limit, tolerance, (a.rho, b.rho))
        return whole_run(cost, a.weights, b.weights, start[1], schedule)
    f, g, t, iterations, stopped = _loop(problem, options, start)
    reached = t < torch.inf
    with torch.no_grad():
        r, c, columns = problem.factors(f, g, reached)
        rows = apply_plan(cost, r, c, columns[..., None], problem.epsilon)[..., 0]
    return Run(f, g, rows, reached, iterations, stopped)


def _loop(problem: Problem, options: Options, start: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """(f, g, t, iterations, stopped): potentials, the softmin that g comes from, and per problem how it ended.

    After the half-iterations s over rows and t over columns, (p, t's potential) is what the run returns if it ends
    here, and (p, g), of which both softmins are known, is what it is judged by: its columns are mended then, which
    brings the rows no further from theirs. Longer steps may overshoot: of a run that is judged,
    the best pair is returned.
    """
    cost, a, b = problem.cost, problem.a, problem.b
    f, g = start
    symmetric, anderson = options.method == "symmetric", options.method == "anderson"
    plain = options.method in ("alternating", "anderson")  # p is the row's potential: one reading can do for both
    at_once = plain and kernels.select(f.device, f.dtype).iterates(cost)
    judged = options.stops or options.method in ("anderson", "over_relaxed")
    active = torch.ones(len(f), dtype=torch.bool, device=f.device)
    iterations = torch.zeros(len(f), dtype=torch.long, device=f.device)
    before = least = torch.full((len(f),), torch.inf, dtype=f.dtype, device=f.device)
    noise = 10 * torch.finfo(f.dtype).eps * a.weights.detach().sum(-1)
    step = torch.ones_like(before[:, None])
    found, history = (f, g, g), deque(maxlen=MEMORY)
    for k, epsilon in enumerate(_schedule(problem.epsilon, options)):
        c = b.weighted(g, epsilon)
        if at_once:
            s, t = iteration(cost, c, a.log, a.damping(epsilon), epsilon)
            p = row = a.potential(s, epsilon)
        else:
            s = softmin(cost, c, epsilon)
            row = a.potential(s, epsilon)
            p = f if symmetric else torch.lerp(f, row, step)
            t = softmin(cost.mT, a.weighted(p, epsilon), epsilon)
        column = b.potential(t, epsilon)
        iterations += active
        if judged:
            with torch.no_grad():
                row_sums, column_sums = a.marginal(p, s, epsilon), b.marginal(g, t, epsilon)
                residual = a.residual(p, row_sums) + b.residual(g, column_sums)
                better = active & ((residual <= least) | (k <= len(options.annealed)))
                least = torch.where(better, residual, least)
            found = tuple(torch.where(better[:, None], new, old) for new, old in zip((p, column, t), found))
            if options.stops and k >= len(options.annealed):
                active = active & (residual > options.tolerance)
                if done(active, k):
                    break
            improved = (residual < before) & (residual > noise)
            before = residual
        else:
            found = (p, column, t)
        if symmetric:
            f, g = (f + row) / 2, (g + column) / 2
        elif anderson:
            history.append((g, column))
            f, g = p, torch.where(improved[:, None], _combined(history), column)
        elif options.method == "over_relaxed":
            step = torch.where(improved[:, None], options.relaxation, 1.0).to(f.dtype)
            f, g = p, torch.lerp(g, column, step)
        else:
            f, g = p, column
    return *found, iterations, ~active


def _schedule(epsilon: float, options: Options) -> Iterator[float]:
    for k in range(options.limit):
        yield options.annealed[k] if k < len(options.annealed) else epsilon


def _combined(history: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's combination: of images T(g), with the weights of sum 1 that make that of the T(g) - g shortest."""
    points, images = (torch.stack(x, 1) for x in zip(*history, strict=True))
    steps = (images - points).double()
    gram = (steps[:, :, None] * steps[:, None]).sum(-1)
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    gram = gram / torch.where(size == 0, 1, size)
    gram = gram + 1e-10 * torch.eye(len(history), dtype=gram.dtype, device=gram.device)
    weights, _ = torch.linalg.solve_ex(gram, torch.ones_like(gram[..., :1]))
    weights = weights / weights.sum(1, keepdim=True)
    return (weights.to(images.dtype) * images).sum(1)


def _fixed_point(
    problem: Problem, f: Tensor, g: Tensor, exponent: tuple[Tensor, Tensor], roots: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    cost, a, b, epsilon = problem.cost, problem.a, problem.b, problem.epsilon
    f1 = a.potential(softmin(cost, b.weighted(g, epsilon), epsilon), epsilon)
    g1 = b.potential(softmin(cost.mT, a.weighted(f, epsilon), epsilon), epsilon)
    if not (f1.requires_grad or g1.requires_grad):
        return f, g
    at = Linearized(problem.detach().cost, *exponent, roots, epsilon, (a.damping(epsilon), b.damping(epsilon)))
    return FixedPoint.apply(at, f, g, f1, g1)


# ---- arguments


def _check_epsilon(epsilon: float, dtype: torch.dtype) -> None:
    check_number("epsilon", epsilon, above=0)
    if epsilon < torch.finfo(dtype).tiny:
        raise ValueError(f"epsilon: {epsilon} is not a normal number of {dtype}")


def _without_autocast(device: torch.device) -> AbstractContextManager:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _annealed(annealing: object, epsilon: float, limit: int) -> tuple[float, ...]:
    """The epsilons before the last."""
    if annealing is None:
        return ()
    if not isinstance(annealing, tuple) or len(annealing) != 2:
        raise TypeError(f"annealing: a tuple (start, factor), got {annealing!r}")
    start, factor = annealing
    check_number("annealing start", start, above=0)
    check_number("annealing factor", factor, above=0)
    if factor >= 1:
        raise ValueError(f"annealing factor: must be less than 1, got {factor}")
    found = []
    while start > epsilon:
        found.append(float(start))
        start *= factor
    if len(found) >= limit:
        raise ValueError(f"annealing: takes {len(found)} iterations down to epsilon, of {limit}")
    return tuple(found)


def mask_of(name: str, mask: object, size: int, lead: torch.Size, device: torch.device) -> Tensor | None:
    """bool [B, size], or None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"{name}: a tensor of bools or of integers, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dtype != torch.bool:
        if mask.shape != lead:
            raise ValueError(f"{name}: sizes need the shape {list(lead)}, got {list(mask.shape)}")
        mask = torch.arange(size, device=mask.device) < mask[..., None]
    return _expanded(name, mask, size, lead, device)


def weights_of(
    name: str, weights: object, size: int, mask: Tensor | None, lead: torch.Size, device: torch.device, dtype,
    unit: bool = False,
) -> Tensor:  # fmt: skip
    """[B, size], 0 where there is no point."""
    if weights is None and mask is None:
        return torch.full((lead.numel(), size), 1 if unit else 1 / size, dtype=dtype, device=device)
    if weights is None:
        live = mask.to(dtype)
        return live if unit else live / live.sum(-1, keepdim=True).clamp(min=1)
    check_floating(name, weights)
    weights = _expanded(name, weights, size, lead, device).to(dtype)
    if device.type == "cpu" and not (weights >= 0).all():
        raise ValueError(f"{name}: weights must not be negative or NaN")
    return weights if mask is None else torch.where(mask, weights, 0)


def _start(
    start: object, lead: torch.Size, sizes: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if start is None:
        return tuple(torch.zeros((lead.numel(), size), dtype=dtype, device=device) for size in sizes)
    if not isinstance(start, tuple) or len(start) != 2:
        raise TypeError(f"warm_start: a tuple of potentials (f, g), got {type(start).__name__}")
    for potential in start:
        check_floating("warm_start", potential)
    return tuple(
        _expanded("warm_start", potential.detach(), size, lead, device).to(dtype)
        for potential, size in zip(start, sizes, strict=True)
    )


def _expanded(name: str, tensor: Tensor, size: int, lead: torch.Size, device: torch.device) -> Tensor:
    if tensor.shape not in ((*lead, size), (size,)):
        raise ValueError(f"{name}: needs the shape {[*lead, size]} or {[size]}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, the cost is on {device}")
    return tensor.expand(*lead, size).reshape(-1, size)
