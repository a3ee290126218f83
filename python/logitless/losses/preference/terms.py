"""Terms of preference losses: a score of each sequence of a pair, and losses of both.

u = log q(y) - log q_ref(y), summed over the tokens of y      s = link(u), or of averages      r = beta s
x = beta (s_w - s_l) - margin                                 w the chosen sequence, l the rejected one
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.checks import check_choice

LINKS = ("reverse_kl", "forward_kl", "js", "alpha", "log_odds")
CLAMP = 80.0  # largest exponent: exp(80) is finite in float32, and so is its product with a gradient


@dataclass(frozen=True)
class Side:
    """One sequence of every pair: sums of log-probabilities [B], the reference's too, over all and the first tokens."""

    logprob: Tensor
    ref_logprob: Tensor | None = None
    lengths: Tensor | None = None
    prefix: Tensor | None = None  # over the first min(|w|, |l|) tokens
    ref_prefix: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        return self.lengths.clamp(min=1).to(self.logprob.dtype)

    @property
    def logratio(self) -> Tensor:
        return self.logprob - self.ref_logprob


@dataclass(frozen=True)
class Batch:
    """What terms read: B pairs, and with some methods one more sequence for each."""

    chosen: Side
    rejected: Side
    extra: Side | None = None
    margins: Tensor | None = None  # [B]
    from_reference: Tensor | None = None  # [B] bool


@dataclass(frozen=True)
class Score:
    """The implicit reward of a sequence over beta: ``s = link(u)``, u its log-ratio to the reference.

    ==========  ======================================  =========================================================
    link        s                                       source
    ==========  ======================================  =========================================================
    reverse_kl  u                                       DPO (Rafailov et al. 2023, arXiv 2305.18290)
    forward_kl  1 - exp(-u)                             f-DPO (Wang et al. 2023, arXiv 2309.16240), table 1; too:
    js          log(2 e^u / (1 + e^u))                  Jensen-Shannon; below log 2
    alpha       (exp((alpha - 1) u) - 1) / (alpha - 1)  alpha as in TRL, 1 less the paper's; reverse_kl at 1
    log_odds    u - log(1 - exp(u))                     ORPO: of an average log-probability, without reference
    ==========  ======================================  =========================================================

    They are f'(e^u) up to the constant that makes s(0) = 0. TRL's nca_pair, bco_pair, sppo_hard, apo_zero, apo_down and
    aot_unpaired read u whatever the divergence, where ours read s. Exponents are clamped at 80, as TRL's for alpha: no
    gradient beyond.

    Args:
        link: from the table.
        alpha: of the link "alpha".
        normalize: "none"; "score" divides s by the number of tokens (TRL's ipo and sigmoid_norm); "logratio" divides u
            by it, before the link (SimPO, AlphaPO, ORPO). The same for reverse_kl.
        reference_free: u = log q(y): the reference is not read.
        ld_alpha: weight in [0, 1] of the tokens beyond the length of the pair's shorter sequence (LD-DPO); None: 1.
    """

    link: str = "reverse_kl"
    _: KW_ONLY
    alpha: float = 0.5
    normalize: str = "none"
    reference_free: bool = False
    ld_alpha: float | None = None

    def __post_init__(self) -> None:
        check_choice("link", self.link, LINKS)
        check_choice("normalize", self.normalize, ("none", "score", "logratio"))
        check_number("alpha", self.alpha)
        if self.link == "log_odds" and (self.normalize != "logratio" or not self.reference_free):
            raise ValueError(
                "link: log_odds is of average log-probabilities: normalize='logratio', reference_free=True"
            )
        if self.ld_alpha is not None:
            check_number("ld_alpha", self.ld_alpha, low=0)
            if self.ld_alpha > 1:
                raise ValueError(f"ld_alpha: must lie in [0, 1], got {self.ld_alpha}")

    def __call__(self, side: Side) -> Tensor:
        u = side.logprob if self.reference_free else side.logratio
        if self.ld_alpha is not None:
            prefix = side.prefix if self.reference_free else side.prefix - side.ref_prefix
            u = prefix + self.ld_alpha * (u - prefix)
        if self.normalize == "logratio":
            u = u / side.tokens
        s = self._linked(u)
        return s / side.tokens if self.normalize == "score" else s

    def _linked(self, u: Tensor) -> Tensor:
        if self.link == "js":
            return F.logsigmoid(u) + math.log(2)
        if self.link == "log_odds":
            return u - log1mexp(u)
        power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": self.alpha - 1}[self.link]
        return torch.expm1((power * u).clamp(max=CLAMP)) / power if power else u


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x <= 0; x above -eps, a probability of 1 to the type's precision, counts as -eps."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _logistic(x: Tensor, smoothing: float) -> Tensor:
    """``-(1 - e) log sigmoid(x) - e log sigmoid(-x)``."""
    loss = -(1 - smoothing) * F.logsigmoid(x)
    return loss - smoothing * F.logsigmoid(-x) if smoothing else loss


