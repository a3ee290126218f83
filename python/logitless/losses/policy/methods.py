"""Published methods on the composition: a teacher, a base model, replayed data, conflict tokens, proxies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import check_number
from logitless.losses.checks import check_choice
from logitless.losses.policy.inputs import Tokens, exp
from logitless.losses.policy.objective import TokenObjective
from logitless.losses.policy.penalties import ESTIMATORS, KL, Penalty
from logitless.losses.policy.presets import compose, grpo, ppo, with_default
from logitless.losses.policy.ratios import Ratio
from logitless.losses.policy.rewards import LogRatioReward
from logitless.losses.policy.selection import LowPenalised, Only
from logitless.losses.policy.surrogates import Importance, Surrogate
from logitless.terms import CrossEntropy, Divergence, Objective


def trrd(alpha: float, clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """GRPO whose ratio is to a mixture of old policy and teacher, ``exp(lp - alpha old - (1 - alpha) T)``.

    RLAD's trust-region ratio distillation (2026, arXiv 2602.22495). alpha = 1 is GRPO. Reads ``teacher_logprob``.
    """
    check_number("alpha", alpha)
    return grpo(clip, ratio=Ratio(teacher_share=1 - alpha), **options)


def kdrl(
    coef: float,
    estimator: str = "k2",
    clip: float | tuple[float, float] = 0.2,
    *,
    only_wrong: bool = False,
    **options,
) -> TokenObjective:
    """GRPO plus ``coef`` times a KL to the teacher, estimated from the sampled tokens.

    Xu et al. 2025 (arXiv 2506.02208). k2 has the right gradient on-policy. For the KL over the whole vocabulary add
    :func:`logitless.losses.distillation.kdrl` to :func:`grpo`.

    Args:
        coef: constant, or :func:`kdrl_coef` of the step.
        only_wrong: KDRL-mask, the teacher on wrong answers alone; reads ``correct``.
    """
    selection = Only("correct", value=False) if only_wrong else None
    return grpo(clip, penalties=(KL(coef, estimator, "teacher_logprob", selection=selection),), **options)


def kdrl_coef(step: int, steps: int, start: float = 0.2, end: float = 0.002) -> float:
    """KDRL's annealed coefficient, linear from ``start`` to ``end`` over ``steps``, then constant."""
    check_number("steps", steps, above=0)
    return start + (end - start) * min(step / steps, 1.0)


def opd(coef: float = 1.0, **options) -> TokenObjective:
    """On-policy distillation as a policy gradient: ``A_t = advantages_t + coef (T_t - old_t)``, ``L = -A rho``.

    Lu & Thinking Machines Lab 2025 (tinker: coefficient 1, no discount). ``advantages`` may be left out;
    ``old_logprob`` too, where samples are the policy's own.
    """
    return compose(Importance(), rewards=(LogRatioReward(coef),), **options)


