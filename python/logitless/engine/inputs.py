"""The inputs of one evaluation, per row: heads, targets, weights, without the rows that do not count."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from logitless import backends
from logitless.engine.groups import grouped
from logitless.engine.heads import Tile, make_head
from logitless.engine.problem import ABSENT, Problem, check_values, compute_dtype, true_columns
from logitless.engine.statistics import RowContext, Statistics
from logitless.support import decode


class Inputs:
    """What terms and row kernels read of a problem's tensors.

    Rows that are ignored are dropped (``index`` has those that remain: on CPUs), or masked (``live``).
    """

    def __init__(self, problem: Problem, tensors: list[Tensor]) -> None:
        self.problem, self.tensors = problem, tensors
        self.dtype = compute_dtype(problem.heads, tensors)
        self.device = tensors[problem.student.inputs[0]].device
        columns = true_columns(problem.student, tensors)
        check_values(problem, tensors, columns)

        targets = None if problem.targets == ABSENT else tensors[problem.targets]
        self.index = self.live = None
        if targets is not None:
            live = targets != problem.ignore_index
            compact = self.device.type == "cpu" if problem.compact is None else problem.compact
            if not compact:
                self.live = live
            elif not live.all():
                self.index = live.nonzero()[:, 0]
                targets = targets[self.index]
        self.targets = None if targets is None else targets.long()

        self.backend = backends.select(self.device, self.dtype)
        direct = self.backend.LOW_PRECISION
        self.student = make_head(problem.student, tensors, self.index, self.dtype, direct)
        self.teacher = problem.teacher and make_head(problem.teacher, tensors, self.index, self.dtype, direct)
        self.heads = [head for head in (self.student, self.teacher) if head is not None]
        self.tokens, self.rows, self.columns = self.student.tokens, self.student.rows, columns
        if self.live is not None:  # what is not checked poisons its row
            wrong = self.live & ((self.targets < 0) | (self.targets >= columns))
            self.student.outer = torch.where(wrong, torch.nan, self.student.outer)

        self.class_weights = None
        self.class_weight: Tensor | float = 1.0
        if problem.class_weights != ABSENT:
            self.class_weights = tensors[problem.class_weights].to(self.dtype)
            self.class_weight = self.class_weights[self.targets.clamp(0, columns - 1)].double()
        self.filters = decode(problem.keep)
        self.restricted = problem.restricted and targets is not None

        self.groups = grouped(problem.terms)
        if problem.argmax:
            self.groups[0] = replace(self.groups[0], wanted=self.groups[0].wanted | {"argmax"})
        for head in self.heads:
            head.outer = head.outer / self.groups[0].temperature
        self.generic_terms = [key for group in self.groups for key in group.generic]
        self.row_terms = [(i, term) for i, term in enumerate(problem.terms) if term.calls_function]
        topk = next((term.topk for term in problem.terms if term.topk is not None), None)
        self.ids = None
        if topk is not None:
            self.ids = tensors[topk[0]] if self.index is None else tensors[topk[0]][self.index]
        self.student_grad = any(problem.student.wants_grad)
        self.teacher_grad = problem.teacher is not None and any(problem.teacher.wants_grad)

    @property
    def with_gradient(self) -> bool:
        return self.student_grad or self.teacher_grad

    def per_token(self, place: int, rows: slice) -> Tensor:
        """Some rows of a tensor with one number per token, float64."""
        values = self.tensors[place].double()
        return (values if self.index is None else values[self.index])[rows]

    def context(self, s: Statistics, rows: slice) -> RowContext:
        """What terms read of some rows."""
        class_weight = self.class_weight
        return RowContext(
            s,
            self.columns,
            self.student.temperature[rows],
            class_weight[rows] if isinstance(class_weight, Tensor) else class_weight,
            lambda place: self.per_token(place, rows),
        )

    def targets_of(self, tile: Tile) -> Tensor | None:
        """The targets of a tile's rows, as its columns count."""
        return None if self.targets is None else self.targets[tile.rows] - tile.columns.start

    def class_weights_of(self, tile: Tile) -> Tensor | None:
        return None if self.class_weights is None else self.class_weights[tile.columns]

    # ---- what terms are multiplied with

    def scales(self, channel: int) -> list[float]:
        """The factor of every term in a channel."""
        scales = [0.0] * len(self.problem.terms)
        for scale, i in self.problem.channels[channel]:
            scales[i] += scale
        return scales

    def factors(self) -> list[Tensor]:
        """Per term [rows] float64: weight / denominator where the row is live."""
        problem = self.problem
        live = torch.ones(self.rows, dtype=torch.float64, device=self.device)
        base = live if problem.weights == ABSENT else self.per_token(problem.weights, slice(None))
        if self.live is not None:
            live, base = (torch.where(self.live, x, 0) for x in (live, base))
        divide = problem.mean
        return [
            live if i in problem.raw else base / _nonzero(self._denominator(term)) if divide else base
            for i, term in enumerate(problem.terms)
        ]

    def _denominator(self, term) -> Tensor:
        """What the mean of a term divides by, float64 0-d."""
        problem = self.problem
        if problem.denominators != ABSENT:
            return self.tensors[problem.denominators].double()
        if problem.denominator is not None:
            return torch.tensor(problem.denominator, dtype=torch.float64, device=self.device)
        count = torch.ones(self.rows, dtype=torch.float64, device=self.device)
        if term.weighted_classes:
            count = self.class_weight
        return (count if self.live is None else torch.where(self.live, count, 0)).sum()

    # ---- where results belong

    def live_values(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """Values [rows], 0 where a row is not live."""
        return values if self.live is None else torch.where(self.live[rows], values, 0)

    def live_count(self) -> Tensor:
        return torch.tensor(self.rows, device=self.device) if self.live is None else self.live.sum()

    def restore(self, x: Tensor, dim: int = -1) -> Tensor:
        """Per-row results [..., rows] at their tokens, zeros elsewhere."""
        if self.index is None:
            return x
        shape = list(x.shape)
        shape[dim] = self.tokens
        return x.new_zeros(shape).index_copy_(dim, self.index, x)


def _nonzero(denominator: Tensor) -> Tensor:
    """A denominator of 0 (every token ignored) divides by 1: the sum is 0 then."""
    return torch.where(denominator == 0, 1, denominator)