def _exo(x: Tensor, smoothing: float) -> Tensor:
    q, other = x.sigmoid(), (-x).sigmoid()
    return q * (F.logsigmoid(x) - math.log1p(-smoothing)) + other * (F.logsigmoid(-x) - math.log(smoothing))


def _discopop(x: Tensor, tau: float) -> Tensor:
    exponential = (F.logsigmoid(x / tau) - x).clamp(max=CLAMP).exp()  # exp(-x) sigmoid(x / tau): never inf * 0
    return exponential - F.logsigmoid(x) * (-x / tau).sigmoid()


def _kto_pair(chosen: Tensor, rejected: Tensor, loss: Pair) -> Tensor:
    of_chosen, of_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    if loss.detach_baseline:
        of_chosen, of_rejected = of_chosen.detach(), of_rejected.detach()
    return ((loss.beta * (of_rejected - chosen)).sigmoid() + (loss.beta * (rejected - of_chosen)).sigmoid()) / 2


# name: what it makes of the chosen and the rejected score c and r, and of x; and which options, besides beta, it reads
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Pair], Tensor], tuple[str, ...]]] = {
    "sigmoid": (lambda c, r, x, p: _logistic(x, p.label_smoothing), ("label_smoothing", "margin")),
    "hinge": (lambda c, r, x, p: (1 - x).relu(), ("margin",)),
    "ipo": (lambda c, r, x, p: ((x - 0.5) / p.beta) ** 2, ("margin",)),
    "squared": (lambda c, r, x, p: (x / p.beta) ** 2, ("margin",)),
    "exo_pair": (lambda c, r, x, p: _exo(x, p.label_smoothing), ("label_smoothing", "margin")),
    "nca_pair": (
        lambda c, r, x, p: (
            -F.logsigmoid(p.beta * c) - 0.5 * F.logsigmoid(-p.beta * c) - 0.5 * F.logsigmoid(-p.beta * r)
        ),
        (),
    ),
    "robust": (
        lambda c, r, x, p: (
            ((p.label_smoothing - 1) * F.logsigmoid(x) + p.label_smoothing * F.logsigmoid(-x))
            / (1 - 2 * p.label_smoothing)
        ),
        ("label_smoothing", "margin"),
    ),
    "bco_pair": (lambda c, r, x, p: -F.logsigmoid(p.beta * c) - F.logsigmoid(-p.beta * r), ()),
    "sppo_hard": (lambda c, r, x, p: (c - 0.5 / p.beta) ** 2 + (r + 0.5 / p.beta) ** 2, ()),
    "aot": (lambda c, r, x, p: _logistic(x, p.label_smoothing), ("label_smoothing",)),
    "aot_unpaired": (
        lambda c, r, x, p: _logistic(p.beta * (c.sort().values - r.sort().values), p.label_smoothing),
        ("label_smoothing",),
    ),
    "apo_zero": (lambda c, r, x, p: (-p.beta * c).sigmoid() + (p.beta * r).sigmoid(), ()),
    "apo_down": (lambda c, r, x, p: (p.beta * c).sigmoid() + (-x).sigmoid(), ("margin",)),
    "discopop": (lambda c, r, x, p: _discopop(x, p.tau), ("tau", "margin")),
    "kto_pair": (lambda c, r, x, p: _kto_pair(c, r, p), ("detach_baseline",)),
}
SORTED = ("aot", "aot_unpaired")


