"""What a cost may be made of: a tensor, points, or the distributions of two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitless.backends import Chunk
from logitless.engine import plan as planning
from logitless.engine import scan, statistics
from logitless.engine.heads import Tile
from logitless.engine.memory import padded
from logitless.engine.problem import HeadSpec, Request
from logitless.engine.statistics import Statistics
from logitless.logits import LinearLogits, Logits, check_floating, check_logits
from logitless.losses.checks import check_choice
from logitless.ops.sinkhorn import gradients, kernels
from logitless.ops.sinkhorn.kernels import Cost, Dense, Points, Probabilities

KINDS = ("sqeuclidean", "euclidean", "l1", "cosine")
NARROW = 1024  # columns of a slice that are still enough for an efficient product


@dataclass(frozen=True, eq=False)
class PointCost:
    """Costs between points: C_ij = c(x_i, y_j).

    Args:
        x: [..., n, d] floating point.
        y: [..., m, d], of the same type, device and leading dimensions.
        kind: "sqeuclidean" is ||x - y||^2 (without the 1/2 of GeomLoss's p = 2), "euclidean" ||x - y|| (subgradient 0
            at distance 0), "l1" sum |x - y|, "cosine" 1 - <x, y> / (||x|| ||y||) (1 where a point is 0).

    Raises:
        TypeError, ValueError: naming the argument.
    """

    x: Tensor
    y: Tensor
    kind: str = "sqeuclidean"

    def __post_init__(self) -> None:
        check_floating("x", self.x)
        check_floating("y", self.y)
        check_choice("kind", self.kind, KINDS)
        for name, points in (("x", self.x), ("y", self.y)):
            if points.dim() < 2 or 0 in points.shape[-2:]:
                raise ValueError(f"{name}: needs the shape [..., points, d], none of both 0, got {list(points.shape)}")
        if self.x.shape[:-2] != self.y.shape[:-2] or self.x.shape[-1] != self.y.shape[-1]:
            raise ValueError(f"y: shape {list(self.y.shape)} does not fit that of x, {list(self.x.shape)}")
        if (self.x.dtype, self.x.device) != (self.y.dtype, self.y.device):
            raise ValueError(f"y: {self.y.dtype} on {self.y.device}, x is {self.x.dtype} on {self.x.device}")

    @property
    def shape(self) -> torch.Size:
        """[..., n, m]."""
        return torch.Size((*self.x.shape[:-1], self.y.shape[-2]))

    @property
    def tensor(self) -> Tensor:
        """One that has the device and the type."""
        return self.x

    def lowered(self, mask_a: Tensor | None, mask_b: Tensor | None, workspace: int) -> Cost:
        x, y = (points.reshape(-1, *points.shape[-2:]).to(_compute_dtype(points.dtype)) for points in (self.x, self.y))
        x, y = (
            points if mask is None else torch.where(mask[..., None], points, 0)
            for points, mask in ((x, mask_a), (y, mask_b))
        )
        if self.kind == "cosine":
            x, y = (points / _norms(points) for points in (x, y))
        if self.kind == "sqeuclidean":  # is formed by a product: the smaller the points, the smaller its error
            center = torch.cat([x.detach(), y.detach()], 1).mean(1, keepdim=True)
            x, y = x - center, y - center
        points = Points(x, y, self.kind)
        count, n, m = points.shape
        matrices = 2 * count + 1  # with their gradients, and the plan that a run keeps of one problem
        fits = matrices * n * m * x.element_size() <= workspace
        of = kernels.select(x.device, x.dtype)
        whole = of.runs(Dense(x.new_empty(()).expand(points.shape)))
        return gradients.build(points) if fits and (whole or not of.forms(points)) else points


@dataclass(frozen=True, eq=False)
class ProbabilityCost:
    """The L1 distance between rows of two softmaxes, C_ij = sum_v |p_iv - q_jv|, in [0, 2] (SinKD's cost).

    It is formed, and differentiated, over slices of the vocabulary: neither the probabilities of all n tokens over all
    V entries nor anything of [n, m, V] is ever held. Forward costs one product of each side, two if not all columns fit
    the workspace; backward costs one more of each side, and two for every side with gradient. With
    p̄_iv = sum_j G_ij sign(p_iv - q_jv), d s_iv = p_iv (p̄_iv - E_p[p̄]), and E_p[p̄] = sum_j G_ij D_ij comes from
    D_ij = sum_v p_iv sign(p_iv - q_jv), which is summed with the cost.

    Args:
        student: logits of [..., n] tokens.
        teacher: logits of [..., m] tokens over the same vocabulary, with the same leading dimensions but the last.
            Temperatures are those of the descriptions.
        teacher_grad: whether the teacher gets gradients as well.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    student: Logits
    teacher: Logits
    teacher_grad: bool = False

    def __post_init__(self) -> None:
        check_logits("student", self.student)
        check_logits("teacher", self.teacher)
        for name, logits in (("student", self.student), ("teacher", self.teacher)):
            if not logits.shape or not logits.shape[-1]:
                raise ValueError(f"{name}: needs at least one token in its last leading dimension")
        if self.student.shape[:-1] != self.teacher.shape[:-1]:
            raise ValueError(
                f"teacher: leading shape {list(self.teacher.shape)}, all but the last of the student's "
                f"{list(self.student.shape)} must agree"
            )
        if self.student.columns != self.teacher.columns:
            raise ValueError(
                f"teacher: vocabulary of {self.teacher.columns}, the student's has {self.student.columns}; "
                "if one is padded, pass the true size as vocab_size to it"
            )
        if self.student.device != self.teacher.device:
            raise ValueError(f"teacher: on {self.teacher.device}, the student is on {self.student.device}")

    @property
    def shape(self) -> torch.Size:
        """[..., n, m]."""
        return torch.Size((*self.student.shape, self.teacher.shape[-1]))

    @property
    def tensor(self) -> Tensor:
        """One that has the device and the type."""
        first, second = (
            logits.hidden if hasattr(logits, "hidden") else logits.logits for logits in (self.student, self.teacher)
        )
        return second if second.dtype == torch.float64 else first

    def lowered(self, mask_a: Tensor | None, mask_b: Tensor | None, workspace: int) -> Cost:
        request = Request()
        student, teacher = (_without(*side) for side in ((self.student, mask_a), (self.teacher, mask_b)))
        specs = (request.head(student), request.head(teacher, differentiable=self.teacher_grad))
        sizes = (self.student.shape[-1], self.teacher.shape[-1])
        return _masked(_ProbabilityL1.apply(specs, sizes, workspace, *request.tensors), mask_a, mask_b)


@dataclass(frozen=True, eq=False)
class TensorCost:
    """A cost that is there already, [..., n, m]."""

    tensor: Tensor

    def __post_init__(self) -> None:
        check_floating("cost", self.tensor)
        if self.tensor.dim() < 2 or 0 in self.tensor.shape[-2:]:
            raise ValueError(f"cost: needs the shape [..., n, m], none of both 0, got {list(self.tensor.shape)}")

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def lowered(self, mask_a: Tensor | None, mask_b: Tensor | None, workspace: int) -> Cost:
        cost = self.tensor.to(_compute_dtype(self.tensor.dtype))
        return _masked(cost.reshape(-1, *cost.shape[-2:]), mask_a, mask_b)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norms(points: Tensor) -> Tensor:
    norms = points.norm(dim=-1, keepdim=True)
    return torch.where(norms == 0, 1, norms)


def _without(logits: Logits, mask: Tensor | None) -> Logits:
    """Zeros for what tokens that do not exist have: NaN times a gradient of 0 would reach that of the weight."""
    if mask is None:
        return logits
    live = mask.reshape(*logits.shape, 1)
    if isinstance(logits, LinearLogits):
        return replace(logits, hidden=torch.where(live, logits.hidden, 0))
    return replace(logits, logits=torch.where(live, logits.logits, 0))


def _masked(cost: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Dense:
    """Whatever stands at points that do not exist, NaN too, has no part."""
    for mask, dim in ((mask_a, -1), (mask_b, -2)):
        if mask is not None:
            cost = torch.where(mask.unsqueeze(dim), cost, 0)
    return Dense(cost)


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """Tensors of consecutive problems, each kind in one."""
    return parts[0] if len(parts) == 1 else [torch.cat(x) for x in zip(*parts, strict=True)]


class _ProbabilityL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, specs: tuple[HeadSpec, HeadSpec], sizes: tuple[int, int], workspace: int, *tensors: Tensor):
        slices = _Slices(specs, tensors, sizes, workspace)
        wanted = any(specs[0].wants_grad + specs[1].wants_grad)
        found, normalizers = [], []
        for _, tiles in slices.groups():
            normalizers.append(slices.normalize(tiles))
            sums = [slices.kernels.l1(*slices.probabilities(pair, normalizers[-1]), wanted) for pair in tiles]
            found.append([sum(x[1:], x[0]) for x in zip(*sums) if x[0] is not None])
        cost, *moments = _joined(found)
        if wanted:
            ctx.specs, ctx.sizes, ctx.workspace = specs, sizes, workspace
            ctx.save_for_backward(cost, *moments, *_joined(normalizers), *tensors)
        return cost.to(slices.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        cost, moments, *saved = ctx.saved_tensors
        normalizers, tensors = saved[:4], saved[4:]
        slices = _Slices(ctx.specs, tensors, ctx.sizes, ctx.workspace)
        wanted = [side for side in (0, 1) if any(ctx.specs[side].wants_grad)]
        groups = list(slices.groups())
        given: dict[int, tuple[Tensor, Tensor]] = {}  # of a side: the upstream gradient, and the moment of its rows
        for side in wanted:
            head, spec = slices.heads[side], ctx.specs[side]
            gradient, moment = (upstream, moments) if side == 0 else (upstream.mT, (cost - moments).mT)
            size = [gradient.abs().sum(-1).flatten()] if spec.linear else []
            rows = max(tiles[0][side].size[0] for _, tiles in groups)
            head.open_gradients(spec.wants_grad, len(groups) <= 1, (rows, slices.width), size)
            given[side] = head.amplified(gradient), moment
        for problems, tiles in groups:
            here, matrices = normalizers, given
            if len(groups) > 1:
                here = [x[tile.rows] for x, tile in zip(normalizers, [tile for tile in tiles[0] for _ in range(2)])]
                matrices = {side: (x[problems], y[problems]) for side, (x, y) in given.items()}
            for pair in tiles:
                sides = slices.probabilities(pair, here)
                for side in wanted:
                    head, tile = slices.heads[side], pair[side]
                    room = slices.room(side, last=side == wanted[-1])
                    out = head.gradient_buffer(tile, room)
                    found = out if out.dtype == slices.dtype else tile.of(room)
                    slices.kernels.l1_backward(*matrices[side], sides[side], sides[1 - side], found)
                    head.accumulate(tile, out if out is found else out.copy_(found))
        gradients: list[Tensor | None] = [None] * len(tensors)
        for side in wanted:
            spec = ctx.specs[side]
            places = [place for place, want in zip(spec.inputs, spec.wants_grad, strict=True) if want]
            for place, value in zip(places, slices.heads[side].gradients(), strict=True):
                gradients[place] = value
        return None, None, None, *gradients


class _Slices:
    """A walk over problems and slices of the vocabulary of two heads side by side.

    A slice needs, per column and row of one side, its logits, unless they are there already, and in backward its
    gradient and temporaries.
    """

    def __init__(
        self,
        specs: Sequence[HeadSpec],
        tensors: Sequence[Tensor],
        sizes: tuple[int, int],
        workspace: int,
    ) -> None:
        self.heads = scan.heads(specs, tensors)
        first = self.heads[0]
        self.sizes, self.dtype, self.columns = sizes, first.dtype, first.columns
        self.count = first.rows // sizes[0]
        self.kernels = kernels.select(first.device, first.dtype)
        per_problem = 4 * sum(sizes) * first.dtype.itemsize
        self.together = min(max(1, workspace // (per_problem * min(NARROW, self.columns))), max(1, self.count))
        self.width = min(max(1, workspace // (per_problem * self.together)), self.columns)
        self.buffers = [self._buffer(side) if head.buffered else None for side, head in enumerate(self.heads)]
        for head in self.heads:
            if head.spec.linear:
                head.upcast = min(self.width, max(1, (1 << 20) // head.hidden.shape[1]))
                head.low_products = planning.machine(head.device).low_products
        self._only: list[Chunk] = []  # the chunks of a single slice, formed for the statistics

    def groups(self) -> Iterator[tuple[slice, list[tuple[Tile, Tile]]]]:
        """(problems, their tiles of both sides, from the first column to the last)."""
        for start in range(0, max(1, self.count), self.together):
            problems = slice(start, min(start + self.together, self.count))
            rows = [slice(problems.start * size, problems.stop * size) for size in self.sizes]
            yield (
                problems,
                [
                    tuple([Tile(r, slice(column, min(column + self.width, self.columns)), r) for r in rows])
                    for column in range(0, self.columns, self.width)
                ],
            )

    def normalize(self, tiles: list[tuple[Tile, Tile]]) -> list[Tensor]:
        """Per side the maximum of every row, and the sum of exp(s - maximum), merged from slice to slice."""
        backend = kernels.rows(self.heads[0].device, self.dtype)
        together = self.sizes[0] == self.sizes[1]  # then the kernel takes them for a student's and a teacher's
        merged: list[Statistics] = []
        for pair in tiles:
            chunks = [self._chunk(side, tile) for side, tile in enumerate(pair)]
            calls = [chunks] if together else [(chunk, None) for chunk in chunks]
            for k, call in enumerate(calls):
                found = backend.statistics(*call, targets=None, weights=None, wanted=frozenset())
                found = statistics.join(found) if found["max"].dim() == 2 else found
                merged[k : k + 1] = [statistics.merge(merged[k], found) if k < len(merged) else found]
        if len(tiles) == 1:
            self._only = chunks
        return [of[name] for of in merged for name in ("max", "sum", "teacher_max", "teacher_sum") if name in of]

    def probabilities(self, pair: tuple[Tile, Tile], normalizers: Sequence[Tensor]) -> list[Probabilities]:
        """Of both sides; the normalizers are those of the tiles' rows."""
        chunks, self._only = self._only or [self._chunk(side, tile) for side, tile in enumerate(pair)], []
        return [
            Probabilities(chunk, *normalizers[2 * side : 2 * side + 2], self.sizes[side])
            for side, chunk in enumerate(chunks)
        ]

    def room(self, side: int, last: bool) -> Tensor | None:
        """Where a gradient may be written: over the logits, unless the other side still needs them."""
        if last or self.buffers[side] is None:
            return self.buffers[side]
        if self._spare is None:
            self._spare = self._buffer(side)
        return self._spare

    _spare: Tensor | None = None

    def _buffer(self, side: int) -> Tensor:
        return padded((self.sizes[side] * self.together, self.width), self.dtype, self.heads[side].device)

    def _chunk(self, side: int, tile: Tile) -> Chunk:
        return self.heads[side].chunk(tile, self.buffers[side])
