"""Ratios of the policy to the one that sampled, as logarithms per token.

In the formulas lp, old and T are ``logprob``, ``old_logprob`` and ``teacher_logprob``; sg stops the gradient; mean_i
and sum_i run over the tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.checks import check_choice
from logitless.losses.policy.inputs import Part, Slots, Tokens, check_optional
from logitless.ops.tokens import recipe

LEVELS = ("token", "sequence-mean", "sequence-sum", "sequence-token")


@dataclass(frozen=True)
class Ratio(Part):
    """The log-ratio to the anchor, ``r_t = lp_t - (1 - teacher_share) old_t - teacher_share T_t``, at a level.

    ==============  =====================================  ========================================================
    level           log-ratio of token t in sequence i     who
    ==============  =====================================  ========================================================
    token           r_t                                    PPO, GRPO
    sequence-mean   mean_i r                               GSPO (Zheng et al. 2025); TRL's "sequence"
    sequence-sum    sum_i r                                RLOO: the ratio of whole sequences
    sequence-token  sg(mean_i r) + lp_t - sg(lp_t)         GSPO-token, and how verl writes GSPO
    ==============  =====================================  ========================================================

    Args:
        level: a name of the table.
        teacher_share: 0 anchors at the old policy alone; TRRD's is 1 - alpha.
        low, high: the log-ratio is clamped to them (no gradient outside) before it is used; None: not. verl clamps
            token ratios to [-20, 20] and GSPO's to at most 10.
    """

    level: str = "token"
    teacher_share: float = 0.0
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_choice("level", self.level, LEVELS)
        check_number("teacher_share", self.teacher_share)
        check_optional(self, "low", "high")

    @property
    def row_local(self) -> bool:
        return self.level == "token"

    @property
    def sequences(self) -> bool:
        return self.level != "token"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "old_logprob"} | ({"teacher_logprob"} if self.teacher_share else set()))

    def log_ratio(self, tokens: Tokens) -> Tensor:
        r = tokens.log_ratio
        if self.teacher_share:
            anchor = (1 - self.teacher_share) * tokens["old_logprob"] + self.teacher_share * tokens["teacher_logprob"]
            r = tokens["logprob"] - anchor
        if self.level != "token":
            segments = tokens.segments
            r = segments.spread(segments.sum(r) if self.level == "sequence-sum" else segments.mean(r))
        if self.level == "sequence-token":
            r = r.detach() + tokens["logprob"] - tokens["logprob"].detach()
        return r if self.low is None and self.high is None else r.clamp(self.low, self.high)

    def described(self, slots: Slots) -> recipe.Ratio:
        teacher = slots("teacher_logprob") if self.teacher_share else recipe.ABSENT
        low, high = recipe.bounds(self.low, self.high)
        return recipe.Ratio(self.level, teacher, self.teacher_share, low, high)

    def clipped(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(tokens.mask)
        return none, none


@dataclass(frozen=True)
class GeometricRatio(Part):
    """``mean_i c_t``, c_t = min(r_t, high) where A_t > 0, max(r_t, -low) where A_t < 0, 0 else; r_t = lp_t - old_t: the
    geometric mean of ratios that are clipped token by token, in logarithms, on the side that the advantage pushes to.

    GMPO (Zhao et al. 2025, arXiv 2507.20673).
    """

    low: float = 0.4
    high: float = 0.4

    row_local = False
    sequences = True

    def __post_init__(self) -> None:
        check_number("low", self.low, low=0)
        check_number("high", self.high, low=0)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "old_logprob", "advantages"})

    def log_ratio(self, tokens: Tokens) -> Tensor:
        r, sign = tokens.log_ratio, tokens["advantages"].sign()
        c = sign * torch.minimum(sign * r, sign * r.clamp(-self.low, self.high))
        return tokens.segments.spread(tokens.segments.mean(c))

    def described(self, slots: Slots) -> recipe.Ratio:
        return recipe.Ratio("geometric", low=self.low, high=self.high)

    def clipped(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        r, advantages = tokens.log_ratio, tokens["advantages"]
        return (r < -self.low) & (advantages < 0), (r > self.high) & (advantages > 0)
