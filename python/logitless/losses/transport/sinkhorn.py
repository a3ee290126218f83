"""Losses that are entropic optimal transport: between the samples of a batch, and between tokens of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from logitless.engine import plan as planning
from logitless.logits import (
    LinearLogits,
    Logits,
    check_constant,
    check_floating,
    check_logits,
    check_number,
    check_targets,
    tempered,
)
from logitless.losses.checks import check_choice, check_range
from logitless.ops.loss import check_reduction
from logitless.ops.sinkhorn import PointCost, ProbabilityCost, sinkhorn_divergence
from logitless.ops.sinkhorn.cost import TensorCost
from logitless.ops.sinkhorn.gradients import build
from logitless.ops.sinkhorn.kernels import Dense
from logitless.ops.sinkhorn.solve import mask_of, transport_cost

Cost = Tensor | PointCost | ProbabilityCost


def sinkd(
    student: Logits,
    teacher: Logits,
    targets: Tensor | None = None,
    *,
    samples: str = "batch",
    epsilon: float = 0.1,
    temperature: float = 2.0,
    iterations: int = 20,
    scale: float = 0.001,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    workspace: int | str = "auto",
) -> Tensor:
    """Sinkhorn distance between all of the student's and all of the teacher's distributions of a batch.

        scale <P, C>     C_ij = sum_v |q_iv - p_jv|,  P = diag(u) exp(-C / epsilon) diag(v),  P 1 = 1 and P^T 1 = 1

    Cui et al. 2024, "Sinkhorn distance minimization for knowledge distillation" (SinKD, arXiv 2402.17110), in its form
    for batches. Rows are normalised first, columns last, ``iterations`` times, and the gradient is that of the finite
    run: value and gradient are those of the released ``Sinkhorn`` of logits [n, V], here in the log domain, where no
    epsilon underflows, and without a buffer [n, n, V]. The marginals are 1 each, so that the value grows with n: it is
    n times the distance of mass 1. Of logits [B, T, V] the released T0 code normalises over tokens in place of the
    vocabulary; this does not.

    Costs four products of the student and two of the teacher, one more of each where not all columns fit the workspace:
    see :class:`logitless.ProbabilityCost`.

    Args:
        student: logits of [n] tokens, or [n, ...], or [..., n], see ``samples``.
        teacher: of as many, over the same vocabulary. A constant.
        targets: in that shape, integers, only to leave out tokens equal to ``ignore_index``.
        samples: which dimension is transported, where there are several: "batch", the first (one problem for every
            position), or "token", the last (one for every sequence). DenseLogits are copied for the former, and for
            targets.
        epsilon: of the regularisation; costs are at most 2.
        temperature: divides both sides' logits.
        iterations: of Sinkhorn.
        scale: factor of the loss; 0.001 for BERT, 0.0008 for T0 and GPT-Neo.
        reduction: over problems with a token at least: "mean", "sum", or "none".
        denominator: what "mean" divides by instead.
        workspace: as in :func:`logitless.sinkhorn`.

    Returns:
        0-d, or in the shape of the student's other dimensions for reduction="none".

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    for name, logits in (("student", student), ("teacher", teacher)):
        check_logits(name, logits)
        if not logits.shape:
            raise ValueError(f"{name}: needs the shape [n, ...] or [..., n], got a single token")
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: leading shape {list(teacher.shape)}, the student's is {list(student.shape)}")
    if targets is not None:
        check_targets(targets, student)
    check_choice("samples", samples, ("batch", "token"))
    check_number("temperature", temperature, above=0)
    check_number("scale", scale)
    check_reduction(reduction, denominator)
    mask = None if targets is None else targets != ignore_index
    sides = [tempered(logits, temperature) for logits in (student, teacher)]
    if samples == "batch" and len(student.shape) > 1:
        sides = [_first_last(logits) for logits in sides]
        mask = None if mask is None else mask.movedim(0, -1)
    cost = ProbabilityCost(*sides)
    options = {"mask_a": mask, "mask_b": mask, "iterations": iterations, "workspace": workspace}
    found = transport_cost(cost, unit=True, epsilon=epsilon, **options)
    return _reduced(scale * found, None if mask is None else mask.any(-1), reduction, denominator)


