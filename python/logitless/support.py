"""Filtered support: the tokens that a sampler keeps, and the distribution renormalised over them, which it draws from.

    q~_j = e^(s_j) / sum_{k kept} e^(s_k) where j is kept, else 0
    d log q~_y / d s_j = 1[j = y] - q~_j where j is kept, else 0

The kept set is a constant under differentiation. A target that is not kept has log-probability -inf with gradient 0.

All filters but :class:`KeepIds` are thresholds: from a row of scaled logits s comes a *floor*, and what is not below it
is kept. So tokens that tie at the floor (bf16 logits!) are all kept, those of a nucleus too, where a sampler that sorts
keeps some. Several thresholds apply in order, each to the distribution that those before it left. Temperature comes
first, as in vLLM and Transformers: s is divided by it already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import check_number


@dataclass(frozen=True)
class MinP:
    """Keeps the tokens of at least ``p`` times the largest probability (Nguyen et al. 2024, "Turning Up the Heat").

    Args:
        p: in (0, 1]; 1 keeps the largest alone.
    """

    p: float

    def __post_init__(self) -> None:
        _check_share(self.p)

    def keeps_all(self, columns: int) -> bool:
        return False

    def encode(self) -> tuple[str, float]:
        return "MinP", float(self.p)

    def floors(self, s: Tensor) -> Tensor:
        """[rows] floors of scaled logits [rows, V]."""
        return s.amax(-1) + math.log(self.p)


@dataclass(frozen=True)
class TopK:
    """Keeps the ``k`` largest logits, and what equals the k-th of them (Fan et al. 2018).

    Args:
        k: at least 1; V or more keeps all.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"k: an integer, got {type(self.k).__name__}")
        if self.k < 1:
            raise ValueError(f"k: must be at least 1, got {self.k}")

    def keeps_all(self, columns: int) -> bool:
        return self.k >= columns

    def encode(self) -> tuple[str, int]:
        return "TopK", self.k

    def floors(self, s: Tensor) -> Tensor:
        """[rows] floors of scaled logits [rows, V]."""
        return s.topk(self.k, sorted=False).values.amin(-1)


@dataclass(frozen=True)
class TopP:
    """Keeps the nucleus: the smallest set of most probable tokens whose mass is at least ``p`` (Holtzman et al. 2020).

    Args:
        p: in (0, 1]; 1 keeps all.
    """

    p: float

    def __post_init__(self) -> None:
        _check_share(self.p)

    def keeps_all(self, columns: int) -> bool:
        return self.p == 1

    def encode(self) -> tuple[str, float]:
        return "TopP", float(self.p)

    def floors(self, s: Tensor) -> Tensor:
        """[rows] floors of scaled logits [rows, V], by bisection: no sort.

        With m the maximum, what lies below m - log(V / (1 - p)) has less mass than (1 - p) e^m. From there it takes so
        many halvings to tell any two logits apart that differ by more than a rounding error of 1.
        """
        low_enough = math.log(s.shape[1] / (1 - self.p)) + 1
        top = s.amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top)
        e = (s - top).exp()
        mass = self.p * e.sum(-1, keepdim=True)
        low, high = top - low_enough, top + 1  # of at least, of less than that mass
        above = torch.empty_like(e)  # 0 or 1: on CPUs far faster than a choice
        for _ in range(math.ceil(math.log2((low_enough + 1) / torch.finfo(s.dtype).eps))):
            middle = (low + high) / 2
            torch.ge(s, middle, out=above)
            enough = above.mul_(e).sum(-1, keepdim=True) >= mass
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return low[:, 0]


@dataclass(frozen=True, eq=False)
class KeepIds:
    """Keeps tokens that were recorded: those a sampler says it kept.

    Only their logits are computed: K rows of a linear head's weight per token, and no product over the vocabulary.

    Args:
        ids: [..., K] integer token ids per token, in any order; -1 pads, and an id that occurs twice counts once.
    """

    ids: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Tensor):
            raise TypeError(f"ids: an integer tensor, got {type(self.ids).__name__}")
        if self.ids.dtype.is_floating_point or self.ids.dtype.is_complex or self.ids.dtype == torch.bool:
            raise TypeError(f"ids: an integer tensor, got {self.ids.dtype}")
        if self.ids.dim() < 1 or self.ids.shape[-1] < 1:
            raise ValueError(f"ids: needs the shape [..., K] with K >= 1, got {list(self.ids.shape)}")


Threshold = MinP | TopP | TopK
Keep = Threshold | KeepIds | tuple[Threshold, ...]


def check_keep(keep: object) -> None:
    """A filter, several thresholds that are applied in order, or None."""
    if keep is None or isinstance(keep, KeepIds):
        return
    for one in keep if isinstance(keep, tuple) else (keep,):
        if not isinstance(one, (MinP, TopP, TopK)):
            raise TypeError(
                f"keep: a MinP, TopP, TopK or KeepIds, or a tuple of the first three, got {type(one).__name__}"
            )


def encode(keep: Keep | None, columns: int) -> tuple[tuple[str, float], ...]:
    """The thresholds that leave any of so many columns out, as plain values."""
    if keep is None or isinstance(keep, KeepIds):
        return ()
    filters = keep if isinstance(keep, tuple) else (keep,)
    return tuple([one.encode() for one in filters if not one.keeps_all(columns)])


def decode(plain: tuple[tuple[str, float], ...]) -> list[Threshold]:
    """Undoes :func:`encode`."""
    kinds = {"MinP": MinP, "TopP": TopP, "TopK": TopK}
    return [kinds[name](number) for name, number in plain]


def _check_share(p: object) -> None:
    check_number("p", p, above=0)
    if p > 1:
        raise ValueError(f"p: must lie in (0, 1], got {p}")
