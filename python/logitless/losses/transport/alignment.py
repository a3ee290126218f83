"""Which tokens of two tokenizations of a text belong together, as tensors of fixed shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.logits import Logits, check_logits, check_token_shape


@dataclass(frozen=True)
class Pairs:
    """Tokens of the student beside those of the teacher, one pair a row.

    On CPUs all are live. Elsewhere there are as many rows per sequence as there could be at most, since counting would
    wait for the device; those that are not live point at tokens that take no part, no two at the same.
    """

    student: Tensor  # [R] places among the student's tokens, all sequences one after the other
    teacher: Tensor  # [R]
    sequence: Tensor  # [R] which sequence
    live: Tensor  # [R] bool
    counts: Tensor  # [B] live rows per sequence
    every: bool = False  # all tokens of both sides, in order

    @property
    def indices(self) -> tuple[Tensor | None, Tensor | None]:
        """The places, None for all tokens."""
        return (None, None) if self.every else (self.student, self.teacher)

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """[R] values at the student's tokens, zeros elsewhere."""
        values = torch.where(self.live, values, 0)
        return values.new_zeros(shape.numel()).index_put((self.student,), values).view(shape)


@dataclass(frozen=True)
class Groups:
    """Groups of one side's tokens: [B, T] each."""

    index: Tensor  # which group of its sequence a token is in, counted from 0
    member: Tensor  # whether it is in any
    first: Tensor  # whether it is the first of its group
    last: Tensor


def check_sequences(student: Logits, teacher: Logits) -> None:
    """Two sides of [..., T] tokens on one device that agree but in T and vocabulary."""
    for name, logits in (("student", student), ("teacher", teacher)):
        check_logits(name, logits)
        if not logits.shape:
            raise ValueError(f"{name}: needs the shape [..., T], got a single token")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: leading shape {list(teacher.shape)}, all but the last of the student's {list(student.shape)} "
            "must agree"
        )
    if student.device != teacher.device:
        raise ValueError(f"teacher: on {teacher.device}, the student is on {student.device}")


def live_tokens(name: str, targets: Tensor | None, logits: Logits, ignore_index: int) -> Tensor:
    """[B, T] bool: the tokens that count."""
    if targets is None:
        live = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    else:
        _check_ids(name, targets, logits)
        live = targets != ignore_index
    return _flat(live)


def check_ends(name: str, ends: object, logits: Logits) -> Tensor:
    """[B, T]: where in the text tokens end. That those that count do not go back is checked on CPUs."""
    _check_ids(name, ends, logits)
    ends = _flat(ends)
    if ends.device.type == "cpu" and ends.numel() and ((ends >= 0) & (ends < ends.cummax(-1).values)).any():
        raise ValueError(f"{name}: must not decrease from token to token")
    return ends


def check_tokens(name: str, tokens: object, ends: Tensor, logits: Logits) -> Tensor:
    """[B, T] ids of the tokens that count, -100 elsewhere."""
    _check_ids(name, tokens, logits)
    tokens = torch.where(ends < 0, -100, tokens.reshape(ends.shape).long())
    if tokens.device.type == "cpu" and ((ends >= 0) & ((tokens < 0) | (tokens >= logits.columns))).any():
        raise ValueError(f"{name}: must lie in [0, {logits.columns}) where a token counts")
    return tokens


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check_ids(name: str, ids: object, logits: Logits) -> None:
    if not isinstance(ids, Tensor) or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{name}: an integer tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    check_token_shape(name, ids, logits)


def paired(student: Tensor, teacher: Tensor) -> Pairs:
    """The i-th live token of a student's sequence [B, T] beside the i-th of the teacher's [B, U]."""
    found = padded(student, teacher)
    if student.device.type != "cpu":
        return found
    rows = (found.student, found.teacher, found.sequence, found.live)
    every = bool(student.all() and teacher.all()) and student.shape == teacher.shape
    return Pairs(*(x[found.live] for x in rows), found.counts, every)


def padded(student: Tensor, teacher: Tensor) -> Pairs:
    """Rows for all that there could be, whose number does not depend on values."""
    length = min(student.shape[-1], teacher.shape[-1])
    counts = torch.minimum(student.sum(-1), teacher.sum(-1))
    live = torch.arange(length, device=student.device) < counts[:, None]
    sequence = torch.arange(len(student), device=student.device)[:, None].expand(live.shape)
    places = []
    for mask in (student, teacher):
        order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)[:, :length]
        places.append((order + sequence * mask.shape[-1]).reshape(-1))
    return Pairs(*places, sequence.reshape(-1), live.reshape(-1), counts)


def groups(student: Tensor, teacher: Tensor) -> tuple[Groups, Groups]:
    """Tokens of both sides up to every place in the text where a token of either ends.

    Args:
        student, teacher: [B, T] and [B, U] integers, where in the text every token ends; negative: it does not count.

    Returns:
        The groups of both sides, as many in a sequence. Tokens after the last common end are in none.
    """
    sides = []
    for ends in (student, teacher):
        ends = F.pad(ends.long(), (1, 0), value=-1)  # then no side is empty
        counted = ends >= 0
        reach = torch.where(counted, ends, -1).cummax(-1).values
        rank = counted.cumsum(-1)
        after = torch.searchsorted(reach, reach, right=True) - 1  # the last place by which the text reaches no further
        sides.append((counted, reach, counted & (rank == rank.gather(-1, after))))
    found = []
    for (counted, reach, ending), (_, other, _) in (sides, sides[::-1]):
        place = torch.searchsorted(other, reach).clamp(max=other.shape[-1] - 1)
        last = ending & (other.gather(-1, place) == reach)
        index = last.cumsum(-1) - last.long()
        member = counted & (index < last.sum(-1, keepdim=True))
        before = torch.where(member, index, -1).cummax(-1).values.roll(1, -1)  # the first place holds padding
        found.append(Groups(*(x[:, 1:] for x in (index, member, member & (index > before), last))))
    return tuple(found)
