"""Scores of tokens and sequences, and those with the largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import Logits, check_alike, check_floating, check_number
from logitless.losses.checks import check_choice
from logitless.ops.logprobs import logprobs


@dataclass(frozen=True)
class Surprisal:
    """Per token [...], in nats, 0 where ignored."""

    surprisal: Tensor  # -log p(target)
    entropy: Tensor  # the surprisal that the model expects


@torch.no_grad()
def surprisal(logits: Logits, targets: Tensor, *, ignore_index: int = -100, workspace: int | str = "auto") -> Surprisal:
    """Surprisal of every target, and the entropy of the distribution that it was drawn from. Products: 1G.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    stats = logprobs(logits, targets, entropy=True, ignore_index=ignore_index, workspace=workspace)
    return Surprisal(-stats.logprob, stats.entropy)


@torch.no_grad()
def excess_loss(
    student: Logits, reference: Logits, targets: Tensor, *, ignore_index: int = -100, workspace: int | str = "auto"
) -> Tensor:
    """``-log p_student(y) + log p_reference(y)`` per token [...]; 0 where ignored. Products: 2G.

    Rho-1 (Lin et al. 2024, arXiv 2404.07965, section 2.2) trains on the tokens where it is largest: those that the
    student can still learn. MiniPLM (Gu et al. 2025) keeps the sequences where the small reference model's mean exceeds
    the teacher's most: ``sequence_mean(excess_loss(reference, teacher, y), y)``.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_alike(student=student, reference=reference)
    options = {"ignore_index": ignore_index, "workspace": workspace}
    return logprobs(reference, targets, **options).logprob - logprobs(student, targets, **options).logprob


def sequence_mean(scores: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean of scores [..., L] over the tokens of each sequence that are not ignored, [...]; 0 where there are none."""
    _check_scores(scores, targets)
    live = targets != ignore_index
    return torch.where(live, scores, 0).sum(-1) / live.sum(-1).clamp(min=1)


def select_top(
    scores: Tensor, ratio: float, *, targets: Tensor | None = None, per: str = "batch", ignore_index: int = -100
) -> Tensor:
    """Which entries have the largest scores: bool of their shape.

    Of n that count, ``ratio * n`` are selected: the nearest integer, and at least one if n > 0. Of equal scores the
    first come first. Train on the selection with ``targets.where(mask, ignore_index)``: the mean is over selected
    tokens then, the loss of Rho-1.

    Args:
        scores: [...] floating, e.g. of :func:`excess_loss` (tokens) or :func:`sequence_mean` (sequences).
        ratio: in (0, 1].
        targets: [...]; entries equal to ``ignore_index`` do not count.
        per: "batch" ranks all entries together, "sequence" those of the last dimension.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_number("ratio", ratio, above=0)
    if ratio > 1:
        raise ValueError(f"ratio: must lie in (0, 1], got {ratio}")
    check_choice("per", per, ("batch", "sequence"))
    _check_scores(scores, targets)
    live = torch.ones_like(scores, dtype=torch.bool) if targets is None else targets != ignore_index
    shape = scores.shape
    if per == "batch":
        scores, live = scores.reshape(-1), live.reshape(-1)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ignored = (~live).gather(-1, order).to(torch.uint8)
    order = order.gather(-1, ignored.sort(dim=-1, stable=True).indices)  # they come last
    count = live.sum(-1, keepdim=True)
    wanted = (ratio * count.double()).round().clamp(min=1).minimum(count)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.zeros_like(live).scatter(-1, order, rank < wanted).view(shape)


def _check_scores(scores: Tensor, targets: Tensor | None) -> None:
    check_floating("scores", scores)
    if scores.dim() < 1:
        raise ValueError("scores: needs at least one dimension")
    if targets is None:
        return
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: an integer tensor, got {type(targets).__name__}")
    if targets.shape != scores.shape:
        raise ValueError(f"targets: shape {list(targets.shape)}, the scores have {list(scores.shape)}")
