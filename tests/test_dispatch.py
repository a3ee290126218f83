"""Which of two backends serves a call on a GPU: what was measured faster there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from logitless.backends import Chunk, Combination
from logitless.backends.dispatch import Dispatch, kernel_name

FIRST = SimpleNamespace(
    NAME="cuda", statistics=lambda *_, **__: "cuda", gradient=lambda *_: 1 / 0, fused=lambda *_, **__: "cuda"
)
SECOND = SimpleNamespace(
    NAME="triton",
    statistics=lambda *_, **__: "triton",
    gradient=lambda *given: given[-1].fill_(7),
    fused=lambda *_, **__: "triton",
    product_statistics=lambda *_, **__: "triton",
)


def chunk(columns: int) -> Chunk:
    return Chunk(torch.zeros(1, columns), None, None, torch.ones(1))


def statistics(dispatch: Dispatch, columns: int, teacher: Chunk | None = None) -> str:
    return dispatch.statistics(chunk(columns), teacher, targets=None, weights=None, wanted=frozenset())


def test_what_is_not_measured_goes_to_the_first():
    dispatch = Dispatch((FIRST, SECOND), {})
    assert statistics(dispatch, 100) == "cuda"
    assert dispatch.product_statistics() == "triton"


def test_the_nearest_size_decides():
    faster = {"1000": {"cuda": 2.0, "triton": 1.0}, "100000": {"cuda": 1.0, "triton": 2.0}}
    dispatch = Dispatch((FIRST, SECOND), {kernel_name("statistics", False): faster})
    assert [statistics(dispatch, columns) for columns in (1, 9000, 11000, 10**6)] == [
        "triton",
        "triton",
        "cuda",
        "cuda",
    ]
    assert statistics(dispatch, 1000, teacher=chunk(1000)) == "cuda"  # pairs were not measured


def test_calls_are_passed_on_whole():
    sizes = {"100": {"cuda": 2.0, "triton": 1.0, "abacus": 0.1}}
    kernels = [kernel_name("gradient", False), kernel_name("fused", True, True)]
    dispatch = Dispatch((FIRST, SECOND), dict.fromkeys(kernels, sizes))
    out = torch.zeros(1, 100)
    dispatch.gradient(chunk(100), None, None, Combination({}), out)
    assert bool((out == 7).all())
    with pytest.raises(ZeroDivisionError):
        dispatch.gradient(chunk(100), chunk(100), None, Combination({}), out)
    generic = Combination({}, generic=((None, (), None),))
    assert dispatch.fused(chunk(100), chunk(100), combination=generic) == "triton"
    assert dispatch.fused(chunk(100), None, combination=Combination({})) == "cuda"
