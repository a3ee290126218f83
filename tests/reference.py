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


def kept(s, *filters) -> Tensor:
    """[..., V] bool: what is left after filters ("min_p", p), ("top_k", k), ("top_p", p), ("ids", [..., K]) in order.

    By sorting. Tokens as probable as the least probable one that is kept are kept too.
    """
    with torch.no_grad():
        mask = torch.ones_like(s, dtype=torch.bool)
        for name, parameter in filters:
            q = torch.where(mask, s, -torch.inf).softmax(-1)
            ordered = q.sort(-1, descending=True).values
            if name == "min_p":
                mask &= q >= parameter * ordered[..., :1]
            elif name == "top_k":
                mask &= q >= ordered[..., min(parameter, q.shape[-1]) - 1, None]
            elif name == "top_p":
                needed = ordered.cumsum(-1) - ordered < parameter
                mask &= q >= torch.where(needed, ordered, 1).amin(-1, keepdim=True)
            else:
                found = torch.zeros(*s.shape[:-1], s.shape[-1] + 1, dtype=torch.bool, device=s.device)
                mask &= found.scatter(-1, parameter % found.shape[-1], True)[..., :-1]  # -1: the column that is cut
        return mask


def filtered(s, mask) -> Tensor:
    """Logits of the kept tokens, whose choice is a constant; -inf for the others."""
    return torch.where(mask, s, -torch.inf)


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


# ---- divergences; a parameter is a number or a tensor with one per row


def forward_kl(s, t):
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    return _xlogy(log_p.exp(), log_p - log_q).sum(-1)


def reverse_kl(s, t):
    return forward_kl(t, s)


def symmetric_kl(s, t, weight=0.5):
    return (1 - weight) * forward_kl(s, t) + weight * reverse_kl(s, t)


def jsd(s, t, beta=0.5):
    if not isinstance(beta, Tensor) and beta in (0, 1):
        return reverse_kl(s, t) if beta else forward_kl(s, t)
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    log_m = _log_mixture(beta, log_p, log_q)
    teacher = _xlogy(log_p.exp(), log_p - log_m).sum(-1)
    student = _xlogy(log_q.exp(), log_q - log_m).sum(-1)
    return beta * teacher + (1 - beta) * student


def skew_forward_kl(s, t, alpha=0.1):
    """KL(p || alpha p + (1 - alpha) q)."""
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    return _xlogy(log_p.exp(), log_p - _log_mixture(alpha, log_p, log_q)).sum(-1)


def skew_reverse_kl(s, t, alpha=0.1, detach_mixture=False):
    """KL(q || alpha q + (1 - alpha) p)."""
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    log_m = _log_mixture(alpha, log_q.detach() if detach_mixture else log_q, log_p)
    return _xlogy(log_q.exp(), log_q - log_m).sum(-1)


def tvd(s, t):
    return 0.5 * (t.softmax(-1) - s.softmax(-1)).abs().sum(-1)


def squared_hellinger(s, t):
    return 1 - ((s.log_softmax(-1) + t.log_softmax(-1)) / 2).exp().sum(-1)


def bhattacharyya(s, t):
    return -torch.logsumexp((s.log_softmax(-1) + t.log_softmax(-1)) / 2, -1)


def alpha(s, t, alpha=0.5):
    """(1 - sum p^a q^(1-a)) / (a (1-a)), KL(p || q) at a = 1, KL(q || p) at a = 0."""
    alpha = _per_row(alpha, s)
    inside = (alpha != 0) & (alpha != 1)
    a = torch.where(inside, alpha, 0.5)
    value = (1 - (a[..., None] * t.log_softmax(-1) + (1 - a[..., None]) * s.log_softmax(-1)).exp().sum(-1)) / (
        a * (1 - a)
    )
    return torch.where(inside, value, torch.where(alpha == 1, forward_kl(s, t), reverse_kl(s, t)))


def renyi(s, t, alpha=0.5):
    """log sum p^a q^(1-a) / (a - 1), KL(p || q) at a = 1."""
    if not isinstance(alpha, Tensor) and alpha == 1:
        return forward_kl(s, t)
    a = _per_row(alpha, s)
    return torch.logsumexp(a[..., None] * t.log_softmax(-1) + (1 - a[..., None]) * s.log_softmax(-1), -1) / (a - 1)


def chi2_pearson(s, t):
    p, q = t.log_softmax(-1).exp(), s.log_softmax(-1).exp()
    return ((p - q) ** 2 / q).sum(-1)


def chi2_neyman(s, t):
    return chi2_pearson(t, s)


def cauchy_schwarz(s, t):
    """-log(sum p q / sqrt(sum p^2 sum q^2))."""
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    both, of_p, of_q = (torch.logsumexp(x, -1) for x in (log_p + log_q, 2 * log_p, 2 * log_q))
    return (of_p + of_q) / 2 - both


def alpha_beta(s, t, a=0.2, b=0.7):
    """ABKD, with the limits where a, b or a + b is 0; every case row by row, since parameters may be per row."""
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    a, b = _per_row(a, s)[..., None], _per_row(b, s)[..., None]
    c, ratio = a + b, log_p - log_q

    def power(x, log):
        return (x * log).exp()

    def nonzero(x):
        return torch.where(x == 0, 1, x)

    product = power(a, log_p) * power(b, log_q)
    value = -(product - a / nonzero(c) * power(c, log_p) - b / nonzero(c) * power(c, log_q)) / nonzero(a * b)
    of_p = (power(a, log_p) * (a * ratio - 1) + power(a, log_q)) / nonzero(a) ** 2  # b = 0
    of_q = (power(b, log_p) - power(b, log_q) * (1 + b * ratio)) / nonzero(b) ** 2  # a = 0
    opposite = (power(a, ratio) - a * ratio - 1) / nonzero(a) ** 2  # a + b = 0
    for limit, taken in ((a == 0, of_q), (b == 0, of_p), (c == 0, opposite)):
        value = torch.where(limit, taken, value)
    return torch.where((a == 0) & (b == 0), ratio**2 / 2, value).sum(-1)


def softened_reverse_kl(s, t):
    """sum q f(p/q) with f(r) = (r + 1) log(1/2 + 1/(2r))."""
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    mixed = torch.logaddexp(log_p, log_q)
    return _xlogy(mixed.exp(), mixed - log_p - math.log(2)).sum(-1)


def adaptive_kl(s, t, mu=0.5):
    """KL(p || q) and KL(q || p), weighted by the share of sum |p - q| in the head of p, whole ties, and in the rest."""
    with torch.no_grad():
        p, order = t.softmax(-1).sort(-1, descending=True)
        gap = (p - s.softmax(-1).gather(-1, order)).abs()
        last_equal = torch.searchsorted(-p, -p, right=True) - 1
        head = (p.cumsum(-1).gather(-1, last_equal) <= mu) | (p == p[..., :1])
        total = gap.sum(-1)
        share = torch.where(total == 0, 0.5, torch.where(head, gap, 0).sum(-1) / total)
    return share * forward_kl(s, t) + (1 - share) * reverse_kl(s, t)


def _per_row(parameter, s):
    return torch.as_tensor(parameter, dtype=s.dtype).expand(s.shape[:-1])


def _log_mixture(weight, log_p, log_q):
    """log(weight p + (1 - weight) q)."""
    weight = _per_row(weight, log_p)[..., None]
    return torch.logaddexp(log_p + weight.log(), log_q + (-weight).log1p())


def _xlogy(probability, log):
    """probability * log with 0 * (-inf) = 0, in value and gradient."""
    return probability * torch.where(probability == 0, 0.0, log)
