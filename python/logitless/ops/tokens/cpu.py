"""The token kernel in vectorised C++ (csrc/cpu/tokens.cpp), for float32 tokens on a CPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from logitless.backends.cpu import _C, supports  # noqa: F401 (the same inputs are)
from logitless.ops.tokens.kernels import Call
from logitless.ops.tokens.recipe import Recipe

State = tuple[Tensor, ...]  # the norm, derivatives of the loss divided by it


@functools.lru_cache(maxsize=256)
def _compiled(recipe: Recipe):
    return _C.TokenRecipe(recipe)


def forward(call: Call, wanted: bool) -> tuple[Tensor, State | None]:
    lp = call.inputs[0]
    size = lp.numel()
    derivatives = tuple(lp.new_empty(size) for _ in call.recipe.gradients) if wanted else ()
    if call.offsets is not None and int(call.offsets[-1]) < size:
        size = int(call.offsets[-1])
        for derivative in derivatives:
            derivative[size:] = 0
    if not call.needs_offsets:
        call = replace(call, offsets=None)  # vectors then need not end with a sequence
    results = _C.tokens(
        _compiled(call.recipe),
        tokens=size,
        sequences=call.sequences,
        inputs=[(x.data_ptr(), x.dim() == 2) for x in call.inputs],
        mask=0 if call.mask is None else call.mask.data_ptr(),
        offsets=0 if call.offsets is None else call.offsets.data_ptr(),
        denominator=1.0 if call.denominator is None else call.denominator.item(),
        derivatives=[derivative.data_ptr() for derivative in derivatives],
        threads=torch.get_num_threads(),
    )
    results = lp.new_tensor(results, dtype=torch.float64)
    return results, (results[-1], *derivatives) if wanted else None


def backward(recipe: Recipe, state: State, upstream: Tensor) -> tuple[Tensor, ...]:
    norm, *derivatives = state
    factor = upstream.item() * norm.item()
    return tuple(derivative * factor for derivative in derivatives)
