"""What a token kernel computes: a policy objective as plain data, for every backend the same.

A recipe is hashable: Triton compiles one kernel per recipe, C++ and CUDA choose among compiled pieces.

Inputs are *slots*: x[k] is [T] per token or [B] per sequence; slot 0 is ``lp``, the policy's log-probability, and
sg(lp) wherever a part names it by its slot. What the mask hides reads as 0 everywhere and gets derivative 0. Per token
t of sequence i, n_i the number of its tokens under the mask, sums and maxima "over i" likewise, sg(x) a constant:

    A = x[advantages] (0 if not given) + sum_k coef_k (x[plus_k] - x[minus_k])                      rewards
    old = x[old];   d = lp - old;   r = lp - (1 - share) old - share x[teacher]
    c = min(d, high) if A > 0, max(d, -low) if A < 0, else 0
    l = clamp(r | mean_i r | sum_i r | sg(mean_i r) + lp - sg(lp) | mean_i c)                       ratio
    F = prod_k factor_k                                                                             factors
    S = F surrogate(A, l, lp, old, ...), 0 where F = 0                                              surrogate
    P_k = x[weights_k] penalty_k                                                                    penalties
    w = x[weights] (1 if not given), / n_i with ``sequence_mean``

    loss = norm sum_t w_t (S_t + sum_k coef_k P_kt),   norm = scale / denominator

and per slot g of ``gradients`` the derivative of the loss with respect to x[g]; that of l runs back through mean and
sum to every token of the sequence. ``e^x`` is that of min(x, 80), with derivative 0 beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ABSENT = -1  # a slot that is not given
INFINITY = float("inf")

LEVELS = ("token", "sequence-mean", "sequence-sum", "sequence-token", "geometric")
SURROGATES = {  # name: its parameters, in the order of ``Surrogate.parameters``; see losses/policy/surrogates.py
    "clip": ("low", "high", "dual", "delta"),  # dual and delta inf where not given
    "importance": (),
    "reinforce": (),
    "cispo": ("low", "high"),
    "sapo": ("tau_pos", "tau_neg"),
    "vespo": ("k_pos", "lam_pos", "k_neg", "lam_neg"),
    "dro": ("beta",),
    "dppo_tv": ("low", "high", "cap"),
    "dppo_kl": ("low", "high", "cap"),
    "dppo_tv_ratio": ("low", "high"),  # detach_ratio=False
    "dppo_kl_ratio": ("low", "high"),
}
PENALTIES = (  # of d = lp - x[other]; "input" is x[other] itself, "nll" is -lp; see losses/policy/penalties.py
    *("k1", "abs", "k2", "k3", "k1+", "k3+", "rapo", "dph_forward_kl", "dph_js", "dph_alpha", "ratio_k3"),
    *("input", "nll"),
)
FACTORS = ("input", "only", "not", "at_least", "importance", "rejection_k1", "rejection_k2", "rejection_k3", "opsm")
OVER = ("token", "sum", "mean", "max")  # what a factor is taken over: the token, or its sequence
METRICS = (
    *("tokens", "clip_fraction_low", "clip_fraction_high", "approx_kl_k1", "approx_kl_k3"),
    *("ratio_mean", "ratio_min", "ratio_max", "entropy", "factor_mean", "kept_fraction"),
)
MOST = {"inputs": 24, "gradients": 8, "rewards": 4, "penalties": 8, "factors": 8}  # that backends have room for
DENOMINATORS = ("none", "tokens", "sequences", "given")  # sequences: those with a token under the mask


@dataclass(frozen=True)
class Reward:
    coef: float
    plus: int
    minus: int


@dataclass(frozen=True)
class Ratio:
    level: str = "token"
    teacher: int = ABSENT
    share: float = 0.0
    low: float = -INFINITY  # of the clamp; of "geometric" the bounds of c
    high: float = INFINITY


@dataclass(frozen=True)
class Surrogate:
    name: str
    parameters: tuple[float, ...] = ()
    rollout: int = ABSENT  # of vespo


@dataclass(frozen=True)
class Penalty:
    """``value(clamp(d, +-largest))`` clamped to +-largest_value; where x[keep] is 0, d is ("input": the value, "nll":
    lp)."""

    name: str
    coef: float
    other: int = ABSENT
    weights: int = ABSENT
    keep: int = ABSENT
    largest: float = INFINITY
    largest_value: float = INFINITY
    alpha: float = 0.0


@dataclass(frozen=True)
class Factor:
    """input: x[first]. only, not: 1 where x[first] != 0, where it is 0. at_least: 1 where x[first] >= low. With
    u = sg(x[first]) - x[rollout] and v one of u ("importance"), its estimate k1 = -u, k2 = u^2 / 2, k3 = e^u - 1 - u
    ("rejection"), over the token or the sequence's sum, mean or maximum:

    importance: W = e^clamp(v, +-bound); clamped to [low, high], or with ``masked`` 0 outside
    rejection: 1 where low <= v <= high, else 0
    opsm: 1 where A >= 0 or mean_i(-u) <= high, else 0
    """

    name: str
    first: int
    rollout: int = ABSENT
    over: str = "token"
    masked: bool = False
    low: float = -INFINITY
    high: float = INFINITY
    bound: float = INFINITY


@dataclass(frozen=True)
class Recipe:
    inputs: tuple[str, ...]  # what the slots hold
    gradients: tuple[int, ...] = (0,)
    old: int = 0
    advantages: int = ABSENT
    rewards: tuple[Reward, ...] = ()
    ratio: Ratio = field(default_factory=Ratio)
    surrogate: Surrogate = field(default_factory=lambda: Surrogate("reinforce"))
    penalties: tuple[Penalty, ...] = ()
    factors: tuple[Factor, ...] = ()
    weights: int = ABSENT
    entropy: int = ABSENT  # for the metric
    sequence_mean: bool = False
    denominator: str = "none"
    scale: float = 1.0

    @property
    def sequences(self) -> bool:
        """Whether sums over sequences are needed before a token's value is known."""
        if self.sequence_mean or self.ratio.level != "token" or self.surrogate.name == "vespo":
            return True
        return any(factor.over != "token" or factor.name == "opsm" for factor in self.factors)

    @property
    def needs_offsets(self) -> bool:
        """Whether it matters, if only for the denominator, where sequences begin."""
        return self.sequences or self.denominator == "sequences"

    @property
    def fits(self) -> bool:
        """Whether backends have room for it."""
        return all(len(getattr(self, name)) <= most for name, most in MOST.items())

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the results, in order: loss, policy, one per penalty, METRICS (0 for those not asked), norm.

        "policy" and penalties are norm sum_t w_t S_t and norm sum_t w_t P_kt, without coefficient.
        """
        return ("loss", "policy", *(f"penalty_{k}" for k in range(len(self.penalties))), *METRICS, "norm")


def bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Those of a recipe: infinite where there is none."""
    return -INFINITY if low is None else float(low), INFINITY if high is None else float(high)
