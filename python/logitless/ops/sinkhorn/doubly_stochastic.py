"""Doubly stochastic matrices from logits, small and many; and the assignment of tokens to experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitless.logits import check_floating, check_number
from logitless.losses.checks import check_choice, check_count
from logitless.ops.sinkhorn import kernels
from logitless.ops.sinkhorn.result import SinkhornResult
from logitless.ops.sinkhorn.solve import sinkhorn

DIALECTS = ("exact", "deepseek", "megatron")
LARGEST = 64


class DoublyStochastic(NamedTuple):
    matrix: Tensor  # [..., n, n]
    residual: Tensor  # [...] the largest distance of a row or column sum from 1, without gradient


def doubly_stochastic(logits: Tensor, iterations: int = 20, dialect: str = "exact") -> DoublyStochastic:
    """Sinkhorn-Knopp on exp(logits): rows, then columns, ``iterations`` times (Sinkhorn 1964; mHC, Xie et al. 2025).

    Logits that vary by a few units leave row sums off by 1e-2 after 20 iterations: look at the residual. The gradient
    is exact for the finite run, from the logits alone: backward repeats the run, and no history is kept in memory.

    Args:
        logits: [..., n, n], n <= 64; low precision is computed in float32.
        iterations: how many times both are normalised.
        dialect: "exact": in the log domain, any logits; entries of -inf stay 0, and rows without others too.
            "deepseek" (TileKernels): P = softmax over rows + eps, P /= column sums + eps, then iterations - 1 times
            P /= row sums + eps, P /= column sums + eps; eps = 1e-6. "megatron" (Megatron-LM at
            d98e8a64; later versions use the former): P = exp(logits - row maximum), then P /= max(row sums, eps),
            P /= max(column sums, eps). Where eps does not matter "megatron" agrees with "exact" to rounding,
            "deepseek" to about 1e-4.

    Returns:
        (matrix, residual), float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or not 1 <= logits.shape[-1] <= LARGEST:
        raise ValueError(f"logits: needs the shape [..., n, n] with n in [1, {LARGEST}], got {list(logits.shape)}")
    check_count("iterations", iterations)
    check_choice("dialect", dialect, DIALECTS)
    flat = logits.reshape(-1, *logits.shape[-2:])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    matrix, residual = _DoublyStochastic.apply(iterations, dialect, flat)
    return DoublyStochastic(matrix.view(logits.shape), residual.view(logits.shape[:-2]))


class _DoublyStochastic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, iterations: int, dialect: str, logits: Tensor):
        ctx.iterations, ctx.dialect = iterations, dialect
        ctx.save_for_backward(logits)
        matrix, residual = kernels.select(logits.device, logits.dtype).doubly_stochastic(logits, iterations, dialect)
        ctx.mark_non_differentiable(residual)
        return matrix, residual

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _: Tensor):
        (logits,) = ctx.saved_tensors
        backend = kernels.select(logits.device, logits.dtype)
        return None, None, backend.doubly_stochastic_backward(logits, upstream, ctx.iterations, ctx.dialect)


def sinkhorn_routing(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    mask: Tensor | None = None,
) -> SinkhornResult:
    """The balanced assignment of tokens to experts: every expert gets the same mass (S-BASE, Clark et al. 2022).

        P = argmin <P, -logits> + temperature sum P log P,    P 1 = 1/tokens, P^T 1 = 1/experts

    ``result.plan().topk(k, -1)`` are the experts of every token; tokens * plan are their probabilities. Megatron-LM's
    ``sinkhorn`` has the same limit, but exponentiates logits as they are, repeats without a bound, and ends silently on
    NaN; here ``converged`` and ``residual`` say how balanced the plan is, and nothing overflows. Its tolerance is the
    mean change of a scaling, ours the L1 distance of the marginals. ``plan()`` is differentiable, implicitly; take it
    under ``torch.no_grad()`` where only indices are used.

    Args:
        logits: [..., tokens, experts].
        temperature: > 0; 1 is Megatron's.
        tolerance, max_iterations: as in :func:`sinkhorn`.
        mask: bool [..., tokens], or integers [...]: which tokens exist; the plan is 0 for others.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_floating("logits", logits)
    check_number("temperature", temperature, above=0)
    return sinkhorn(-logits, epsilon=temperature, tolerance=tolerance, max_iterations=max_iterations, mask_a=mask)
