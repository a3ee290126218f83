"""Losses of a token's log-probability and of numbers that come with it: policy objectives, as summands.

Where each token's gradient depends on its own numbers alone, such a loss is a term of the engine's one pass (3G).
Where it does not (ratios of whole sequences, quantiles of a batch), log-probabilities are an operation of their own,
whose gradient comes back from the loss: recomputed (4G), or without a product where the head is frozen (2G).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitless.engine.autograd import autograd
from logitless.engine.problem import register_term
from logitless.engine.statistics import Coefficients, RowContext
from logitless.logits import Logits, check_token_shape
from logitless.ops.loss import LossResult
from logitless.terms import Entropy, LogProb, LogSumExp, Summand, Term

STATISTICS: dict[str, Term] = {"logprob": LogProb(), "entropy": Entropy(), "lse": LogSumExp()}


class Tokenwise(Summand):
    """A summand that reads per-token inputs by name; frozen, and told apart by its ``repr``."""

    name: ClassVar[str] = "policy"
    needs_targets: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    key: str
    row_local: bool
    statistics: frozenset[str]  # of STATISTICS (and others that come as inputs, with gradient)
    known: ClassVar[dict[str, Tokenwise]] = {}

    def register(self) -> None:
        """To be called at the end of construction: in compiled graphs objectives are constants, known by their key."""
        key = repr(self).replace("'", "`")  # encoded problems quote with the former
        object.__setattr__(self, "key", key)
        Tokenwise.known[key] = self

    def prepare(self, given: dict[str, Tensor | None], *, like: Tensor, mask: Tensor, cu_seqlens: Tensor | None):
        """Checked, flat inputs: ``values`` [N] by name and ``mask`` [N], see :mod:`logitless.losses.policy.inputs`."""
        raise NotImplementedError

    def local(self, values: Mapping[str, Tensor], mask: Tensor):
        """The same from what :meth:`prepare` gave, for some of the tokens, float64."""
        raise NotImplementedError

    def losses(self, tokens) -> dict[str, Tensor]:
        """By name, [N] each."""
        raise NotImplementedError

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """[N] the loss that they make."""
        raise NotImplementedError

    def check_denominator(self, denominator: float | Tensor | None) -> None:
        """Raises TypeError or ValueError where it cannot take it."""
        raise NotImplementedError

    def weights(self, tokens, denominator: float | Tensor | None) -> Tensor:
        """[N] with ``loss = (weights * total).sum()``."""
        raise NotImplementedError

    def metrics(self, tokens) -> dict[str, Tensor]:
        """0-d each, from inputs and statistics."""
        raise NotImplementedError

    def evaluate(self, tokens, denominator: float | Tensor | None) -> LossResult:
        """Loss, terms and metrics of tokens that have their statistics."""
        weight = self.weights(tokens, denominator)
        losses = self.losses(tokens)
        return LossResult(
            _sum(weight, self.total(losses)),
            {name: _sum(weight, loss.detach()) for name, loss in losses.items()},
            self.metrics(tokens),
        )


@register_term
@dataclass(frozen=True, eq=False)
class TokenwiseTerm(Term):
    """A row-local :class:`Tokenwise` objective with its inputs among the problem's tensors, weights included."""

    key: str
    places: tuple[tuple[str, int], ...]
    mask: int
    weight: int

    needs_targets: ClassVar[bool] = True
    is_open: ClassVar[bool] = False
    name: ClassVar[str] = "policy"

    @property
    def objective(self) -> Tokenwise:
        return Tokenwise.known[self.key]

    @property
    def wanted(self) -> frozenset[str]:
        return frozenset().union(*(STATISTICS[name].wanted for name in self.objective.statistics))

    def value(self, rows: RowContext) -> Tensor:
        return self._loss(rows, self._statistics(rows))

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        statistics = self._statistics(rows)
        with autograd(True):
            leaves = [x.detach().requires_grad_() for x in statistics.values()]
            loss = self._loss(rows, dict(zip(statistics, leaves, strict=True)))
            found = [None] * len(leaves)
            if loss.requires_grad:
                found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        for name, slope in zip(statistics, found, strict=True):
            if slope is not None:
                STATISTICS[name].coefficients(rows, torch.where(u == 0, 0, u * slope), into)

    def _statistics(self, rows: RowContext) -> dict[str, Tensor]:
        return {name: STATISTICS[name].value(rows) for name in sorted(self.objective.statistics)}

    def _loss(self, rows: RowContext, statistics: dict[str, Tensor]) -> Tensor:
        values = {name: rows.per_token(place) for name, place in self.places}
        tokens = self.objective.local(values | statistics, rows.per_token(self.mask) != 0)
        loss, weight = self.objective.total(self.objective.losses(tokens)), rows.per_token(self.weight)
        return torch.where(weight == 0, 0, weight * loss)

    def encode(self) -> tuple:
        return ("TokenwiseTerm", self.key, self.places, self.mask, self.weight)


