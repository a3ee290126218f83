"""Statistics of one tile: accumulators by the backend, what a top-k teacher needs, sums that need lse first."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.backends import Chunk
from logitless.backends.torch import scaled
from logitless.divergences import SUMS, RowSum
from logitless.engine import statistics
from logitless.engine.groups import Group
from logitless.engine.heads import Tile
from logitless.engine.inputs import Inputs
from logitless.engine.picked import Picked
from logitless.engine.statistics import Statistics


def of_tile(
    inputs: Inputs, tile: Tile, student: Chunk, teacher: Chunk | None, group: Group, scratch: list[Tensor]
) -> Statistics:
    """The accumulators of a group, mergeable with those of other columns of the same rows."""
    picked = Picked(student, inputs.ids[tile.rows], tile.columns.start) if group.picked else None
    if group.rest:
        rest = _rest(inputs, tile, student, scratch)
    if group.rest and not group.wanted:  # the rest and the ids together are the row
        at_ids = picked.statistics()
        found = statistics.merge({name: rest[name] for name in at_ids}, at_ids)
        if inputs.targets is not None:
            found["target"] = Picked(student, inputs.targets[tile.rows, None], tile.columns.start).values()[:, 0]
    else:
        found = statistics.joined(
            inputs.backend.statistics(
                student,
                teacher,
                targets=inputs.targets_of(tile),
                weights=inputs.class_weights_of(tile),
                wanted=group.wanted,
            )
        )
    if "argmax" in found:
        found["argmax"] = found["argmax"] + tile.columns.start
    if picked is not None:
        found["picked"] = torch.where(inputs.ids[tile.rows] < 0, -torch.inf, picked.values())
    if group.rest:
        found |= {"rest_max": rest["max"], "rest_sum": rest["sum"]}
    return found


def maskable(inputs: Inputs) -> bool:
    """Whether raw products may be set to -inf where they are: in a buffer of ours, and without a cap."""
    return inputs.student.buffered and inputs.student.inner is None


def _rest(inputs: Inputs, tile: Tile, student: Chunk, scratch: list[Tensor]) -> Statistics:
    """The accumulators of all columns but the teacher's ids: masked, since 1 minus their mass would lose it."""
    if not maskable(inputs):
        student = Chunk(scaled(student, tile.of(scratch[0])), None, None, torch.ones_like(student.outer))
    picked = Picked(student, inputs.ids[tile.rows], tile.columns.start)
    picked.mask()
    found = inputs.backend.statistics(student, None, targets=None, weights=None, wanted=frozenset())
    picked.restore()
    return statistics.joined(found)


def finish(
    inputs: Inputs, tile: Tile, found: Statistics, student: Chunk, teacher: Chunk | None, group: Group
) -> Statistics:
    """Statistics of a group's whole rows, with the sums that need lse first and so read them again."""
    s = statistics.finish(found)
    for key in group.generic:
        s[key, "value"], s[key, "slope"] = _generic(inputs, key, tile, s, student, teacher)
    if inputs.teacher_grad:
        exchanged = statistics.exchange(s)
        for key in group.adjoint_generic:
            both = _generic(inputs, key, tile, exchanged, teacher, student)
            s["teacher", key, "value"], s["teacher", key, "slope"] = both
    return s


def _generic(
    inputs: Inputs, key: tuple, tile: Tile, s: Statistics, student: Chunk, teacher: Chunk
) -> tuple[Tensor, Tensor]:
    normalizers = statistics.normalizers(s, inputs.dtype)
    return inputs.backend.generic(student, teacher, normalizers, *row_sum(inputs, key, tile))


def row_sum(inputs: Inputs, key: tuple, tile: Tile) -> tuple[RowSum, tuple[Tensor, ...]]:
    """What a key names, and its parameters for the rows of a tile."""
    name, parameters = key
    outer = inputs.student.outer[tile.rows]
    return SUMS[name], tuple(
        inputs.per_token(parameter[1], tile.rows).to(inputs.dtype)
        if isinstance(parameter, tuple)
        else torch.full_like(outer, parameter)
        for parameter in parameters
    )
