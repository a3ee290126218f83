"""Weighted products of distributions: contrastive and value-guided decoding, mixtures of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.decoding.rows import (
    check_targets_of,
    check_workspace,
    compute_dtype,
    concatenated,
    empty,
    of_targets,
    pick,
    row_blocks,
)
from logitless.logits import LinearLogits, Logits, check_alike, check_number, check_per_token
from logitless.losses.checks import check_count
from logitless.losses.rows import expectation


@dataclass(frozen=True)
class Guided:
    """Of the combined distribution, per token [...]; None where not asked for."""

    entropy: Tensor  # nats
    logprob: Tensor | None  # of the targets, 0 where ignored
    topk_logprobs: Tensor | None  # [..., k], descending
    topk_indices: Tensor | None  # [..., k]
    sample: Tensor | None  # int64
    sample_logprob: Tensor | None


@torch.no_grad()
def guided(
    heads: Sequence[Logits],
    alphas: Sequence[float | Tensor],
    *,
    targets: Tensor | None = None,
    top_k: int | None = None,
    sample: bool = False,
    generator: torch.Generator | None = None,
    ignore_index: int = -100,
    workspace: int | str = "auto",
) -> Guided:
    """The product of distributions ``p(v) ~ prod_i p_i(v) ** alpha_i``, normalised once, in one pass over all heads.

    ``log p = log_softmax(sum_i alpha_i log_softmax(z_i)) = log_softmax(sum_i alpha_i z_i)``: the heads' normalisers are
    constants of a row and cancel, so heads may also give values that are not log-probabilities.

    ==========================================  ===================================  =================================
    method                                      heads                                alphas
    ==========================================  ===================================  =================================
    GenARM (Xu et al. 2025)                     base, autoregressive reward models   1, then w_i / beta each
    value-guided decoding                       base, token values Q(s, v)           1, 1 / beta
    contrastive decoding (Li et al. 2023)       expert, amateur                      1, -1 (without its candidate set)
    proxy tuning, DExperts (Liu et al. 2021)    base, expert, anti-expert            1, a, -a
    multi-objective decoding (Shi et al. 2024)  one policy per objective             weights of sum 1
    ==========================================  ===================================  =================================

    A token that is impossible (a logit of -inf) for any head of an alpha other than 0 is impossible. Divide every alpha
    by T for a temperature of the combination. Products: the sum of the heads' G. Memory: a chunk of logits per head;
    :func:`combine` describes the same distribution to every other operation, at the price of a copy of the weights.

    Args:
        heads: logits of [...] tokens over one vocabulary; hidden sizes are free.
        alphas: per head a number, or a tensor with one per token [...].
        targets: [...] token ids whose log-probabilities are wanted; those equal to ``ignore_index`` give 0.
        top_k: how many of the most probable tokens to return.
        sample: draw one token per row, by the largest of log-probability plus Gumbel noise.
        generator: of the noise. It is drawn chunk by chunk: the same seed gives the same tokens at the same workspace.
        workspace: bytes for chunks of logits.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    first = _check_heads(heads)
    alphas = _check_alphas(alphas, heads)
    if targets is not None:
        check_targets_of(first, targets, ignore_index)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: a torch.Generator, got {type(generator).__name__}")
    if top_k is not None:
        check_count("top_k", top_k, first.columns)
    budget = check_workspace(workspace, ignore_index)
    kind = compute_dtype(heads)
    entropy = empty(first, kind)
    logprob = None if targets is None else empty(first, kind)
    best = None if top_k is None else empty(first, kind, top_k)
    ids = None if top_k is None else empty(first, torch.long, top_k)
    drawn = empty(first, torch.long) if sample else None
    drawn_logprob = empty(first, kind) if sample else None
    for rows, logits in row_blocks(heads, budget):
        log_p = _combined(logits, [a[rows, None] if isinstance(a, Tensor) else a for a in alphas]).log_softmax(-1)
        entropy[rows] = -expectation(log_p.exp(), log_p)
        if targets is not None:
            logprob[rows] = of_targets(log_p, targets.reshape(-1)[rows], ignore_index)
        if top_k is not None:
            best[rows], ids[rows] = log_p.topk(top_k, -1)
        if sample:
            noise = torch.empty_like(log_p).exponential_(generator=generator).log_()
            drawn[rows] = (log_p - noise).argmax(-1)
            drawn_logprob[rows] = pick(log_p, drawn[rows])
    found = (entropy, logprob, best, ids, drawn, drawn_logprob)
    return Guided(*[None if x is None else x.view(*first.shape, *x.shape[1:]) for x in found])


