"""The token kernel in vectorised C++ (csrc/cpu/tokens.cpp), for float32 tokens on a CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from logitless.backends.cpu import _C, supports  # noqa: F401 (the same inputs are)
from logitless.ops.tokens.recipe import Recipe

State = tuple[Tensor, ...]  # the norm, derivatives of the loss divided by it


@functools.lru_cache(maxsize=256)
def _compiled(recipe: Recipe):
    return _C.TokenRecipe(recipe)


def forward(
    recipe: Recipe,
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    offsets: Tensor | None,
    denominator: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, State | None]:
    size = inputs[0].numel()
    derivatives = tuple(inputs[0].new_empty(size) for _ in recipe.gradients) if wanted else ()
    if offsets is not None and int(offsets[-1]) < size:
        size = int(offsets[-1])
        for derivative in derivatives:
            derivative[size:] = 0
    per_sequence = [x.dim() == 2 for x in inputs]
    if not recipe.needs_offsets and not any(per_sequence):
        offsets = None  # vectors then need not end with a sequence
    results = _C.tokens(
        _compiled(recipe),
        tokens=size,
        sequences=0 if offsets is None else offsets.numel() - 1,
        inputs=[(x.data_ptr(), of_sequence) for x, of_sequence in zip(inputs, per_sequence, strict=True)],
        mask=0 if mask is None else mask.data_ptr(),
        offsets=0 if offsets is None else offsets.data_ptr(),
        denominator=1.0 if denominator is None else denominator.item(),
        derivatives=[derivative.data_ptr() for derivative in derivatives],
        threads=torch.get_num_threads(),
    )
    results = inputs[0].new_tensor(results, dtype=torch.float64)
    return results, (results[-1], *derivatives) if wanted else None


def backward(recipe: Recipe, state: State, upstream: Tensor) -> tuple[Tensor, ...]:
    norm, *derivatives = state
    factor = upstream.item() * norm.item()
    return tuple(derivative * factor for derivative in derivatives)
