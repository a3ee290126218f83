"""Distillation of language models: published methods as terms, and what they compute of log-probabilities per token.

p is the teacher's distribution over the vocabulary, q the student's, both of scaled logits; r = p / q. A method that
returns a Term or an Objective is called as ``method(...)(student, targets=y, teacher=teacher, weights=..., ...)``, see
``Objective.__call__``, and is added to others. Teachers are constants. Log-probabilities are in nats; ``mask`` is
boolean, True where a token counts, of the same shape [..., T], and the last dimension is a sequence.

Every function raises TypeError or ValueError that names the argument, before any work.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.logits import check_floating, check_number
from logitless.losses.checks import check_choice, check_count, check_range
from logitless.losses.rows import expectation, kl, sorted_l1
from logitless.terms import CrossEntropy, Divergence, Objective, Term, row_term

# --- methods that are sums of terms ---


def gkd(beta: float = 0.5, *, temperature: float = 1.0, sft_weight: float = 0.0) -> Objective:
    """Generalised knowledge distillation: ``beta KL(p || m) + (1 - beta) KL(q || m)``, m = beta p + (1 - beta) q.

    Agarwal et al. 2024, "On-policy distillation of language models" (arXiv 2306.13649), equation 1; which sequences are
    the student's own (their lambda) is a matter of the data.

    Args:
        beta: the teacher's share of m, in [0, 1]. 0 is forward and 1 is reverse KL, as in TRL and Liger (a jump: the
            divergence itself goes to 0 at both ends).
        temperature: divides both sides' logits in the divergence, not in the cross-entropy. No factor T^2, as in TRL.
        sft_weight: weight of an added cross-entropy with the targets.
    """
    return _with_cross_entropy(1.0 * Divergence("jsd", beta=beta, temperature=temperature), sft_weight)


def distillm(direction: str = "forward", alpha: float = 0.1, *, kd_ratio: float = 1.0) -> Objective:
    """Skew KL: ``KL(p || alpha p + (1 - alpha) q)``, or reverse ``KL(q || alpha q + (1 - alpha) p)``.

    Ko et al. 2024, "DistiLLM" (arXiv 2402.03898), section 3.1. The released code drops the teacher's entropy from the
    forward one, which has no gradient.

    Args:
        direction: "forward" or "reverse".
        alpha: share in the mixture of the distribution on the left, in [0, 1]; 0 is plain KL.
        kd_ratio: in [0, 1]; the loss is ``kd_ratio * divergence + (1 - kd_ratio) * cross-entropy``, as released.
    """
    check_choice("direction", direction, ("forward", "reverse"))
    check_range("kd_ratio", kd_ratio)
    return _with_cross_entropy(kd_ratio * Divergence(f"skew_{direction}_kl", alpha=alpha), 1 - kd_ratio)


def distillm2(response: str, alpha: float | Tensor = 0.1, *, beta: float = 1.0) -> Objective:
    """One side of the contrastive loss ``(2 - beta) SKL(chosen) + beta SRKL(rejected)``.

    Ko et al. 2025, "DistiLLM-2" (arXiv 2503.07067): skew forward KL on the teacher's responses, skew reverse KL on the
    student's, where the student inside the mixture is a constant, as released.

        >>> beta = distillm2_beta(step, total_steps)
        >>> loss = distillm2("chosen", alpha_chosen, beta=beta)(chosen, teacher=...).loss
        >>> loss = loss + distillm2("rejected", alpha_rejected, beta=beta)(rejected, teacher=...).loss

    Args:
        response: "chosen" or "rejected": whose tokens these are.
        alpha: share of the distribution on the left in the mixture; one for all or per token, :func:`distillm2_alpha`.
        beta: in [0, 2], see :func:`distillm2_beta`.
    """
    check_choice("response", response, ("chosen", "rejected"))
    check_range("beta", beta, high=2)
    if response == "chosen":
        return (2 - beta) * Divergence("skew_forward_kl", alpha=alpha)
    return beta * Divergence("skew_reverse_kl", alpha=alpha, detach_mixture=True)


def minillm() -> Term:
    """The single-step term of MiniLLM: reverse KL over the whole vocabulary at every sampled token.

    Gu et al. 2024, "MiniLLM" (arXiv 2306.08543), section 2.2. Cross-entropy minus entropy in the released code, which
    is the same. The long-range part is a policy gradient on :func:`minillm_reward`.
    """
    return Divergence("reverse_kl")


def wsd(weight: float = 0.5) -> Term:
    """Weighted sum of divergences ``(1 - weight) KL(p || q) + weight KL(q || p)`` (WSD in ABKD, see :func:`abkd`)."""
    return Divergence("symmetric_kl", weight=weight)


def abkd(a: float = 0.2, b: float = 0.7) -> Term:
    """Alpha-beta divergence ``-1/(ab) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]``.

    Wang et al. 2025, "ABKD" (arXiv 2505.04560), equation 6, with the limits at a = 0, b = 0 and a + b = 0. (1, 0) is
    forward and (0, 1) reverse KL; a larger a looks at where the teacher is sure, a larger b at where the student is.
    """
    return Divergence("alpha_beta", a=a, b=b)


def paced(step: int, switch: int) -> Term:
    """Two stages: forward KL, which covers the teacher, before step ``switch``; reverse KL, which sharpens, from it on.

    Xu et al. 2026, "PACED" (arXiv 2603.11178), with :func:`paced_weights` as ``weights``.
    """
    check_number("step", step, low=0)
    check_number("switch", switch, low=0)
    return Divergence("forward_kl" if step < switch else "reverse_kl")


def kdrl(beta: float) -> Objective:
    """``beta KL(q || p)`` over the whole vocabulary, to add to a policy objective: ``J_GRPO - beta KL`` is maximised.

    Xu et al. 2025, "KDRL" (arXiv 2506.02208); its estimates from sampled tokens are in ``ll.policy.kdrl``.
    """
    check_number("beta", beta, low=0)
    return beta * Divergence("reverse_kl")


def llava_mod(*, sft_weight: float = 0.0) -> Objective:
    """Mimic distillation ``KL(p || q)``, plus ``sft_weight`` times the cross-entropy with the targets.

    Shu et al. 2024, "LLaVA-MoD" (arXiv 2408.15881). The released code has ``-sum_v p_v log q_v``, which is this plus
    H(p) and has its gradient. Where the heads are padded differently, ``vocab_size`` of both logits cuts them.
    """
    return _with_cross_entropy(1.0 * Divergence("forward_kl"), sft_weight)


def _with_cross_entropy(loss: Objective, weight: float) -> Objective:
    check_number("sft_weight", weight, low=0)
    return loss + weight * CrossEntropy() if weight else loss


# --- methods that need whole rows: functions of (log p, log q), [C, V] each ---


def bd_kd(delta: float = 2.0) -> Term:
    """``w_T KL(p || q) + w_S KL(q || p)``, weighted by who is less sure.

    w_T = 1 + delta where H(p) > H(q), w_S = 1 + delta where H(q) > H(p), else 1; both without gradient. Amara et al.
    2022, "BD-KD" (arXiv 2212.12965), as ABKD implements it, which leaves H(p) out of the forward KL's value.
    """
    check_number("delta", delta, low=0)

    def rows(log_p: Tensor, log_q: Tensor) -> Tensor:
        with torch.no_grad():
            excess = expectation(log_q.exp(), log_q) - expectation(log_p.exp(), log_p)  # H(p) - H(q)
        forward, reverse = 1 + delta * (excess > 0), 1 + delta * (excess < 0)
        return forward * kl(log_p, log_q) + reverse * kl(log_q, log_p)

    return _pair_term(rows, "bd_kd")


def adaptive_kl(mu: float = 0.5, *, convention: str = "dskd", temperature: float = 1.0) -> Term:
    """Adaptive KL: ``g_h / (g_h + g_t) KL(p || q) + g_t / (g_h + g_t) KL(q || p)``, the factors without gradient.

    g_h and g_t sum |p - q| over the head and the tail of the teacher's distribution (AKL, Wu et al. 2024,
    "Rethinking Kullback-Leibler divergence in knowledge distillation for large language models", arXiv 2404.02657).

    Args:
        mu: mass of the head, in [0, 1].
        convention: what happens to the token at which the mass passes mu. "dskd": it is of the head, the least set of
            mass mu (DSKD sorts ascending, and its tail is what fits into mass 1 - mu). "abkd": it is of the tail, but
            the most probable token is always of the head (this is ``Divergence("adaptive_kl")``).
        temperature: divides both sides' logits (DSKD's kd_temp), without a factor T^2.
    """
    check_range("mu", mu)
    check_choice("convention", convention, ("dskd", "abkd"))
    if convention == "abkd":
        return Divergence("adaptive_kl", mu=mu, temperature=temperature)

    def rows(log_p: Tensor, log_q: Tensor) -> Tensor:
        with torch.no_grad():
            p, order = log_p.exp().sort(-1, descending=True)
            gap = (p - log_q.exp().gather(-1, order)).abs()
            head = p.cumsum(-1) - p < mu  # the mass of what comes first
            total = gap.sum(-1)
            share = torch.where(head, gap, 0).sum(-1) / torch.where(total == 0, 1, total)
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)

    return _pair_term(rows, "adaptive_kl", temperature)


def alphanet(low: float = -1.0, high: float = 1.0) -> Term:
    """The larger of two alpha-divergences ``(1 - sum_v p^a q^(1-a)) / (a (1 - a))``, a in {low, high}, per token.

    Wang et al. 2021, "AlphaNet" (arXiv 2102.07954), without its clipping of r^a. a = 1 is forward and a = 0 reverse KL.
    ABKD takes the larger of the two losses of a batch, in two passes: ``torch.maximum(abkd(low, 1 - low)(...).loss,
    abkd(high, 1 - high)(...).loss)``.
    """
    check_number("low", low)
    check_number("high", high)

    def divergence(a: float, log_p: Tensor, log_q: Tensor) -> Tensor:
        if a in (0, 1):
            return kl(log_p, log_q) if a else kl(log_q, log_p)
        nothing = (log_p == -torch.inf) & (log_q == -torch.inf)
        log_sum = torch.where(nothing, -torch.inf, a * log_p + (1 - a) * log_q).logsumexp(-1)
        return -torch.expm1(log_sum) / (a * (1 - a))

    return _pair_term(lambda *logs: torch.maximum(divergence(low, *logs), divergence(high, *logs)), "alphanet")


def kl_top(k: int = 1000, variant: str = "truncated") -> Term:
    """KL over k tokens of the vocabulary, chosen at every position without gradient.

    KL-Top of OSTQuant (Hu et al. 2025, arXiv 2501.13987), as released; the teacher is the model before quantisation.

    Args:
        k: how many tokens; no more than there are.
        variant: "truncated": sum of ``p log(p / q)`` over the teacher's top k, not renormalised (what its scripts use;
            it can be negative). "renormalized": KL(p || q), both renormalised over the teacher's top k. "reverse":
            KL(q || p), both renormalised over the student's top k.
    """
    check_count("k", k)
    check_choice("variant", variant, ("truncated", "renormalized", "reverse"))

    def rows(log_p: Tensor, log_q: Tensor) -> Tensor:
        ranked = log_q if variant == "reverse" else log_p
        kept = ranked.topk(min(k, ranked.shape[-1])).indices
        log_p, log_q = log_p.gather(-1, kept), log_q.gather(-1, kept)
        if variant != "truncated":
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        return kl(log_q, log_p) if variant == "reverse" else kl(log_p, log_q)

    return _pair_term(rows, f"kl_top_{variant}")


def mft(threshold: float = 0.2, *, temperature: float = 1.0, correct_all: bool = True) -> Term:
    """Minifinetuning: ``T^2 KL(p' || q)``, p' = (1 - c) p + c e_y the teacher corrected towards the target y.

    Belcak et al. 2025 (arXiv 2506.15702); Model Optimizer's MFTLoss. c is the least for which p'_y is ``threshold``
    above what the teacher's favourite token keeps.

    Args:
        threshold: in [0, 1].
        temperature: T, divides both sides' logits.
        correct_all: where the teacher's favourite is y already, raise p_y by ``threshold`` (to at most 1), as Model
            Optimizer does; False: leave p alone there.
    """
    check_range("threshold", threshold)
    check_number("temperature", temperature, above=0)

    def rows(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            p, y = (t / temperature).softmax(-1), y[:, None]
            label, (top, favourite) = p.gather(-1, y), p.max(-1, keepdim=True)
            lifted = threshold / (1 - label).clamp(min=max(threshold, 1e-30)) if correct_all else 0.0
            c = torch.where(favourite == y, lifted, (threshold + (top - label)) / (1 + (top - label)))
            log_target = ((1 - c) * p).scatter(-1, y, (1 - c) * label + c).log()
        return temperature**2 * kl(log_target, (s / temperature).log_softmax(-1))

    return row_term(rows, name="mft", teacher=True, targets=True)


def wasserstein_1d() -> Term:
    """``sum_v |cdf_p(v) - cdf_q(v)|``: Wasserstein-1 with the cost |v - w| between token ids.

    Stands in for the V x V transport of DPO-Kernels (Das et al. 2025, arXiv 2501.03271) where ids are in order of
    meaning.
    """
    return _pair_term(lambda log_p, log_q: (log_p.exp() - log_q.exp()).cumsum(-1).abs().sum(-1), "wasserstein_1d")


def uld() -> Term:
    """Universal logit distillation: ``sum_i |p_(i) - q_(i)|``, both sorted in descending order.

    Boizard et al. 2024, "Towards cross-tokenizer distillation" (arXiv 2402.12030): Wasserstein-1 where all tokens are
    equally far apart and labels do not matter. This is the term for one vocabulary, to be added to others;
    :func:`logitless.transport.uld` takes vocabularies and tokens of any two models, and need not sort whole rows.
    """
    return _pair_term(lambda log_p, log_q: sorted_l1(log_q.exp(), log_p.exp())[0], "uld")


_LOG_F_WEIGHT: dict[str, Callable[[Tensor], Tensor]] = {  # log h of log r, h(r) = r^2 f''(r)
    "reverse_kl": torch.zeros_like,
    "softened_reverse_kl": lambda log_r: F.logsigmoid(-log_r),
    "js": F.logsigmoid,
    "squared_hellinger": lambda log_r: 0.5 * log_r - math.log(4),
    "forward_kl": lambda log_r: log_r,
    "jeffreys": lambda log_r: -F.logsigmoid(-log_r),
}


def f_distill(divergence: str = "js", *, normalize: bool = False, clip: float | None = None) -> Term:
    """The reverse KL's gradient weighted by h(r): the gradient is ``E_q[h(r) log(q / p) grad log q]``.

    Xu et al. 2025, "One-step diffusion models with f-divergence distribution matching" (arXiv 2502.15681), carried over
    to tokens, where the score difference becomes log(q / p): a heuristic, exact for "reverse_kl" alone, whose
    value ``E_q[h(r) log(q / p)]`` need not be positive. ``Divergence`` has the exact f-divergences.

    Args:
        divergence: f, and h(r) = r^2 f''(r): "reverse_kl" 1, "softened_reverse_kl" 1 / (r + 1), "js" r / (r + 1),
            "squared_hellinger" sqrt(r) / 4, "forward_kl" r, "jeffreys" r + 1. The later ones cover more modes.
        normalize: divide h by its mean E_q[h] at each position (the paper's mean over a batch, taken exactly).
        clip: upper bound of h before that.
    """
    weigh = _f_weighting(divergence, clip)

    def rows(log_p: Tensor, log_q: Tensor) -> Tensor:
        with torch.no_grad():
            weight = (log_q + weigh(log_p - log_q)).exp()  # q h, finite where h alone is not
            weight = torch.where((log_q == -torch.inf) | (weight == 0), 0, weight)
            if normalize:
                weight = weight / weight.sum(-1, keepdim=True)
            cost = torch.where(weight == 0, 0, weight * (log_q - log_p))
        one = 1 + torch.where(cost == 0, 0, log_q - log_q.detach())  # whose gradient is that of log q
        return (cost * one).sum(-1)

    return _pair_term(rows, f"f_distill_{divergence}")


def f_distill_weights(
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    mask: Tensor,
    divergence: str = "js",
    *,
    normalize: bool = False,
    clip: float | None = None,
) -> Tensor:
    """h(r) of sampled tokens, as ``weights`` of ``Divergence("reverse_kl")`` or of a policy loss; 0 outside the mask.

    As :func:`f_distill`, with r = exp(teacher_logprob - student_logprob) [..., T]; ``normalize`` divides by the mean
    over all tokens of the batch that count.
    """
    weigh = _f_weighting(divergence, clip)
    _check_tokens(mask, student_logprob=student_logprob, teacher_logprob=teacher_logprob)
    h = torch.where(mask, weigh((teacher_logprob - student_logprob).detach()).exp(), 0)
    if not normalize:
        return h
    mean = h.sum() / mask.sum().clamp(min=1)
    return h / torch.where(mean == 0, 1, mean)


def _f_weighting(divergence: str, clip: float | None) -> Callable[[Tensor], Tensor]:
    """log r -> log h(r), clipped."""
    check_choice("divergence", divergence, tuple(_LOG_F_WEIGHT))
    if clip is None:
        return _LOG_F_WEIGHT[divergence]
    check_number("clip", clip, above=0)
    return lambda log_r: _LOG_F_WEIGHT[divergence](log_r).clamp(max=math.log(clip))


def _pair_term(function: Callable[[Tensor, Tensor], Tensor], name: str, temperature: float = 1.0) -> Term:
    """A term from a function of (log p, log q)."""
    check_number("temperature", temperature, above=0)

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return function((t / temperature).log_softmax(-1), (s / temperature).log_softmax(-1))

    return row_term(rows, name=name, teacher=True)


# --- what methods compute of log-probabilities per token ---


def distillm2_alpha(
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    mask: Tensor,
    *,
    anchor: float | Tensor,
    response: str = "chosen",
    alpha: float = 0.1,
) -> Tensor:
    """DistiLLM-2's alpha, adapted to every sequence: ``clip(1 - (1 - alpha) anchor / (gap + 1e-5), 0.01, alpha)``.

    gap is exp(mean log-probability) of the teacher less that of the student on chosen responses, the other way round on
    rejected ones: easy sequences get a small alpha (Ko et al. 2025, section 3.3; the constants are the code's).

    Args:
        student_logprob, teacher_logprob: [..., T] log-probabilities of the response's tokens.
        mask: [..., T] bool.
        anchor: a typical gap, number or 0-d tensor: the mean over a batch, which the released code keeps from the first
            steps.
        response: "chosen" or "rejected".
        alpha: the largest, and the one for a gap of ``anchor``; in [0.01, 1].

    Returns:
        [..., T], the same at all tokens of a sequence, without gradient (the released code lets it through).
    """
    check_choice("response", response, ("chosen", "rejected"))
    check_range("alpha", alpha, low=0.01)
    if not isinstance(anchor, Tensor):
        check_number("anchor", anchor)
    _check_tokens(mask, student_logprob=student_logprob, teacher_logprob=teacher_logprob)
    gap = _mean(teacher_logprob.detach(), mask).exp() - _mean(student_logprob.detach(), mask).exp()
    gap = gap if response == "chosen" else -gap
    adapted = (1 - (1 - alpha) * anchor / (gap + 1e-5)).clamp(0.01, alpha)
    return adapted[..., None].expand(mask.shape)


def distillm2_beta(step: int, total_steps: int) -> float:
    """The rejected side's weight grows from 1 to 1.5 in the first half: ``1 + 0.5 min(1, 2 step / total_steps)``.

    DistiLLM-2's released schedule (gradual beta; off there by default, beta = 1).
    """
    check_number("step", step, low=0)
    check_number("total_steps", total_steps, above=0)
    return 1 + 0.5 * min(1.0, 2 * step / total_steps)


def minillm_reward(
    student_logprob: Tensor, teacher_logprob: Tensor, mask: Tensor, *, include_current: bool = False
) -> Tensor:
    """Length-normalised reward to go, ``R_t = mean of log p(y_u) - log q(y_u) over u > t``, [..., T].

    Gu et al. 2024, "MiniLLM", section 2.2 (length normalisation): the advantage of token t, whose own reward the
    single-step term :func:`minillm` has. 0 at the last token and outside the mask; without gradient.

    Args:
        student_logprob, teacher_logprob: [..., T] log-probabilities of sampled tokens.
        mask: [..., T] bool.
        include_current: the mean over u >= t, as in the released code (there discounted by gamma, then whitened).
    """
    _check_tokens(mask, student_logprob=student_logprob, teacher_logprob=teacher_logprob)
    reward = torch.where(mask, (teacher_logprob - student_logprob).detach(), 0)
    total, count = (x.flip(-1).cumsum(-1).flip(-1) for x in (reward, mask))
    if not include_current:
        total, count = F.pad(total[..., 1:], (0, 1)), F.pad(count[..., 1:], (0, 1))
    return torch.where(mask, total / count.clamp(min=1), 0)


def paced_weights(pass_rate: Tensor, a: float = 1.0, b: float = 1.0) -> Tensor:
    """``w(p) = p^a (1 - p)^b``: problems the student solves sometimes count most.

    Xu et al. 2026, "PACED", whose default is p (1 - p).

    Args:
        pass_rate: [...] share of the student's attempts at a token's problem that succeed, in [0, 1].
        a, b: at least 0; the peak is at a / (a + b).
    """
    check_floating("pass_rate", pass_rate)
    check_number("a", a, low=0)
    check_number("b", b, low=0)
    return pass_rate**a * (1 - pass_rate) ** b


def retemper(logprobs: Tensor, temperature: float, *, tail: str = "power") -> tuple[Tensor, Tensor]:
    """A truncated distribution at another temperature, from probabilities alone: ``p^(1/T) / Z``.

    Exact for a full vector, as softmax(t / T) is p^(1/T) normalised; for the kept ids of a stored or served teacher the
    rest can only be estimated. Both rules are DistillKit's.

    Args:
        logprobs: [..., K] log-probabilities of the kept ids over the full vocabulary; -inf where there is no id.
        temperature: T, over the one that ``logprobs`` were made at.
        tail: "power": the rest of the mass is one more token, ``rest^(1/T)`` (DistillKit's symmetric_uniform).
            "none": the rest is dropped, and the kept ids are renormalised (its zero); for a full vector, whose rest is
            rounding.

    Returns:
        ([..., K] log-probabilities, [...] log-probability of the rest): together they sum to 1.
    """
    check_floating("logprobs", logprobs)
    check_number("temperature", temperature, above=0)
    check_choice("tail", tail, ("power", "none"))
    if tail == "power":
        mass = logprobs.logsumexp(-1, keepdim=True).clamp(max=0)  # rounding may pass 1
        rest = torch.log(-torch.expm1(mass))
    else:
        rest = logprobs.new_full((*logprobs.shape[:-1], 1), -torch.inf)
    tempered = (torch.cat([logprobs, rest], -1) / temperature).log_softmax(-1)
    return tempered[..., :-1], tempered[..., -1]


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each sequence that count; 0 where there are none."""
    return torch.where(mask, x, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def _check_tokens(mask: object, **logprobs: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    for name, tensor in logprobs.items():
        check_floating(name, tensor)
        if tensor.shape != mask.shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}, the mask's is {list(mask.shape)}")
