"""What is added to the surrogate: estimates of divergences from other policies, entropy, likelihood of good answers.

A divergence over the whole vocabulary is a term of its own: ``ll.policy.grpo() + 0.1 * ll.Divergence("reverse_kl")``.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.checks import check_choice
from logitless.losses.policy.inputs import STATISTICS, Part, Slots, Tokens, exp, expm1
from logitless.losses.policy.selection import Selection
from logitless.ops.tokens import recipe


@dataclass(frozen=True, eq=False)
class Penalty(Part):
    """``coef * value`` is added to the loss of every token; ``result.terms[name]`` has the value without it."""

    coef: float

    def __post_init__(self) -> None:
        check_number("coef", self.coef)

    @property
    def name(self) -> str:
        raise NotImplementedError

    def value(self, tokens: Tokens) -> Tensor:
        """[T]."""
        raise NotImplementedError


def _k3(d: Tensor) -> Tensor:
    return expm1(-d) + d


def _straight_through(value: Tensor, d: Tensor) -> Tensor:
    k2 = d**2 / 2
    return value.detach() + k2 - k2.detach()


def _rapo(d: Tensor) -> Tensor:
    return -d * exp(-d) - expm1(-d)


def _dph_js(d: Tensor) -> Tensor:
    log_mean = torch.log1p(expm1(d) / 2)  # log((u + 1) / 2)
    return exp(d) * (d - log_mean) - log_mean


ESTIMATORS = {
    "k1": lambda d: d,
    "abs": torch.abs,
    "k2": lambda d: d**2 / 2,
    "k3": _k3,
    "k1+": lambda d: _straight_through(d, d),
    "k3+": lambda d: _straight_through(_k3(d), d),
    "rapo": _rapo,
    "dph_forward_kl": lambda d: expm1(d) - d,
    "dph_js": _dph_js,
}


@dataclass(frozen=True)
class KL(Penalty):
    """An estimate of a divergence from another policy, from the sampled token alone, d = lp - other.

    ================  ================================  ===================  ==========================================
    estimator         value                             gradient on lp       comment
    ================  ================================  ===================  ==========================================
    k1                d                                 1                    0 in expectation: as a reward, not a loss
    abs               |d|                               sign d
    k2                d^2 / 2                           d                    reverse KL's gradient, on-policy (mse)
    k3                e^-d - 1 + d                      1 - e^-d             *forward* KL's gradient, on-policy
                                                                             (low_var_kl; GRPO, OpenRLHF, NeMo-RL)
    ratio_k3          rho (e^-d - 1 + d)                rho d                reverse KL off-policy too, rho = e^(lp-old)
                                                                             per token whatever the objective's ratio
                                                                             (DeepSeek-V3.2; TRL's default since 1.16)
    k1+, k3+          that of k1, k3                    d                    value of one, gradient of k2 (verl)
    rapo              w log w - w + 1, w = e^-d         -w log w             forward-KL generator on policy samples
    dph_forward_kl    u - log u - 1, u = e^d            u - 1                forward KL on samples of the *other*
    dph_js            u log u - (u+1) log((u+1)/2)      u log(2u / (u+1))    Jensen-Shannon, on samples of the other
    dph_alpha         (u^(1-a) - (1-a) u - a)           (u - u^(1-a)) / a    alpha divergence, on samples of the other
                      / (a (a-1))
    ================  ================================  ===================  ==========================================

    Args:
        coef: its coefficient (TRL's and verl's beta).
        estimator: a name of the table (Schulman 2020, "Approximating KL divergence", for k1 to k3).
        against: the input with the other policy's log-probabilities.
        clamp: bounds on |d| and on the estimate, (20, 10) in verl, OpenRLHF and NeMo-RL for k3; gradients are 0
            outside. None: no bound.
        weights: an input that multiplies it, per token or per sequence.
        selection: the tokens that have it; None: all.
        alpha: a of dph_alpha.
    """

    estimator: str = "k3"
    against: str = "ref_logprob"
    _: KW_ONLY
    clamp: tuple[float | None, float | None] = (None, None)
    weights: str | None = None
    selection: Selection | None = None
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("estimator", self.estimator, (*ESTIMATORS, "ratio_k3", "dph_alpha"))
        check_number("alpha", self.alpha)
        if self.alpha in (0, 1):
            raise ValueError(f"alpha: neither 0 nor 1, got {self.alpha}")

    @property
    def name(self) -> str:
        return "kl" if self.against == "ref_logprob" else f"kl_{self.against.removesuffix('_logprob')}"

    @property
    def row_local(self) -> bool:
        return self.selection is None or self.selection.row_local

    @property
    def reads(self) -> frozenset[str]:
        names = {"logprob", self.against}
        names |= {"old_logprob"} if self.estimator == "ratio_k3" else set()
        names |= {self.weights} if self.weights else set()
        return frozenset(names | (self.selection.reads if self.selection else set()))

    def value(self, tokens: Tokens) -> Tensor:
        d = tokens["logprob"] - tokens[self.against]
        if self.selection is not None:  # before the estimate, so that no infinity of the others is left
            d = torch.where(self.selection.keep(tokens), d, 0)
        largest, largest_value = self.clamp
        if largest is not None:
            d = d.clamp(-largest, largest)
        if self.estimator == "ratio_k3":
            value = exp(tokens.log_ratio) * _k3(d)
        elif self.estimator == "dph_alpha":
            a = self.alpha
            value = (expm1((1 - a) * d) - (1 - a) * expm1(d)) / (a * (a - 1))
        else:
            value = ESTIMATORS[self.estimator](d)
        if largest_value is not None:
            value = value.clamp(-largest_value, largest_value)
        return value if self.weights is None else tokens[self.weights] * value

    def described(self, slots: Slots) -> recipe.Penalty | None:
        if self.against == "logprob" or self.weights in STATISTICS:  # through which a gradient runs
            return None
        keep = recipe.ABSENT
        if self.selection is not None:
            keep = slots.made(self.selection.factor(slots.tokens))
        weights = recipe.ABSENT if self.weights is None else slots(self.weights)
        largest, largest_value = [math.inf if bound is None else bound for bound in self.clamp]
        return recipe.Penalty(
            self.estimator, self.coef, slots(self.against), weights, keep, largest, largest_value, self.alpha
        )


@dataclass(frozen=True)
class Entropy(Penalty):
    """The policy's entropy H with its gradient; a bonus where ``coef`` is negative.

    Args:
        coef: coefficient of +H in the loss.
        of: the input with the entropies.
    """

    of: str = "entropy"

    @property
    def name(self) -> str:
        return self.of

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.of})

    def value(self, tokens: Tokens) -> Tensor:
        return tokens[self.of]

    def described(self, slots: Slots) -> recipe.Penalty:
        return recipe.Penalty("input", self.coef, slots(self.of))


@dataclass(frozen=True, eq=False)
class PositiveNLL(Penalty):
    """``-lp`` of the tokens of correct answers (input ``correct``, not 0), divided by their share of the tokens, so
    that under token-mean it is their mean. VAPO (Yue et al. 2025, arXiv 2504.05118).

    Args:
        coef: the paper's mu, 0.1.
        share: of correct answers' tokens in the batch; None: in this call, which under gradient accumulation differs
            from one to the next.
    """

    coef: float = 0.1
    share: float | Tensor | None = None

    @property
    def name(self) -> str:
        return "positive_nll"

    @property
    def row_local(self) -> bool:
        return self.share is not None

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "correct"})

    def value(self, tokens: Tokens) -> Tensor:
        weight = self._weight(tokens)
        return weight * torch.where(tokens["correct"] != 0, -tokens["logprob"], 0)

    def described(self, slots: Slots) -> recipe.Penalty:
        return recipe.Penalty("nll", self.coef, weights=slots.made(self._weight(slots.tokens)), keep=slots("correct"))

    def _weight(self, tokens: Tokens) -> Tensor:
        correct = (tokens["correct"] != 0).to(tokens.dtype)
        share = tokens.mean(correct) if self.share is None else self.share
        return torch.where(correct != 0, correct / share, 0)  # not 0 / 0 where no answer is correct
