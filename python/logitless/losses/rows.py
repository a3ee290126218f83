"""What losses of whole rows [C, V] share: -inf logits and probabilities of 0 make no NaN, in value or gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expectation(p: Tensor, x: Tensor) -> Tensor:
    """``sum_v p_v x_v``, where tokens of probability 0 count for nothing, whatever x is there: 0 log 0 = 0."""
    return (p * x.masked_fill(p == 0, 0)).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q)."""
    return expectation(log_p.exp(), log_p - log_q)


def lowest(x: Tensor) -> float:
    """In place of -inf where a gradient would be NaN: its softmax is 0, and differences of it are finite."""
    return torch.finfo(x.dtype).min / 4


def without(x: Tensor, ids: Tensor) -> Tensor:
    """x with the logits at ``ids`` [C, k] taken out; lowest numbers, so that a row may lose all it had."""
    return x.scatter(-1, ids, lowest(x))


def sorted_l1(q: Tensor, p: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """``sum_i |q_(i) - p_(i)|``, both sorted in descending order and the shorter padded with zeros: ([C], bound [C]).

    Args:
        q: [C, V] not negative. p: [C, W], alike.
        k: None: exact, by sorting all. Else the k largest of each side are compared, and what is left of each as one
            number: with R_q and R_p the sums of the rest,

                sum_(i <= k) |q_(i) - p_(i)| + |R_q - R_p|  <=  exact  <=  the same + 2 min(R_q, R_p)

            since sum_(i > k) |q_(i) - p_(i)| lies between |R_q - R_p| and R_q + R_p. The left side is the value,
            2 min(R_q, R_p) the bound on what it lacks.
    """
    most = max(q.shape[-1], p.shape[-1])
    if k is None or k >= most:
        q, p = (F.pad(x.sort(-1, descending=True).values, (0, most - x.shape[-1])) for x in (q, p))
        return (q - p).abs().sum(-1), q.new_zeros(q.shape[0])
    tops, rests = [], []
    for x in (q, p):
        top, ids = x.topk(min(k, x.shape[-1]))
        tops.append(F.pad(top, (0, k - top.shape[-1])))
        rests.append(x.scatter(-1, ids, 0).sum(-1))  # not 1 less the others: it may be small
    value = (tops[0] - tops[1]).abs().sum(-1) + (rests[0] - rests[1]).abs()
    return value, 2 * torch.minimum(*rests).detach()