def combine(heads: Sequence[LinearLogits], alphas: Sequence[float | Tensor]) -> LinearLogits:
    """One head for ``sum_i alpha_i z_i``: ``[a_1 h_1, a_2 h_2, ...] [W_1, W_2, ...]^T``, a_i = alpha_i scale_i / T_i.

    Its softmax is the distribution of :func:`guided`, and every operation of the library takes it: losses and
    statistics, with gradients to the heads' own hidden states and weights.

    It copies the weights: V x (H_1 + H_2 + ...) elements, beside the heads' own, made anew at each call. Build it once
    where the weights stay and only hidden states change (``dataclasses.replace(combined, hidden=...)``), or use
    :func:`guided`, which copies nothing, but has no gradient. In low precision a_i h_i is rounded once, unless a_i = 1.

    Args:
        heads: linear logits of [...] tokens over one vocabulary, of one type; without softcap.
        alphas: per head a number, or a tensor with one per token [...].

    Raises:
        TypeError, ValueError: naming the argument; a head with a softcap is not linear; a bias needs factors (alphas,
            temperatures) that are numbers, since those that differ per token make it another for every token.
    """
    first = _check_heads(heads)
    alphas = [a if isinstance(a, (int, float)) else a.view(first.shape) for a in _check_alphas(alphas, heads)]
    hiddens, weights, bias = [], [], None
    for i, (head, alpha) in enumerate(zip(heads, alphas, strict=True)):
        if not isinstance(head, LinearLogits):
            raise TypeError(f"heads[{i}]: a LinearLogits, got {type(head).__name__}; guided() takes any logits")
        if head.softcap is not None:
            raise ValueError(f"heads[{i}]: has a softcap, so it is not linear; use guided()")
        if head.dtype != first.dtype:
            raise ValueError(f"heads[{i}]: {head.dtype}, heads[0] is {first.dtype}; cast one of them")
        factor = alpha * head.scale / head.temperature
        per_token = isinstance(factor, Tensor)
        if head.bias is not None:
            if per_token:
                raise ValueError(f"heads[{i}]: a bias with an alpha or temperature per token; use guided()")
            share = factor * head.bias[: head.columns]
            bias = share if bias is None else bias + share
        if per_token or factor != 1:
            hiddens.append((head.hidden * (factor[..., None] if per_token else factor)).to(head.dtype))
        else:
            hiddens.append(head.hidden)
        weights.append(head.weight[: head.columns])
    return LinearLogits(concatenated(hiddens), concatenated(weights), bias)


def _combined(logits: list[Tensor], alphas: list[float | Tensor]) -> Tensor:
    """sum_i alpha_i z_i [C, V]; -inf where a head of an alpha other than 0 has -inf, whatever the alpha's sign."""
    total, impossible = torch.zeros_like(logits[0]), torch.zeros_like(logits[0], dtype=torch.bool)
    for z, alpha in zip(logits, alphas, strict=True):
        excluded = z == -torch.inf
        impossible |= excluded & (alpha != 0)
        total += alpha * torch.where(excluded, 0, z)
    return total.masked_fill_(impossible, -torch.inf)


def _check_heads(heads: object) -> Logits:
    if not isinstance(heads, Sequence):
        raise TypeError(f"heads: a sequence of logits, got {type(heads).__name__}")
    if not heads:
        raise ValueError("heads: needs at least one")
    check_alike(**{f"heads[{i}]": head for i, head in enumerate(heads)})
    return heads[0]


def _check_alphas(alphas: Sequence[float | Tensor], heads: Sequence[Logits]) -> list[float | Tensor]:
    """One per head; those per token flattened."""
    if not isinstance(alphas, Sequence):
        raise TypeError(f"alphas: a sequence of numbers or tensors, got {type(alphas).__name__}")
    if len(alphas) != len(heads):
        raise ValueError(f"alphas: {len(alphas)}, there are {len(heads)} heads")
    for i, (alpha, head) in enumerate(zip(alphas, heads, strict=True)):
        if isinstance(alpha, Tensor):
            check_per_token(f"alphas[{i}]", alpha, head)
        else:
            check_number(f"alphas[{i}]", alpha)
    return [alpha.reshape(-1) if isinstance(alpha, Tensor) else alpha for alpha in alphas]
