"""Accumulators of row kernels are merged across columns here, and finished into statistics: once, for every backend.

The fields of the accumulators are listed in :mod:`logitless.backends`. Everything is float64, [rows].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.backends import Normalizers

Statistics = dict[object, Tensor]  # by name; (divergence, "value" or "slope") for what generic kernels found


@dataclass(frozen=True)
class RowContext:
    """What a term may read of some rows: statistics, and what depends on the inputs alone."""

    statistics: Statistics
    columns: int  # V
    temperature: Tensor  # the student's, [rows] or a scalar tensor
    class_weight: Tensor | float = 1.0  # that of the target, [rows]
    per_token: Callable[[int], Tensor] | None = None  # a place among the problem's tensors -> its float64 [rows]

    def matrix(self, place: int) -> Tensor:
        """The float64 [rows, K] that the problem has at a place."""
        return self.per_token(place)

    def number(self, number: float | tuple) -> Tensor | float:
        """A number, or as ("token", place) one per row."""
        return self.per_token(number[1]) if isinstance(number, tuple) else number

    def __getitem__(self, name: object) -> Tensor:
        return self.statistics[name]


class Coefficients(dict):
    """Per-row coefficients by basis element: a name of ``backends.BASIS``, "one_hot_alone" (a one-hot without balance),
    "q_lse" or (divergence, parameters)."""

    def add(self, key: object, value: Tensor) -> None:
        self[key] = self[key] + value if key in self else value


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Joins the accumulators of two column ranges of the same rows."""
    return join({name: torch.stack([a[name], b[name]]) for name in a})


def join(a: Statistics) -> Statistics:
    """Accumulators [rows] of column ranges [parts, rows]. ``argmax`` counts from the same column in all of them."""
    shift, best, merged = _join_maxima(a["max"])
    factor = shift.exp()
    out = {"max": merged, "sum": (a["sum"] * factor).sum(0)}
    if "target" in a:
        out["target"] = a["target"].sum(0)
    if "first" in a:
        out["first"] = _times(factor, a["first"] + _finite(shift) * a["sum"]).sum(0)
    if "square" in a:
        out["square"] = (a["square"] * factor * factor).sum(0)
    if "weighted" in a:
        out["mass"] = a["mass"].sum(0)
        out["weighted"] = (a["weighted"] + _finite(shift) * a["mass"]).sum(0)
    if "argmax" in a:
        out["argmax"] = a["argmax"].gather(0, best[None])[0]
    if "teacher_max" in a:
        shift_t, _, out["teacher_max"] = _join_maxima(a["teacher_max"])
        factor_t = shift_t.exp()
        out["teacher_sum"] = (a["teacher_sum"] * factor_t).sum(0)
        if "forward" in a:
            moved = _finite(shift_t) - _finite(shift)
            out["forward"] = _times(factor_t, a["forward"] + a["teacher_sum"] * moved).sum(0)
            out["reverse"] = _times(factor, a["reverse"] + a["sum"] * moved).sum(0)
    if "rest_max" in a:
        shift, _, out["rest_max"] = _join_maxima(a["rest_max"])
        out["rest_sum"] = (a["rest_sum"] * shift.exp()).sum(0)
    for name in a:
        if isinstance(name, tuple) or name == "picked":  # plain sums: of a generic divergence, of what is in one part
            out[name] = a[name].sum(0)
    return out


def joined(a: Statistics) -> Statistics:
    """Accumulators of a backend, [rows] or [parts, rows], as [rows]."""
    return join(a) if a["max"].dim() == 2 else a


