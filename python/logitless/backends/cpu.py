"""The cpu backend: the contract in vectorised C++ (csrc/cpu), for float32 chunks on a CPU.

This module only passes addresses on. The contract guarantees shapes, types and adjacent columns; what may come with
another stride (a vector that was expanded, say) is made contiguous here and kept until the call returns.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from logitless.backends import Chunk, Combination, Normalizers, accumulator_names
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
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self._kept.append(tensor)
        return tensor.data_ptr()

    def fields(self, chunk: Chunk) -> dict[str, object]:
        return {
            "z": chunk.z.data_ptr(),
            "stride": chunk.z.stride(0),
            "bias": self.of(chunk.bias),
            "outer": self.of(chunk.outer),
            "inner": chunk.inner,
            "floor": self.of(chunk.floor),
        }

    def chunk(self, chunk: Chunk | None):
        return None if chunk is None else _C.Chunk(**self.fields(chunk))

    def normalizers(self, normalizers: Normalizers) -> dict[str, int]:
        return {name: self.of(tensor) for name, tensor in vars(normalizers).items()}

    def combination(self, combination: Combination) -> dict[str, object]:
        """Without divergences, targets and weights."""
        rows = combination.rows
        if rows is not None and rows.stride(1) != 1:
            rows = rows.contiguous()
            self._kept.append(rows)
        return {
            "coefficients": {name: self.of(c) for name, c in combination.coefficients.items()},
            "rows_gradient": (0, 0) if rows is None else (rows.data_ptr(), rows.stride(0)),
            "live": self.of(combination.live),
        }


def statistics(
    student: Chunk,
    teacher: Chunk | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    names = accumulator_names(teacher is not None, targets, wanted)
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
        found["mass"][:] = columns if weights is None else weights.double().sum()
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
    address = _Addresses()
    _C.gradient(
        rows,
        columns,
        address.chunk(student),
        address.chunk(teacher),
        normalizers=address.normalizers(normalizers),
        **address.combination(combination),
        divergences=[
            (row_sum.name, [address.of(p) for p in parameters], address.of(c))
            for row_sum, parameters, c in combination.generic
        ],
        targets=address.of(combination.targets),
        weights=address.of(combination.weights),
        out=(out.data_ptr(), out.stride(0)),
        threads=torch.get_num_threads(),
    )


def floors(student: Chunk, kind: str, number: float) -> Tensor:
    rows, columns = student.z.shape
    found = torch.empty_like(student.outer)
    address = _Addresses()
    _C.floors(
        rows,
        columns,
        address.chunk(student),
        filter=kind,
        number=math.log(number) if kind == "MinP" else number,
        out=found.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return found
