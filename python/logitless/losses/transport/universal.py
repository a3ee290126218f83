"""Losses that compare sorted probabilities: they need no common vocabulary, and no tokens in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logitless.logits import Logits, check_number, check_per_token, tempered
from logitless.losses.checks import check_choice, check_count, check_range
from logitless.losses.rows import expectation, sorted_l1
from logitless.losses.transport.alignment import (
    Groups,
    Pairs,
    check_ends,
    check_sequences,
    check_tokens,
    groups,
    live_tokens,
    paired,
)
from logitless.ops.gather import add_at
from logitless.ops.logprobs import logprobs
from logitless.ops.loss import LossResult, check_execution, check_reduction
from logitless.ops.row_function import row_loss, row_values

AVERAGES = ("token", "sequence")


def uld(
    student: Logits,
    teacher: Logits,
    targets: Tensor | None = None,
    teacher_targets: Tensor | None = None,
    *,
    k: int | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    average: str = "token",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    workspace: int | str = "auto",
) -> LossResult:
    """Universal logit distillation: ``sum_i |q_(i) - p_(i)|``, both sorted in descending order, the shorter padded.

    Boizard et al. 2024, "Towards cross-tokenizer distillation" (arXiv 2402.12030): Wasserstein-1 where all tokens are
    equally far apart and labels do not matter. q of the student's i-th token that counts meets p of the teacher's i-th,
    up to the shorter of both answers. It is added, times 1.5, to the cross-entropy.

    The released code's mean over sequences of means over tokens is ``average="sequence"``. Its logits are those at the
    answer's positions, which predict the tokens after: pass targets that are not shifted for the same.

    Costs one product of each side and two for the gradient (two sides more for reduction="none"). Sorting rows costs
    more than that on most machines; with ``k`` nothing is sorted but the k largest of each row.

    Args:
        student: logits of [..., T] tokens.
        teacher: of [..., U] tokens, over any vocabulary. A constant.
        targets: [..., T] integers, only to leave out tokens equal to ``ignore_index``; None: all count.
        teacher_targets: [..., U], alike.
        k: None: exact. Else the k largest probabilities of each side are compared one by one, and what is left of each
            as one number. That is a lower bound of the loss, and the loss is at most ``metrics["bound"]`` above it:
            twice the smaller of both rests. Some 100 leave little of a language model's distribution.
        temperature: divides both sides' logits (the released student_temperature and teacher_temperature, 1).
        weights: [..., T] floating factors of the student's tokens, without gradient.
        average: what "mean" and "sum" are over: "token"s, or "sequence"s, each with the mean of its tokens. A
            sequence without any does not count.
        reduction: "mean", "sum" or "none" (per token of the student, 0 at those without a partner).
        denominator: what "mean" divides by in place of the number of tokens (sequences) that count.
        ignore_index, workspace: as in ``Objective.__call__``.

    Returns:
        LossResult: "uld" in ``terms``; ``metrics``: "tokens", how many have a partner, and "bound", reduced alike.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    if k is not None:
        check_count("k", k)
    check_sequences(student, teacher)
    check_number("temperature", temperature, above=0)
    workspace_bytes = _check(average, reduction, denominator, ignore_index, workspace)
    if weights is not None:
        check_per_token("weights", weights, student)
    pairs = paired(
        live_tokens("targets", targets, student, ignore_index),
        live_tokens("teacher_targets", teacher_targets, teacher, ignore_index),
    )

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return torch.stack(sorted_l1(s.softmax(-1), t.softmax(-1), k), -1)

    sides = [tempered(logits, temperature) for logits in (student, teacher)]
    factors = _factors(pairs, None if weights is None else weights.reshape(-1), reduction, denominator, average)
    return _reduced(rows, sides, pairs, factors, (), reduction, workspace_bytes, ("uld", "bound"))