def multi_cost(
    costs: Sequence[Cost],
    weights: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float = 10.0,
    iterations: int = 100,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    workspace: int | str = "auto",
) -> Tensor:
    """``<P, C>`` of a mixture of costs, ``C = sum_m weights_m C_m``: multi-cost Wasserstein.

    Vuong et al. 2026, "MCW-KD: Multi-cost Wasserstein knowledge distillation for large language models" (AAAI 2026),
    with the regularisation of its released code: K = exp(-0.1 C), uniform weights 1/n and 1/m, 100 iterations (fewer
    where its error is below 1e-9 in the 1st or the 51st), differentiated through. That adds 1e-9 to every denominator.
    Of a student [n] and a teacher [m] its iterations end with the teacher's marginal, as here.

    The paper's costs are distances and divergences of truncated distributions, edit distances, and distances of hidden
    states and of their context: any of them as a tensor or points here, the L1 distance of whole distributions as
    :class:`logitless.ProbabilityCost`.

    Args:
        costs: of one shape [..., n, m]: tensors, :class:`logitless.PointCost`, :class:`logitless.ProbabilityCost`.
        weights: [M] floating, one per cost, differentiable if wanted. The released code initialises them by hand,
            learns them unconstrained, and has :func:`mixture_weights` to set them.
        a, b, mask_a, mask_b, epsilon, workspace: as in :func:`logitless.sinkhorn`.
        iterations: as there; the gradient is that of the finite run.
        reduction: over problems: "mean", "sum" or "none". denominator: what "mean" divides by instead.

    Returns:
        0-d, or [...].

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    if not isinstance(costs, (list, tuple)) or not costs:
        raise TypeError(f"costs: a list of at least one cost, got {type(costs).__name__}")
    costs = [cost if isinstance(cost, (PointCost, ProbabilityCost)) else TensorCost(cost) for cost in costs]
    check_floating("weights", weights)
    if list(weights.shape) != [len(costs)]:
        raise ValueError(f"weights: needs the shape [{len(costs)}], got {list(weights.shape)}")
    if any(cost.shape != costs[0].shape for cost in costs):
        raise ValueError(f"costs: shapes {[list(cost.shape) for cost in costs]} differ")
    check_reduction(reduction, denominator)
    shape, device = costs[0].shape, weights.device
    if any(cost.tensor.device != device for cost in costs):
        raise ValueError(f"costs: not all on {device}, where the weights are")
    masks = [
        mask_of(name, mask, size, shape[:-2], device)
        for name, mask, size in (("mask_a", mask_a, shape[-2]), ("mask_b", mask_b, shape[-1]))
    ]
    total = sum(w * _stored(cost, masks) for w, cost in zip(weights, costs))
    options = {"mask_a": mask_a, "mask_b": mask_b, "iterations": iterations, "workspace": workspace}
    found = transport_cost(total.view(shape), a, b, epsilon=epsilon, **options)
    lives = [mask.any(-1).view(found.shape) for mask in masks if mask is not None]
    live = None if not lives else lives[0] if len(lives) == 1 else lives[0] & lives[1]
    return _reduced(found, live, reduction, denominator)


def mixture_weights(values: Tensor, *, sigma: float = 2.0, floor: float = 0.01) -> Tensor:
    """``argmin_w <values, w> + sigma ||w - 1/M||^2`` over w >= floor that sum to 1: weights for :func:`multi_cost`.

    How MCW-KD's released code sets the weights of costs whose mean values are [M]: less of what costs more. It is the
    projection of 1/M - values / (2 sigma) onto the simplex, found by sorting (Duchi et al. 2008, figure 1).

    Args:
        values: [..., M] floating, without gradient.
        sigma: > 0; the larger, the closer to equal weights.
        floor: in [0, 1/M].

    Returns:
        [..., M].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floating("values", values)
    check_constant("values", values)
    check_number("sigma", sigma, above=0)
    if values.dim() < 1 or values.shape[-1] < 1:
        raise ValueError(f"values: needs the shape [..., M], got {list(values.shape)}")
    number = values.shape[-1]
    check_range("floor", floor, high=1 / number)
    mass = 1 - number * floor
    y = -values / (2 * sigma)  # a constant in y changes nothing
    ranked = y.sort(-1, descending=True).values
    level = (ranked.cumsum(-1) - mass) / torch.arange(1, number + 1, device=y.device)
    kept = (ranked > level).sum(-1, keepdim=True).clamp(min=1)
    return floor + (y - level.gather(-1, kept - 1)).clamp(min=0)


