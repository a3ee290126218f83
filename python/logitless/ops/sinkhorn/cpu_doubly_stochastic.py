"""Doubly stochastic matrices in C++ (csrc/cpu/doubly_stochastic.cpp). Only addresses are passed on."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.backends.cpu import _C


def doubly_stochastic(logits: Tensor, iterations: int, dialect: str) -> tuple[Tensor, Tensor]:
    residual = logits.new_empty(len(logits))
    return _call(logits, None, iterations, dialect, residual), residual


def doubly_stochastic_backward(logits: Tensor, gradient: Tensor, iterations: int, dialect: str) -> Tensor:
    return _call(logits, gradient.contiguous(), iterations, dialect, None)


def _call(logits: Tensor, gradient: Tensor | None, iterations: int, dialect: str, residual: Tensor | None) -> Tensor:
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    _C.transport.doubly_stochastic(
        len(logits),
        logits.shape[-1],
        iterations,
        dialect,
        logits=logits.data_ptr(),
        upstream=0 if gradient is None else gradient.data_ptr(),
        out=out.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out
