"""The one table of divergences between the teacher's distribution p and the student's q over one row of logits.

A divergence is one row of :data:`TABLE`. Its *family* says how it is computed (``logitless.backends`` has the kernels):

``moments``
    a mix ``a * KL(p || q) + b * KL(q || p)`` of the two moments that one online pass collects;
``generic``
    ``D = sum_j q_j f(p_j / q_j)`` for a convex f with f(1) = 0; with ``g(r) = f(r) - r f'(r)`` its gradient with
    respect to the student's scaled logits is ``q_j (g_j - E_q[g])``. The row gives ``q f`` and ``q g`` pointwise; f is
    chosen with f'(1) = 0, which adds nothing to the sum and makes every summand non-negative, of second order in p - q.

The gradient with respect to the *teacher's* logits is the student gradient of the ``adjoint`` divergence with the two
sides exchanged (``f*(r) = r f(1/r)``), so no row states it twice.

The functor of the same name in csrc/math/divergences.h states the generic formulas for the C++ kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """A number in [low, high] and what it means."""

    name: str
    default: float
    low: float
    high: float


@dataclass(frozen=True)
class Definition:
    """One row of the table; ``parameters`` below are the values of ``self.parameters``, in their order."""

    name: str
    family: str  # "moments" or "generic"
    adjoint: Callable[..., tuple[str, tuple[float, ...]]]  # parameters -> (name, parameters) of D(q, p) as D'(p, q)
    parameters: tuple[Parameter, ...] = ()
    mix: Callable[..., tuple[float, float]] | None = None  # moments: parameters -> (a, b)
    pointwise: Callable[..., tuple[Tensor, Tensor]] | None = None  # generic: (log p, log q, *parameters) -> (q f, q g)
    limits: Callable[..., tuple[str, tuple[float, ...]] | None] = lambda *_: None  # where another row takes over


def _log_mixture(log_p: Tensor, log_q: Tensor, of_p: Tensor) -> tuple[Tensor, Tensor]:
    """(log(p/m), log(q/m)) of m = of_p p + (1 - of_p) q.

    With d = log p - log q, log(m / max(p, q)) = log1p(a expm1(-|d|)) where a is the weight of the smaller of the two:
    exact for p close to q, and finite wherever either is 0.
    """
    d = log_p - log_q
    log_m = torch.log1p(torch.where(d > 0, 1 - of_p, of_p) * torch.expm1(-d.abs()))
    return d.clamp(max=0) - log_m, (-d).clamp(max=0) - log_m


def _times(factor: Tensor, other: Tensor) -> Tensor:
    """factor * other, and 0 wherever factor is 0: 0 log 0 = 0."""
    return torch.where(factor == 0, 0, factor * other)


def _jsd(log_p: Tensor, log_q: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """q f = beta p log(p/m) + (1-beta) q log(q/m), g = (1-beta) log(q/m), m = beta p + (1-beta) q."""
    log_p_m, log_q_m = _log_mixture(log_p, log_q, beta)
    p, q = log_p.exp(), log_q.exp()
    p_term, q_term = _times(p, log_p_m), _times(q, log_q_m)
    return beta * p_term + (1 - beta) * q_term, (1 - beta) * q_term


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """q f = p log(p/m) + m - p, g = (1-alpha) (1 - p/m), m = alpha p + (1-alpha) q."""
    log_p_m, _ = _log_mixture(log_p, log_q, alpha)
    p, q = log_p.exp(), log_q.exp()
    return _times(p, log_p_m) + (1 - alpha) * (q - p), _times(q, -(1 - alpha) * torch.expm1(log_p_m))


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """q f = q log(q/m) + m - q, g = log(q/m) + alpha (1 - q/m), m = (1-alpha) p + alpha q."""
    _, log_q_m = _log_mixture(log_p, log_q, 1 - alpha)
    p, q = log_p.exp(), log_q.exp()
    return _times(q, log_q_m) + (1 - alpha) * (p - q), _times(q, log_q_m - alpha * torch.expm1(log_q_m))


def _tvd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """q f = |p - q| / 2, g = sign(q - p) / 2."""
    d = log_p - log_q
    larger = torch.where(d > 0, log_p, log_q).exp()
    return -0.5 * _times(larger, torch.expm1(-d.abs())), -0.5 * _times(log_q.exp(), d.sign())


def _squared_hellinger(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """q f = (sqrt(p) - sqrt(q))^2 / 2, g = (1 - sqrt(p/q)) / 2."""
    d = log_p - log_q
    less = torch.expm1(-0.5 * d.abs())  # sqrt(smaller / larger) - 1
    larger = torch.where(d > 0, log_p, log_q).exp()
    root = torch.where(d > 0, 0.5 * (log_p + log_q), log_q).exp()  # sqrt(p q), or q where that is the larger
    return 0.5 * _times(larger, less * less), 0.5 * _times(root, torch.where(d > 0, less, -less))


TABLE: dict[str, Definition] = {
    row.name: row
    for row in (
        Definition("forward_kl", "moments", mix=lambda: (1.0, 0.0), adjoint=lambda: ("reverse_kl", ())),
        Definition("reverse_kl", "moments", mix=lambda: (0.0, 1.0), adjoint=lambda: ("forward_kl", ())),
        Definition(
            "symmetric_kl",
            "moments",
            parameters=(Parameter("weight", 0.5, 0.0, 1.0),),  # the share of KL(q || p)
            mix=lambda weight: (1.0 - weight, weight),
            adjoint=lambda weight: ("symmetric_kl", (1.0 - weight,)),
        ),
        Definition(
            "jsd",
            "generic",
            parameters=(Parameter("beta", 0.5, 0.0, 1.0),),  # the teacher's share of the mixture
            pointwise=_jsd,
            adjoint=lambda beta: ("jsd", (1.0 - beta,)),
            limits=lambda beta: {0.0: ("forward_kl", ()), 1.0: ("reverse_kl", ())}.get(beta),
        ),
        Definition(
            "skew_forward_kl",
            "generic",
            parameters=(Parameter("alpha", 0.1, 0.0, 1.0),),  # the teacher's share of the mixture
            pointwise=_skew_forward_kl,
            adjoint=lambda alpha: ("skew_reverse_kl", (alpha,)),
            limits=lambda alpha: {0.0: ("forward_kl", ())}.get(alpha),
        ),
        Definition(
            "skew_reverse_kl",
            "generic",
            parameters=(Parameter("alpha", 0.1, 0.0, 1.0),),  # the student's share of the mixture
            pointwise=_skew_reverse_kl,
            adjoint=lambda alpha: ("skew_forward_kl", (alpha,)),
            limits=lambda alpha: {0.0: ("reverse_kl", ())}.get(alpha),
        ),
        Definition("tvd", "generic", pointwise=_tvd, adjoint=lambda: ("tvd", ())),
        Definition(
            "squared_hellinger", "generic", pointwise=_squared_hellinger, adjoint=lambda: ("squared_hellinger", ())
        ),
    )
}


def resolve(name: str, given: dict[str, float]) -> tuple[str, tuple[float, ...]]:
    """Checks a divergence's name and parameters and fills in defaults.

    Returns the name and the parameters' values in the table's order. ValueError for an unknown name, an unknown
    parameter or a value outside its range; TypeError for a value that is not a number.
    """
    if name not in TABLE:
        raise ValueError(f"divergence: unknown name {name!r}; known are {', '.join(TABLE)}")
    definition = TABLE[name]
    unknown = set(given) - {p.name for p in definition.parameters}
    if unknown:
        takes = ", ".join(p.name for p in definition.parameters) or "no parameter"
        raise ValueError(f"{sorted(unknown)[0]}: divergence {name!r} takes {takes}")
    values = []
    for parameter in definition.parameters:
        value = given.get(parameter.name)
        value = parameter.default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{parameter.name}: a number, got {type(value).__name__}")
        if not parameter.low <= value <= parameter.high:
            raise ValueError(f"{parameter.name}: must lie in [{parameter.low:g}, {parameter.high:g}], got {value}")
        values.append(float(value))
    return name, tuple(values)
