"""Walks over chunks of whole rows in plain torch operations, for quantities that no row kernel knows.

Without gradient, for one or several logits descriptions side by side:

    for rows, (s, t) in chunks([student, teacher]):
        out[rows] = (s - t).amax(-1)

With gradient, an operation is an ``autograd.Function`` over (HeadSpec, tensors): :func:`walk` in its forward pass, and
in its backward pass :func:`differentiate`, which recomputes the chunks and takes the chain rule from scaled logits to
hidden, weight and bias. A whole row at a time is known, so each pass costs one product per side, and the gradient two
more. :func:`evaluate` has autograd differentiate a function of rows, whose heads may have vocabularies of their own.
Autocast changes nothing: every product here writes into a buffer of its own type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from logitless import backends
from logitless.backends import Chunk
from logitless.engine import plan as planning
from logitless.engine import statistics
from logitless.engine.autograd import autograd
from logitless.engine.heads import DenseHead, LinearHead, Tile, make_head
from logitless.engine.memory import padded
from logitless.engine.plan import Plan, Shape, Side
from logitless.engine.problem import ABSENT, HeadSpec, Problem, Request, check_values, compute_dtype
from logitless.logits import Logits


def chunks(sides: Sequence[Logits], workspace: int | None = None) -> Iterator[tuple[slice, list[Tensor]]]:
    """The scaled logits of some rows at a time, without gradient.

    Args:
        sides: descriptions of the same N tokens over the same vocabulary, on one device (the caller checks:
            :func:`logitless.logits.check_alike`). Their leading dimensions count as one.
        workspace: bytes for the chunks of all sides, kept; None: what the planner thinks best.

    Yields:
        (rows, [s of each side]): a slice of [0, N), and [C, V] tensors of scaled logits (float64 if any side is
        float64, else float32) with V the true vocabulary size. They are the caller's to overwrite, and hold until the
        next step.

    Raises:
        ValueError: ``workspace`` is too small for one row; a temperature that is not positive (on CPUs).
    """
    request = Request()
    specs = [request.head(logits, differentiable=False) for logits in sides]
    yield from walk(specs, request.tensors, workspace)


def walk(
    specs: Sequence[HeadSpec], tensors: Sequence[Tensor], workspace: int | None = None, index: Tensor | None = None
) -> Iterator[tuple[slice, list[Tensor]]]:
    """:func:`chunks` of heads that :class:`Request` described, of all rows or those of ``index``."""
    sides = heads(specs, tensors, index)
    for tile, scaled in _tiles(sides, _plan(sides, workspace, (False, False))):
        yield tile.rows, scaled


def differentiate(
    spec: HeadSpec,
    tensors: Sequence[Tensor],
    gradient: Callable[[slice, Tensor], Tensor],
    size: Tensor,
    workspace: int | None = None,
    index: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of ``tensors``, None where none is wanted, from those of scaled logits.

    Args:
        gradient: called as ``gradient(rows, s)`` with some of the rows (of those in ``index``) and their [B, V] scaled
            logits; returns d loss / d s, [B, V].
        size: [rows], about how large a row's d loss / d s is: products of float16 operands are scaled by it.
    """
    (head,) = heads([spec], tensors, index)
    plan = _plan([head], workspace, (spec.wants_grad[0], any(spec.wants_grad[1:])))
    _open_gradients(head, plan, size)
    for tile, (s,) in _tiles([head], plan):
        out = head.gradient_buffer(tile, s)
        for block in blocks(s):
            rows = slice(tile.rows.start + block.start, tile.rows.start + block.stop)
            out[block] = head.amplified(gradient(rows, s[block])) * slope(s[block], head.inner, head.outer[rows])
        head.accumulate(tile, out)
    return _placed(head, len(tensors))


