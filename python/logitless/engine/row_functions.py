"""Terms that are functions of a user: called with rows of scaled logits, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.backends import Chunk
from logitless.backends.torch import scaled
from logitless.engine.autograd import autograd
from logitless.engine.heads import Tile
from logitless.engine.inputs import Inputs

BUFFERS = 6  # [C, V] buffers that autograd of a row function may hold: logits, gradient, a few saved


def call(
    inputs: Inputs, tile: Tile, student: Chunk, teacher: Chunk | None, upstream: list[Tensor] | None
) -> tuple[dict, tuple[Tensor | None, Tensor | None]]:
    """Values of the row functions, and with ``upstream`` the gradients of their sum by s and t."""
    if not inputs.row_terms:
        return {}, (None, None)
    s = scaled(student)
    t = None if teacher is None else scaled(teacher)
    targets = None if inputs.targets is None else inputs.targets[tile.rows].clamp(0, inputs.columns - 1)
    leaves = []
    if upstream is not None:
        leaves += [s.requires_grad_()] if inputs.student_grad else []
        leaves += [t.requires_grad_()] if inputs.teacher_grad else []
    with autograd(upstream is not None):
        values = {}
        total: Tensor | float = 0.0
        for i, term in inputs.row_terms:
            arguments = [s] + ([t] if term.teacher else []) + ([targets] if term.targets else [])
            value = term.function(*arguments)
            if not isinstance(value, Tensor) or value.shape != (s.shape[0],):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"row_term {term.name!r}: must return [{s.shape[0]}], got {shape}")
            values[term.key, "value"] = value.detach().double()
            if upstream is not None:
                u = term.row_upstream(inputs.context({}, tile.rows), upstream[i])
                total = total + (value * u.to(value.dtype)).sum()
        gradients = iter(())
        if leaves and isinstance(total, Tensor) and total.requires_grad:
            gradients = iter(torch.autograd.grad(total, leaves, allow_unused=True))
    student_gradient = next(gradients, None) if inputs.student_grad else None
    return values, (student_gradient, next(gradients, None) if inputs.teacher_grad else None)
