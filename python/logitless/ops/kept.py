"""Recorded support: the logits of the kept tokens alone, with targets at their places among those."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.engine.problem import ABSENT, HeadSpec, Request
from logitless.logits import DenseLogits, LinearLogits, Logits
from logitless.support import KeepIds

IGNORED = -100  # in place of any other ignore_index, which may be a place


class Recorded:
    """A student restricted to the tokens of :class:`KeepIds`.

    ``ids`` [N, K + 1], ascending, each once, -1 where there is none, as in the last column: the place of targets that
    are not kept. ``targets`` [...] are places, :data:`IGNORED` where ignored.
    """

    def __init__(self, student: Logits, keep: KeepIds, targets: Tensor | None, ignore_index: int) -> None:
        given, columns = keep.ids, student.columns
        if given.shape[:-1] != student.shape:
            raise ValueError(f"ids: shape {list(given.shape)}, one row per token needs {[*student.shape, 'K']}")
        if given.device != student.device:
            raise ValueError(f"ids: on {given.device}, the logits are on {student.device}")
        checks = given.device.type == "cpu" and not torch.compiler.is_compiling()
        ids = given.reshape(-1, given.shape[-1]).long()
        strange = (ids < -1) | (ids >= columns)
        if checks and strange.any():
            raise ValueError(f"ids: must lie in [0, {columns}) or be -1, got {ids[strange][0].item()}")
        ids = ids.clamp(-1, columns - 1).sort().values
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        self.ids = torch.nn.functional.pad(ids.masked_fill(repeated, -1), (0, 1), value=-1)
        self.student = student if isinstance(student, LinearLogits) else self._picked(student)
        self.targets = None
        if targets is not None:
            y = targets.reshape(-1, 1).long()
            ignored = y[:, 0] == ignore_index
            wrong = ((y < 0) | (y >= columns))[:, 0] | strange.any(-1)
            if checks and (wrong & ~ignored).any():
                bad = y[wrong & ~ignored][0].item()
                raise ValueError(f"targets: must lie in [0, {columns}) or be ignore_index={ignore_index}, got {bad}")
            hit = self.ids == y
            place = torch.where(hit.any(-1), hit.int().argmax(-1), self.ids.shape[1] - 1)
            place = torch.where(wrong, self.ids.shape[1], place)  # which the engine refuses, or makes NaN
            self.targets = torch.where(ignored, IGNORED, place).view(targets.shape)

    def _picked(self, student: DenseLogits) -> DenseLogits:
        """Scaled logits at the ids; the first is 0 where there is none, as in a head of gathered columns."""
        exists = (self.ids >= 0).view(*student.shape, -1)
        z = student.logits.gather(-1, self.ids.clamp(min=0).view(exists.shape))
        z = student.scale * (z if student.dtype == torch.float64 else z.float())
        if student.softcap is not None:
            z = student.softcap * torch.tanh(z / student.softcap)
        temperature = student.temperature
        z = z / (temperature[..., None].to(z.dtype) if isinstance(temperature, Tensor) else temperature)
        first = torch.arange(exists.shape[-1], device=z.device) == 0
        nothing = ~exists.any(-1, keepdim=True) & first
        return DenseLogits(torch.where(exists, z, torch.where(nothing, 0.0, -torch.inf)))

    def head(self, request: Request) -> HeadSpec:
        linear = isinstance(self.student, LinearLogits)
        return request.head(self.student, ids=request.place(self.ids) if linear else ABSENT)

    def token(self, place: Tensor) -> Tensor:
        """The tokens at places [...]; 0 where ignored."""
        found = self.ids.gather(1, place.view(-1, 1)).view(place.shape)
        return torch.where(self.targets == IGNORED, 0, found)
