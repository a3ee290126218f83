"""The one chunk loop: it alone decides when a matrix product runs.

:func:`reduced` evaluates one channel to a scalar and forms its gradient in the same pass (eager), :func:`per_row`
returns channels per token and what their backward needs, :func:`per_row_backward` is that backward. All three walk over
tiles with :meth:`Run.walk`, where logits are multiplied, and hand gradients to the heads, where they are; row kernels
and terms know nothing of products, strategies or reductions. What happens to a tile in between is elsewhere:

    inputs         what a problem's tensors are per row, and where results belong
    groups         the terms by temperature
    accumulators   tile -> statistics
    emission       statistics, coefficients -> gradient of the tile
    row_functions  both, for functions of a user
    floors         what filters keep of a tile
    state, frozen  what results per token keep for backward; the backward without a product
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from logitless.backends import Chunk
from logitless.divergences import SUMS
from logitless.engine import accumulators, emission, floors, frozen, groups, row_functions, state, statistics
from logitless.engine import plan as planning
from logitless.engine.heads import DenseHead, LinearHead, Tile
from logitless.engine.inputs import Inputs
from logitless.engine.memory import empty, padded
from logitless.engine.plan import Plan, Side, Tiling
from logitless.engine.problem import Problem
from logitless.engine.statistics import Coefficients, Statistics


class Run(Inputs):
    """One evaluation: its inputs, its plan, and the buffers of the walk over its tiles."""

    def __init__(self, problem: Problem, tensors: list[Tensor], per_row: bool) -> None:
        super().__init__(problem, tensors)
        self.is_per_row = per_row
        self.machine = planning.machine(self.device)
        self.floor: Tensor | None = None  # [rows], where a forward pass has found them
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
            one_scalar=frozen.mix(self.problem) is not None,
            whole_rows=bool(self.generic_terms or self.row_terms or self.filters),
            scratch=(row_functions.BUFFERS if self.row_terms else 0) + self.teacher_grad + self._scratches,
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
        masked = any(group.rest for group in self.groups) and not accumulators.maskable(self)
        return max(min(len(self.groups) - 1, 2) if self.with_gradient else 0, int(masked))

    # ---- the walk: one product per head and tile

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

    def _buffer(self, rows: int, tiling: Tiling) -> Tensor:
        return padded((rows, min(tiling.columns, self.columns)), self.dtype, self.device)

    def _floors(self, rows: slice, chunk: Chunk) -> Tensor:
        """Of the student's own temperature, whatever that of the terms."""
        if self.floor is not None:
            return self.floor[rows]
        return floors.find(self.filters, replace(chunk, outer=chunk.outer * self.groups[0].temperature), self.backend)

    # ---- forward

    def evaluate(
        self, tiling: Tiling, upstream: list[Tensor] | None = None, stash: Tensor | None = None, fill: bool = False
    ) -> Statistics:
        """Statistics of all rows; with ``upstream`` (per term [rows]) gradients of whole rows are formed on the way."""
        if self.problem.product == "fused":
            return self._product_statistics()
        if upstream is not None and self._fuses:
            return self._evaluate_fused(tiling, upstream)
        found = []
        for tile, student, teacher, s in self.finished_rows(tiling, stash, fill):
            u = None if upstream is None else [x[tile.rows] for x in upstream]
            values, row_gradients = row_functions.call(self, tile, student, teacher, u)
            s |= values
            if u is not None:
                coefficients = emission.coefficients(self, s, u, tile.rows)
                self.differentiate(tile, student, teacher, s, *coefficients, row_gradients)
            found.append(s)
        return {name: torch.cat([s[name] for s in found]) for name in found[0]}

    def finished_rows(
        self, tiling: Tiling, stash: Tensor | None = None, fill: bool = False
    ) -> Iterator[tuple[Tile, Chunk, Chunk | None, Statistics]]:
        """Rows with their statistics, when their last tile has been visited."""
        partial: dict[int, list[Statistics]] = {}
        for tile, student, teacher in self.walk(tiling, stash, fill):
            sides = [group.at(student, teacher) for group in self.groups]
            found = [
                accumulators.of_tile(self, tile, *chunks, group, self.scratch)
                for chunks, group in zip(sides, self.groups, strict=True)
            ]
            if (before := partial.pop(tile.rows.start, None)) is not None:
                found = [statistics.merge(*both) for both in zip(before, found, strict=True)]
            if tile.columns.stop < self.columns:
                partial[tile.rows.start] = found
                continue
            s: Statistics = {}
            for g, (group, chunks) in enumerate(zip(self.groups, sides, strict=True)):
                finished = accumulators.finish(self, tile, found[g], *chunks, group)
                s |= {groups.key(g, name): value for name, value in finished.items()}
            if student.floor is not None:
                s["floor"] = student.floor.double()
            yield tile, student, teacher, s

    def _product_statistics(self) -> Statistics:
        """By a kernel that forms the product itself: no walk, and no chunk."""
        student, teacher = self.student, self.teacher
        found = self.backend.product_statistics(
            student.factors,
            None if teacher is None else teacher.factors,
            targets=self.targets,
            weights=self.class_weights,
            wanted=self.groups[0].wanted,
        )
        return statistics.finish(statistics.joined(found))

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
                emission.spare(coefficients, floors.outside(student, self.targets_of(tile)))
            if (alone := coefficients.pop("one_hot_alone", None)) is not None:
                coefficients.add("one_hot", alone)
                coefficients.add("q", alone)  # against the balance that the kernels will give it
            found.append(
                self.backend.fused(
                    student,
                    teacher,
                    targets=self.targets_of(tile),
                    weights=self.class_weights,
                    wanted=self.groups[0].wanted,
                    combination=emission.combination(self, tile, coefficients, {}, None),
                    out=out,
                )
            )
            self.student.accumulate(tile, out)
        if len({tuple(x.shape[:-1] for x in part.values()) for part in found}) > 1:  # rows were split differently
            found = [statistics.joined(part) for part in found]
        all_rows = statistics.joined({name: torch.cat([part[name] for part in found], -1) for name in found[0]})
        s = statistics.finish(all_rows)
        if self.filters:
            s["floor"] = torch.cat(kept).double()
        for k, key in enumerate(key for key in opened if isinstance(key, tuple)):
            s[key, "value"], s[key, "slope"] = all_rows[k, "value"], all_rows[k, "slope"]
        return s

    def term_values(self, s: Statistics) -> list[Tensor]:
        """Values of the terms, float64 [rows] each, 0 where a row is not live."""
        values: list[Tensor | None] = [None] * len(self.problem.terms)
        for g, group in enumerate(self.groups):
            context = self.context(groups.of_group(s, g), slice(None))
            for i in group.terms:
                values[i] = self.live_values(self.problem.terms[i].value(context))
        return values

    # ---- gradient: one product per input that wants one, and tile

    def open_gradients(self, tiling: Tiling, upstream: list[Tensor], kept: int = 0, only_hidden: bool = False) -> None:
        blocks = [group for part in ((0, kept), (kept, self.rows)) for _, group in tiling.row_blocks(*part)]
        longest = max((group.stop - group.start for group in blocks), default=0)
        shape = (longest, min(tiling.columns, self.columns))
        for head in self.heads:
            wants = head.spec.wants_grad
            wants = (wants[0], False, False) if only_hidden else wants
            head.open_gradients(wants, len({group.start for group in blocks}) <= 1, shape, upstream)

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
        sides = [groups.of_group(s, g) for g in range(len(self.groups))]
        gradient = None
        if self.teacher_grad:  # first, into a buffer of its own: the student's gradient reads the teacher's chunk
            gradient = self.teacher.gradient_buffer(tile, self.spare)
            exchanged = [groups.exchanged(side) for side in sides]
            extra = self.teacher.amplified(row_gradients[1])
            emission.gradient(self, tile, teacher, student, exchanged, of_teacher, extra, gradient, self.scratch)
        if self.student_grad:
            out = self.student.gradient_buffer(tile, self.buffers[0])
            extra = self.student.amplified(row_gradients[0])
            emission.gradient(self, tile, student, teacher, sides, of_student, extra, out, self.scratch)
            self.student.accumulate(tile, out)
        if gradient is not None:
            self.teacher.accumulate(tile, gradient)

    def gradients(self) -> list[Tensor]:
        return [gradient for head in self.heads for gradient in head.gradients()]