# ---- one call


@dataclass(frozen=True)
class Prepared:
    """The tokenwise objectives of a call, of which there may be none."""

    objectives: dict[int, tuple[float, Tokenwise, object]]  # by place in the sum: (factor, objective, tokens)
    denominator: float | Tensor | None
    local: bool  # whether they are terms of the one pass

    @property
    def names(self) -> list[str]:
        """Statistics of the student that they read, log-probabilities always: for metrics."""
        if not self.objectives:
            return []
        wanted = frozenset().union(*(o.statistics for _, o, _ in self.objectives.values()))
        return ["logprob", *sorted((wanted & STATISTICS.keys()) - {"logprob"})]

    @property
    def read(self) -> list[Term]:
        return [STATISTICS[name] for name in self.names]

    def placed(self, terms: list, place) -> list[Term]:
        """The terms of the sum with engine terms for the objectives: those themselves, or log-probabilities."""
        placed = list(terms)
        for i, (_, objective, tokens) in self.objectives.items():
            placed[i] = STATISTICS["logprob"]
            if self.local:
                weights = objective.weights(tokens, self.denominator)
                places = tuple([(name, place(values)) for name, values in tokens.values.items()])
                mask, weight = place(tokens.mask), place(weights)
                placed[i] = TokenwiseTerm(objective.key, places, mask, weight)
        return placed

    def channels(self, channel: tuple, count: int) -> tuple[tuple, tuple[int, ...], tuple[int, ...]]:
        """(channels, raw terms, observed terms): the statistics that are read come after ``count`` other terms."""
        read = tuple(range(count, count + len(self.names)))
        raw = (*self.objectives, *read)
        if self.local:
            return (channel,), raw, read
        others = tuple([part for part in channel if part[1] not in self.objectives])
        return (*((others,) if others else ()), *(((1.0, i),) for i in read)), raw, ()

    def results(self, loss: Tensor, seen: Tensor, terms: dict, metrics: dict) -> tuple[Tensor, dict, dict]:
        """The loss with what the engine has not seen of the objectives, their terms and their metrics."""
        statistics = dict(zip(self.names, seen, strict=True))
        by_term: dict[str, Tensor] = {}
        metrics = {name: value for name, value in metrics.items() if name not in self.names}
        for i, (name, value) in enumerate(terms.items()):
            if i not in self.objectives:
                by_term[_unused(name, by_term)] = value
                continue
            factor, objective, tokens = self.objectives[i]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.local):
                found = objective.evaluate(tokens.with_given(**statistics), self.denominator)
            if not self.local:
                loss = loss + factor * found.loss
            for key, value in found.terms.items():
                by_term[_unused(key, by_term)] = value
            for key, value in found.metrics.items():
                metrics = metrics | {_unused(key, metrics) if key != "tokens" else key: value}
        return loss, by_term, metrics


def prepared(
    summands: tuple,
    inputs: dict[str, Tensor | None],
    student: Logits,
    targets: Tensor | None,
    ignore_index: int,
    denominator: float | Tensor | None,
    reduction: str,
    one_pass: bool,
) -> Prepared:
    """Of the tokenwise objectives in a sum, which alone take ``inputs`` (beside "weights").

    Raises:
        ValueError, TypeError: naming the argument.
    """
    objectives = {i: (float(factor), o) for i, (factor, o) in enumerate(summands) if isinstance(o, Tokenwise)}
    if not objectives:
        if unknown := sorted(inputs.keys() - {"weights"}):
            raise TypeError(f"{unknown[0]}: no term of this objective takes it")
        return Prepared({}, denominator, local=True)
    if reduction == "none":
        raise ValueError("reduction: 'none' has no meaning for a policy objective, which aggregates by itself")
    inputs = {name: x for name, x in inputs.items() if x is not None}
    mask, cu_seqlens = inputs.pop("mask", None), inputs.pop("cu_seqlens", None)
    live = targets != ignore_index
    if mask is not None:
        check_token_shape("mask", mask, student)
        live = live & (mask != 0)
    like = torch.empty(
        student.shape, dtype=torch.float64 if student.dtype == torch.float64 else torch.float32, device=student.device
    )
    found = {}
    for i, (factor, objective) in objectives.items():
        tokens = objective.prepare(inputs, like=like, mask=live, cu_seqlens=cu_seqlens)
        objective.check_denominator(denominator)
        found[i] = (factor, objective, tokens)
    row_local = all(o.row_local and o.statistics <= STATISTICS.keys() for _, o in objectives.values())
    return Prepared(found, denominator, local=row_local and one_pass)


def _sum(weights: Tensor, loss: Tensor) -> Tensor:
    return torch.where(weights == 0, 0, weights * loss).sum()


def _unused(name: str, taken: dict) -> str:
    count, numbered = 1, name
    while numbered in taken:
        count += 1
        numbered = f"{name}_{count}"
    return numbered