def finish(a: Statistics) -> Statistics:
    """Statistics of whole rows from their accumulators.

    ``max``, ``log_sum`` (lse = max + log_sum), ``target`` (s_y - max), ``entropy``, ``log_collision`` (log sum q^2),
    ``weighted`` (sum_j w_j (s_j - max)), ``mass`` (sum_j w_j), ``argmax``, ``teacher_max``, ``teacher_log_sum``,
    ``forward_kl``, ``reverse_kl``; with a top-k teacher ``topk`` [rows, K] (log q at its ids) and ``topk_rest`` (log of
    the mass elsewhere).
    """
    out = {"max": a["max"], "log_sum": a["sum"].log()}
    if "target" in a:
        out["target"] = a["target"] - _finite(a["max"])
    if "first" in a:
        out["entropy"] = out["log_sum"] - a["first"] / a["sum"]
    if "square" in a:
        out["log_collision"] = a["square"].log() - 2 * out["log_sum"]
    for name in ("weighted", "mass", "argmax"):
        if name in a:
            out[name] = a[name]
    if "picked" in a:
        out["topk"] = a["picked"] - (_finite(a["max"]) + out["log_sum"])[:, None]
    if "rest_max" in a:
        out["topk_rest"] = (_finite(a["rest_max"]) - _finite(a["max"])) + a["rest_sum"].log() - out["log_sum"]
    if "teacher_max" in a:
        out["teacher_max"] = a["teacher_max"]
        out["teacher_log_sum"] = a["teacher_sum"].log()
        if "forward" in a:
            out["forward_kl"] = a["forward"] / a["teacher_sum"] - out["teacher_log_sum"] + out["log_sum"]
            out["reverse_kl"] = -a["reverse"] / a["sum"] - out["log_sum"] + out["teacher_log_sum"]
    return out


def close(open_coefficients: Coefficients, s: Statistics) -> Coefficients:
    """Open coefficients with their balance added to that of q, so that terms never state it.

    The gradient of a function that a shift of the logits leaves alone sums to 0 over the vocabulary. So of every term
    q_j gets minus its coefficient times its sum over the row. What terms add to "q" and to "q_lse" (times lse) comes on
    top.
    """
    closed = Coefficients(open_coefficients)
    lse_factor = closed.pop("q_lse", None)
    if lse_factor is not None:
        closed.add("q", lse_factor * (s["max"] + s["log_sum"]))
    alone = closed.pop("one_hot_alone", None)
    if alone is not None:
        closed.add("one_hot", alone)
    for key, c in open_coefficients.items():
        if isinstance(key, tuple):
            closed.add("q", -c * s[key, "slope"])
        elif key in _SUMS:
            closed.add("q", -c * _SUMS[key](s))
    return closed


_SUMS = {  # over a row, of what a coefficient multiplies
    "one_hot": lambda s: 1.0,
    "p": lambda s: 1.0,
    "weights": lambda s: s["mass"],
    "q_log_q": lambda s: -s["entropy"],
    "q_squared": lambda s: s["log_collision"].exp(),
    "q_log_ratio": lambda s: s["reverse_kl"],
}


def exchange(s: Statistics) -> Statistics:
    """The statistics with student and teacher exchanged: what a gradient of the teacher's logits reads."""
    out = {
        "max": s["teacher_max"],
        "log_sum": s["teacher_log_sum"],
        "teacher_max": s["max"],
        "teacher_log_sum": s["log_sum"],
    }
    if "forward_kl" in s:
        out |= {"forward_kl": s["reverse_kl"], "reverse_kl": s["forward_kl"]}
    return out


def normalizers(s: Statistics, dtype: torch.dtype) -> Normalizers:
    def cast(name: str) -> Tensor | None:
        return s[name].to(dtype) if name in s else None

    return Normalizers(cast("max"), cast("log_sum"), cast("teacher_max"), cast("teacher_log_sum"))


def _join_maxima(maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(maxima relative to the joint one, where that is first, the joint one [rows])."""
    merged, best = maxima.max(0)
    return maxima - _finite(merged), best, merged


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0, x)


def _times(factor: Tensor, other: Tensor) -> Tensor:
    return torch.where(factor == 0, 0, factor * other)
