"""The cpu backend: the contract in vectorised C++ (csrc/cpu), for float32 chunks on a CPU.

This module only passes addresses on. The contract guarantees shapes, types and adjacent columns; what may come with
another stride (a vector that was expanded, say) is made contiguous here and kept until the call returns.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from logitless.backends import Chunk, Combination, Normalizers
from logitless.divergences import RowSum

NAME = "cpu"
LOW_PRECISION = False


def _load():
    """The extension and None, or None and the reason why it cannot be used."""
    try:
        if importlib.util.find_spec("logitless._C") is None:
            return None, "the extension logitless._C was not built"
        return importlib.import_module("logitless._C"), None
    except ImportError as error:
        return None, f"the extension logitless._C does not load: {error}"


_C, PROBLEM = _load()


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.float32


class _Addresses:
    """Addresses of tensors, which live as long as this does."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def of(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def chunk(self, chunk: Chunk | None):
        if chunk is None:
            return None
        return _C.Chunk(
            z=chunk.z.data_ptr(),
            stride=chunk.z.stride(0),
            bias=self.of(chunk.bias),
            outer=self.of(chunk.outer),
            inner=chunk.inner,
            floor=self.of(chunk.floor),
        )

    def normalizers(self, normalizers: Normalizers) -> dict[str, int]:
        return {name: self.of(tensor) for name, tensor in vars(normalizers).items()}


def statistics(
    student: Chunk,
    teacher: Chunk | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    names = ["max", "sum"]
    names += ["target"] if targets is not None else []
    names += ["first"] if "entropy" in wanted else []
    names += ["square"] if "collision" in wanted else []
    names += ["weighted"] if "weighted" in wanted else []
    if teacher is not None:
        names += ["teacher_max", "teacher_sum"]
        names += ["forward", "reverse"] if "moments" in wanted else []
    rows, columns = student.z.shape
    found = dict(zip(names, student.outer.new_empty(len(names), rows, dtype=torch.float64).unbind()))
    if "argmax" in wanted:
        found["argmax"] = student.outer.new_empty(rows, dtype=torch.int64)
    address = _Addresses()
    _C.statistics(
        rows,
        columns,
        address.chunk(student),
        address.chunk(teacher),
        targets=address.of(targets),
        weights=address.of(weights),
        accumulators={name: tensor.data_ptr() for name, tensor in found.items()},
        threads=torch.get_num_threads(),
    )
    if "weighted" in wanted:
        mass = (
            student.outer.new_tensor(float(columns), dtype=torch.float64) if weights is None else weights.double().sum()
        )
        found["mass"] = mass.expand(rows)
    return found


def generic(
    student: Chunk,
    teacher: Chunk,
    normalizers: Normalizers,
    row_sum: RowSum,
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """(sum_j f_j, sum_j h_j) per row, float64; of a log-sum (L, b)."""
    rows, columns = student.z.shape
    value, slope = student.outer.new_empty(2, rows, dtype=torch.float64).unbind()
    address = _Addresses()
    _C.generic(
        rows,
        columns,
        address.chunk(student),
        address.chunk(teacher),
        normalizers=address.normalizers(normalizers),
        divergence=row_sum.name,
        parameters=[address.of(p) for p in parameters],
        value=value.data_ptr(),
        slope=slope.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return value, slope


def gradient(
    student: Chunk,
    teacher: Chunk | None,
    normalizers: Normalizers,
    combination: Combination,
    out: Tensor,
) -> None:
    rows, columns = student.z.shape
    extra = combination.rows
    if extra is not None and extra.stride(1) != 1:
        extra = extra.contiguous()
    address = _Addresses()
    _C.gradient(
        rows,
        columns,
        address.chunk(student),
        address.chunk(teacher),
        normalizers=address.normalizers(normalizers),
        coefficients={name: address.of(c) for name, c in combination.coefficients.items()},
        divergences=[
            (row_sum.name, [address.of(p) for p in parameters], address.of(c))
            for row_sum, parameters, c in combination.generic
        ],
        targets=address.of(combination.targets),
        weights=address.of(combination.weights),
        rows_gradient=(0, 0) if extra is None else (extra.data_ptr(), extra.stride(0)),
        live=address.of(combination.live),
        out=(out.data_ptr(), out.stride(0)),
        threads=torch.get_num_threads(),
    )
