"""Corrections for samples of an inference engine whose probabilities differ from the trainer's: detached factors.

In the formulas w = old - roll per token (``against="old_logprob"``) or lp - roll (``against="logprob"``, for training
that keeps no old policy), with old, lp, roll ``old_logprob``, ``logprob``, ``rollout_logprob``. A factor multiplies the
surrogate alone, not the KL penalty.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.checks import check_choice
from logitless.losses.policy.inputs import LARGEST_LOG, Part, Slots, Tokens, check_optional
from logitless.losses.policy.penalties import ESTIMATORS
from logitless.ops.tokens import recipe

LEVELS = ("token", "sequence", "geometric")
REDUCTIONS = ("token", "seq_sum", "seq_mean", "seq_max")


@dataclass(frozen=True)
class _Correction(Part):
    def factor(self, tokens: Tokens) -> Tensor:
        """[T], without gradient."""
        raise NotImplementedError


@dataclass(frozen=True)
class _RolloutCorrection(_Correction):
    """What the two below share: what they compare the rollout with, and when that is known."""

    _: KW_ONLY
    against: str = "old_logprob"

    def __post_init__(self) -> None:
        check_choice("against", self.against, ("old_logprob", "logprob"))

    @property
    def fixed(self) -> bool:
        return self.against == "old_logprob"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"rollout_logprob", self.against})

    def log_weight(self, tokens: Tokens) -> Tensor:
        return tokens[self.against].detach() - tokens["rollout_logprob"]


@dataclass(frozen=True)
class ImportanceCorrection(_RolloutCorrection):
    """The importance weight ``W = exp(w_t)``, of the sequence ``exp(sum_i w)`` or its geometric mean ``exp(mean_i w)``,
    kept in bounds: truncated, ``clip(W, low, high)``, or masked, W where low <= W <= high and 0 elsewhere.

    Truncated: TIS (Yao et al. 2025). Masked: MIS; per token with both bounds IcePop (Ring-1T, 2025). TRL's four modes
    are level "token" or "sequence" with mode "truncate" or "mask".

    Args:
        level: "token", "sequence" or "geometric".
        mode: "truncate" or "mask".
        high, low: bounds of W; None: none.
        bound: log W is clamped to [-bound, bound] first, as verl does; None: only to what exp can hold.
        normalize: divide by the mean of W over the tokens ("token") or sequences of this call (verl's batch_normalize).
    """

    level: str = "token"
    mode: str = "truncate"
    high: float | None = 2.0
    low: float | None = None
    bound: float | None = 20.0
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("level", self.level, LEVELS)
        check_choice("mode", self.mode, ("truncate", "mask"))
        check_optional(self, "high", "low", "bound")

    @property
    def row_local(self) -> bool:
        return self.level == "token" and not self.normalize

    @property
    def sequences(self) -> bool:
        return self.level != "token"

    def factor(self, tokens: Tokens) -> Tensor:
        w, segments = self.log_weight(tokens), tokens.segments
        if self.level != "token":
            w = segments.sum(w) if self.level == "sequence" else segments.mean(w)
        bound = LARGEST_LOG if self.bound is None else self.bound
        weight = w.clamp(-bound, bound).exp()
        low, high = self.low or 0.0, math.inf if self.high is None else self.high
        if self.mode == "truncate":
            weight = weight.clamp(low, high)
        else:
            weight = torch.where((weight >= low) & (weight <= high), weight, 0)
        if self.normalize:
            counts = (segments.lengths > 0) if self.level != "token" else tokens.mask
            mean = torch.where(counts, weight, 0).sum() / counts.sum().clamp(min=1)
            weight = weight / mean.clamp(min=torch.finfo(weight.dtype).tiny)
        return weight if self.level == "token" else segments.spread(weight)

    def described(self, slots: Slots) -> recipe.Factor | None:
        if self.normalize:  # a mean of the batch
            return None
        low, high = recipe.bounds(self.low, self.high)
        return recipe.Factor(
            "importance",
            slots(self.against),
            slots("rollout_logprob"),
            {"token": "token", "sequence": "sum", "geometric": "mean"}[self.level],
            self.mode == "mask",
            max(low, 0.0),
            high,
            LARGEST_LOG if self.bound is None else self.bound,
        )


@dataclass(frozen=True)
class Rejection(_RolloutCorrection):
    """1 where the estimated divergence of trainer and inference engine lies in [low, high], else 0 (verl's rollout_rs).

    The estimate per token is k1 = -w, k2 = w^2 / 2 or k3 = e^w - 1 - w; ``over`` says whether it is held against the
    bounds token by token, or its sum, mean or maximum over the sequence. Several rejections in one objective multiply:
    all must hold. verl takes what it rejects out of the mask, so out of penalties and denominators too; its bounds of
    k1 are of e^k1.
    """

    estimate: str = "k3"
    over: str = "token"
    high: float | None = None
    low: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("estimate", self.estimate, ("k1", "k2", "k3"))
        check_choice("over", self.over, REDUCTIONS)
        if self.high is None and self.low is None:
            raise ValueError("high: at least one of high and low must be given")
        check_optional(self, "high", "low")

    @property
    def row_local(self) -> bool:
        return self.over == "token"

    @property
    def sequences(self) -> bool:
        return self.over != "token"

    def factor(self, tokens: Tokens) -> Tensor:
        k, segments = ESTIMATORS[self.estimate](-self.log_weight(tokens)), tokens.segments
        if self.over != "token":
            of_sequence = {"seq_sum": segments.sum, "seq_mean": segments.mean, "seq_max": segments.max}
            k = segments.spread(of_sequence[self.over](k))
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        return ((k >= low) & (k <= high)).to(k.dtype)

    def described(self, slots: Slots) -> recipe.Factor:
        over, (low, high) = self.over.removeprefix("seq_"), recipe.bounds(self.low, self.high)
        first, rollout = slots(self.against), slots("rollout_logprob")
        return recipe.Factor(f"rejection_{self.estimate}", first, rollout, over, low=low, high=high)


@dataclass(frozen=True)
class Opsm(_Correction):
    """1 where A >= 0 or ``mean_i (roll - lp) <= threshold``, else 0: sequences that went badly and are no longer the
    policy's own teach nothing. Off-policy sequence masking (DeepSeek-V3.2, 2025); TRL, slime.
    """

    threshold: float

    row_local = False
    sequences = True

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "rollout_logprob", "advantages"})

    def factor(self, tokens: Tokens) -> Tensor:
        gap = tokens.segments.mean(tokens["rollout_logprob"] - tokens["logprob"].detach())
        keep = (tokens["advantages"] >= 0) | tokens.segments.spread(gap <= self.threshold)
        return keep.to(gap.dtype)

    def described(self, slots: Slots) -> recipe.Factor:
        return recipe.Factor("opsm", slots("logprob"), slots("rollout_logprob"), high=self.threshold)


def tis(high: float = 2.0, level: str = "token", **options) -> ImportanceCorrection:
    """Truncated importance sampling, ``min(W, high)``. verl has 2.0 per sequence, TRL 3.0, G-OPD 5.0 per token."""
    return ImportanceCorrection(level=level, mode="truncate", high=high, **options)


def mis(high: float = 3.0, level: str = "sequence", **options) -> ImportanceCorrection:
    """Masked importance sampling, W where W <= high, else 0. The defaults are TRL's sequence_mask."""
    return ImportanceCorrection(level=level, mode="mask", high=high, **options)


def icepop(low: float = 0.5, high: float = 5.0, **options) -> ImportanceCorrection:
    """W per token where low <= W <= high, else 0 (IcePop: Ring-1T, 2025). The default bounds are ours."""
    return ImportanceCorrection(level="token", mode="mask", low=low, high=high, **options)
