"""Sequences laid end to end in one vector of tokens: sums, means and maxima per sequence, and back to their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def once(method: Callable) -> property:
    """A property that is computed when first read: functools.cached_property without its lock, which torch.compile does
    not enter. Its object has a dict ``kept``."""

    def read(self):
        if method.__name__ not in self.kept:
            self.kept[method.__name__] = method(self)
        return self.kept[method.__name__]

    return property(read, doc=method.__doc__)


@dataclass(frozen=True, eq=False)
class Segments:
    """Sequence i is the tokens offsets[i] : offsets[i + 1]; only those under the mask count.

    Padded rows [B, T] are the case of equal steps, so both layouts run the same code. Nothing waits for the device.
    """

    offsets: Tensor  # [B + 1] int64
    tokens: int  # T
    given: Tensor | None  # [T] bool; None: all
    whole: bool  # whether there are no tokens after the last sequence
    kept: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, tokens: int, mask: Tensor | None) -> Segments:
        """From cumulative lengths 0, l_0, l_0 + l_1, ...; tokens after the last belong to no sequence."""
        return cls(cu_seqlens.long(), tokens, mask, whole=False)

    @classmethod
    def padded(cls, rows: int, columns: int, mask: Tensor | None, device: torch.device) -> Segments:
        return cls(torch.arange(rows + 1, device=device) * columns, rows * columns, mask, whole=True)

    @once
    def ids(self) -> Tensor:
        """[T], the sequence of every token."""
        place = torch.arange(self.tokens, device=self.offsets.device)
        return torch.bucketize(place, self.offsets[1:], right=True).clamp(max=self.count - 1)

    @once
    def mask(self) -> Tensor:
        """[T] bool."""
        if self.whole and self.given is not None:
            return self.given
        inside = torch.arange(self.tokens, device=self.offsets.device) < self.offsets[-1]
        return inside if self.given is None else self.given & inside

    @property
    def count(self) -> int:
        """B, empty sequences included."""
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """[B] tokens under the mask."""
        return self.sum(self.mask.float())

    def sum(self, x: Tensor) -> Tensor:
        """[T] to [B]."""
        return self._reduce(torch.where(self.mask, x, 0), "sum")

    def mean(self, x: Tensor) -> Tensor:
        """[T] to [B]; 0 for an empty sequence."""
        return self.sum(x) / self.lengths.clamp(min=1).to(x.dtype)

    def max(self, x: Tensor) -> Tensor:
        """[T] to [B]; -inf for an empty sequence."""
        return self._reduce(torch.where(self.mask, x, -torch.inf), "max")

    def spread(self, x: Tensor) -> Tensor:
        """[B] to [T]: every token gets its sequence's value."""
        return x[self.ids]

    def following(self, x: Tensor) -> Tensor:
        """[T] to [T]: the value at the next token of the same sequence; 0 after the last and where that is masked."""
        x = torch.where(self.mask, x, 0)
        last = torch.arange(x.numel(), device=x.device) + 1 == self.offsets[1:][self.ids]
        return torch.where(last, 0, torch.cat([x[1:], x.new_zeros(min(1, x.numel()))]))

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        # in float64, since it adds one by one; unsafe: offsets are not read back from the device
        return torch.segment_reduce(x.double(), how, offsets=self.offsets, unsafe=True).to(x.dtype)