def g_opd(scale: float = 1.25, clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """Generalised on-policy distillation, ``A_t = scale (T_t - base_t) - (old_t - base_t)``, under PPO's clip.

    Arxiv 2602.12125. The reward T - base is scaled against the KL to the base model, the student's start or the teacher
    before its own RL: scale = 1 is :func:`opd`, above 1 is ExOPD, which extrapolates. Reads ``teacher_logprob`` and
    ``base_logprob``; the release adds ``correction=(tis(5.0),)``.
    """
    rewards = (LogRatioReward(scale, plus="teacher_logprob", minus="base_logprob"), LogRatioReward(1.0, "base_logprob"))
    return ppo(clip, dual=None, rewards=rewards, **options)


def rapo(coef: float, entropy_coef: float, clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """GRPO with a forward-KL penalty to a softened reference and an entropy bonus: ``coef KL(ref^phi || pi) - b H``.

    Rewards-aware policy optimisation (2025, arXiv 2510.03865). ``ref_logprob`` is the reference at temperature
    1 / phi(r), phi rising to at most 1 with the sequence's reward: ``LinearLogits(..., temperature=per token)``. Its
    estimate from policy samples is w log w - w + 1 with w = ref / pi.
    """
    return grpo(clip, beta=coef, kl="rapo", entropy_coef=entropy_coef, **options)


def dph_rl(
    coef: float, generator: str = "js", clip: float | tuple[float, float] = 0.2, *, alpha: float = 0.2, **options
) -> TokenObjective:
    """PPO without KL on exploration; on rehearsed correct samples of the reference an f-divergence that covers it.

    Diversity-preserving hybrid RL (2025, arXiv 2509.07430). The input ``replay`` (per token or sequence) is not 0 on
    rehearsed samples; they need ``ref_logprob``, cached, and of the rest any finite numbers.

    Args:
        coef: 0.01 to 0.05 for forward_kl, 0.05 to 0.2 for js in the paper.
        generator: "forward_kl", "js" or "alpha", see :class:`KL`.
        alpha: of "alpha".
    """
    rehearsal = KL(coef, f"dph_{generator}", selection=Only("replay"), alpha=alpha)
    return ppo(clip, dual=None, selection=(Only("replay", value=False),), penalties=(rehearsal,), **options)


def apo(beta: float = 1e-3, clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """GRPO whose KL (k3) is weighted per sequence, input ``kl_weights``: :func:`dads_weights`.

    Asymmetric policy optimisation (View-R1 2025, arXiv 2506.21655), with :func:`stcr_advantages` for advantages; not
    APO-zero or APO-down.
    """
    return grpo(clip, penalties=(KL(beta, weights="kl_weights"),), **options)


def gtpo(**options) -> TokenObjective:
    """``-A_t exp(lp - sg lp)``, mean per sequence, then over sequences: group-relative *trajectory*-based optimisation.

    Arxiv 2508.03772, with :func:`gtpo_advantages` for advantages and :func:`gtpo_weights` for weights; leave
    ``old_logprob`` out. Not GTPO/GRPO-S (arXiv 2508.04349), which shapes rewards by entropy.
    """
    return compose(Importance(), **with_default(options, "seq-mean-token-mean"))


def lp_reg(
    share: float = 0.01, coef: float = 1.0, clip: float | tuple[float, float] = (1.0, 9.0), **options
) -> TokenObjective:
    """PPO that keeps rare but sensible tokens: plus ``coef k3(lp, proxy)`` on those it would push down.

    Low-probability regularisation (2025, arXiv 2510.03222). They are among the ``share`` of tokens with least lp, have
    A < 0 and lp < proxy; ``proxy_logprob`` is the policy's own, renormalised after min-p (drops p < 0.02 max p),
    -inf where dropped: ``ll.logprobs(..., keep=ll.MinP(0.02)).logprob``. With the clip's low of 1 those tokens have no
    other bound, as in the paper.
    """
    return ppo(
        clip, dual=None, penalties=(KL(coef, against="proxy_logprob", selection=LowPenalised(share)),), **options
    )


@dataclass(frozen=True, eq=False)
class GatedKL(Penalty):
    """SAFE's penalty, one number for the batch: ``(K - threshold)^2 max(0.5, floor / (mean H + 0.1))`` where the mean
    estimate K exceeds the threshold, else 0. The gate by entropy is detached; the gradient is that of K.

    Under token-mean without weights the loss has it once. ``released``: no gradient, as in the published code, which
    builds it from numbers.
    """

    threshold: float | Tensor = 0.3
    floor: float = 2.0
    estimator: str = "k3"
    released: bool = False

    row_local = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("estimator", self.estimator, tuple(ESTIMATORS))

    @property
    def name(self) -> str:
        return "gated_kl"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "ref_logprob", "entropy"})

    def value(self, tokens: Tokens) -> Tensor:
        divergence = tokens.mean(ESTIMATORS[self.estimator](tokens["logprob"] - tokens["ref_logprob"]))
        gate = (self.floor / (tokens.mean(tokens["entropy"]).detach() + 0.1)).clamp(min=0.5)
        value = (divergence - self.threshold).clamp(min=0) ** 2 * gate
        return (value.detach() if self.released else value).expand(tokens.mask.shape)


def safe(
    threshold: float | Tensor = 0.3,
    coef: float = 0.1,
    *,
    entropy_coef: float = 0.01,
    floor: float = 2.0,
    estimator: str = "k3",
    released: bool = False,
    **options,
) -> TokenObjective:
    """PPO with a KL penalty beyond a threshold, gated by entropy, see :class:`GatedKL`, and an entropy bonus.

    ``threshold`` is :func:`safe_threshold`'s; the critic's value is :func:`double_soft_min`. The estimator of K is our
    reading.
    """
    penalty = GatedKL(coef, threshold, floor, estimator, released)
    return ppo(dual=None, entropy_coef=entropy_coef, penalties=(penalty,), **options)


@dataclass(frozen=True)
class SafeState:
    """Of :func:`safe_threshold`: fast and slow mean of the reward, last velocity and its sum."""

    fast: float | Tensor = 0.0
    slow: float | Tensor = 0.0
    velocity: float | Tensor = 0.0
    total: float | Tensor = 0.0


def safe_threshold(
    state: SafeState, reward: float | Tensor, phase: float = 1.0, gains: tuple[float, float, float] = (0.3, 0.01, 0.05)
) -> tuple[Tensor, SafeState]:
    """SAFE's threshold of the KL, ``clip((0.3 + PID(v)) phase, 0.1, 0.6)``, v the velocity of the reward.

    Our reading of it: v = fast - slow, exponential means of the batch's mean reward with decay 0.9 and 0.99; PID is
    gains (proportional, integral, derivative) on v, its running sum and its last change. Rising reward allows more.
    """
    reward = torch.as_tensor(reward)
    fast, slow = 0.9 * state.fast + 0.1 * reward, 0.99 * state.slow + 0.01 * reward
    velocity = fast - slow
    total = state.total + velocity
    pid = gains[0] * velocity + gains[1] * total + gains[2] * (velocity - state.velocity)
    return ((0.3 + pid) * phase).clamp(0.1, 0.6), SafeState(fast, slow, velocity, total)


def double_soft_min(first: Tensor, second: Tensor, alpha: float = 0.3) -> Tensor:
    """``-alpha (logsumexp(-v / alpha) - log 2)`` of two critics' values: their soft minimum.

    SAFE's critic; where both agree it is their value.
    """
    check_number("alpha", alpha, above=0)
    return -alpha * (torch.logaddexp(-first / alpha, -second / alpha) - math.log(2))


def depo(part: str = "token", **options) -> TokenObjective:
    """HyLaR's decoupled PPO, for one kind of position: the loss is the sum of both.

    "token": clip (0.2, 0.3), dual 3, with k3 to the reference at 0.05. "latent": clip (0.1, 0.1), dual 3, to be
    multiplied by 0.5, where log-probabilities are :func:`vmf_logprob`'s, plus 1e-2 times :func:`vmf_kl`. Each with the
    mask of its own positions.
    """
    check_choice("part", part, ("token", "latent"))
    if part == "token":
        return ppo((0.2, 0.3), dual=3.0, **{"beta": 0.05, **options})
    return ppo(0.1, dual=3.0, **options)


@dataclass(frozen=True)
class Oreal(Surrogate):
    """``-A lp`` on correct answers (input ``correct``), ``-A exp(lp - sg lp)`` on others: gradient -A on both."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"logprob", "advantages", "correct"})

    def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
        logprob = tokens["logprob"]
        return -tokens["advantages"] * torch.where(tokens["correct"] != 0, logprob, exp(logprob - logprob.detach()))


def oreal(beta: float = 0.01, **options) -> TokenObjective:
    """Outcome-reward RL: likelihood of correct answers, policy gradient on wrong ones, k3 to the reference.

    InternLM OREAL (Lyu et al. 2025, arXiv 2502.06781). Both have their own normalisers: give
    :func:`oreal_advantages` as ``advantages``, and ``correct``.
    """
    return compose(Oreal(), beta=beta, **options)


def superhf(coef: float = 0.35) -> Objective:
    """Supervised fine-tuning on the best of k samples, ``CE + coef KL(original || online)`` over the whole vocabulary.

    Mukobi et al. 2023 (arXiv 2310.16763): a sum of terms of logits, called with ``targets`` (the samples of highest
    reward) and the original model as ``teacher``. The paper's max(0, KL) is the KL.
    """
    check_number("coef", coef, low=0)
    return CrossEntropy() + coef * Divergence("forward_kl")


def pama(clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """PPO's clip with :func:`pama_advantages` for advantages (Pareto multi-objective alignment, arXiv 2508.07768)."""
    return ppo(clip, dual=None, **options)
