"""Gradients of one tile: the terms' coefficients, and the combination of the basis that the backend emits."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.backends import BASIS, Chunk, Combination
from logitless.backends.torch import scaled
from logitless.engine import accumulators, statistics
from logitless.engine.groups import exchanged, of_group
from logitless.engine.heads import Tile
from logitless.engine.inputs import Inputs
from logitless.engine.picked import Picked
from logitless.engine.statistics import Coefficients, Statistics


def coefficients(
    inputs: Inputs, s: Statistics, upstream: list[Tensor], rows: slice
) -> tuple[list[Coefficients], list[Coefficients]]:
    """Per group, coefficients of the student's and the teacher's gradient, given d loss / d value of every term."""
    student, teacher = [], []
    for g, group in enumerate(inputs.groups):
        of_student = of_group(s, g)
        context = inputs.context(of_student, rows)
        amplified = inputs.student.amplified(upstream)
        opened = Coefficients()
        for i in group.terms:
            inputs.problem.terms[i].coefficients(context, amplified[i], opened)
        if inputs.restricted:
            spare(opened, of_student["target"] == -torch.inf)
        student.append(statistics.close(opened, of_student))
        if inputs.teacher_grad:
            of_teacher = exchanged(of_student)
            context = inputs.context(of_teacher, rows)
            amplified = inputs.teacher.amplified(upstream)
            opened = Coefficients()
            for i in group.terms:
                if (adjoint := inputs.problem.terms[i].adjoint) is not None:
                    adjoint.coefficients(context, amplified[i], opened)
            teacher.append(statistics.close(opened, of_teacher))
    return student, teacher


def spare(opened: Coefficients, outside: Tensor) -> None:
    """A target outside of the support has no gradient: with the one-hot goes its balance."""
    for name in ("one_hot", "one_hot_alone"):
        if name in opened:
            opened[name] = torch.where(outside, 0, opened[name])


def gradient(
    inputs: Inputs,
    tile: Tile,
    chunk: Chunk,
    other: Chunk | None,
    s: list[Statistics],
    coefficients: list[Coefficients],
    rows: Tensor | None,
    out: Tensor,
    scratch: list[Tensor],
) -> None:
    """The gradient of all groups by one side's raw products; ``rows`` is that of functions of rows."""
    for g, group in enumerate(inputs.groups[1:], start=1):
        part = tile.of(scratch[min(g, len(scratch)) - 1])
        c = coefficients[g]
        if chunk.inner is None:  # by s, not by z
            (at,) = group.at(chunk)
            c = {key: x / (chunk.outer if x.dim() == 1 else chunk.outer[:, None]) for key, x in c.items()}
        else:
            scaled(chunk, part)
            at = Chunk(part, None, None, torch.full_like(chunk.outer, group.factor))
        _emit(inputs, tile, at, *group.at(other), s[g], c, None, part)
        rows = part if rows is None else part.add_(rows)
    _emit(inputs, tile, chunk, other, s[0], coefficients[0], rows, out)


def _emit(
    inputs: Inputs,
    tile: Tile,
    chunk: Chunk,
    other: Chunk | None,
    s: Statistics,
    coefficients: Coefficients,
    rows: Tensor | None,
    out: Tensor,
) -> None:
    """One combination of the basis, and what it has at the teacher's ids."""
    mixed = combination(inputs, tile, coefficients, s, rows)
    normalizers = statistics.normalizers(s, inputs.dtype)
    sparse = coefficients.get("sparse")
    if sparse is None:
        inputs.backend.gradient(chunk, other, normalizers, mixed, out)
        return
    picked = Picked(chunk, inputs.ids[tile.rows], tile.columns.start)
    values = sparse + picked.gradient(mixed, coefficients, s["topk"])
    elsewhere = coefficients["q_elsewhere"] + coefficients.get("q", 0)
    mixed.coefficients["q"] = elsewhere.to(inputs.dtype)
    inputs.backend.gradient(chunk, other, normalizers, mixed, out)
    picked.write(values if inputs.live is None else torch.where(inputs.live[tile.rows, None], values, 0), out)


def combination(
    inputs: Inputs, tile: Tile, coefficients: Coefficients, s: Statistics, rows: Tensor | None
) -> Combination:
    """What the backend is asked to emit for a tile."""
    generic = []
    for key, c in coefficients.items():
        if isinstance(key, tuple):
            row_sum, parameters = accumulators.row_sum(inputs, key, tile)
            if row_sum.family == "log_sum":
                parameters += (s[key, "value"].to(inputs.dtype),)
            generic.append((row_sum, parameters, c.to(inputs.dtype)))
    return Combination(
        {key: c.to(inputs.dtype) for key, c in coefficients.items() if key in (*BASIS, "q_lse")},
        inputs.targets_of(tile),
        inputs.class_weights_of(tile),
        tuple(generic),
        rows,
        None if inputs.live is None else inputs.live[tile.rows],
    )