def gold(
    student: Logits,
    teacher: Logits,
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    student_ends: Tensor,
    teacher_ends: Tensor,
    *,
    merge: str = "observed",
    matched: tuple[Tensor, Tensor] | None = None,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    beta: float = 0.5,
    floor: float = 1e-8,
    k: int | None = None,
    temperature: float = 1.0,
    average: str = "token",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    workspace: int | str = "auto",
) -> LossResult:
    """General online logit distillation: universal logit distillation of groups of tokens that span the same text.

    Patino et al. 2025, "Unlocking on-policy distillation for any model family", TRL's GOLD. Both sides tokenize one
    text. A group is what lies between two places where a token of each side ends; it has one distribution on each side,
    the *base* token's times the probabilities of the group's other tokens:

        q(v) = q_base(v) prod_j max(q_j(token_j), floor)        and p alike: together at most 1, not renormalised
        extended   sum_i |q_(i) - p_(i)|                        both sorted, see :func:`uld`
        hybrid     w_m JSD_beta(p, q)  over pairs of ids that are the same string
                   + w_u sum_i |q_(i) - p_(i)|  over all other ids

    with ``JSD_beta = beta sum p log(p / m) + (1 - beta) sum q log(q / m)``, m = beta p + (1 - beta) q, p and q not
    below ``floor``; beta = 0 and 1 are the two KL divergences, as in TRL.

    TRL takes the mean over sequences of means over groups, 0 for one without any: ``average="sequence"``, and the
    number of sequences as ``denominator`` if some may have none. It reads the logits *at* the answer's positions with
    merge="observed": for the same value pass tokens and ends that are not shifted against the logits. What follows the
    last common end is a group of its own there, if both sides have tokens left; here it has no part.

    Args:
        student: logits of [..., T] tokens, those that predict ``student_tokens``.
        teacher: of [..., U] tokens, over any vocabulary. A constant.
        student_tokens, teacher_tokens: [..., T] and [..., U] integer ids.
        student_ends, teacher_ends: [..., T] and [..., U] integers, not decreasing: where in the text each token ends
            (in bytes: the second of a tokenizer's offsets). Negative: it does not count (prompt, padding, end of
            sequence).
        merge: "observed": the base is the group's first token; "bayesian": its last, which makes q the joint
            probability of the tokens before and v.
        matched: (student ids [M], teacher ids [M]) of the same strings, no id twice: the hybrid form. None: extended.
        matched_weight, unmatched_weight: w_m and w_u, both or neither; by default M / V of the teacher and 1 less that.
            Without any unmatched id on one side there is no unmatched part, as in TRL.
        beta: in [0, 1].
        floor: > 0; TRL's is 1e-8.
        k: as in :func:`uld`, for the sorted part.
        temperature: divides both sides' logits.
        average: "token": over groups; or "sequence".
        reduction: "mean", "sum" or "none" (at the base token of each group of the student, 0 elsewhere).
        denominator, workspace: as in :func:`uld`.

    Returns:
        LossResult: "gold" in ``terms``, and "matched" and "unmatched" without their weights in the hybrid form;
        ``metrics``: "tokens", the number of groups, and "bound".

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    if k is not None:
        check_count("k", k)
    check_sequences(student, teacher)
    check_choice("merge", merge, ("observed", "bayesian"))
    check_range("beta", beta)
    check_number("floor", floor, above=0)
    check_number("temperature", temperature, above=0)
    workspace_bytes = _check(average, reduction, denominator, -100, workspace)
    ends = [check_ends(*x) for x in (("student_ends", student_ends, student), ("teacher_ends", teacher_ends, teacher))]
    tokens = [
        check_tokens("student_tokens", student_tokens, ends[0], student),
        check_tokens("teacher_tokens", teacher_tokens, ends[1], teacher),
    ]
    weights = _hybrid(matched, matched_weight, unmatched_weight, student, teacher)
    sides = [tempered(logits, temperature) for logits in (student, teacher)]
    members = groups(*ends)
    bases = [side.first if merge == "observed" else side.last for side in members]
    pairs = paired(*bases)
    with torch.no_grad():
        of_teacher = _merged(sides[1], tokens[1], members[1], bases[1], pairs.teacher, floor, workspace)
    merged = (_merged(sides[0], tokens[0], members[0], bases[0], pairs.student, floor, workspace), of_teacher)

    def rows(s: Tensor, t: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        q, p = s.softmax(-1) * log_a.exp()[:, None], t.softmax(-1) * log_b.exp()[:, None]
        if weights is None:
            value, bound = sorted_l1(q, p, k)
            return torch.stack([value, bound], -1)
        same = _jsd(*(x[:, ids].clamp(min=floor) for x, ids in zip((q, p), matched)), beta)
        if min(q.shape[-1], p.shape[-1]) == len(matched[0]):
            others = bound = torch.zeros_like(same)
        else:
            others, bound = sorted_l1(*(x.index_fill(-1, ids, 0) for x, ids in zip((q, p), matched)), k)
        value = weights[0] * same + weights[1] * others
        return torch.stack([value, weights[1] * bound, same, others], -1)

    factors = _factors(pairs, None, reduction, denominator, average)
    names = ("gold", "bound") if weights is None else ("gold", "bound", "matched", "unmatched")
    return _reduced(rows, sides, pairs, factors, merged, reduction, workspace_bytes, names)


def _check(average: str, reduction: str, denominator: object, ignore_index: int, workspace: int | str) -> int | None:
    """The workspace in bytes."""
    check_choice("average", average, AVERAGES)
    check_reduction(reduction, denominator)
    if reduction == "none" and average == "sequence":
        raise ValueError("average: 'sequence' is for reduction 'mean' or 'sum'")
    return check_execution(ignore_index, None, "auto", "auto", workspace)


def _factors(
    pairs: Pairs, weights: Tensor | None, reduction: str, denominator: float | Tensor | None, average: str
) -> Tensor:
    """[R] float64: what every row is multiplied with before all are summed."""
    factors = pairs.live.double()
    if weights is not None:
        factors = torch.where(pairs.live, weights[pairs.student].double(), 0)
    number = pairs.counts.sum()
    if average == "sequence":
        factors = factors / pairs.counts.clamp(min=1)[pairs.sequence]
        number = (pairs.counts > 0).sum()
    if reduction == "mean":
        factors = factors / (number.clamp(min=1) if denominator is None else denominator)
    return factors


def _reduced(
    rows: Callable[..., Tensor],
    sides: Sequence[Logits],
    pairs: Pairs,
    factors: Tensor,
    inputs: Sequence[Tensor],
    reduction: str,
    workspace: int | None,
    names: tuple[str, ...],
) -> LossResult:
    """``names``: of the columns that ``rows`` returns, the loss first and the bound second."""
    how = {"width": len(names), "indices": pairs.indices, "workspace": workspace}
    if reduction == "none":
        values = row_values(rows, sides, inputs, **how)
        every = [pairs.spread((factors * x).to(x.dtype), sides[0].shape) for x in values.unbind(-1)]
        loss = every[0]
    else:
        loss, values = row_loss(rows, sides, factors, inputs, **how)
        every = [torch.where(factors == 0, 0, factors * x).sum().to(x.dtype) for x in values.unbind(-1)]
    found = {name: x.detach() for name, x in zip(names, every)}
    return LossResult(loss, found, {"tokens": pairs.counts.sum(), "bound": found.pop("bound")})


# ---- groups of tokens


def _hybrid(
    matched: object, matched_weight: object, unmatched_weight: object, student: Logits, teacher: Logits
) -> tuple[float, float] | None:
    """The weights of both parts, checked; None for the extended form."""
    for name, weight in (("matched_weight", matched_weight), ("unmatched_weight", unmatched_weight)):
        if weight is not None:
            check_number(name, weight)
            if matched is None:
                raise ValueError(f"{name}: goes with matched ids")
    if matched is None:
        return None
    if not isinstance(matched, tuple) or len(matched) != 2:
        raise TypeError(f"matched: a tuple (student ids, teacher ids), got {type(matched).__name__}")
    for ids, logits in zip(matched, (student, teacher)):
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"matched: int64 tensors, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.dim() != 1 or ids.shape != matched[0].shape:
            raise ValueError(f"matched: two tensors [M], got {[list(x.shape) for x in matched]}")
        if ids.device != logits.device:
            raise ValueError(f"matched: on {ids.device}, the logits are on {logits.device}")
        if ids.device.type == "cpu" and ((ids < 0) | (ids >= logits.columns)).any():
            raise ValueError(f"matched: ids must lie in [0, {logits.columns})")
        if ids.device.type == "cpu" and len(ids.unique()) < len(ids):
            raise ValueError("matched: no id may come twice")
    if (matched_weight is None) != (unmatched_weight is None):
        raise ValueError("unmatched_weight: goes with matched_weight, both or neither")
    if matched_weight is not None:
        return float(matched_weight), float(unmatched_weight)
    share = len(matched[1]) / teacher.columns
    return share, 1 - share


def _merged(logits: Logits, tokens: Tensor, side: Groups, base: Tensor, at: Tensor, floor: float, workspace) -> Tensor:
    """[R]: the log-probability of a group's tokens but the base, for the groups whose base tokens are ``at``."""
    others = (side.member & ~base).reshape(-1)
    targets = torch.where(others, tokens.reshape(-1), -100).view(logits.shape)
    found = logprobs(logits, targets, workspace=workspace).logprob.reshape(-1)
    found = torch.where(others, found.clamp(min=math.log(floor)), 0)
    group = side.index + torch.arange(len(base), device=base.device)[:, None] * base.shape[1]
    group = torch.where(side.member, group, 0).reshape(-1)
    total = torch.zeros_like(found)
    add_at(total, group, found)
    return total[group[at]]


def _jsd(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """Of rows of positive numbers, whose sums need not be 1."""
    if beta in (0, 1):
        return expectation(q, q.log() - p.log()) if beta else expectation(p, p.log() - q.log())
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * expectation(p, p.log() - log_m) + (1 - beta) * expectation(q, q.log() - log_m)
