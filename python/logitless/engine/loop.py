"""The one chunk loop: products, row kernels and gradients, tile by tile.

:func:`reduced` evaluates one channel to a scalar and forms its gradient in the same pass (eager), :func:`per_row`
returns channels per token and what their backward needs, :func:`per_row_backward` is that backward. All three walk over
tiles with :meth:`Run.walk`; row kernels and terms know nothing of products, strategies or reductions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logitless import backends
from logitless.backends import BASIS, Chunk, Combination
from logitless.backends.torch import scaled
from logitless.divergences import SUMS, RowSum
from logitless.engine import floors, statistics
from logitless.engine import plan as planning
from logitless.engine.autograd import autograd
from logitless.engine.heads import DenseHead, LinearHead, Tile, make_head
from logitless.engine.memory import empty, padded
from logitless.engine.picked import Picked
from logitless.engine.plan import Plan, Side, Tiling
from logitless.engine.problem import ABSENT, Problem, check_values
from logitless.engine.statistics import Coefficients, RowContext, Statistics
from logitless.support import decode

ROW_FUNCTION_BUFFERS = 6  # [C, V] buffers that autograd of a row function may hold: logits, gradient, a few saved


@dataclass(frozen=True)
class Group:
    """The terms at one temperature. All groups read the same products: their logits differ by a factor."""

    temperature: float
    factor: float  # on the logits of the first group
    terms: tuple[int, ...]  # indices
    wanted: frozenset[str]
    picked: bool  # whether they read the logits at the teacher's ids
    rest: bool  # and the mass of all others
    generic: tuple[tuple, ...]  # keys of what generic kernels sum for them
    adjoint_generic: tuple[tuple, ...]  # and for the gradient of the teacher


def grouped(terms: tuple) -> list[Group]:
    """The terms of a problem by temperature; functions of rows read the logits of the first group as they are."""
    temperatures = sorted({1.0 if term.calls_function else term.temperature for term in terms})
    if 1.0 in temperatures:
        temperatures.remove(1.0)
        temperatures.insert(0, 1.0)
    groups = []
    for temperature in temperatures:
        chosen = [(i, t) for i, t in enumerate(terms) if temperature == (1.0 if t.calls_function else t.temperature)]
        adjoints = [term.adjoint for _, term in chosen if term.adjoint is not None]
        groups.append(
            Group(
                temperature,
                temperatures[0] / temperature,
                tuple([i for i, _ in chosen]),
                frozenset().union(*(term.wanted for _, term in chosen)),
                any(term.topk is not None for _, term in chosen),
                any(term.needs_rest for _, term in chosen),
                _generic_keys(term for _, term in chosen),
                _generic_keys(adjoints),
            )
        )
    return groups


class Run:
    """One evaluation: inputs with ignored rows dropped or masked, backend, and the factors of every term."""

    def __init__(self, problem: Problem, tensors: list[Tensor], per_row: bool) -> None:
        self.problem, self.tensors, self.is_per_row = problem, tensors, per_row
        self.dtype = compute_dtype(problem, tensors)
        self.device = tensors[problem.student.inputs[0]].device
        columns = true_columns(problem, tensors)
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
        self.machine = planning.machine(self.device)
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
        self.floor: Tensor | None = None  # [rows], where a forward pass has found them
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
        if problem.product == "fused":
            self._check_fused_product()

    def _check_fused_product(self) -> None:
        """ValueError where the passes without gradient cannot fold products into statistics."""
        if not hasattr(self.backend, "product_statistics"):
            raise ValueError(f"product: 'fused' needs a kernel that the {self.backend.NAME} backend does not have")
        if not all(head.spec.linear for head in self.heads):
            raise ValueError("product: 'fused' needs linear logits on all sides")
        if self.generic_terms or self.row_terms or len(self.groups) > 1 or self.ids is not None:
            raise ValueError("product: 'fused' serves what one pass of statistics gives: moments at one temperature")
        if self.filters:
            raise ValueError("product: 'fused' never sees whole rows, which keep= needs")
        if self.with_gradient and (not self.is_per_row or self.problem.strategy not in ("auto", "recompute")):
            raise ValueError("product: 'fused' is for passes without gradient: reduction='none', or no gradient at all")

    # ---- planning

    def plan(self) -> Plan:
        shape = planning.Shape(
            tokens=self.rows,
            vocab=self.columns,
            student=_side(self.student),
            teacher=self.teacher and _side(self.teacher),
            itemsize=self.dtype.itemsize,
            per_row=self.is_per_row,
            one_scalar=frozen_mix(self.problem) is not None,
            whole_rows=bool(self.generic_terms or self.row_terms or self.filters),
            scratch=(ROW_FUNCTION_BUFFERS if self.row_terms else 0) + self.teacher_grad + self._scratches,
        )
        strategy = self.problem.strategy
        if self.problem.product == "fused" and self.with_gradient:
            strategy = "recompute"
        chosen = planning.plan(shape, self.machine, strategy, self.problem.workspace)
        for head in self.heads:
            head.upcast = chosen.upcast
            head.low_products = self.machine.low_products and self.backend.LOW_PRECISION
        return chosen

    @property
    def _scratches(self) -> int:
        """Buffers for gradients of other temperatures (one, and one more to add to it) and for logits to be masked."""
        masked = any(group.rest for group in self.groups) and not self._maskable
        return max(min(len(self.groups) - 1, 2) if self.with_gradient else 0, int(masked))

    @property
    def _maskable(self) -> bool:
        """Whether raw products may be set to -inf where they are: in a buffer of ours, and without a cap."""
        return self.student.buffered and self.student.inner is None

    # ---- the walk

    def walk(
        self, tiling: Tiling, stash: Tensor | None = None, fill: bool = False
    ) -> Iterator[tuple[Tile, Chunk, Chunk | None]]:
        """Every tile with its chunks: vocabulary slices outside, rows inside.

        ``stash`` [heads, rows, V] holds the raw products of the first rows (or, with ``fill``, receives them).
        """
        kept = 0 if stash is None else stash.shape[1]
        blocks = [*tiling.row_blocks(0, kept), *tiling.row_blocks(kept, self.rows)] or [(slice(0, 0), slice(0, 0))]
        longest = max((block.stop - block.start for block, _ in blocks), default=0)
        self.buffers = [self._buffer(longest, tiling) if head.buffered else None for head in self.heads]
        self.spare = self._buffer(longest, tiling) if self.teacher_grad and self.teacher.buffered else None
        self.scratch = [self._buffer(longest, tiling) for _ in range(self._scratches)]
        for columns in tiling.column_blocks(self.columns):
            for block, group in blocks:
                tile = Tile(block, columns, group)
                layers = iter(() if stash is None or block.stop > kept else stash)
                chunks = []
                for head, buffer in zip(self.heads, self.buffers, strict=True):
                    layer = next(layers, None) if head.buffered else None
                    if layer is None:
                        chunks.append(head.chunk(tile, buffer))
                    else:
                        chunks.append(head.stashed(tile, layer[block, columns], fill))
                if self.filters:
                    chunks[0] = replace(chunks[0], floor=self._floors(block, chunks[0]))
                yield tile, chunks[0], chunks[1] if len(chunks) > 1 else None
        self.buffers = self.spare = self.scratch = None

    def _floors(self, rows: slice, chunk: Chunk) -> Tensor:
        """Of the student's own temperature, whatever that of the terms."""
        if self.floor is not None:
            return self.floor[rows]
        return floors.find(self.filters, replace(chunk, outer=chunk.outer * self.groups[0].temperature))

    def _buffer(self, rows: int, tiling: Tiling) -> Tensor:
        return padded((rows, min(tiling.columns, self.columns)), self.dtype, self.device)

    def evaluate(
        self, tiling: Tiling, upstream: list[Tensor] | None = None, stash: Tensor | None = None, fill: bool = False
    ) -> Statistics:
        """Statistics of all rows; with ``upstream`` (per term [rows]) gradients of whole rows are formed on the way."""
        if self.problem.product == "fused":
            factors = [head.factors for head in self.heads]
            found = self.backend.product_statistics(
                factors[0],
                factors[1] if len(factors) > 1 else None,
                targets=self.targets,
                weights=self.class_weights,
                wanted=self.groups[0].wanted,
            )
            return statistics.finish(statistics.join(found) if found["max"].dim() == 2 else found)
        if upstream is not None and self._fuses:
            return self._evaluate_fused(tiling, upstream)
        found = []
        for tile, student, teacher, s in self.finished_rows(tiling, stash, fill):
            u = None if upstream is None else [x[tile.rows] for x in upstream]
            values, row_gradients = self.row_functions(tile, student, teacher, u)
            s |= values
            if u is not None:
                self.differentiate(tile, student, teacher, s, *self.coefficients(s, u, tile.rows), row_gradients)
            found.append(s)
        return {name: torch.cat([s[name] for s in found]) for name in found[0]}

    @property
    def _fuses(self) -> bool:
        """Whether the backend's one call for statistics and gradient serves."""
        if self.teacher_grad or self.row_terms or len(self.groups) > 1 or self.ids is not None:
            return False
        log_sums = any(SUMS[name].family == "log_sum" for name, _ in self.generic_terms)
        is_open = all(term.is_open for term in self.problem.terms)
        return hasattr(self.backend, "fused") and is_open and not log_sums

    def _evaluate_fused(self, tiling: Tiling, upstream: list[Tensor]) -> Statistics:
        """The same in one call of the backend per tile: small operations between kernels would cost like those."""
        opened = Coefficients()
        context = self.context({}, slice(None))
        for term, u in zip(self.problem.terms, self.student.amplified(upstream), strict=True):
            term.coefficients(context, u, opened)
        opened = {key: c.to(self.dtype) for key, c in opened.items()}
        found, kept = [], []
        for tile, student, teacher in self.walk(tiling):
            kept.append(student.floor)
            out = self.student.gradient_buffer(tile, self.buffers[0])
            coefficients = Coefficients({key: c[tile.rows] for key, c in opened.items()})
            if self.restricted:
                self._spare(coefficients, floors.outside(student, self._targets(tile)))
            if (alone := coefficients.pop("one_hot_alone", None)) is not None:
                coefficients.add("one_hot", alone)
                coefficients.add("q", alone)  # against the balance that the kernels will give it
            combination = self._combination(tile, coefficients, {}, None)
            found.append(
                self.backend.fused(
                    student,
                    teacher,
                    targets=self._targets(tile),
                    weights=self.class_weights,
                    wanted=self.groups[0].wanted,
                    combination=combination,
                    out=out,
                )
            )
            self.student.accumulate(tile, out)
        if len({tuple(x.shape[:-1] for x in part.values()) for part in found}) > 1:  # rows were split differently
            found = [statistics.join(part) if part["max"].dim() == 2 else part for part in found]
        accumulators = {name: torch.cat([part[name] for part in found], -1) for name in found[0]}
        if accumulators["max"].dim() == 2:
            accumulators = statistics.join(accumulators)
        s = statistics.finish(accumulators)
        if self.filters:
            s["floor"] = torch.cat(kept).double()
        for k, key in enumerate(key for key in opened if isinstance(key, tuple)):
            s[key, "value"], s[key, "slope"] = accumulators[k, "value"], accumulators[k, "slope"]
        return s

    def finished_rows(
        self, tiling: Tiling, stash: Tensor | None = None, fill: bool = False
    ) -> Iterator[tuple[Tile, Chunk, Chunk | None, Statistics]]:
        """Rows with their statistics, when their last tile has been visited."""
        partial: dict[int, list[Statistics]] = {}
        for tile, student, teacher in self.walk(tiling, stash, fill):
            found = [self._accumulators(tile, *self._at(group, student, teacher), group) for group in self.groups]
            if (before := partial.pop(tile.rows.start, None)) is not None:
                found = [statistics.merge(*both) for both in zip(before, found, strict=True)]
            if tile.columns.stop < self.columns:
                partial[tile.rows.start] = found
                continue
            s: Statistics = {}
            for g, (group, accumulators) in enumerate(zip(self.groups, found, strict=True)):
                finished = self._finish(tile, accumulators, *self._at(group, student, teacher), group)
                s |= {_key(g, name): value for name, value in finished.items()}
            if student.floor is not None:
                s["floor"] = student.floor.double()
            yield tile, student, teacher, s

    # ---- forward

    def _at(self, group: Group, *chunks: Chunk | None) -> list[Chunk | None]:
        """Chunks at the temperature of a group."""
        if group.factor == 1:
            return list(chunks)
        return [None if chunk is None else replace(chunk, outer=chunk.outer * group.factor) for chunk in chunks]

    def _accumulators(self, tile: Tile, student: Chunk, teacher: Chunk | None, group: Group) -> Statistics:
        """Those of one tile, mergeable with those of other columns of the same rows."""
        picked = Picked(student, self.ids[tile.rows], tile.columns.start) if group.picked else None
        if group.rest:
            rest = self._rest(tile, student)
        if group.rest and not group.wanted:  # the rest and the ids together are the row
            at_ids = picked.statistics()
            found = statistics.merge({name: rest[name] for name in at_ids}, at_ids)
            if self.targets is not None:
                found["target"] = Picked(student, self.targets[tile.rows, None], tile.columns.start).values()[:, 0]
        else:
            weights = None if self.class_weights is None else self.class_weights[tile.columns]
            found = self.backend.statistics(
                student, teacher, targets=self._targets(tile), weights=weights, wanted=group.wanted
            )
            if found["max"].dim() == 2:
                found = statistics.join(found)
        if "argmax" in found:
            found["argmax"] = found["argmax"] + tile.columns.start
        if picked is not None:
            found["picked"] = torch.where(self.ids[tile.rows] < 0, -torch.inf, picked.values())
        if group.rest:
            found |= {"rest_max": rest["max"], "rest_sum": rest["sum"]}
        return found

    def _rest(self, tile: Tile, student: Chunk) -> Statistics:
        """The accumulators of all columns but the teacher's ids: masked, since 1 minus their mass would lose it."""
        if not self._maskable:
            student = Chunk(scaled(student, tile.of(self.scratch[0])), None, None, torch.ones_like(student.outer))
        picked = Picked(student, self.ids[tile.rows], tile.columns.start)
        picked.mask()
        found = self.backend.statistics(student, None, targets=None, weights=None, wanted=frozenset())
        picked.restore()
        return statistics.join(found) if found["max"].dim() == 2 else found

    def _finish(self, tile: Tile, found: Statistics, student: Chunk, teacher: Chunk | None, group: Group) -> Statistics:
        """Statistics of rows, with the sums that need lse first and so read whole rows again."""
        s = statistics.finish(found)
        for key in group.generic:
            s[key, "value"], s[key, "slope"] = self._generic(key, tile, s, student, teacher)
        if self.teacher_grad:
            exchanged = statistics.exchange(s)
            for key in group.adjoint_generic:
                both = self._generic(key, tile, exchanged, teacher, student)
                s["teacher", key, "value"], s["teacher", key, "slope"] = both
        return s

    def _generic(self, key: tuple, tile: Tile, s: Statistics, student: Chunk, teacher: Chunk) -> tuple[Tensor, Tensor]:
        normalizers = statistics.normalizers(s, self.dtype)
        return self.backend.generic(student, teacher, normalizers, *self._row_sum(key, tile))

    def _row_sum(self, key: tuple, tile: Tile) -> tuple[RowSum, tuple[Tensor, ...]]:
        """What a key names, and its parameters for the rows of a tile."""
        name, parameters = key
        outer = self.student.outer[tile.rows]
        return SUMS[name], tuple(
            self.per_token(parameter[1], tile.rows).to(self.dtype)
            if isinstance(parameter, tuple)
            else torch.full_like(outer, parameter)
            for parameter in parameters
        )

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

    def term_values(self, s: Statistics, rows: slice) -> list[Tensor]:
        """Values of the terms, float64 [rows] each, 0 where a row is not live."""
        values: list[Tensor | None] = [None] * len(self.problem.terms)
        for g, group in enumerate(self.groups):
            context = self.context(_of_group(s, g), rows)
            for i in group.terms:
                values[i] = self.live_values(self.problem.terms[i].value(context), rows)
        return values

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
            live if i in problem.raw else base / _nonzero(self.denominator(term)) if divide else base
            for i, term in enumerate(problem.terms)
        ]

    def denominator(self, term) -> Tensor:
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

    def live_values(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
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

    # ---- gradient

    @property
    def with_gradient(self) -> bool:
        return self.student_grad or self.teacher_grad

    def open_gradients(self, tiling: Tiling, upstream: list[Tensor], kept: int = 0, only_hidden: bool = False) -> None:
        groups = [group for part in ((0, kept), (kept, self.rows)) for _, group in tiling.row_blocks(*part)]
        longest = max((group.stop - group.start for group in groups), default=0)
        shape = (longest, min(tiling.columns, self.columns))
        for head in self.heads:
            wants = head.spec.wants_grad
            wants = (wants[0], False, False) if only_hidden else wants
            head.open_gradients(wants, len({group.start for group in groups}) <= 1, shape, upstream)

    def gradients(self) -> list[Tensor]:
        return [gradient for head in self.heads for gradient in head.gradients()]

    def coefficients(
        self, s: Statistics, upstream: list[Tensor], rows: slice
    ) -> tuple[list[Coefficients], list[Coefficients]]:
        """Per group, coefficients of the student's and the teacher's gradient, given d loss / d value of every term."""
        student, teacher = [], []
        for g, group in enumerate(self.groups):
            of_group = _of_group(s, g)
            context = self.context(of_group, rows)
            amplified = self.student.amplified(upstream)
            opened = Coefficients()
            for i in group.terms:
                self.problem.terms[i].coefficients(context, amplified[i], opened)
            if self.restricted:
                self._spare(opened, of_group["target"] == -torch.inf)
            student.append(statistics.close(opened, of_group))
            if self.teacher_grad:
                exchanged = _exchanged(of_group)
                context = self.context(exchanged, rows)
                amplified = self.teacher.amplified(upstream)
                opened = Coefficients()
                for i in group.terms:
                    if (adjoint := self.problem.terms[i].adjoint) is not None:
                        adjoint.coefficients(context, amplified[i], opened)
                teacher.append(statistics.close(opened, exchanged))
        return student, teacher

    def _spare(self, opened: Coefficients, outside: Tensor) -> None:
        """A target outside of the support has no gradient: with the one-hot goes its balance."""
        for name in ("one_hot", "one_hot_alone"):
            if name in opened:
                opened[name] = torch.where(outside, 0, opened[name])

    def differentiate(
        self,
        tile: Tile,
        student: Chunk,
        teacher: Chunk | None,
        s: Statistics,
        of_student: list[Coefficients],
        of_teacher: list[Coefficients],
        row_gradients: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """Forms the gradients of a tile and hands them to the heads. ``s`` and coefficients are those of its rows."""
        sides = [_of_group(s, g) for g in range(len(self.groups))]
        gradient = None
        if self.teacher_grad:  # first, into a buffer of its own: the student's gradient reads the teacher's chunk
            gradient = self.teacher.gradient_buffer(tile, self.spare)
            exchanged = [_exchanged(side) for side in sides]
            extra = self.teacher.amplified(row_gradients[1])
            self._gradient(tile, teacher, student, exchanged, of_teacher, extra, gradient)
        if self.student_grad:
            out = self.student.gradient_buffer(tile, self.buffers[0])
            extra = self.student.amplified(row_gradients[0])
            self._gradient(tile, student, teacher, sides, of_student, extra, out)
            self.student.accumulate(tile, out)
        if gradient is not None:
            self.teacher.accumulate(tile, gradient)

    def _gradient(
        self,
        tile: Tile,
        chunk: Chunk,
        other: Chunk | None,
        s: list[Statistics],
        coefficients: list[Coefficients],
        rows: Tensor | None,
        out: Tensor,
    ) -> None:
        """The gradient of all groups by one side's raw products; ``rows`` is that of functions of rows."""
        for g, group in enumerate(self.groups[1:], start=1):
            scratch = tile.of(self.scratch[min(g, len(self.scratch)) - 1])
            c = coefficients[g]
            if chunk.inner is None:  # by s, not by z
                at = self._at(group, chunk)[0]
                c = {key: x / (chunk.outer if x.dim() == 1 else chunk.outer[:, None]) for key, x in c.items()}
            else:
                scaled(chunk, scratch)
                at = Chunk(scratch, None, None, torch.full_like(chunk.outer, group.factor))
            self._emit(tile, at, self._at(group, other)[0], s[g], c, None, scratch)
            rows = scratch if rows is None else scratch.add_(rows)
        self._emit(tile, chunk, other, s[0], coefficients[0], rows, out)

    def _emit(
        self,
        tile: Tile,
        chunk: Chunk,
        other: Chunk | None,
        s: Statistics,
        coefficients: Coefficients,
        rows: Tensor | None,
        out: Tensor,
    ) -> None:
        """One combination of the basis, and what it has at the teacher's ids."""
        sparse = coefficients.get("sparse")
        if sparse is None:
            combination = self._combination(tile, coefficients, s, rows)
            self.backend.gradient(chunk, other, statistics.normalizers(s, self.dtype), combination, out)
            return
        picked = Picked(chunk, self.ids[tile.rows], tile.columns.start)
        combination = self._combination(tile, coefficients, s, rows)
        values = sparse + picked.gradient(combination, coefficients, s["topk"])
        elsewhere = coefficients["q_elsewhere"] + coefficients.get("q", 0)
        combination.coefficients["q"] = elsewhere.to(self.dtype)
        self.backend.gradient(chunk, other, statistics.normalizers(s, self.dtype), combination, out)
        picked.write(values if self.live is None else torch.where(self.live[tile.rows, None], values, 0), out)

    def _combination(self, tile: Tile, coefficients: dict, s: Statistics, rows: Tensor | None) -> Combination:
        generic = []
        for key, c in coefficients.items():
            if isinstance(key, tuple):
                row_sum, parameters = self._row_sum(key, tile)
                if row_sum.family == "log_sum":
                    parameters += (s[key, "value"].to(self.dtype),)
                generic.append((row_sum, parameters, c.to(self.dtype)))
        return Combination(
            {key: c.to(self.dtype) for key, c in coefficients.items() if key in (*BASIS, "q_lse")},
            self._targets(tile),
            None if self.class_weights is None else self.class_weights[tile.columns],
            tuple(generic),
            rows,
            None if self.live is None else self.live[tile.rows],
        )

    def _targets(self, tile: Tile) -> Tensor | None:
        return None if self.targets is None else self.targets[tile.rows] - tile.columns.start

    def row_functions(
        self, tile: Tile, student: Chunk, teacher: Chunk | None, upstream: list[Tensor] | None
    ) -> tuple[dict, tuple[Tensor | None, Tensor | None]]:
        """Values of the user's row functions, and with ``upstream`` the gradients of their sum by s and t."""
        if not self.row_terms:
            return {}, (None, None)
        s = scaled(student)
        t = None if teacher is None else scaled(teacher)
        targets = None if self.targets is None else self.targets[tile.rows].clamp(0, self.columns - 1)
        leaves = []
        if upstream is not None:
            leaves += [s.requires_grad_()] if self.student_grad else []
            leaves += [t.requires_grad_()] if self.teacher_grad else []
        with autograd(upstream is not None):
            values = {}
            total: Tensor | float = 0.0
            for i, term in self.row_terms:
                arguments = [s] + ([t] if term.teacher else []) + ([targets] if term.targets else [])
                value = term.function(*arguments)
                if not isinstance(value, Tensor) or value.shape != (s.shape[0],):
                    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"row_term {term.name!r}: must return [{s.shape[0]}], got {shape}")
                values[term.key, "value"] = value.detach().double()
                if upstream is not None:
                    u = term.row_upstream(self.context({}, tile.rows), upstream[i])
                    total = total + (value * u.to(value.dtype)).sum()
            gradients = iter(())
            if leaves and isinstance(total, Tensor) and total.requires_grad:
                gradients = iter(torch.autograd.grad(total, leaves, allow_unused=True))
        student_gradient = next(gradients, None) if self.student_grad else None
        return values, (student_gradient, next(gradients, None) if self.teacher_grad else None)


def reduced(problem: Problem, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The one channel of a problem, summed over rows, with its gradient formed in the same pass.

    Returns (loss, values of the terms [T], number of live tokens, values per token of the observed terms [M, N],
    gradients asked for): student's, then teacher's.
    """
    run = Run(problem, tensors, per_row=False)
    tiling = run.plan().forward
    factors = run.factors()
    upstream = [scale * factor for scale, factor in zip(run.scales(0), factors, strict=True)]
    if run.with_gradient:
        run.open_gradients(tiling, upstream)
    s = run.evaluate(tiling, upstream if run.with_gradient else None)
    values = run.term_values(s, slice(None))
    totals = torch.stack([(factor * value).sum() for factor, value in zip(factors, values, strict=True)])
    loss = _weighted_sum(run.scales(0), totals)
    gradients = run.gradients() if run.with_gradient else []
    observed = loss.new_zeros(0, run.tokens)
    if problem.observed:
        observed = run.restore(torch.stack([values[i] for i in problem.observed]))
    return loss.to(run.dtype), totals.to(run.dtype), run.live_count(), observed.to(run.dtype), gradients


def per_row(problem: Problem, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Channels per token, and what their backward needs.

    Returns (channels [K, N], values of the terms [T, N], argmax [N] or [0], state): ignored tokens are 0. The state is
    [statistics [S, N] of the live rows, extra]: extra is D [N, H] (frozen), stashed logits (stash) or empty.
    """
    run = Run(problem, tensors, per_row=True)
    plan = run.plan()
    factors = run.factors()
    stash = None
    if plan.stash_rows:
        buffered = sum(head.buffered for head in run.heads)
        stash = padded((buffered, plan.stash_rows, run.columns), run.dtype, run.device)
    upstream = None
    if frozen := plan.strategy == "frozen":
        upstream = [scale * factor for scale, factor in zip(run.scales(0), factors, strict=True)]
        run.open_gradients(plan.forward, upstream, only_hidden=True)
        run.restricted &= len(problem.channels) == 1  # else D is one for all, and the mix minds targets outside
    s = run.evaluate(plan.forward, upstream, stash, fill=True)
    values = run.term_values(s, slice(None))
    terms = torch.stack([factor * value for factor, value in zip(factors, values, strict=True)])
    channels = torch.stack([_weighted_sum(run.scales(k), terms) for k in range(len(problem.channels))])
    argmax = run.live_values(s["argmax"]) if problem.argmax else torch.zeros(0, dtype=torch.long, device=run.device)
    kept = torch.zeros(0, run.tokens, dtype=torch.float64, device=run.device)
    if run.with_gradient:
        names = statistic_names(problem, tensors)
        kept = torch.zeros(sum(names.values()), run.tokens, dtype=torch.float64, device=run.device)
        kept[:, : run.rows] = torch.cat([s[name].reshape(run.rows, width).t() for name, width in names.items()])
    extra = torch.zeros(0, dtype=run.dtype, device=run.device) if stash is None else stash
    if frozen:
        extra = empty((run.tokens, run.student.hidden.shape[1]), run.dtype, run.device)
        gain = run.student.gain
        extra[: run.rows] = run.student.hidden_grad if gain is None else run.student.hidden_grad / gain
        extra[run.rows :] = 0
    results = (run.restore(x.to(run.dtype)) for x in (channels, terms))
    return (*results, run.restore(argmax) if problem.argmax else argmax, [kept, extra] if run.with_gradient else [])


def per_row_backward(problem: Problem, tensors: list[Tensor], state: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Gradients asked for, given d loss / d channels [K, N]."""
    kept, extra = state
    strategy = {1: "recompute", 2: "frozen", 3: "stash"}[
        extra.dim()
    ]  # what the forward pass did, whatever it would now
    run = Run(replace(problem, strategy=strategy), tensors, per_row=True)
    names = statistic_names(problem, tensors)
    s = {
        name: part.t() if name in ("topk", ("group", name[1], "topk")) else part[0]
        for (name, width), part in zip(names.items(), kept[:, : run.rows].split(list(names.values())), strict=True)
    }
    if run.filters:
        run.floor = s["floor"].to(run.dtype)
    upstream = (upstream if run.index is None else upstream[:, run.index]).double()
    if strategy == "frozen":
        gradient = _frozen_gradient(run, s, extra[: run.rows], upstream)
        return [run.restore(gradient.to(run.student.hidden.dtype), 0)]
    factors = run.factors()
    u = [
        factors[i] * sum(run.scales(k)[i] * upstream[k] for k in range(len(problem.channels)))
        for i in range(len(problem.terms))
    ]
    stash = extra if strategy == "stash" else None
    tiling = run.plan().backward
    run.open_gradients(tiling, u, 0 if stash is None else stash.shape[1])
    coefficients = run.coefficients(s, u, slice(0, run.rows))
    for tile, student, teacher in run.walk(tiling, stash):
        rows = tile.rows
        _, row_gradients = run.row_functions(tile, student, teacher, [x[rows] for x in u])
        of_rows = ([{key: c[rows] for key, c in group.items()} for group in side] for side in coefficients)
        run.differentiate(
            tile, student, teacher, {key: value[rows] for key, value in s.items()}, *of_rows, row_gradients
        )
    return run.gradients()


def _weighted_sum(scales: list[float], values: Tensor) -> Tensor:
    total = torch.zeros_like(values[0])
    for scale, value in zip(scales, values, strict=True):
        if scale:  # infinite values of terms that have no part stay out
            total = total + scale * value
    return total


def _frozen_gradient(run: Run, s: Statistics, d: Tensor, upstream: Tensor) -> Tensor:
    """sum_k upstream_k (alpha_k D + beta_k d_y W_y): no product, see :func:`frozen_mix`."""
    alpha, beta = zip(*frozen_mix(run.problem), strict=True)
    outside = s["target"] == -torch.inf if any(beta) and run.restricted else None
    if outside is not None:  # D is then that of -lse, and what reads the target has no gradient
        needs = [run.problem.terms[channel[0][1]].needs_targets for channel in run.problem.channels]
        upstream = torch.stack(
            [torch.where(outside, 0, u) if need else u for need, u in zip(needs, upstream, strict=True)]
        )
    out = d * (upstream.new_tensor(alpha) @ upstream).to(run.dtype)[:, None]
    if any(beta):
        head = run.student
        slope = head.outer.double()
        if head.inner is not None:
            slope = slope * head.inner * (1 - ((s["target"] + s["max"]) / slope) ** 2)
        if outside is not None:
            slope = torch.where(outside, 0, slope)
        targets = run.targets.clamp(0, run.columns - 1)
        factor = (upstream.new_tensor(beta) @ upstream) * run.live_values(slope)
        out += factor.to(run.dtype)[:, None] * head.weight[targets].to(run.dtype)
    return out


def frozen_mix(problem: Problem) -> list[tuple[float, float]] | None:
    """Per channel (alpha, beta): its gradient is alpha D + beta d_y W_y with D that of the first; None: it is not.

    logprob = target_logit - lse, so one D serves all three. (Not of gathered columns: targets count those.)
    """
    if len(problem.channels) == 1:
        return [(1.0, 0.0)]
    mixes = {"LogProb": (1.0, 0.0), "TargetLogit": (0.0, 1.0), "LogSumExp": (-1.0, 1.0)}
    names = [problem.terms[channel[0][1]].encode()[0] for channel in problem.channels]
    if problem.student.ids != ABSENT or names[0] != "LogProb" or not set(names) <= set(mixes):
        return None
    return [mixes[name] for name in names]


def statistic_names(problem: Problem, tensors: list[Tensor]) -> dict:
    """Keys of the statistics of a problem, in the order in which they are kept for backward: how many per row."""
    names: dict = {}
    for g, group in enumerate(grouped(problem.terms)):
        of_group: list = ["max", "log_sum"]
        of_group += ["target"] if problem.targets != ABSENT else []
        of_group += ["entropy"] if "entropy" in group.wanted else []
        of_group += ["log_collision"] if "collision" in group.wanted else []
        of_group += ["weighted", "mass"] if "weighted" in group.wanted else []
        if problem.teacher is not None:
            of_group += ["teacher_max", "teacher_log_sum"]
            of_group += ["forward_kl", "reverse_kl"] if "moments" in group.wanted else []
            of_group += [(key, part) for key in group.generic for part in ("value", "slope")]
            if any(problem.teacher.wants_grad):
                of_group += [("teacher", key, part) for key in group.adjoint_generic for part in ("value", "slope")]
        names |= {_key(g, name): 1 for name in of_group}
        if group.picked:
            ids = next(term.topk[0] for term in problem.terms if term.topk is not None)
            names[_key(g, "topk")] = tensors[ids].shape[1]
        if group.rest:
            names[_key(g, "topk_rest")] = 1
    return names | ({"floor": 1} if problem.keep else {})


def _key(group: int, name: object) -> object:
    """The key of a group's statistic among those of all groups."""
    return ("group", group, name) if group else name


def _of_group(s: Statistics, group: int) -> Statistics:
    """Undoes :func:`_key` for the statistics of one group."""
    if not group:
        return s
    return {key[2]: value for key, value in s.items() if isinstance(key, tuple) and key[:2] == ("group", group)}


def _exchanged(s: Statistics) -> Statistics:
    """The statistics with student and teacher exchanged, sums of adjoints included."""
    adjoint = {key[1:]: value for key, value in s.items() if isinstance(key, tuple) and key[0] == "teacher"}
    return statistics.exchange(s) | adjoint


def _generic_keys(terms: Iterable) -> tuple[tuple, ...]:
    """What the generic kernel must evaluate for some terms, each once."""
    return tuple(sorted({key for term in terms for key in term.generic}, key=repr))


def compute_dtype(problem: Problem, tensors: list[Tensor]) -> torch.dtype:
    """float64 if an input is, else float32."""
    heads = [problem.student] if problem.teacher is None else [problem.student, problem.teacher]
    double = any(tensors[head.inputs[0]].dtype == torch.float64 for head in heads)
    return torch.float64 if double else torch.float32


def true_columns(problem: Problem, tensors: list[Tensor]) -> int:
    """The true vocabulary size."""
    head = problem.student
    if head.ids != ABSENT:
        return tensors[head.ids].shape[1]
    if head.vocab_size is not None:
        return head.vocab_size
    return tensors[head.inputs[1]].shape[0] if head.linear else tensors[head.inputs[0]].shape[1]


def _side(head: LinearHead | DenseHead) -> Side:
    wants = head.spec.wants_grad
    if not head.spec.linear:
        return Side(0, head.logits.element_size(), head.buffered, wants[0], False)
    return Side(head.hidden.shape[1], head.hidden.element_size(), True, wants[0], wants[1] or wants[2])


def _nonzero(denominator: Tensor) -> Tensor:
    """A denominator of 0 (every token ignored) divides by 1: the sum is 0 then."""
    return torch.where(denominator == 0, 1, denominator)
