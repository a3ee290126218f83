"""The cuda backend: the contract in CUDA C++ (csrc/cuda), in float32, on an NVIDIA GPU.

Chunks may also hold float16 or bfloat16 logits (materialised ones, read as they are), and gradients may be written in
those types. :func:`fused` is one launch and reads each row once, wherever a cluster of blocks can hold a row.

This module only passes addresses on, as the cpu backend does; it never waits for the device. What it makes contiguous
lives until the call returns, which is enough: memory freed afterwards is reused on the same stream, later.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from logitless.backends import Chunk, Combination, Normalizers, accumulator_names, cpu
from logitless.divergences import RowSum

NAME = "cuda"
LOW_PRECISION = True

_kernels = getattr(cpu._C, "cuda", None)
PROBLEM = (
    None
    if _kernels is not None
    else cpu.PROBLEM or "the extension logitless._C was built without CUDA (no nvcc, or LOGITLESS_CUDA=0)"
)

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The accumulators that the balance of q reads, by the open coefficient that it belongs to.
_BALANCE = {"weights": "mass", "q_log_q": "first", "q_squared": "square", "q_log_ratio": "reverse"}


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    if PROBLEM is not None or device.type != "cuda" or dtype != torch.float32:
        return False
    return _runs_on(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _runs_on(index: int) -> bool:
    problem = _kernels.problem(index)
    if problem is not None:
        if "insufficient" in problem:  # CUDA's own words for an old driver name no version
            problem += "; a newer NVIDIA driver is needed, or a build with an older CUDA"
        warnings.warn(
            f"logitless: the CUDA kernels cannot run on cuda:{index} ({problem}); another backend serves instead",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem is None


def _queue(device: torch.device) -> dict[str, int]:
    """Where to launch: the device and its current stream."""
    return {"device": device.index, "stream": torch._C._cuda_getCurrentRawStream(device.index)}


class _Call(cpu._Addresses):
    """The arguments of one launch, and the tensors whose addresses they hold."""

    def __init__(self, student: Chunk, teacher: Chunk | None) -> None:
        super().__init__()
        self.rows, columns = student.z.shape
        self.device = student.z.device
        self.arguments = {
            "rows": self.rows,
            "columns": columns,
            "student": self.chunk(student),
            "teacher": self.chunk(teacher),
            **_queue(self.device),
        }

    def chunk(self, chunk: Chunk | None):
        return None if chunk is None else _kernels.Chunk(**self.fields(chunk), type=_TYPES[chunk.z.dtype])

    def sums(self, names: list) -> tuple[dict[object, Tensor], dict[object, int]]:
        """New float64 [rows] tensors, and their addresses."""
        together = torch.empty(len(names), self.rows, dtype=torch.float64, device=self.device)
        first, size = together.data_ptr(), 8 * self.rows
        return dict(zip(names, together.unbind())), {name: first + i * size for i, name in enumerate(names)}

    def statistics(self, targets: Tensor | None, weights: Tensor | None, names: list[str]) -> dict[str, Tensor]:
        found, addresses = self.sums([name for name in names if name != "argmax"])
        if "argmax" in names:
            found["argmax"] = torch.empty(self.rows, dtype=torch.int64, device=self.device)
            addresses["argmax"] = found["argmax"].data_ptr()
        self.arguments["targets"] = self.of(targets)
        self.arguments["weights"] = self.of(weights)
        self.arguments["accumulators"] = addresses
        return found

    def terms(self, generic, sums: dict[object, int]) -> None:
        """Generic divergences, and where their ("value", "slope") go."""
        self.arguments["divergences"] = [
            (
                row_sum.name,
                [self.of(p) for p in parameters],
                self.of(c),
                sums.get((k, "value"), 0),
                sums.get((k, "slope"), 0),
            )
            for k, (row_sum, parameters, c) in enumerate(generic)
        ]

    def emit(self, combination: Combination, out: Tensor) -> None:
        self.arguments |= self.combination(combination) | {
            "hot": self.of(combination.targets),
            "weight_vector": self.of(combination.weights),
            "out": (out.data_ptr(), out.stride(0), _TYPES[out.dtype]),
        }


def _names(teacher: Chunk | None, targets: Tensor | None, wanted: frozenset[str]) -> list[str]:
    return accumulator_names(teacher is not None, targets, wanted) + ["argmax"] * ("argmax" in wanted)


def statistics(
    student: Chunk,
    teacher: Chunk | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    call = _Call(student, teacher)
    found = call.statistics(targets, weights, _names(teacher, targets, wanted))
    _kernels.statistics(**call.arguments)
    return found


def generic(
    student: Chunk,
    teacher: Chunk,
    normalizers: Normalizers,
    row_sum: RowSum,
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """(sum_j f_j, sum_j h_j) per row, float64; of a log-sum (L, b)."""
    call = _Call(student, teacher)
    found, addresses = call.sums([(0, "value"), (0, "slope")])
    call.arguments["normalizers"] = call.normalizers(normalizers)
    call.terms([(row_sum, parameters, None)], addresses)
    _kernels.generic(**call.arguments)
    return found[0, "value"], found[0, "slope"]


def gradient(
    student: Chunk,
    teacher: Chunk | None,
    normalizers: Normalizers,
    combination: Combination,
    out: Tensor,
) -> None:
    call = _Call(student, teacher)
    call.arguments["normalizers"] = call.normalizers(normalizers)
    call.emit(combination, out)
    call.terms(combination.generic, {})
    _kernels.gradient(**call.arguments)


def fused(
    student: Chunk,
    teacher: Chunk | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
    combination: Combination,
    out: Tensor,
) -> dict[object, Tensor]:
    """``weights`` serve the statistics and the combination, whose own are not read."""
    call = _Call(student, teacher)
    names = _names(teacher, targets, wanted)
    balance = [_BALANCE[key] for key in combination.coefficients if key in _BALANCE]
    found = call.statistics(targets, weights, list(dict.fromkeys(names + balance)))
    sums: dict[object, Tensor] = {}
    if combination.generic:
        sums, addresses = call.sums([(k, name) for k in range(len(combination.generic)) for name in ("value", "slope")])
        call.terms(combination.generic, addresses)
    call.emit(combination, out)
    call.arguments["weight_vector"] = call.arguments["weights"]
    _kernels.fused(**call.arguments)
    return {name: found[name] for name in names} | sums
