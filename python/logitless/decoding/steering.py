"""Steering vector decoding: a direction in the space of logits, and how far to go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.decoding.rows import check_targets_of, check_workspace, compute_dtype, empty, of_targets, row_blocks
from logitless.engine.scan import blocks, chunks
from logitless.logits import Logits, check_alike, check_number
from logitless.losses.checks import check_count, check_range
from logitless.losses.rows import kl


@dataclass(frozen=True)
class Steering:
    """The k tokens that are most probable under the tuned model, [..., k], and what belongs to a whole row, [...]."""

    indices: Tensor
    logits: Tensor  # the tuned model's, scaled
    direction: Tensor
    divergence: Tensor  # KL(tuned || pretrained), nats
    strength: Tensor | None  # the optimal mu


@torch.no_grad()
def svdecode(
    tuned: Logits,
    pretrained: Logits,
    *,
    top_k: int,
    targets: Tensor | None = None,
    alpha: float = 0.1,
    outside: float = -math.inf,
    eps: float = 1e-12,
    ignore_index: int = -100,
    workspace: int | str = "auto",
) -> Steering:
    """Steering vector decoding (SVDecode, Hu et al. 2025, arXiv 2509.15888, algorithms 1 and 2).

    With P the warm-started model and P_0 the pretrained one, decode from ``steer(logits of P, direction, mu)``, where

        direction_v = P_v (KL(P || P_0) - log(P_v / P_0v))        if P_v >= alpha max P, else lambda (``outside``)
        mu* = <e_y - P, direction> / (||direction||^2 + eps)      the optimal strength for a target y

    and one mu for all tokens is the mean of mu* over calibration data, without labels at decoding time.

    The direction is *minus* the gradient of KL(P || P_0) by the logits of P, as the paper has it: a positive mu leads
    back to the pretrained model. mu* carries the sign, and is negative where the target's probability rose in tuning.
    Tokens outside have no part in the sums of mu* (the paper's lambda of -inf would make them infinite).

    A pretrained probability of 0 where the tuned one is not makes the divergence infinite and the direction NaN.
    Products: 2G.

    Args:
        tuned, pretrained: logits of [...] tokens over one vocabulary.
        top_k: how many tokens per row to return.
        targets: [...] token ids; with them ``strength`` is computed, 0 where ignored.
        alpha: in [0, 1]: tokens less probable than alpha times the row's maximum are not steered; 0: all are.
        outside: direction of tokens that are not steered: -inf forbids them, 0 leaves their logits.
        eps: of mu*.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    _check_steering(tuned, pretrained, alpha, outside)
    check_count("top_k", top_k, tuned.columns)
    check_number("eps", eps, low=0)
    if targets is not None:
        check_targets_of(tuned, targets, ignore_index)
    budget = check_workspace(workspace, ignore_index)
    kind = compute_dtype([tuned, pretrained])
    indices = empty(tuned, torch.long, top_k)
    logits, direction = empty(tuned, kind, top_k), empty(tuned, kind, top_k)
    found = empty(tuned, kind)
    strength = None if targets is None else empty(tuned, kind)
    for rows, (s, s_0) in row_blocks([tuned, pretrained], budget):
        log_p, steps, inside, moved = _direction(s, s_0, alpha)
        found[rows] = moved
        logits[rows], indices[rows] = s.topk(top_k, -1)
        direction[rows] = torch.where(inside, steps, outside).gather(-1, indices[rows])
        if targets is not None:
            steps = torch.where(inside, steps, 0)
            gains = steps - (log_p.exp() * steps).sum(-1, keepdim=True)
            gain = of_targets(gains, targets.reshape(-1)[rows], ignore_index)
            strength[rows] = gain / ((steps * steps).sum(-1) + eps)
    found = (indices, logits, direction, found, strength)
    return Steering(*[None if x is None else x.view(*tuned.shape, *x.shape[1:]) for x in found])


def svdecode_chunks(
    tuned: Logits,
    pretrained: Logits,
    *,
    alpha: float = 0.1,
    outside: float = -math.inf,
    workspace: int | str = "auto",
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The direction of :func:`svdecode` over the whole vocabulary, a chunk of rows at a time.

    Yields:
        (rows, logits [C, V], direction [C, V]): ``rows`` is a slice of the flattened tokens, ``logits`` are the tuned
        model's. Use them before the next chunk is asked for, e.g. ``steer(logits, direction, mu).argmax(-1)``.

    Raises:
        TypeError, ValueError: naming the argument, when called.
    """
    _check_steering(tuned, pretrained, alpha, outside)
    budget = check_workspace(workspace)

    @torch.no_grad()
    def walk() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for rows, (s, s_0) in chunks([tuned, pretrained], budget):
            for block in blocks(s):
                _, steps, inside, _ = _direction(s[block], s_0[block], alpha)
                s_0[block] = torch.where(inside, steps, outside)
            yield rows, s, s_0

    return walk()


def steer(logits: Tensor, direction: Tensor, mu: float | Tensor) -> Tensor:
    """``logits + mu * direction``, and -inf where the direction is -inf, also for a negative mu (or one of 0)."""
    return torch.where(direction == -torch.inf, -torch.inf, logits + mu * direction)


def _check_steering(tuned: Logits, pretrained: Logits, alpha: float, outside: float) -> None:
    check_alike(tuned=tuned, pretrained=pretrained)
    check_range("alpha", alpha)
    if outside != -math.inf:
        check_number("outside", outside)


def _direction(s: Tensor, s_0: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log P, direction without its constraint, whether a token is inside, KL(P || P_0)) of a chunk."""
    log_p, log_p_0 = s.log_softmax(-1), s_0.log_softmax(-1)
    moved = kl(log_p, log_p_0)
    steps = torch.where(log_p == -torch.inf, 0, log_p.exp() * (moved[:, None] - (log_p - log_p_0)))
    threshold = math.log(alpha) if alpha else -math.inf
    return log_p, steps, log_p >= log_p.amax(-1, keepdim=True) + threshold, moved