def wasserstein_dependency(
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    kind: str = "euclidean",
    debias: bool = False,
    mask: Tensor | None = None,
    **options,
) -> Tensor:
    """``W(P_xy, P_x P_y)``: how far the pairs (x_i, y_i) are from independent ones, all (x_i, y_j).

    Ozair et al. 2019, "Wasserstein dependency measure for representation learning" (arXiv 1903.11780), of samples: 0 if
    independent, and to be *maximised* for representations that tell of each other. The paper bounds it from below with
    a critic that is kept Lipschitz; this solves the transport of n points to n^2 itself, with entropic regularisation.
    The cost [n, n^2] is not held where it exceeds the workspace.

    Args:
        x, y: [..., n, d] and [..., n, e], of one type: the i-th of both belong together.
        epsilon: of the regularisation, in units of the cost.
        kind: of the distance between pairs, that of (x, y) as one point: "euclidean" (Wasserstein-1), "l1" (the sum of
            the distances of both), "sqeuclidean" (likewise; Wasserstein-2 squared).
        debias: subtract what the regularisation adds: then it is 0 for independent samples. Costs the transport of n^2
            points to n^2. See :func:`logitless.sinkhorn_divergence`.
        mask: [..., n] bool, False where there is no pair.
        options: ``iterations``, ``tolerance``, ``max_iterations``, ``method``, ``gradient``, ``workspace``, ... of
            :func:`logitless.sinkhorn_divergence`.

    Returns:
        [...], differentiable in x and y.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_choice("kind", kind, ("euclidean", "l1", "sqeuclidean"))
    for name, points in (("x", x), ("y", y)):
        check_floating(name, points)
        if points.dim() < 2 or not points.shape[-2]:
            raise ValueError(f"{name}: needs the shape [..., n, d] with n >= 1, got {list(points.shape)}")
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"y: shape {list(y.shape)} does not fit that of x, {list(x.shape)}")
    if (x.dtype, x.device) != (y.dtype, y.device):
        raise ValueError(f"y: {y.dtype} on {y.device}, x is {x.dtype} on {x.device}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask: shape {list(mask.shape)}, needs {list(x.shape[:-1])}")
        options |= {"mask_a": mask, "mask_b": (mask[..., :, None] & mask[..., None, :]).flatten(-2)}
    n = x.shape[-2]
    first = x[..., :, None, :].expand(*x.shape[:-1], n, x.shape[-1])
    second = y[..., None, :, :].expand(*y.shape[:-2], n, *y.shape[-2:])
    independent = torch.cat([first, second], -1).flatten(-3, -2)
    pairs = torch.cat([x, y], -1)
    return sinkhorn_divergence(pairs, independent, epsilon=epsilon, kind=kind, debias=debias, **options).value


def _first_last(logits: Logits) -> Logits:
    """The first of the leading dimensions made the last."""
    temperature = logits.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.movedim(0, -1)
    if isinstance(logits, LinearLogits):
        return replace(logits, hidden=logits.hidden.movedim(0, -2), temperature=temperature)
    return replace(logits, logits=logits.logits.movedim(0, -2), temperature=temperature)


def _stored(cost: TensorCost | PointCost | ProbabilityCost, masks: list[Tensor | None]) -> Tensor:
    """[B, n, m]."""
    found = cost.lowered(*masks, planning.machine(cost.tensor.device).cap)
    return (found if isinstance(found, Dense) else build(found)).cost


def _reduced(values: Tensor, live: Tensor | None, reduction: str, denominator: float | Tensor | None) -> Tensor:
    """Over problems; those that are not live, as all are without ``live``, are 0 already."""
    total = values.sum() if values.dim() and reduction != "none" else values
    if reduction != "mean":
        return total
    if denominator is None:
        denominator = max(1, values.numel()) if live is None else live.sum().clamp(min=1)
    return total if isinstance(denominator, int) and denominator == 1 else total / denominator
