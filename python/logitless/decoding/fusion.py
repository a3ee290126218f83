"""Dynamic logits fusion: small experts steer a large model, with weights per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.decoding.rows import check_workspace, compute_dtype, empty, row_blocks
from logitless.logits import Logits, check_alike, check_number
from logitless.losses.checks import check_count
from logitless.losses.rows import kl

ALPHAS = tuple([i / 10 for i in range(21)])  # 0, 0.1, ..., 2


@dataclass(frozen=True)
class Fusion:
    """Per token: the experts' weights [..., T], and the objective that they reach [...]."""

    alphas: Tensor
    objective: Tensor


@torch.no_grad()
def dynamic_logits_fusion(
    large: Logits,
    small: Logits,
    experts: Sequence[Logits],
    *,
    alphas: Sequence[float] = ALPHAS,
    sweeps: int = 2,
    workspace: int | str = "auto",
) -> Fusion:
    """Weights of small experts for a large model, per token (Fan et al. 2024, arXiv 2406.15480, section 3).

    With P = softmax(M_L) the large model, Q = softmax(M_S) the small one, Q_t = softmax(M_t) its fine-tuned experts and
    ``P~ = softmax(M_L + sum_t alpha_t (M_t - M_S))``, the weights minimise

        sum_t [KL(P~ || P) - KL(Q_t || Q)]^2 + [KL(P || P~) - KL(Q || Q_t)]^2

    so that the large model moves as far as the small ones did. All candidates are evaluated on the same chunk of
    logits: a product per head in all, (T + 2) G, and one log-sum-exp and two first moments per candidate.

    One expert: the best of ``alphas``, exactly. Several: coordinate descent over the same grid, from its first value
    for every expert, ``sweeps`` times through the experts; the objective never rises, the minimum may be a local one.

    Decode with ``guided([large, small, *experts], [1, -alphas.sum(-1), *alphas.unbind(-1)])``.

    Args:
        large, small, experts: logits of [...] tokens over one vocabulary. A token that small excludes (-inf) must be
            excluded by large and the experts too.
        alphas: grid of candidates, on the paper's interval [0, 2] by default.
        sweeps: passes through the experts, where there are several.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    if not isinstance(experts, Sequence) or not experts:
        raise ValueError("experts: needs at least one")
    check_alike(large=large, small=small, **{f"experts[{t}]": expert for t, expert in enumerate(experts)})
    if not isinstance(alphas, Sequence) or not alphas:
        raise ValueError("alphas: a sequence of at least one number")
    for i, alpha in enumerate(alphas):
        check_number(f"alphas[{i}]", alpha)
    check_count("sweeps", sweeps)
    budget = check_workspace(workspace)
    heads = [large, small, *experts]
    kind = compute_dtype(heads)
    weights, objective = empty(large, kind, len(experts)), empty(large, kind)
    for rows, logits in row_blocks(heads, budget):
        weights[rows], objective[rows] = _fusion(logits, alphas, sweeps if len(experts) > 1 else 1)
    return Fusion(weights.view(*large.shape, -1), objective.view(large.shape))


def _fusion(logits: list[Tensor], grid: Sequence[float], sweeps: int) -> tuple[Tensor, Tensor]:
    """Weights [C, T] and objective [C] of a chunk."""
    log_p, log_q, *experts = (z.log_softmax(-1) for z in logits)
    deltas = [torch.where(log_t == log_q, 0, log_t - log_q) for log_t in experts]  # 0 where both exclude a token
    wanted = [(kl(log_t, log_q), kl(log_q, log_t)) for log_t in experts]
    weights = log_p.new_full((len(log_p), len(experts)), float(grid[0]))
    best = log_p.new_zeros(len(log_p))
    for _ in range(sweeps):
        for t, delta in enumerate(deltas):
            base = log_p.clone()
            for u, other in enumerate(deltas):
                if u != t:
                    base += torch.where(weights[:, u, None] == 0, 0, weights[:, u, None] * other)
            for i, alpha in enumerate(grid):
                log_fused = (base + alpha * delta if alpha else base).log_softmax(-1)
                moved = kl(log_fused, log_p), kl(log_p, log_fused)
                value = sum((moved[0] - goal[0]) ** 2 + (moved[1] - goal[1]) ** 2 for goal in wanted)
                better = value < best if i else torch.ones_like(value, dtype=torch.bool)
                best = torch.where(better, value, best)
                weights[:, t] = torch.where(better, alpha, weights[:, t])
    return weights, best
