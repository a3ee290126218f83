"""The seam between policy objectives and what computes them: one call gives value, derivatives and metrics.

A backend reads every input once (twice where sums over sequences come first) and writes each derivative once; results
are added up in a fixed order. Where none serves (float64, a part of an objective that no recipe describes), the
objective's own torch expression does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitless import backends
from logitless.ops.tokens.recipe import Recipe


@dataclass(frozen=True)
class Call:
    """Sequence i is offsets[i] : offsets[i + 1]; tokens after the last do not count, nor do those outside the mask."""

    recipe: Recipe
    inputs: tuple[Tensor, ...]  # by slot; float32, contiguous, [T] per token or, with offsets, [B, 1] per sequence
    mask: Tensor | None  # [T] bool
    offsets: Tensor | None  # [B + 1] int64
    denominator: Tensor | None  # 0-d float32, for recipe.denominator == "given"

    @property
    def sequences(self) -> int:
        return 0 if self.offsets is None else self.offsets.numel() - 1

    @property
    def per_sequence(self) -> tuple[bool, ...]:
        return tuple(x.dim() == 2 for x in self.inputs)

    @property
    def needs_offsets(self) -> bool:
        """Whether it matters where sequences begin, and not only where the last one ends."""
        return self.recipe.needs_offsets or any(self.per_sequence)


class TokenKernels(Protocol):
    def forward(self, call: Call, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Results, float64 [len(recipe.results)]; if derivatives are ``wanted``, the tensors that backward needs."""

    def backward(self, recipe: Recipe, state: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        """``upstream`` (0-d float32) times the derivatives, [T] float32 each, one per slot of ``recipe.gradients``.

        The state is left as it is: a second call gives the same.
        """


NAMES = ("cpu", "cuda", "triton")  # backends that have the kernel: logitless.ops.tokens.<name>


def select(device: torch.device, dtype: torch.dtype) -> TokenKernels | None:
    """The kernels for tensors of a device and type; None: the torch expression serves.

    So it does for float64, and in compiled graphs, where torch.compile fuses it itself.

    Raises:
        ValueError: LOGITLESS_BACKEND forces a backend that cannot run here.
    """
    if dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    found = [backend.NAME for backend in backends.candidates(device, dtype) if backend.NAME in NAMES]
    return importlib.import_module(f"logitless.ops.tokens.{found[0]}") if found else None


def run(
    kernels: TokenKernels,
    recipe: Recipe,
    inputs: list[Tensor],
    mask: Tensor | None,
    offsets: Tensor | None,
    denominator: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss 0-d float32, with the gradients that the recipe names; all results, float64).

    The inputs may be of any type and stride.
    """
    wanted = torch.is_grad_enabled() and any(inputs[slot].requires_grad for slot in recipe.gradients)
    if denominator is not None:
        denominator = denominator.to(inputs[0].device, torch.float32)
    inputs = tuple((x if k in recipe.gradients else x.detach()).float().contiguous() for k, x in enumerate(inputs))
    mask, offsets = [None if x is None else x.contiguous() for x in (mask, offsets)]
    return _Loss.apply(kernels, Call(recipe, inputs, mask, offsets, denominator), wanted, *inputs)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: TokenKernels, call: Call, wanted: bool, *inputs: Tensor):
        results, state = kernels.forward(call, wanted)
        if wanted:
            ctx.kernels, ctx.recipe, ctx.inputs = kernels, call.recipe, len(inputs)
            ctx.save_for_backward(*state)
        ctx.mark_non_differentiable(results)
        return results[0].float(), results

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _):
        found: list[Tensor | None] = [None] * ctx.inputs
        gradients = ctx.kernels.backward(ctx.recipe, ctx.saved_tensors, upstream)
        for slot, gradient in zip(ctx.recipe.gradients, gradients, strict=True):
            found[slot] = gradient
        return None, None, None, *found