class Term:
    """A loss of every pair of a :class:`Batch`, [B]. The fields say what a batch must hold."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    needs_reference: ClassVar[bool] = False
    needs_lengths: ClassVar[bool] = False
    needs_prefix: ClassVar[bool] = False
    needs_from_reference: ClassVar[bool] = False
    takes_margins: ClassVar[bool] = False
    mixes_pairs: ClassVar[bool] = False  # whether its values are not those of single pairs, and take no weights

    def value(self, batch: Batch) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Pair(Term):
    """A loss of the scores of the chosen and the rejected sequence, by TRL's name.

    ============  ================================================================================================
    sigmoid       -(1 - e) log sigmoid(x) - e log sigmoid(-x): DPO (2305.18290), with e > 0 conservative DPO
    hinge         max(0, 1 - x): SLiC (2305.10425); beta is the reciprocal of the margin
    ipo           ((x - 1/2) / beta)^2, i.e. (s_w - s_l - 1 / (2 beta))^2: IPO (2310.12036), equation 17
    squared       (x / beta)^2: IPO with the margin as target, see :func:`egpo`
    exo_pair      KL((q, 1 - q) || (1 - e, e)), q = sigmoid(x): EXO (2402.00856), equation 16; e > 0, 1e-3 say
    nca_pair      -log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2: NCA (2402.05369)
    robust        [-(1 - e) log sigmoid(x) + e log sigmoid(-x)] / (1 - 2e): robust DPO (2403.00409)
    bco_pair      -log sigmoid(r_w) - log sigmoid(-r_l): BCO (2404.04656) without its shift, see :func:`bco`
    sppo_hard     (s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2: SPPO (2405.00675) with probabilities 1 and 0
    aot           sigmoid of beta (sorted policy margins - sorted reference margins): AOT (2406.05882)
    aot_unpaired  sigmoid of beta (sorted s_w - sorted s_l): the same for unpaired data
    apo_zero      1 - sigmoid(r_w) + sigmoid(r_l): APO-zero (2408.06266), equation 7; chosen better than the model
    apo_down      sigmoid(r_w) + 1 - sigmoid(x): APO-down, equation 8; chosen worse than the model
    discopop      -log sigmoid(x) (1 - g) + exp(-x) g, g = sigmoid(x / tau): DiscoPOP (2406.08414), equation 5
    kto_pair      [sigmoid(beta (z_l - s_w)) + sigmoid(beta (s_l - z_w))] / 2, z = max(0, mean over the batch of s)
    ============  ================================================================================================

    e is ``label_smoothing``. aot and aot_unpaired sort over the batch at hand, so that their values belong to no pair.

    Args:
        loss: from the table.
        beta: positive; how strongly the reference binds: a larger beta keeps the policy closer to it.
        label_smoothing: e in [0, 1/2), the probability that a label is wrong. TRL's sigmoid has none any more.
        margin: what is subtracted, in rewards: SimPO's gamma.
        tau: temperature of DiscoPOP's mixing, positive.
        detach_baseline: whether kto_pair's z are constants, as in KTO's paper.
        clip_reference: leave the reference's margin out where it is negative, i.e. where the reference prefers the
            rejected sequence: x = beta (margin of log q - max(0, margin of log q_ref)).
        score: how a sequence is scored.
    """

    loss: str = "sigmoid"
    _: KW_ONLY
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    tau: float = 0.05
    detach_baseline: bool = True
    clip_reference: bool = False
    score: Score = field(default_factory=Score)

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, tuple(LOSSES))
        check_number("beta", self.beta, above=0)
        check_number("tau", self.tau, above=0)
        check_number("margin", self.margin)
        check_number("label_smoothing", self.label_smoothing, low=0)
        if not self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: must lie in [0, 1/2), got {self.label_smoothing}")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("label_smoothing: exo_pair is infinite at 0; its authors take 1e-3")
        for option, default in (("label_smoothing", 0.0), ("margin", 0.0), ("detach_baseline", True)):
            if getattr(self, option) != default and option not in LOSSES[self.loss][1]:
                raise ValueError(f"{option}: {self.loss} has none, got {getattr(self, option)}")
        if (self.loss == "aot" or self.clip_reference) and self.score.link != "reverse_kl":
            what = "aot" if self.loss == "aot" else "clip_reference"
            raise ValueError(f"link: {what} sets policy and reference apart, which needs reverse_kl")
        if self.clip_reference and (not self.takes_margins or self.score.reference_free):
            raise ValueError("clip_reference: needs a loss of x and a reference")

    @property
    def name(self) -> str:
        return self.loss

    @property
    def needs_reference(self) -> bool:
        return not self.score.reference_free

    @property
    def needs_lengths(self) -> bool:
        return self.score.normalize != "none"

    @property
    def needs_prefix(self) -> bool:
        return self.score.ld_alpha is not None

    @property
    def takes_margins(self) -> bool:
        return "margin" in LOSSES[self.loss][1]

    @property
    def mixes_pairs(self) -> bool:
        return self.loss in SORTED

    def rewards(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.beta * self.score(batch.chosen), self.beta * self.score(batch.rejected)

    def value(self, batch: Batch) -> Tensor:
        chosen, rejected = self.score(batch.chosen), self.score(batch.rejected)
        x = chosen - rejected
        if self.clip_reference:
            x = x + self._reference_margins(batch, x).clamp(max=0)
        elif self.loss == "aot":
            reference = self._reference_margins(batch, x)
            x = (x + reference).sort().values - reference.sort().values
        x = self.beta * x - self.margin
        if batch.margins is not None and self.takes_margins:
            x = x - batch.margins
        return LOSSES[self.loss][0](chosen, rejected, x, self)

    def _reference_margins(self, batch: Batch, x: Tensor) -> Tensor:
        if self.score.reference_free:
            return torch.zeros_like(x)
        policy = replace(self.score, reference_free=True)
        return (policy(batch.chosen) - policy(batch.rejected) - x).detach()


@dataclass(frozen=True)
class Nll(Term):
    """Negative log-likelihood of the chosen sequence, or of the extra one.

    Args:
        average: "token": the mean over all tokens of the batch (TRL's sft, CPO, ORPO and TPO; NeMo's sft): each
            sequence's sum over the batch's average length, so that it depends on how a batch is split. "sequence": the
            mean over each sequence's own tokens (OpenRLHF's nll_loss_coef; RPO). "none": the sum (CPO's equation).
        extra: of the extra sequence in the chosen one's place (TPO's gold answer).
    """

    average: str = "token"
    extra: bool = False
    name: ClassVar[str] = "nll"

    def __post_init__(self) -> None:
        check_choice("average", self.average, ("token", "sequence", "none"))

    @property
    def needs_lengths(self) -> bool:
        return self.average != "none"

    @property
    def reads(self) -> tuple[str, ...]:
        return ("extra",) if self.extra else ("chosen",)

    def value(self, batch: Batch) -> Tensor:
        (side,) = (getattr(batch, name) for name in self.reads)
        if self.average == "none":
            return -side.logprob
        if self.average == "sequence":
            return -side.logprob / side.tokens
        lengths = side.lengths.to(side.logprob.dtype)
        return -side.logprob * (lengths.shape[0] / lengths.sum().clamp(min=1))


@dataclass(frozen=True)
class Optimism(Term):
    """Log-probability of that sequence of the pair which the reference sampled: XPO's exploration bonus, minimised."""

    name: ClassVar[str] = "optimism"
    needs_from_reference: ClassVar[bool] = True

    def value(self, batch: Batch) -> Tensor:
        return torch.where(batch.from_reference, batch.chosen.logprob, batch.rejected.logprob)


@dataclass(frozen=True)
class OnlineKL(Term):
    """``u^2 / 2`` of the extra sequence, sampled from the policy: its gradient is that of KL(q || q_ref)."""

    name: ClassVar[str] = "online_kl"
    reads: ClassVar[tuple[str, ...]] = ("extra",)
    needs_reference: ClassVar[bool] = True

    def value(self, batch: Batch) -> Tensor:
        return 0.5 * batch.extra.logratio**2
