"""The torch backend: the contract in plain torch operations, for any device and any floating compute type.

It is the fallback for everything. Work proceeds in blocks of at most ``BLOCK`` elements, so that its temporaries stay
at a few MB whatever the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from logitless.backends import Chunk, Combination, Normalizers
from logitless.divergences import RowSum

NAME = "torch"
LOW_PRECISION = True
BLOCK = 1 << 17  # elements per temporary


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _row_blocks(chunk: Chunk) -> Iterator[slice]:
    rows, columns = chunk.z.shape
    step = max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _scaled(chunk: Chunk, rows: slice) -> tuple[Tensor, Tensor]:
    """s and ds/dz of some rows; ds/dz is [rows, 1] without a softcap and a floor, [rows, columns] with one."""
    x, outer = raw(chunk, rows), chunk.outer[rows, None]
    if chunk.inner is None:
        s, slope = outer * x, outer
    else:
        capped = torch.tanh(chunk.inner * x)
        s, slope = outer * capped, outer * chunk.inner * (1 - capped * capped)
    if chunk.floor is not None:
        s = torch.where(x < chunk.floor[rows, None], -torch.inf, s)
        slope = torch.where(s == -torch.inf, 0, slope)
    return s, slope


def raw(chunk: Chunk, rows: slice = slice(None)) -> Tensor:
    """z + bias of some rows, in the compute type."""
    z = chunk.z[rows].to(chunk.outer.dtype)
    return z if chunk.bias is None else z + chunk.bias


def scaled(chunk: Chunk, out: Tensor | None = None) -> Tensor:
    """s of a chunk, as a tensor of its own or in ``out``."""
    if out is None:
        return _scaled(chunk, slice(None))[0]
    for rows in _row_blocks(chunk):
        out[rows] = _scaled(chunk, rows)[0]
    return out


def _times(factor: Tensor, other: Tensor) -> Tensor:
    """factor * other, and 0 wherever factor is 0."""
    return torch.where(factor == 0, 0, factor * other)


def _log_probability(s: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
    return (s - _finite(maximum)[:, None]) - log_sum[:, None]


def _finite(maximum: Tensor) -> Tensor:
    return torch.where(maximum == -torch.inf, 0, maximum)


def statistics(
    student: Chunk,
    teacher: Chunk | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    rows = student.z.shape[0]
    found: dict[str, Tensor] = {}
    # Results have their place before temporaries come and go: small tensors left among those would fragment the heap.
    for block in _row_blocks(student) if rows else [slice(0, 0)]:
        for name, value in _block_statistics(student, teacher, targets, weights, wanted, block).items():
            if name not in found:
                found[name] = value.new_empty(rows)
            found[name][block] = value
    return found


def _block_statistics(student, teacher, targets, weights, wanted, rows) -> dict[str, Tensor]:
    s, _ = _scaled(student, rows)
    maximum, argmax = s.max(-1)
    shifted = s - _finite(maximum)[:, None]
    e = shifted.exp()
    found = {"max": maximum, "sum": e.sum(-1)}
    if targets is not None:
        y = targets[rows]
        inside = (y >= 0) & (y < s.shape[1])
        picked = s.gather(1, y.clamp(0, s.shape[1] - 1)[:, None])[:, 0]
        found["target"] = torch.where(inside, picked, 0)
    if "entropy" in wanted:
        found["first"] = _times(e, shifted).sum(-1)
    if "collision" in wanted:
        found["square"] = (e * e).sum(-1)
    if "weighted" in wanted:
        found["weighted"] = (shifted if weights is None else _times(weights, shifted)).sum(-1)
        mass = s.shape[1] if weights is None else weights.double().sum()
        found["mass"] = torch.ones_like(maximum, dtype=torch.float64) * mass
    if "argmax" in wanted:
        found["argmax"] = argmax
    if teacher is not None:
        t, _ = _scaled(teacher, rows)
        maximum_t = t.amax(-1)
        shifted_t = t - _finite(maximum_t)[:, None]
        e_t = shifted_t.exp()
        found |= {"teacher_max": maximum_t, "teacher_sum": e_t.sum(-1)}
        if "moments" in wanted:
            difference = shifted_t - shifted
            found["forward"] = _times(e_t, difference).sum(-1)
            found["reverse"] = _times(e, difference).sum(-1)
    return {name: value if name == "argmax" else value.double() for name, value in found.items()}


def generic(
    student: Chunk,
    teacher: Chunk,
    normalizers: Normalizers,
    row_sum: RowSum,
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    value = student.z.new_zeros(student.z.shape[0], dtype=torch.float64)
    slope = torch.zeros_like(value)
    for rows in _row_blocks(student):
        log_q = _log_probability(_scaled(student, rows)[0], normalizers.max[rows], normalizers.log_sum[rows])
        log_p = _log_probability(
            _scaled(teacher, rows)[0], normalizers.teacher_max[rows], normalizers.teacher_log_sum[rows]
        )
        found = row_sum.pointwise(log_p, log_q, *(p[rows, None] for p in parameters))
        if row_sum.family == "log_sum":
            value[rows], slope[rows] = found.logsumexp(-1).double(), parameters[1][rows].double()
        else:
            value[rows], slope[rows] = (x.sum(-1).double() for x in found)
    return value, slope


def _slope(row_sum: RowSum, log_p: Tensor, log_q: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """What the coefficient of a row sum multiplies in a gradient."""
    if row_sum.family != "log_sum":
        return row_sum.pointwise(log_p, log_q, *parameters)[1]
    *given, log_sum = parameters
    summands = row_sum.pointwise(log_p, log_q, *given)
    return torch.where(summands == -torch.inf, 0, given[1] * (summands - log_sum).exp())


def gradient(
    student: Chunk,
    teacher: Chunk | None,
    normalizers: Normalizers,
    combination: Combination,
    out: Tensor,
) -> None:
    for rows in _row_blocks(student):
        _block_gradient(student, teacher, normalizers, combination, out, rows)


def _block_gradient(student, teacher, normalizers, combination, out, rows) -> None:
    def coefficient(name: str) -> Tensor | None:
        found = combination.coefficients.get(name)
        return None if found is None else found[rows, None]

    s, slope = _scaled(student, rows)
    log_q = _log_probability(s, normalizers.max[rows], normalizers.log_sum[rows])
    q = log_q.exp()
    total = torch.zeros_like(s)
    if (c := coefficient("q")) is not None:
        total += c * q
    if (c := coefficient("q_log_q")) is not None:
        total += c * _times(q, log_q)
    if (c := coefficient("q_squared")) is not None:
        total += c * (q * q)
    if (c := coefficient("weights")) is not None:
        total += c if combination.weights is None else c * combination.weights
    if teacher is not None:
        log_p = _log_probability(
            _scaled(teacher, rows)[0], normalizers.teacher_max[rows], normalizers.teacher_log_sum[rows]
        )
        if (c := coefficient("p")) is not None:
            total += c * log_p.exp()
        if (c := coefficient("q_log_ratio")) is not None:
            total += c * _times(q, log_q - log_p)
        for row_sum, parameters, c in combination.generic:
            total += c[rows, None] * _slope(row_sum, log_p, log_q, tuple(p[rows, None] for p in parameters))
    if combination.rows is not None:
        total += combination.rows[rows]
    if (c := coefficient("one_hot")) is not None:
        y = combination.targets[rows]
        inside = ((y >= 0) & (y < s.shape[1]))[:, None]
        total.scatter_add_(1, y.clamp(0, s.shape[1] - 1)[:, None], torch.where(inside, c, 0))
    total = total.mul_(slope) if student.floor is None else _times(slope, total)
    if combination.live is not None:
        total = torch.where(combination.live[rows, None], total, 0)
    out[rows] = total
