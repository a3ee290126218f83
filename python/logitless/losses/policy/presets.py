"""Policy losses by their published names, with the defaults of the paper or framework.

Names that stand for several things: *CISPO*'s clip (four conventions, an argument); *DRO* (direct reward optimisation;
the robust one is ``kl_dro_weights``); *GTPO* (conflict tokens, arXiv 2508.03772; not GTPO/GRPO-S, 2508.04349); *APO*
(View-R1; apo_zero and apo_down are preference losses); *IPO* (a preference loss; prime-rl's masks tokens as
``dppo_tv`` does, whatever the sign of A); *RAPO* (arXiv 2510.03865).
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.logits import check_constant, check_floating, check_number
from logitless.losses.checks import check_choice
from logitless.losses.policy.aggregation import Aggregation, aggregation_of, reduce
from logitless.losses.policy.inputs import prepare
from logitless.losses.policy.objective import TokenObjective
from logitless.losses.policy.penalties import KL, Entropy, Penalty, PositiveNLL
from logitless.losses.policy.ratios import GeometricRatio, Ratio
from logitless.losses.policy.selection import ClipCovariance, TopCovariance
from logitless.losses.policy.surrogates import Cispo, Clip, Dppo, Dro, Importance, Reinforce, Sapo, Surrogate, Vespo
from logitless.ops.loss import LossResult

TRL_MEAN = Aggregation("seq-mean-token-mean", count_empty=True)
TRL_SUM = Aggregation("seq-mean-token-sum", count_empty=True)


def compose(
    surrogate: Surrogate,
    *,
    beta: float = 0.0,
    kl: str = "k3",
    kl_clamp: tuple[float | None, float | None] = (None, None),
    entropy_coef: float = 0.0,
    penalties: tuple[Penalty, ...] = (),
    **parts,
) -> TokenObjective:
    """A :class:`TokenObjective` with the two penalties that every framework has.

    Args:
        surrogate: see :mod:`surrogates`.
        beta: coefficient of the penalty to the reference; 0: none, and no ``ref_logprob``.
        kl: its estimator, see :class:`KL`. TRL 1.16 has "ratio_k3" (use_bias_correction_kl); verl's low_var_kl and
            NeMo-RL's are "k3" with kl_clamp=(20, 10).
        kl_clamp: bounds, see :class:`KL`.
        entropy_coef: of the entropy bonus; 0: none. It is aggregated as the rest is, as in verl; TRL's is a mean over
            tokens whatever the loss.
        penalties: further ones.
        parts: ratio, rewards, correction, selection, aggregation of :class:`TokenObjective`.
    """
    check_number("beta", beta)
    check_number("entropy_coef", entropy_coef)
    usual = (KL(beta, kl, clamp=kl_clamp),) if beta else ()
    usual += (Entropy(-entropy_coef),) if entropy_coef else ()
    return TokenObjective(surrogate, penalties=usual + tuple(penalties), **parts)


def ppo(clip: float | tuple[float, float] = 0.2, *, dual: float | None = 3.0, **options) -> TokenObjective:
    """Proximal policy optimisation, ``max(-A rho, -A clip(rho, 1 - low, 1 + high))`` (Schulman et al. 2017).

    Args:
        clip: low and high, or one number for both.
        dual: dual-clip bound of negative advantages; verl's 3.0. None: off, as in OpenRLHF, NeMo-RL and the paper.
        options: of :func:`compose`; here and below.
    """
    return compose(_clip(clip, dual=dual), **options)


def grpo(clip: float | tuple[float, float] = 0.2, *, delta: float | None = None, **options) -> TokenObjective:
    """Group-relative policy optimisation: PPO's clip, mean per sequence, then over sequences.

    DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), with k3 where ``beta`` is given. Empty sequences count, as in
    TRL. ``delta``: see :func:`two_sided`.
    """
    return compose(_clip(clip, delta=delta), **with_default(options, TRL_MEAN))


def dr_grpo(norm: float, clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """GRPO without its length bias: the sum over all tokens by B times a constant (Liu et al. 2025, arXiv 2503.20783).

    Args:
        norm: the constant: the largest completion length (TRL's max_completion_length, verl's loss_scale_factor).
    """
    mode = Aggregation("seq-mean-token-sum-norm", norm=norm, count_empty=True)
    return compose(_clip(clip), **with_default(options, mode))


def bnpo(clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """GRPO's clip, mean over the tokens of this micro-batch (TRL's bnpo): under accumulation not that of the batch."""
    return compose(_clip(clip), **with_default(options, "bnpo"))


def dapo(clip: float | tuple[float, float] = (0.2, 0.28), **options) -> TokenObjective:
    """Clip-higher and the mean over all tokens (Yu et al. 2025, arXiv 2503.14476, equation 10).

    Over micro-batches or ranks pass ``denominator``, as TRL's num_items_in_batch; ``aggregation="dapo"`` insists on it.
    """
    return compose(_clip(clip), **options)


def two_sided(delta: float = 4.0, clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """GRPO whose ratio is at most ``delta`` for negative advantages too: ``-min(min(rho, delta) A, clip(rho) A)``.

    INTELLECT-2 (Prime Intellect 2025), section 4.1; TRL's ``delta``, which is off there.
    """
    return grpo(clip, delta=delta, **options)


def gspo(clip: float | tuple[float, float] = (3e-4, 4e-4), **options) -> TokenObjective:
    """The ratio of a sequence, its geometric mean over tokens, clipped.

    Zheng et al. 2025 (arXiv 2507.18071), whose clip this is. TRL's importance_sampling_level="sequence", which counts
    empty sequences too. verl's gspo has the configuration's clip and the gradient of :func:`gspo_token`: the same where
    advantages are per sequence and the aggregation is this one.
    """
    return _on_sequences("sequence-mean", clip, "seq-mean-token-mean", options)


def gspo_token(clip: float | tuple[float, float] = (3e-4, 4e-4), **options) -> TokenObjective:
    """GSPO's ratio in value, each token's own in gradient: for advantages that differ by token."""
    return _on_sequences("sequence-token", clip, "seq-mean-token-mean", options)


def luspo(clip: float | tuple[float, float] = (3e-4, 4e-4), **options) -> TokenObjective:
    """GSPO weighted by length, ``mean_i sum_t L_it`` (arXiv 2602.05261), as TRL has it.

    Weights, KL and token-level parts are summed over the tokens under the mask; Liger divides them by the padded width.
    Empty sequences count.
    """
    return _on_sequences("sequence-mean", clip, TRL_SUM, options)


def gmpo(clip: float | tuple[float, float] = 0.4, **options) -> TokenObjective:
    """``-A exp(mean_i clip(lp - old))``, clipped by the sign of A in logarithms (Zhao et al. 2025, arXiv 2507.20673).

    Advantages per sequence; given per token, each token has the sequence's ratio times its own. Empty sequences count,
    as in TRL and verl (geo_mean).
    """
    ratio = GeometricRatio(*_pair(clip))
    return compose(Importance(), ratio=ratio, **with_default(options, TRL_MEAN))


def rloo(clip: float | tuple[float, float] = 0.2, **options) -> TokenObjective:
    """PPO's clip on the ratio of whole sequences, ``exp(sum_i (lp - old))`` (Ahmadian et al. 2024; TRL's RLOOTrainer).

    Advantages are the reward minus the mean of the prompt's other samples. Empty sequences count.
    """
    return _on_sequences("sequence-sum", clip, TRL_MEAN, options)


def cispo(convention: str = "verl", low: float | None = None, high: float | None = None, **options) -> TokenObjective:
    """``-sg(clip(rho)) A lp`` (MiniMax-M1 2025), clipped as one of four frameworks means it.

    ==============  ==========================  =================
    convention      clip of rho                 defaults
    ==============  ==========================  =================
    verl            1 - low, 1 + high           0.2, 0.2
    trl             none, high                  high = 5.0
    open_instruct   none, 1 + high              high = 0.272
    tinker          low, high                   0.0, 4.0
    ==============  ==========================  =================
    """
    defaults = {"verl": (0.2, 0.2), "trl": (None, 5.0), "open_instruct": (None, 0.272), "tinker": (0.0, 4.0)}
    check_choice("convention", convention, tuple(defaults))
    if low is not None and defaults[convention][0] is None:
        raise ValueError(f"low: {convention} has no lower bound")
    low, high = [given if given is not None else usual for given, usual in zip((low, high), defaults[convention])]
    if convention == "verl":
        low = 1 - low
    if convention in ("verl", "open_instruct"):
        high = 1 + high
    return compose(Cispo(low, high), **options)


def reinforce(**options) -> TokenObjective:
    """``-A lp``, summed over tokens, mean over sequences (Williams 1992; verl's default for it)."""
    return compose(Reinforce(), **with_default(options, "seq-mean-token-sum"))


def gpg(**options) -> TokenObjective:
    """Group policy gradient, ``-A lp``, mean over tokens (Chu et al. 2025, arXiv 2504.02546)."""
    return compose(Reinforce(), **options)


def sapo(tau_pos: float = 1.0, tau_neg: float = 1.05, **options) -> TokenObjective:
    """Soft adaptive policy optimisation, see :class:`Sapo` (Gao et al. 2025, arXiv 2511.20347)."""
    return compose(Sapo(tau_pos, tau_neg), **with_default(options, TRL_MEAN))


def vespo(
    k_pos: float = 2.0,
    lam_pos: float = 3.0,
    k_neg: float = 3.0,
    lam_neg: float = 2.0,
    *,
    rollout: bool = False,
    **options,
) -> TokenObjective:
    """Smooth weights of sequences, see :class:`Vespo` (2026, arXiv 2602.10693). TRL's mean is over the batch's tokens:
    pass ``denominator``."""
    return compose(Vespo(k_pos, lam_pos, k_neg, lam_neg, rollout), **options)


def dro(beta: float, **options) -> TokenObjective:
    """Direct reward optimisation per token, see :class:`Dro` (Richemond et al. 2024; verl, tinker)."""
    return compose(Dro(beta), **options)


def dppo_tv(
    clip: float | tuple[float, float] = 0.2, *, cap: float = 20.0, detach_ratio: bool = True, **options
) -> TokenObjective:
    """Tokens masked by total variation, see :class:`Dppo` (2026, arXiv 2602.04879)."""
    return compose(Dppo("tv", *_pair(clip), cap, detach_ratio), **options)


def dppo_kl(
    clip: float | tuple[float, float] = 0.2, *, cap: float = 20.0, detach_ratio: bool = True, **options
) -> TokenObjective:
    """Tokens masked by binary KL, see :class:`Dppo` (2026, arXiv 2602.04879)."""
    return compose(Dppo("kl", *_pair(clip), cap, detach_ratio), **options)


def clip_cov(
    share: float = 2e-4,
    bounds: tuple[float, float] = (1.0, 5.0),
    clip: float | tuple[float, float] = 0.2,
    *,
    generator: torch.Generator | None = None,
    **options,
) -> TokenObjective:
    """PPO without a random few of the tokens whose covariance lies in ``bounds``.

    Clip-Cov (Cui et al. 2025, arXiv 2505.22617). ``generator`` is the draw's; give ranks different ones.
    """
    return compose(_clip(clip), selection=(ClipCovariance(share, *bounds, generator),), **options)


def kl_cov(share: float = 2e-4, coef: float = 1.0, **options) -> TokenObjective:
    """``-A rho``, plus ``coef |lp - old|`` on the tokens of largest covariance (Cui et al. 2025, arXiv 2505.22617).

    ``coef`` is 1 in verl's function, 0.1 in its configuration.
    """
    penalty = KL(coef, "abs", "old_logprob", selection=TopCovariance(share))
    return compose(Importance(), penalties=(penalty,), **options)


def vapo_nll(coef: float = 0.1, clip: float | tuple[float, float] = (0.2, 0.28), **options) -> TokenObjective:
    """PPO plus the likelihood of correct answers, input ``correct``; see :class:`PositiveNLL` (VAPO, 2025)."""
    return compose(_clip(clip), penalties=(PositiveNLL(coef),), **options)


def papo(
    perception: float = 0.1,
    entropies: tuple[float, float] = (0.03, 0.03),
    clip: float | tuple[float, float] = 0.2,
    *,
    cap: float = 0.2,
    **options,
) -> TokenObjective:
    """GRPO that rewards depending on the image: ``- perception min(k3(lp, lp_masked), cap) + w_1 H + w_2 H_masked``.

    Perception-aware policy optimisation (Wang et al. 2025, arXiv 2507.06448). lp_masked and H_masked come from a second
    forward pass on a masked image: inputs ``masked_logprob`` and ``masked_entropy``, which get gradients if they
    require them. ``cap`` is that of TRL's experimental trainer; aggregation="token-mean" is PAPO-D.
    """
    terms = (
        KL(-perception, "k3", "masked_logprob", clamp=(None, cap)),
        Entropy(entropies[0]),
        Entropy(entropies[1], "masked_entropy"),
    )
    return compose(_clip(clip), penalties=terms, **with_default(options, TRL_MEAN))


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    clip: float = 0.5,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    aggregation: str | Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
) -> LossResult:
    """PPO's critic, ``0.5 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)``.

    Args:
        values: [T] or [B, T] floating, with gradient.
        returns: R, in the same shape.
        old_values: when sampled; None: no clipping.
        clip: 0.5 in verl and OpenRLHF, 0.2 in TRL.
        mask, cu_seqlens, weights, aggregation, denominator: as in :meth:`TokenObjective.from_logprobs`.

    Returns:
        LossResult: terms "value"; metrics tokens and clip_fraction, of tokens where the clipped square is the larger.
    """
    check_floating("values", values)
    check_number("clip", clip, above=0)
    aggregation = aggregation_of(aggregation)
    if aggregation.sequences and values.dim() == 1 and cu_seqlens is None:
        raise ValueError("cu_seqlens: needed by an aggregation over sequences")
    for name, x in {"returns": returns, "old_values": old_values}.items():
        if x is not None:
            check_constant(name, x)
    given = {"logprob": values, "returns": returns, "old_values": old_values, "weights": weights}
    tokens = prepare(given, like=values, mask=mask, cu_seqlens=cu_seqlens)
    v, wanted = tokens["logprob"], tokens["returns"]
    square = clipped = (v - wanted) ** 2
    if old_values is not None:
        old = tokens["old_values"]
        clipped = (v.clamp(old - clip, old + clip) - wanted) ** 2
    loss = reduce(0.5 * torch.maximum(square, clipped), aggregation.weights(tokens, denominator))
    fraction = tokens.mean((clipped > square).to(tokens.dtype)).detach()
    return LossResult(loss, {"value": loss.detach()}, {"tokens": tokens.mask.sum(), "clip_fraction": fraction})


def _pair(clip: float | tuple[float, float]) -> tuple[float, float]:
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    return low, high


def _clip(clip: float | tuple[float, float], **bounds) -> Clip:
    return Clip(*_pair(clip), **bounds)


def with_default(options: dict, aggregation: str | Aggregation) -> dict:
    return {"aggregation": aggregation, **options}


def _on_sequences(level: str, clip, aggregation: str, options: dict) -> TokenObjective:
    return compose(_clip(clip), ratio=Ratio(level), **with_default(options, aggregation))
