"""Which tokens count: masks over a batch, without gradient, and without waiting for the device.

A selection multiplies the surrogate (the objective's ``selection``) or one penalty (its own); denominators do not
change. Quantiles and ranks are taken over the tokens of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.policy.inputs import Part, Slots, Tokens
from logitless.ops.tokens import recipe


@dataclass(frozen=True, eq=False)
class Selection(Part):
    def keep(self, tokens: Tokens) -> Tensor:
        """[T] bool."""
        raise NotImplementedError

    def factor(self, tokens: Tokens) -> Tensor:
        """[T] 1 where kept, else 0."""
        return self.keep(tokens).to(tokens.dtype)


@dataclass(frozen=True)
class Only(Selection):
    """Tokens where the named input is not 0 (``value=False``: where it is): a mask that the caller knows."""

    name: str
    value: bool = True

    fixed = True

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.name})

    def keep(self, tokens: Tokens) -> Tensor:
        return (tokens[self.name] != 0) == self.value

    def described(self, slots: Slots) -> recipe.Factor:
        return recipe.Factor("only" if self.value else "not", slots(self.name))


@dataclass(frozen=True, eq=False)
class TopEntropy(Selection):
    """The share of tokens of highest entropy: ``H >= quantile(H, 1 - share)``.

    Wang et al. 2025 (arXiv 2506.01939), share 0.2; TRL's top_entropy_quantile. The quantile (with torch's linear
    interpolation) is of this call's tokens, or ``threshold``, where the batch's is known: then ranks agree.
    """

    share: float = 0.2
    threshold: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def row_local(self) -> bool:
        return self.threshold is not None

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"entropy"})

    def keep(self, tokens: Tokens) -> Tensor:
        entropy = tokens["entropy"].detach()
        return entropy >= (quantile(entropy, tokens.mask, 1 - self.share) if self.threshold is None else self.threshold)

    def described(self, slots: Slots) -> recipe.Factor | None:
        if not isinstance(self.threshold, (int, float)):  # a quantile of the batch
            return None
        return recipe.Factor("at_least", slots("entropy"), low=float(self.threshold))


@dataclass(frozen=True)
class LowestProbability(Selection):
    """The share of tokens that the policy finds least probable: ``lp <= quantile(lp, share)``."""

    share: float = 0.01

    row_local = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob"})

    def keep(self, tokens: Tokens) -> Tensor:
        logprob = tokens["logprob"].detach()
        return logprob <= quantile(logprob, tokens.mask, self.share)


@dataclass(frozen=True)
class LowPenalised(LowestProbability):
    """Of those, the tokens with A < 0 and lp < ``proxy_logprob``: what Lp-Reg protects. Its proxy is the policy itself,
    min-p filtered and renormalised; give -inf where the filter drops the token."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "advantages", "proxy_logprob"})

    def keep(self, tokens: Tokens) -> Tensor:
        below = tokens["logprob"].detach() < tokens["proxy_logprob"]
        return super().keep(tokens) & (tokens["advantages"] < 0) & below


def covariance(tokens: Tokens) -> Tensor:
    """[T] ``(A - mean A) (lp - mean lp)``, means over the tokens of this call (Cui et al. 2025, arXiv 2505.22617)."""
    advantages, logprob = tokens["advantages"], tokens["logprob"].detach()
    return (advantages - tokens.mean(advantages)) * (logprob - tokens.mean(logprob))


@dataclass(frozen=True)
class TopCovariance(Selection):
    """The max(1, share * N) tokens of largest covariance, those whose updates lower the entropy most (KL-Cov)."""

    share: float = 2e-4

    row_local = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "advantages"})

    def keep(self, tokens: Tokens) -> Tensor:
        return first(covariance(tokens), tokens.mask, _number(self.share, tokens.mask))


@dataclass(frozen=True, eq=False)
class ClipCovariance(Selection):
    """All but max(1, share * N) tokens, drawn at random among those with low < covariance < high (Clip-Cov).

    Cui et al. 2025. verl draws among tokens that PPO does not clip; the others have no gradient
    anyway, but their values then count in the loss.
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    generator: torch.Generator | None = None

    row_local = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "advantages"})

    def keep(self, tokens: Tokens) -> Tensor:
        value = covariance(tokens)
        eligible = tokens.mask & (value > self.low) & (value < self.high)
        draw = torch.rand(value.shape, device=value.device, generator=self.generator)
        return ~first(draw, eligible, _number(self.share, tokens.mask))


def quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """``torch.quantile(x[mask], q)`` as a 0-d tensor, with the number of tokens never read back; 0 of none."""
    if not x.numel():
        return x.new_zeros(())
    last = (mask.sum() - 1).clamp(min=0)
    values = torch.where(mask, x, torch.inf).sort().values
    place = last.double() * q
    low, high = values.gather(0, torch.stack([place.floor(), place.ceil()]).long())
    value = torch.lerp(low, high, (place - place.floor()).to(x.dtype))
    return torch.where(mask.any(), value, 0)


def first(x: Tensor, mask: Tensor, number: Tensor) -> Tensor:
    """[T] bool: the ``number`` tokens under the mask with the largest x; ties go to the earlier token."""
    order = torch.where(mask, x, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(x.numel(), device=x.device))
    return mask & (rank < number)


def _number(share: float, mask: Tensor) -> Tensor:
    return (mask.sum().double() * share).floor().clamp(min=1)


def _check_share(share: object) -> None:
    check_number("share", share, above=0)
    if share > 1:
        raise ValueError(f"share: must lie in (0, 1], got {share}")
