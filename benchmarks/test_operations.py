"""Operations without a head: time by rounds in one process."""

from __future__ import annotations

import torch

from benchmarks.operations import Operation, leaves, step
from benchmarks.report import operation_summary
from benchmarks.rounds import difference, timed


def test_operation(operation: Operation, rounds, quick, operation_records, benchmark) -> None:
    tensors = operation.inputs(quick)

    def clear() -> None:
        for leaf in leaves(tensors):
            leaf.grad = None

    differences = _check_agreement(operation, tensors, clear)
    contenders = {name: (lambda forward=forward: step(forward, tensors)) for name, forward in operation.peers.items()}
    rounds = min(rounds, operation.rounds or rounds)
    samples = timed(benchmark, contenders, lambda: step(operation.logitless, tensors), clear, rounds)
    if samples is None:
        return
    record = {
        "name": operation.name,
        "size": "small" if quick else operation.size,
        "against": operation.against,
        "samples": samples,
        **operation_summary(samples),
        "differences": differences,
    }
    benchmark.extra_info.update(record)
    operation_records.append(record)


def _check_agreement(operation: Operation, tensors: dict[str, torch.Tensor], clear) -> dict[str, list[float]]:
    """Of value and gradients, the largest differences from torch's."""
    found = {}
    for name, forward in operation.forwards().items():
        clear()
        found[name] = [step(forward, tensors), *(leaf.grad for leaf in leaves(tensors))]
    clear()
    value, *gradients = found.pop("torch")
    differences = {
        name: [difference(mine, value), max(map(difference, of_mine, gradients))]
        for name, (mine, *of_mine) in found.items()
    }
    for name, each in differences.items():
        bars = operation.inexact.get(name, operation.agreement)
        assert all(found <= bar for found, bar in zip(each, bars)), (name, each)
    return differences
