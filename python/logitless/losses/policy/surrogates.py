"""What is minimised in place of minus the expected advantage: losses per token from a log-ratio and an advantage.

In the formulas rho = exp(log-ratio), A is the advantage, lp ``logprob``, old ``old_logprob``; sg stops the gradient.
Sources of the implementations that users compare with: TRL 1.16, verl 0.9.1, OpenRLHF 0.11, NeMo-RL, open-instruct,
tinker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.checks import check_choice
from logitless.losses.policy.inputs import Part, Slots, Tokens, check_optional, exp
from logitless.ops.tokens import recipe

READS = frozenset({"logprob", "old_logprob", "advantages"})


@dataclass(frozen=True)
class Surrogate(Part):
    """A loss per token. Subclasses give ``loss`` and, where they clip, ``clipped``."""

    @property
    def reads(self) -> frozenset[str]:
        return READS

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        """[T]."""
        raise NotImplementedError

    def clipped(self, tokens: Tokens, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """[T] bool twice: tokens whose gradient is cut or reduced since the ratio is too low, too high."""
        none = torch.zeros_like(tokens.mask)
        return none, none


@dataclass(frozen=True)
class Clip(Surrogate):
    """``L = max(-A min(rho, delta), -A clip(rho, 1 - low, 1 + high))``; where A < 0, then ``min(L, -A dual)``.

    PPO (Schulman et al. 2017, arXiv 1707.06347); high > low is DAPO's clip-higher (Yu et al. 2025, equation 10).
    dL/dlp is -A rho while the first argument is the larger one, else 0.

    Args:
        low, high: how far below and above 1 the ratio may go.
        dual: bound c > 1 of the loss of negative advantages (Ye et al. 2020; verl's clip_ratio_c = 3); None: none.
        delta: bound of the ratio itself, which two-sided clipping has for negative advantages too (INTELLECT-2, 2025);
            above 1 + high. None: none.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        check_number("low", self.low, low=0)
        check_number("high", self.high, low=0)
        if self.dual is not None:
            check_number("dual", self.dual, above=1)
        if self.delta is not None:
            check_number("delta", self.delta, above=1 + self.high)

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        advantages, ratio = tokens["advantages"], exp(log_ratio)
        free = ratio if self.delta is None else ratio.clamp(max=self.delta)
        loss = torch.maximum(-advantages * free, -advantages * ratio.clamp(1 - self.low, 1 + self.high))
        if self.dual is None:
            return loss
        return torch.where(advantages < 0, torch.minimum(loss, -advantages * self.dual), loss)

    def described(self, slots: Slots) -> recipe.Surrogate:
        dual, delta = [math.inf if bound is None else bound for bound in (self.dual, self.delta)]
        return recipe.Surrogate("clip", (self.low, self.high, dual, delta))

    def clipped(self, tokens: Tokens, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        advantages, ratio = tokens["advantages"], exp(log_ratio)
        low, high = (ratio < 1 - self.low) & (advantages < 0), (ratio > 1 + self.high) & (advantages > 0)
        for bound in (self.dual, self.delta):
            if bound is not None:
                high = high | ((ratio > bound) & (advantages < 0))
        return low, high


@dataclass(frozen=True)
class Importance(Surrogate):
    """``L = -A rho``: the unclipped policy gradient of old samples (tinker's importance_sampling)."""

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        return -tokens["advantages"] * exp(log_ratio)

    def described(self, slots: Slots) -> recipe.Surrogate:
        return recipe.Surrogate("importance")


@dataclass(frozen=True)
class Reinforce(Surrogate):
    """``L = -A lp`` (Williams 1992)."""

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        return -tokens["advantages"] * tokens["logprob"]

    def described(self, slots: Slots) -> recipe.Surrogate:
        return recipe.Surrogate("reinforce")


@dataclass(frozen=True)
class Cispo(Surrogate):
    """``L = -sg(clip(rho, low, high)) A lp``: the weight is clipped, and every token keeps a gradient.

    MiniMax-M1 (2025, arXiv 2506.13585). ``low`` and ``high`` bound rho itself, None: not at all; the preset
    :func:`cispo` knows how four frameworks write them.
    """

    low: float | None = None
    high: float | None = 5.0

    def __post_init__(self) -> None:
        check_optional(self, "low", "high")

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        weight = exp(log_ratio.detach()).clamp(self.low or 0.0, self.high)
        return -weight * tokens["advantages"] * tokens["logprob"]

    def described(self, slots: Slots) -> recipe.Surrogate:
        return recipe.Surrogate("cispo", (self.low or 0.0, math.inf if self.high is None else self.high))

    def clipped(self, tokens: Tokens, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        ratio = exp(log_ratio)
        return ratio < (self.low or 0.0), ratio > (math.inf if self.high is None else self.high)


@dataclass(frozen=True)
class Sapo(Surrogate):
    """``L = -g A, g = sigmoid(tau (rho - 1)) 4 / tau``: a gate that fades smoothly, tau = tau_pos where A > 0, else
    tau_neg. dL/dlp = -4 s (1 - s) rho A with s the sigmoid.

    Gao et al. 2025 (arXiv 2511.20347).
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        check_number("tau_pos", self.tau_pos, above=0)
        check_number("tau_neg", self.tau_neg, above=0)

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        advantages = tokens["advantages"]
        tau = torch.full_like(advantages, self.tau_neg).masked_fill(advantages > 0, self.tau_pos)
        return -torch.sigmoid(tau * (exp(log_ratio) - 1)) * (4 / tau) * advantages

    def described(self, slots: Slots) -> recipe.Surrogate:
        return recipe.Surrogate("sapo", (self.tau_pos, self.tau_neg))


@dataclass(frozen=True)
class Vespo(Surrogate):
    """``L = -sg(phi) A lp, phi = exp(lam + k log w - lam w)``, log w = sum_i clamp(lp - old, -20, 20) of the sequence,
    itself clamped to [log 1e-8, 20]; k and lam of the sign of A (0 counts as positive).

    VESPO (2026, arXiv 2602.10693) as TRL has it: phi(1) = 1, and sequences far from the sampler, on either side, fade.

    Args:
        k_pos, lam_pos, k_neg, lam_neg: shape and rate of the weight for advantages >= 0 and < 0.
        rollout: add sum_i clamp(old - rollout_logprob, log 1e-8, 20) to log w, TRL's correction for the inference
            engine, which belongs there rather than outside; then give no other correction.
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0
    rollout: bool = False

    row_local = False
    sequences = True

    def __post_init__(self) -> None:
        for name in ("k_pos", "lam_pos", "k_neg", "lam_neg"):
            check_number(name, getattr(self, name), low=0)

    @property
    def reads(self) -> frozenset[str]:
        return READS | {"rollout_logprob"} if self.rollout else READS

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        least = math.log(1e-8)
        advantages, segments = tokens["advantages"], tokens.segments
        log_w = segments.sum(tokens.log_ratio.detach().clamp(-20, 20))
        if self.rollout:
            log_w = log_w + segments.sum((tokens["old_logprob"] - tokens["rollout_logprob"]).clamp(least, 20))
        log_w = segments.spread(log_w.clamp(least, 20))
        k = torch.full_like(log_w, self.k_neg).masked_fill(advantages >= 0, self.k_pos)
        lam = torch.full_like(log_w, self.lam_neg).masked_fill(advantages >= 0, self.lam_pos)
        return -exp(lam + k * log_w - lam * exp(log_w)) * advantages * tokens["logprob"]

    def described(self, slots: Slots) -> recipe.Surrogate:
        rollout = slots("rollout_logprob") if self.rollout else recipe.ABSENT
        return recipe.Surrogate("vespo", (self.k_pos, self.lam_pos, self.k_neg, self.lam_neg), rollout)


@dataclass(frozen=True)
class Dro(Surrogate):
    """``L = -(A lp - beta/2 (lp - old)^2)``; dL/dlp = -(A - beta (lp - old)).

    Direct reward optimisation (Richemond et al. 2024, arXiv 2405.19107), token by token as verl and tinker have it. Not
    distributionally robust optimisation: that is :func:`kl_dro_weights`. ``beta`` has no published default.
    """

    beta: float

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0)

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        return -(tokens["advantages"] * tokens["logprob"] - 0.5 * self.beta * tokens.log_ratio**2)

    def described(self, slots: Slots) -> recipe.Surrogate:
        return recipe.Surrogate("dro", (self.beta,))


@dataclass(frozen=True)
class Dppo(Surrogate):
    """``L = -keep A sg(min(rho, cap)) lp``: tokens whose probability has moved too far in the advantage's direction get
    no gradient. DPPO (2026, arXiv 2602.04879).

    ``divergence``, of p = e^lp and p_old of the sampled token against all others:

    - "tv": keep where p - p_old <= high (A > 0), p - p_old >= -low (else).
    - "kl": D = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p)); not where D > high and p > p_old (A > 0),
      D > low and p < p_old (else).

    Args:
        divergence, low, high: the above.
        cap: bound of the weight; verl's function has 20, its configuration 3.
        detach_ratio: False: ``L = -keep A rho``, uncapped, as prime-rl has it (with 0.2, 0.2, and k2 to the old policy
            of coefficient 2e-3 added).
    """

    divergence: str = "tv"
    low: float = 0.2
    high: float = 0.2
    cap: float = 20.0
    detach_ratio: bool = True

    def __post_init__(self) -> None:
        check_choice("divergence", self.divergence, ("tv", "kl"))
        for name in ("low", "high"):
            check_number(name, getattr(self, name), low=0)
        check_number("cap", self.cap, above=0)

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        low, high = self.clipped(tokens, log_ratio)
        kept = torch.where(low | high, 0, tokens["advantages"])
        if not self.detach_ratio:
            return -kept * exp(log_ratio)
        return -kept * exp(log_ratio.detach()).clamp(max=self.cap) * tokens["logprob"]

    def described(self, slots: Slots) -> recipe.Surrogate:
        if not self.detach_ratio:
            return recipe.Surrogate(f"dppo_{self.divergence}_ratio", (self.low, self.high))
        return recipe.Surrogate(f"dppo_{self.divergence}", (self.low, self.high, self.cap))

    def clipped(self, tokens: Tokens, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        up = tokens["advantages"] > 0
        lp, old = tokens["logprob"].detach(), tokens["old_logprob"]
        p, p_old = lp.exp(), old.exp()
        if self.divergence == "tv":
            return ~up & (p - p_old < -self.low), up & (p - p_old > self.high)
        # log(1 - p) from -expm1(lp), floored so that a probability of 1 stays finite
        rest, rest_old = [torch.log((-torch.expm1(x)).clamp(min=torch.finfo(x.dtype).tiny)) for x in (lp, old)]
        divergence = p_old * (old - lp) + (1 - p_old) * (rest_old - rest)
        return ~up & (divergence > self.low) & (p < p_old), up & (divergence > self.high) & (p > p_old)
