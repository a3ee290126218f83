"""Rows of chunks of logits, and checks that the functions of this package share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from logitless.engine.problem import check_target_values
from logitless.engine.scan import blocks, chunks
from logitless.logits import Logits, check_targets
from logitless.ops.loss import check_execution


def row_blocks(heads: Sequence[Logits], workspace: int | None) -> Iterator[tuple[slice, list[Tensor]]]:
    """:func:`chunks` in blocks of rows so small that temporaries of their size cost nothing beside a chunk."""
    for rows, logits in chunks(heads, workspace):
        for block in blocks(logits[0]):
            yield slice(rows.start + block.start, rows.start + block.stop), [z[block] for z in logits]


def pick(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(-1, index[:, None])[:, 0]


def of_targets(rows: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The targets' entries; 0 where ignored, NaN where there is none."""
    inside = (targets >= 0) & (targets < rows.shape[-1])
    found = torch.where(inside, pick(rows, torch.where(inside, targets, 0).long()), torch.nan)
    return torch.where(targets == ignore_index, 0, found)


def concatenated(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


def empty(logits: Logits, dtype: torch.dtype, *columns: int) -> Tensor:
    """Room for results of flattened tokens."""
    return torch.empty(logits.shape.numel(), *columns, dtype=dtype, device=logits.device)


def compute_dtype(heads: Sequence[Logits]) -> torch.dtype:
    return torch.float64 if any(head.dtype == torch.float64 for head in heads) else torch.float32


def check_targets_of(logits: Logits, targets: object, ignore_index: int) -> None:
    """Of each token; also the values, where those are checked. Elsewhere a wrong one makes NaN."""
    check_targets(targets, logits)
    check_target_values(targets, logits.columns, ignore_index)


def check_workspace(workspace: int | str, ignore_index: int = -100) -> int | None:
    return check_execution(ignore_index, None, "auto", "auto", workspace)
