"""Losses of a linear head: time by rounds in one process, peak memory in a process of its own each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import memory
from benchmarks.cases import CASES, Case, Inputs, bare_products, products_into, step
from benchmarks.report import summary
from benchmarks.rounds import difference, timed


def test_head(case: Case, size, rounds, quick, records, benchmark) -> None:
    """Every round times the contenders in turn, ours right after the bare products; the first round is a warm-up."""
    inputs = case.inputs(size)
    forwards = case.forwards()
    differences = _check_agreement(case, inputs)
    ours = forwards.pop("logitless")
    contenders: dict[str, Callable[[], object]] = {
        name: (lambda forward=forward: step(forward, inputs)) for name, forward in forwards.items()
    }
    contenders["products_into"] = products_into(case, inputs)
    contenders["products"] = bare_products(case, inputs)
    samples = timed(benchmark, contenders, lambda: step(ours, inputs), inputs.clear, rounds)
    if samples is None:
        return
    peaks = {}
    if not quick:
        peaks = {name: memory.measure(case.name, name, repeats=1, quick=False) for name in case.peers}
        peaks["logitless"] = memory.measure(case.name, "logitless", repeats=3, quick=False)
    elif case is CASES[0]:  # a process takes seconds to start
        peaks["logitless"] = memory.measure(case.name, "logitless", repeats=1, quick=True)
    record = {
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "workspace": case.workspace,
        "products": case.products,
        "flops": case.flops(size),
        "bytes": case.bytes(size),
        "against": case.against,
        "samples": samples,
        **summary(samples),
        "differences": differences,
        "memory": peaks,
    }
    benchmark.extra_info.update(record)
    records.append(record)


def _check_agreement(case: Case, inputs: Inputs) -> dict[str, float]:
    """Contenders must compute the same thing: largest differences of result and gradients relative to torch's."""
    found = {}
    for name, forward in case.forwards().items():
        inputs.clear()
        found[name] = [step(forward, inputs), *inputs.gradients]
    inputs.clear()
    expected = found.pop("torch")
    differences = {
        name: max(difference(a, b) for a, b in zip(tensors, expected, strict=True)) for name, tensors in found.items()
    }
    bar = case.agreement or (1e-4 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps)
    assert all(difference <= bar for difference in differences.values()), differences
    return differences