def evaluate(
    specs: Sequence[HeadSpec],
    tensors: Sequence[Tensor],
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    width: int,
    upstream: Tensor | None = None,
    workspace: int | None = None,
    indices: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """A function of rows of several heads, each with a vocabulary of its own; no product but those of the logits.

    Args:
        function: called as ``function(s, ..., *inputs)`` with [B, V] scaled logits of every head and the same rows of
            ``inputs``; returns [B, width], every row a function of its own row alone.
        inputs: [N, ...] tensors; those that require grad get one.
        upstream: [N, width] d loss / d values; None: values alone. A row of zeros has no gradient, NaN or not.
        indices: per head the rows that it takes part with, each at most once; None: all.

    Returns:
        (values [N, width], gradients of ``tensors``: those of the first head; gradients of ``inputs``).
    """
    sides = heads(specs, tensors, indices)
    head, spec = sides[0], specs[0]
    differentiable = upstream is not None and any(spec.wants_grad)
    wants = (spec.wants_grad[0], any(spec.wants_grad[1:])) if differentiable else (False, False)
    plan = _plan(sides, workspace, wants)
    values = torch.zeros((head.rows, width), dtype=head.dtype, device=head.device)
    of_inputs = [torch.zeros_like(x) if upstream is not None and x.requires_grad else None for x in inputs]
    if differentiable:
        _open_gradients(head, plan, upstream.abs().sum(-1))
    for tile, scaled in _tiles(sides, plan):
        out = head.gradient_buffer(tile, scaled[0]) if differentiable else None
        for block in blocks(max(scaled, key=lambda s: s.shape[1])):
            rows = slice(tile.rows.start + block.start, tile.rows.start + block.stop)
            parts = [s[block] for s in scaled]
            with autograd(upstream is not None):
                first = parts[0].detach().requires_grad_(differentiable)
                taken = [x[rows].detach().requires_grad_(grad is not None) for x, grad in zip(inputs, of_inputs)]
                found = function(first, *parts[1:], *taken)
            values[rows] = found.detach()
            leaves = [x for x in (first, *taken) if x.requires_grad]
            if not leaves:
                continue
            u = upstream[rows].to(found.dtype)
            gradients = iter(torch.autograd.grad(found, leaves, u, allow_unused=True, materialize_grads=True))
            live = (u != 0).any(-1)
            if differentiable:
                gradient = torch.where(live[:, None], head.amplified(next(gradients)), 0)
                out[block] = gradient * slope(parts[0], head.inner, head.outer[rows])
            for total in of_inputs:
                if total is not None:
                    part = next(gradients)
                    total[rows] = torch.where(live.view(-1, *[1] * (part.dim() - 1)), part, 0)
        if differentiable:
            head.accumulate(tile, out)
    return values, _placed(head, len(tensors)) if differentiable else [None] * len(tensors), of_inputs


def _open_gradients(head: LinearHead | DenseHead, plan: Plan, size: Tensor) -> None:
    """``size``: [rows], about how large a row's gradient is."""
    groups = [group for _, group in plan.forward.row_blocks(0, head.rows)]
    longest = max((group.stop - group.start for group in groups), default=0)
    single = len({group.start for group in groups}) <= 1
    head.open_gradients(head.spec.wants_grad, single, (longest, head.columns), [size.to(head.dtype)])


def _placed(head: LinearHead | DenseHead, count: int) -> list[Tensor | None]:
    """The gradients of a head, each at the place of its input among all tensors."""
    found: list[Tensor | None] = [None] * count
    places = [place for place, want in zip(head.spec.inputs, head.spec.wants_grad, strict=True) if want]
    for place, value in zip(places, head.gradients(), strict=True):
        found[place] = value
    return found


def normalizers(s: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, log-sum) of rows of scaled logits, float64 [C], by the backend's kernel; lse is their sum."""
    chunk = Chunk(s, None, None, s.new_ones(s.shape[0]))
    backend = backends.select(s.device, s.dtype)
    found = backend.statistics(chunk, None, targets=None, weights=None, wanted=frozenset())
    found = statistics.finish(statistics.joined(found))
    return found["max"], found["log_sum"]


def softmax(s: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
    """Probabilities of rows whose normalizers are known."""
    return torch.exp(s - maximum.to(s.dtype)[:, None]).mul_(torch.exp(-log_sum).to(s.dtype)[:, None])


def blocks(s: Tensor) -> Iterator[slice]:
    """Rows of a chunk in blocks whose temporaries are small: they stay in cache on a CPU, fill the device on a GPU."""
    rows, columns = s.shape
    step = max(1, (1 << (17 if s.device.type == "cpu" else 23)) // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scale_(chunk: Chunk) -> Tensor:
    """Scaled logits of a chunk, in place of its raw products."""
    s = chunk.z
    if chunk.bias is not None:
        s += chunk.bias
    if chunk.inner is not None:
        s.mul_(chunk.inner).tanh_()
    return s.mul_(chunk.outer[:, None])


def slope(s: Tensor, inner: float | None, outer: Tensor) -> Tensor:
    """d s / d z of scaled logits; [B, 1] without a softcap."""
    outer = outer[:, None]
    return outer if inner is None else outer * inner * (1 - (s / outer) ** 2)


def heads(
    specs: Sequence[HeadSpec], tensors: Sequence[Tensor], index: Tensor | Sequence[Tensor | None] | None = None
) -> list[LinearHead | DenseHead]:
    """Heads of one compute type, with their values checked. ``index``: rows, the same of all heads or per head."""
    tensors, dtype = list(tensors), compute_dtype(specs, tensors)
    indices = index if isinstance(index, (list, tuple)) else [index] * len(specs)
    found = [make_head(spec, tensors, at, dtype, direct=False) for spec, at in zip(specs, indices, strict=True)]
    for spec, head in zip(specs, found, strict=True):
        if spec.temperatures != ABSENT:
            check_values(Problem(spec, None, (), ()), tensors, head.columns)
    return found


def _plan(heads: list[LinearHead | DenseHead], workspace: int | None, wants: tuple[bool, bool]) -> Plan:
    """Tiles of whole rows. To the planner, all sides are one with the hidden sizes of all, and a buffer for each."""
    linear = [head for head in heads if head.spec.linear]
    first = heads[0]
    side = Side(
        hidden=sum(head.hidden.shape[1] for head in linear),
        itemsize=min((head.hidden.element_size() for head in linear), default=first.dtype.itemsize),
        hidden_grad=wants[0],
        weight_grad=wants[1],
    )
    shape = Shape(
        tokens=first.rows,
        vocab=max(head.columns for head in heads),
        student=side,
        itemsize=first.dtype.itemsize,
        whole_rows=True,
        scratch=len(heads) - 1,
    )
    machine = planning.machine(first.device)
    plan = planning.plan(shape, machine, "auto", workspace)
    for head in linear:
        head.upcast, head.low_products = plan.upcast, machine.low_products
    return plan


def _tiles(heads: list[LinearHead | DenseHead], plan: Plan) -> Iterator[tuple[Tile, list[Tensor]]]:
    """Tiles of the first head, and the scaled logits of all."""
    blocks = list(plan.forward.row_blocks(0, heads[0].rows))
    longest = max((rows.stop - rows.start for rows, _ in blocks), default=0)
    buffers = [padded((longest, head.columns), head.dtype, head.device) for head in heads]
    for rows, group in blocks:
        tiles = [Tile(rows, slice(0, head.columns), group) for head in heads]
        raw = [head.stashed(tile, tile.of(buffer), fill=True) for head, tile, buffer in zip(heads, tiles, buffers)]
        yield tiles[0], [scale_(chunk) for chunk in raw]