def reduced(problem: Problem, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The one channel of a problem, summed over rows, with its gradient formed in the same pass.

    Returns (loss, values of the terms [T], number of live tokens, values per token of the observed terms [M, N],
    gradients asked for): student's, then teacher's.
    """
    run = Run(problem, tensors, per_row=False)
    tiling = run.plan().forward
    factors = run.factors()
    upstream = _upstream(run, factors)
    if run.with_gradient:
        run.open_gradients(tiling, upstream)
    s = run.evaluate(tiling, upstream if run.with_gradient else None)
    values = run.term_values(s)
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
    if plan.strategy == "frozen":
        upstream = _upstream(run, factors)
        run.open_gradients(plan.forward, upstream, only_hidden=True)
        run.restricted &= len(problem.channels) == 1  # else D is one for all, and the mix minds targets outside
    s = run.evaluate(plan.forward, upstream, stash, fill=True)
    values = run.term_values(s)
    terms = torch.stack([factor * value for factor, value in zip(factors, values, strict=True)])
    channels = torch.stack([_weighted_sum(run.scales(k), terms) for k in range(len(problem.channels))])
    argmax = torch.zeros(0, dtype=torch.long, device=run.device)
    if problem.argmax:
        argmax = run.restore(run.live_values(s["argmax"]))
    results = (run.restore(x.to(run.dtype)) for x in (channels, terms))
    if not run.with_gradient:
        return (*results, argmax, [])
    extra = torch.zeros(0, dtype=run.dtype, device=run.device) if stash is None else stash
    if plan.strategy == "frozen":
        extra = empty((run.tokens, run.student.hidden.shape[1]), run.dtype, run.device)
        gain = run.student.gain
        extra[: run.rows] = run.student.hidden_grad if gain is None else run.student.hidden_grad / gain
        extra[run.rows :] = 0
    kept = state.pack(s, state.statistic_names(problem, tensors), run.rows, run.tokens)
    return (*results, argmax, [kept, extra])


def per_row_backward(problem: Problem, tensors: list[Tensor], kept: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Gradients asked for, given the state of :func:`per_row` and d loss / d channels [K, N]."""
    packed, extra = kept
    strategy = {1: "recompute", 2: "frozen", 3: "stash"}[extra.dim()]  # as in forward, whatever it would be now
    run = Run(replace(problem, strategy=strategy), tensors, per_row=True)
    s = state.unpack(packed, state.statistic_names(problem, tensors), run.rows)
    if run.filters:
        run.floor = s["floor"].to(run.dtype)
    upstream = (upstream if run.index is None else upstream[:, run.index]).double()
    if strategy == "frozen":
        gradient = frozen.gradient(run, s, extra[: run.rows], upstream)
        return [run.restore(gradient.to(run.student.hidden.dtype), 0)]
    factors = run.factors()
    u = [
        factors[i] * sum(run.scales(k)[i] * upstream[k] for k in range(len(problem.channels)))
        for i in range(len(problem.terms))
    ]
    stash = extra if strategy == "stash" else None
    tiling = run.plan().backward
    run.open_gradients(tiling, u, 0 if stash is None else stash.shape[1])
    coefficients = emission.coefficients(run, s, u, slice(0, run.rows))
    for tile, student, teacher in run.walk(tiling, stash):
        rows = tile.rows
        _, row_gradients = row_functions.call(run, tile, student, teacher, [x[rows] for x in u])
        of_rows = ([{key: c[rows] for key, c in group.items()} for group in side] for side in coefficients)
        run.differentiate(
            tile, student, teacher, {key: value[rows] for key, value in s.items()}, *of_rows, row_gradients
        )
    return run.gradients()


def _upstream(run: Run, factors: list[Tensor]) -> list[Tensor]:
    """d (sum of the first channel) / d value of every term [rows]."""
    return [scale * factor for scale, factor in zip(run.scales(0), factors, strict=True)]


def _weighted_sum(scales: list[float], values: Tensor) -> Tensor:
    total = torch.zeros_like(values[0])
    for scale, value in zip(scales, values, strict=True):
        if scale:  # infinite values of terms that have no part stay out
            total = total + scale * value
    return total


def _side(head: LinearHead | DenseHead) -> Side:
    wants = head.spec.wants_grad
    if not head.spec.linear:
        return Side(0, head.logits.element_size(), head.buffered, wants[0], False)
    return Side(head.hidden.shape[1], head.hidden.element_size(), True, wants[0], wants[1] or wants[2])
