"""Where a chunk of whole rows meets its filters: floors on raw products, and targets that are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from logitless.backends import Chunk
from logitless.backends.torch import raw, scaled
from logitless.engine.scan import blocks
from logitless.support import Threshold


def find(filters: Sequence[Threshold], chunk: Chunk, backend: ModuleType) -> Tensor:
    """The floor of every row on x = z + bias, [rows] in the compute type; each filter sees what those before it left.

    On x, not on s, so that every kernel decides alike, however it rounds. And halfway between the smallest x that is
    kept and the largest that is not: a backward pass that forms the products again, in tiles of another shape and so
    with other rounding errors, finds the same columns.
    """
    for one in filters:
        floors = backend.floors(chunk, *one.encode()) if hasattr(backend, "floors") else by_operations(one, chunk)
        chunk = replace(chunk, floor=floors)
    return chunk.floor


def by_operations(one: Threshold, chunk: Chunk) -> Tensor:
    """Floors of one filter, in torch operations."""
    found = torch.empty_like(chunk.outer)
    for rows in blocks(chunk.z):
        floor = None if chunk.floor is None else chunk.floor[rows]
        part = replace(chunk, z=chunk.z[rows], outer=chunk.outer[rows], floor=floor)
        x, s = raw(part), scaled(part)
        dropped = s < one.floors(s)[:, None]
        lowest = torch.where(dropped, torch.inf, x).amin(-1)
        highest = torch.where(dropped, x, -torch.inf).amax(-1)
        middle = highest / 2 + lowest / 2
        middle = torch.where(middle > highest, middle, lowest)
        found[rows] = torch.where(highest == -torch.inf, -torch.inf, middle)
    return found


def outside(chunk: Chunk, targets: Tensor) -> Tensor:
    """[rows] bool: whether a row's target is a column that is not kept."""
    columns = chunk.z.shape[1]
    at = targets.clamp(0, columns - 1)[:, None]
    x = raw(replace(chunk, z=chunk.z.gather(1, at), bias=None if chunk.bias is None else chunk.bias[at]))[:, 0]
    dropped = x == -torch.inf
    return dropped if chunk.floor is None else dropped | (x < chunk.floor)
