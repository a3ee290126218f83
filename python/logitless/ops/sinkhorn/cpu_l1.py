"""The L1 distance between softmaxes in C++ (csrc/cpu/l1.cpp). Only addresses are passed on."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.backends.cpu import _C, _Addresses
from logitless.ops.sinkhorn.kernels import Probabilities


def l1(p: Probabilities, q: Probabilities, moments: bool) -> tuple[Tensor, Tensor | None]:
    address = _Addresses()
    rows, columns = p.chunk.z.shape
    problems = rows // p.tokens
    cost, *found = p.max.new_empty((1 + moments, problems, p.tokens, q.tokens)).unbind()
    _C.transport.l1(
        problems,
        columns,
        _side(address, p),
        _side(address, q),
        cost=cost.data_ptr(),
        moment=found[0].data_ptr() if moments else 0,
        threads=torch.get_num_threads(),
    )
    return cost, found[0] if moments else None


def l1_backward(gradient: Tensor, moments: Tensor, p: Probabilities, q: Probabilities, out: Tensor) -> None:
    address = _Addresses()
    rows, columns = p.chunk.z.shape
    _C.transport.l1_backward(
        rows // p.tokens,
        columns,
        _side(address, p),
        _side(address, q),
        gradient=(gradient.data_ptr(), gradient.stride()),
        moment=(moments.data_ptr(), moments.stride()),
        out=(out.data_ptr(), out.stride(0)),
        threads=torch.get_num_threads(),
    )


def _side(address: _Addresses, side: Probabilities):
    return _C.transport.Probabilities(
        address.chunk(side.chunk), address.of(side.max), address.of(side.sum), side.tokens
    )
