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


def _jsd(log_p: Tensor, log_q: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """q f = beta p log(p/m) + (1-beta) q log(q/m), g = (1-beta) log(q/m), m = beta p + (1-beta) q.

    With d = log p - log q, log(m / max(p, q)) = log1p(a expm1(-|d|)) where a is the weight of the smaller of the two:
    exact for p close to q, and finite wherever either is 0.
    """
    d = log_p - log_q
    log_m = torch.log1p(torch.where(d > 0, 1 - beta, beta) * torch.expm1(-d.abs()))  # relative to the larger
    log_p_m = d.clamp(max=0) - log_m
    log_q_m = (-d).clamp(max=0) - log_m
    p, q = log_p.exp(), log_q.exp()
    p_term = torch.where(p == 0, 0, p * log_p_m)  # 0 log 0 = 0
    q_term = torch.where(q == 0, 0, q * log_q_m)
    return beta * p_term + (1 - beta) * q_term, (1 - beta) * q_term


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
