"""Dense definitions, written from the formulas: the only truth. In float64 they are the oracle, in float32 the baseline
"torch with materialised logits" that the accuracy bar is relative to. The package never imports this file.

Per row: s student logits, t teacher logits, q = softmax(s), p = softmax(t), y target.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(hidden, weight, bias=None, *, scale=1.0, softcap=None, temperature=1.0, vocab_size=None) -> Tensor:
    """softcap * tanh(scale * (h w^T + b) / softcap) / temperature."""
    z = hidden @ weight.T
    return transform(
        z if bias is None else z + bias, scale=scale, softcap=softcap, temperature=temperature, vocab_size=vocab_size
    )


def transform(z, *, scale=1.0, softcap=None, temperature=1.0, vocab_size=None) -> Tensor:
    z = scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype)[..., None]
    return (z / temperature)[..., :vocab_size]


def cross_entropy(s, y, *, label_smoothing=0.0, class_weights=None):
    class_weights = None if class_weights is None else class_weights.to(s.dtype)
    return F.cross_entropy(s, y, weight=class_weights, label_smoothing=label_smoothing, reduction="none")


def z_loss(s):
    return torch.logsumexp(s, -1) ** 2


def entropy(s):
    log_q = s.log_softmax(-1)
    return -_xlogy(log_q.exp(), log_q).sum(-1)


def logprob(s, y):
    return s.log_softmax(-1).gather(-1, y[..., None])[..., 0]


def target_logit(s, y):
    return s.gather(-1, y[..., None])[..., 0]


def lse(s):
    return torch.logsumexp(s, -1)


def collision(s):
    return (s.softmax(-1) ** 2).sum(-1)


def forward_kl(s, t):
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    return _xlogy(log_p.exp(), log_p - log_q).sum(-1)


def reverse_kl(s, t):
    return forward_kl(t, s)


def symmetric_kl(s, t, weight=0.5):
    return (1 - weight) * forward_kl(s, t) + weight * reverse_kl(s, t)


def jsd(s, t, beta=0.5):
    if beta == 0:
        return forward_kl(s, t)
    if beta == 1:
        return reverse_kl(s, t)
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher = _xlogy(log_p.exp(), log_p - log_m).sum(-1)
    student = _xlogy(log_q.exp(), log_q - log_m).sum(-1)
    return beta * teacher + (1 - beta) * student


def skew_forward_kl(s, t, alpha=0.1):
    """KL(p || alpha p + (1 - alpha) q)."""
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha)) if alpha else log_q
    return _xlogy(log_p.exp(), log_p - log_m).sum(-1)


def skew_reverse_kl(s, t, alpha=0.1):
    """KL(q || alpha q + (1 - alpha) p)."""
    return skew_forward_kl(t, s, alpha)


def tvd(s, t):
    return 0.5 * (t.softmax(-1) - s.softmax(-1)).abs().sum(-1)


def squared_hellinger(s, t):
    return 1 - ((s.log_softmax(-1) + t.log_softmax(-1)) / 2).exp().sum(-1)


def _xlogy(probability, log):
    """probability * log with 0 * (-inf) = 0, in value and gradient."""
    return probability * torch.where(probability == 0, 0.0, log)
