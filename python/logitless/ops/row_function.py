"""Functions of whole rows of two heads whose vocabularies, and whose tokens, need not be the same.

``row_term`` puts a function of rows into an objective; there, student and teacher have the same tokens and vocabulary.
The two operations here are for losses across tokenizers. The first head and ``inputs`` are differentiable, the others
are constants; functions are differentiated by autograd, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitless.engine import scan
from logitless.engine.library import rescaled
from logitless.engine.problem import HeadSpec, Request
from logitless.logits import Logits


def row_values(
    function: Callable[..., Tensor],
    sides: Sequence[Logits],
    inputs: Sequence[Tensor] = (),
    *,
    width: int,
    indices: Sequence[Tensor | None] | None = None,
    workspace: int | None = None,
) -> Tensor:
    """[N, width], differentiable with any upstream gradient: backward forms the logits of all sides again.

    Args:
        function: called as ``function(s, ..., *inputs)`` with [B, V] scaled logits of every side and the same rows of
            ``inputs``; returns [B, width], every row a function of its own row alone.
        sides: descriptions of N tokens each, or of more, of which ``indices`` chooses N.
        inputs: [N, ...] tensors.
        indices: per side [N] places among its tokens, no two the same; None: all.
        workspace: bytes for chunks of logits.
    """
    specs, tensors = _described(sides, inputs)
    return _Values.apply(function, specs, width, indices, workspace, len(inputs), *tensors)


def row_loss(
    function: Callable[..., Tensor],
    sides: Sequence[Logits],
    factors: Tensor,
    inputs: Sequence[Tensor] = (),
    *,
    width: int,
    indices: Sequence[Tensor | None] | None = None,
    workspace: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The scalar ``sum_i factors_i values_i0``, and [N, width] values without gradient, as :func:`row_values` has them.

    The gradient is formed with the values: one product of every side and two for the gradient.

    Args:
        factors: [N] without gradient; a row of factor 0 has no part in the sum, whatever its value.
    """
    specs, tensors = _described(sides, inputs)
    return _Loss.apply(function, specs, width, indices, workspace, factors, len(inputs), *tensors)


def _described(sides: Sequence[Logits], inputs: Sequence[Tensor]) -> tuple[list[HeadSpec], list[Tensor]]:
    """The heads, and inputs and tensors of heads in one list."""
    request = Request()
    specs = [request.head(logits, differentiable=i == 0) for i, logits in enumerate(sides)]
    inputs = [x if torch.is_grad_enabled() else x.detach() for x in inputs]
    return specs, [*inputs, *request.tensors]


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, specs, width, indices, workspace, count: int, *tensors: Tensor):
        ctx.how, ctx.specs, ctx.count = (function, width, indices, workspace), specs, count
        ctx.save_for_backward(*tensors)
        values, _, _ = scan.evaluate(specs, tensors[count:], function, tensors[:count], width, None, workspace, indices)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        function, width, indices, workspace = ctx.how
        inputs, tensors = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        _, of_tensors, of_inputs = scan.evaluate(
            ctx.specs, tensors, function, inputs, width, upstream, workspace, indices
        )
        return *[None] * 6, *of_inputs, *of_tensors


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, specs, width, indices, workspace, factors: Tensor, count: int, *tensors: Tensor):
        inputs, tensors = tensors[:count], tensors[count:]
        upstream = None
        if any(ctx.needs_input_grad):
            upstream = torch.zeros((len(factors), width), dtype=factors.dtype, device=factors.device)
            upstream[:, 0] = factors
        values, of_tensors, of_inputs = scan.evaluate(
            specs, tensors, function, inputs, width, upstream, workspace, indices
        )
        gradients = [*of_inputs, *of_tensors]
        ctx.places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        ctx.count = len(gradients)
        ctx.save_for_backward(*(gradients[i] for i in ctx.places))
        ctx.mark_non_differentiable(values)
        return torch.where(factors == 0, 0, factors * values[:, 0]).sum().to(values.dtype), values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _):
        found: list[Tensor | None] = [None] * ctx.count
        for place, gradient in zip(ctx.places, rescaled(list(ctx.saved_tensors), upstream)):
            found[place] = gradient
        return *[None] * 7, *found
