"""Rewards per token that are added to the advantages, without gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from logitless.logits import check_number
from logitless.losses.policy.inputs import Part, Slots, Tokens
from logitless.ops.tokens import recipe


@dataclass(frozen=True)
class LogRatioReward(Part):
    """``A_t <- A_t + coef (plus_t - minus_t)`` for two inputs of log-probabilities.

    On-policy distillation is plus = teacher, minus = old: its expectation over tokens is -KL(student || teacher).
    """

    coef: float = 1.0
    plus: str = "teacher_logprob"
    minus: str = "old_logprob"

    def __post_init__(self) -> None:
        check_number("coef", self.coef)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.plus, self.minus})

    def advantages(self, tokens: Tokens) -> Tensor:
        return self.coef * (tokens[self.plus] - tokens[self.minus]).detach()

    def described(self, slots: Slots) -> recipe.Reward:
        return recipe.Reward(self.coef, slots(self.plus), slots(self.minus))
