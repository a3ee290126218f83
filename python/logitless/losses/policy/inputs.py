"""What an objective reads: named per-token tensors, checked, flat, with exact zeros where masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from logitless.logits import check_constant, check_floating, check_number
from logitless.losses.policy.segments import Segments, once

STATISTICS = ("logprob", "entropy", "lse", "masked_logprob", "masked_entropy")  # of the policy's rows: differentiable
LARGEST_LOG = 80.0  # e^80 is finite in float32


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one call, by name: flat [T] in one floating type, 0 where masked, made when they are first read.
    Kernels take them as they were given. ``tokens["old_logprob"]`` is detached ``logprob`` where none was given:
    on-policy."""

    given: Mapping[str, Tensor]  # [T] or, per sequence, [B, 1], of any type
    given_mask: Tensor | None  # [T] bool; None: all
    size: int  # T
    device: torch.device
    dtype: torch.dtype
    segments: Segments | None
    later: Mapping[str, Callable[[Tokens], Tensor]] = field(default_factory=dict)  # others, computed when first read
    made: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Tensor], mask: Tensor, dtype: torch.dtype) -> Tokens:
        """From values as they are when made, without sequences."""
        return cls({}, mask, mask.numel(), mask.device, dtype, None, made=dict(values))

    @once
    def mask(self) -> Tensor:
        """[T] bool."""
        if self.segments is not None:
            return self.segments.mask
        if self.given_mask is not None:
            return self.given_mask
        return torch.ones(self.size, dtype=torch.bool, device=self.device)

    def __contains__(self, name: str) -> bool:
        return name in self.made or name in self.given or name in self.later

    def __getitem__(self, name: str) -> Tensor:
        if name == "old_logprob" and name not in self:
            return self["logprob"].detach()
        if name not in self.made and name in self.later:
            self.made[name] = self.later[name](self)
        elif name not in self.made:
            x = self.given[name].to(self.dtype)
            x = self.segments.spread(x[:, 0]) if x.dim() == 2 else x
            self.made[name] = torch.where(self.mask, x, 0)
        return self.made[name]

    def raw(self, name: str) -> Tensor:
        """As it was given: [T] or [B, 1], of any type, whatever where masked."""
        return self.given[name] if name in self.given else self[name]

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: self[name] for name in {**self.given, **self.later, **self.made}}

    def with_values(self, **values: Tensor) -> Tokens:
        """With more, or other, values as they are when made."""
        return replace(self, made=self.made | values)

    def with_given(self, **given: Tensor) -> Tokens:
        return replace(self, given={**self.given, **given}, made=dict(self.made))

    def rows(self, index: slice) -> Tokens:
        """Some of the tokens, for objectives that are row-local: sequences are lost."""
        return Tokens.of({name: x[index] for name, x in self.values.items()}, self.mask[index], self.dtype)

    @property
    def log_ratio(self) -> Tensor:
        """[T] ``logprob - old_logprob``."""
        return self["logprob"] - self["old_logprob"]

    def sum(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0).sum()

    def mean(self, x: Tensor) -> Tensor:
        """Over the tokens that count; 0 where there are none."""
        return self.sum(x) / self.mask.sum().clamp(min=1)


class Slots:
    """Inputs of a recipe in the making (:mod:`logitless.ops.tokens.recipe`): slots of named inputs and made ones."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.inputs = {"logprob": tokens.raw("logprob")}

    def __call__(self, name: str) -> int:
        """The slot of an input; of ``old_logprob`` that of ``logprob`` where none was given."""
        if name == "old_logprob" and name not in self.tokens:
            return 0
        self.inputs.setdefault(name, self.tokens.raw(name))
        return list(self.inputs).index(name)

    def made(self, x: Tensor) -> int:
        """The slot of numbers [T] without gradient that torch computes beforehand, since no kernel does."""
        self.inputs[f"made {len(self.inputs)}"] = x
        return len(self.inputs) - 1


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of an objective: options, and a pure function of :class:`Tokens`.

    A class that has a ``described(slots)`` of its own says by it what it is in a recipe, or None where a recipe has no
    words for it; one that inherits it or has none is not known to the kernels.
    """

    row_local: ClassVar[bool] = True  # a token's value depends on that token's own inputs alone
    fixed: ClassVar[bool] = False  # depends on constant inputs alone, so is known before the forward pass
    sequences: ClassVar[bool] = False  # needs to know where sequences begin

    @property
    def reads(self) -> frozenset[str]:
        """Names of the tensors it needs, of the policy's statistics and of the inputs."""
        return frozenset()


def check_optional(part: object, *names: str) -> None:
    """Each of these attributes is a finite number or None."""
    for name in names:
        if getattr(part, name) is not None:
            check_number(name, getattr(part, name))


def exp(x: Tensor) -> Tensor:
    """``e^x``, constant beyond e^80 (gradient 0): no ratio is infinite, so no 0 * inf can arise from one."""
    return x.clamp(max=LARGEST_LOG).exp()


def expm1(x: Tensor) -> Tensor:
    """``e^x - 1``, constant beyond e^80 alike."""
    return torch.expm1(x.clamp(max=LARGEST_LOG))


def prepare(
    given: Mapping[str, Tensor | None],
    *,
    like: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tokens:
    """Named tensors as :class:`Tokens`.

    Each is per token, in the shape of ``like`` ([T] packed or [B, T] padded), or per sequence [B]; a shape that could
    be both is per token. Where the mask is False whatever stands there, NaN included, becomes 0 and gets gradient 0.
    """
    if like.dim() not in (1, 2):
        raise ValueError(f"logprob: needs the shape [T] (packed) or [B, T] (padded), got {list(like.shape)}")
    flat_mask = None
    if mask is not None:
        _check_shape("mask", mask, like, per_sequence=None)
        flat_mask = (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)
    segments = None
    if like.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: is for packed tokens [T]; padded [B, T] take a mask")
        segments = Segments.padded(*like.shape, flat_mask, like.device)
    elif cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, like)
        segments = Segments.packed(cu_seqlens, like.numel(), flat_mask)
    flat = {}
    for name, x in given.items():
        if x is None:
            continue
        if name in STATISTICS:
            _check_shape(name, x, like, per_sequence=None)
            check_floating(name, x)
        else:
            _check_shape(name, x, like, per_sequence=None if segments is None else segments.count)
            check_constant(name, x)
        flat[name] = x.reshape(-1) if x.shape == like.shape else x[:, None]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return Tokens(flat, flat_mask, like.numel(), like.device, dtype, segments)


def _check_shape(name: str, x: object, like: Tensor, *, per_sequence: int | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a tensor, got {type(x).__name__}")
    if x.shape != like.shape and (per_sequence is None or list(x.shape) != [per_sequence]):
        wanted = f"{list(like.shape)}" + ("" if per_sequence is None else f" (per token) or [{per_sequence}]")
        raise ValueError(f"{name}: shape {list(x.shape)}, needs {wanted}")
    if x.device != like.device:
        raise ValueError(f"{name}: on {x.device}, logprob is on {like.device}")


def _check_cu_seqlens(cu_seqlens: object, like: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: an int32 or int64 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: needs the shape [B + 1] with B >= 1, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens: on {cu_seqlens.device}, logprob is on {like.device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # values are not read back from a device
        steps = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or (steps < 0).any() or cu_seqlens[-1] > like.numel():
            raise ValueError(f"cu_seqlens: must rise from 0 to at most {like.numel()}, got {cu_seqlens.tolist()}")
