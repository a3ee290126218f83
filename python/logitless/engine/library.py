"""The boundary to torch: ``torch.library`` operations with fake kernels, and the autograd functions over them.

An operation takes the flat list of tensors and the encoded problem; torch.compile sees one opaque node whose results
have known shapes. Differentiable use is through :func:`loss` and :func:`rows` alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitless.engine import loop
from logitless.engine.problem import Problem, compute_dtype
from logitless.engine.state import statistic_names

torch.library.define("logitless::loss", "(Tensor[] tensors, str problem) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])")
torch.library.define("logitless::rows", "(Tensor[] tensors, str problem) -> (Tensor, Tensor, Tensor, Tensor[])")
torch.library.define(
    "logitless::rows_backward", "(Tensor[] tensors, Tensor[] state, Tensor upstream, str problem) -> Tensor[]"
)


def _loss(tensors: list[Tensor], problem: str):
    return loop.reduced(Problem.decode(problem), tensors)


def _rows(tensors: list[Tensor], problem: str):
    return loop.per_row(Problem.decode(problem), tensors)


def _rows_backward(tensors: list[Tensor], state: list[Tensor], upstream: Tensor, problem: str):
    return loop.per_row_backward(Problem.decode(problem), tensors, state, upstream)


_DEVICES = ("cpu", "cuda")
torch.library.impl("logitless::loss", _DEVICES, _loss)
torch.library.impl("logitless::rows", _DEVICES, _rows)
torch.library.impl("logitless::rows_backward", _DEVICES, _rows_backward)


def _wanted(problem: Problem) -> list[int]:
    """Places of the tensors that get a gradient, in the order of the operations' results."""
    return [place for head in problem.heads for place, want in zip(head.inputs, head.wants_grad, strict=True) if want]


@torch.library.register_fake("logitless::loss")
def _fake_loss(tensors: list[Tensor], problem: str):
    described = Problem.decode(problem)
    dtype, first = compute_dtype(described.heads, tensors), tensors[described.student.inputs[0]]
    return (
        first.new_empty((), dtype=dtype),
        first.new_empty((len(described.terms),), dtype=dtype),
        first.new_empty((), dtype=torch.long),
        first.new_empty((len(described.observed), first.shape[0]), dtype=dtype),
        [tensors[place].new_empty(tensors[place].shape) for place in _wanted(described)],
    )


@torch.library.register_fake("logitless::rows")
def _fake_rows(tensors: list[Tensor], problem: str):
    described = Problem.decode(problem)
    dtype, first = compute_dtype(described.heads, tensors), tensors[described.student.inputs[0]]
    tokens = first.shape[0]
    state = []
    if _wanted(described):
        extra = (tokens, first.shape[1]) if described.strategy == "frozen" else (0,)
        names = sum(statistic_names(described, tensors).values())
        state = [first.new_empty((names, tokens), dtype=torch.float64), first.new_empty(extra, dtype=dtype)]
    return (
        first.new_empty((len(described.channels), tokens), dtype=dtype),
        first.new_empty((len(described.terms), tokens), dtype=dtype),
        first.new_empty((tokens if described.argmax else 0,), dtype=torch.long),
        state,
    )


@torch.library.register_fake("logitless::rows_backward")
def _fake_rows_backward(tensors: list[Tensor], state: list[Tensor], upstream: Tensor, problem: str):
    return [tensors[place].new_empty(tensors[place].shape) for place in _wanted(Problem.decode(problem))]


def loss(problem: Problem, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss 0-d, differentiable; values of the terms [T]; live tokens 0-d; observed values [M, N])."""
    wanted = _wanted(problem)
    if not wanted:
        return torch.ops.logitless.loss(tensors, problem.encode())[:4]
    return _Loss.apply(problem.encode(), tuple(wanted), problem.terms, *tensors)


def rows(problem: Problem, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(channels [K, N], differentiable; values of the terms [T, N]; argmax [N] or [0])."""
    wanted = _wanted(problem)
    if not wanted:
        return torch.ops.logitless.rows(tensors, problem.encode())[:3]
    return _Rows.apply(problem.encode(), tuple(wanted), problem.terms, *tensors)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: str, wanted: tuple[int, ...], terms: tuple, *tensors: Tensor):
        value, terms_, tokens, observed, gradients = torch.ops.logitless.loss(list(tensors), problem)
        ctx.wanted, ctx.inputs = wanted, len(tensors)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(terms_, tokens, observed)
        return value, terms_, tokens, observed

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        scaled = rescaled(list(ctx.saved_tensors), upstream)
        return _place(scaled, ctx.wanted, ctx.inputs)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: str, wanted: tuple[int, ...], terms: tuple, *tensors: Tensor):
        channels, terms_, argmax, state = torch.ops.logitless.rows(list(tensors), problem)
        ctx.problem, ctx.wanted, ctx.inputs = problem, wanted, len(tensors)
        ctx.terms = terms  # a row function lives as long as its graph
        ctx.save_for_backward(*state, *tensors)
        ctx.mark_non_differentiable(terms_, argmax)
        return channels, terms_, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        statistics, extra, *tensors = ctx.saved_tensors
        gradients = torch.ops.logitless.rows_backward(tensors, [statistics, extra], upstream, ctx.problem)
        return _place(gradients, ctx.wanted, ctx.inputs)


def rescaled(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The saved gradients times the upstream scalar: in place where the graph is freed after this backward."""
    if torch.compiler.is_compiling():
        return [gradient * upstream.to(gradient.dtype) for gradient in gradients]
    last = not _keeps_graph()
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return gradients if last else [gradient.clone() for gradient in gradients]
    if last:
        return [gradient.detach().mul_(upstream.to(gradient.dtype)) for gradient in gradients]
    return [gradient * upstream.to(gradient.dtype) for gradient in gradients]


def _keeps_graph() -> bool:
    """Whether a second backward may come; True (which costs a copy) where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def _place(gradients: list[Tensor], wanted: tuple[int, ...], inputs: int) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * inputs
    for place, gradient in zip(wanted, gradients, strict=True):
        found[place] = gradient
    return (None, None, None, *found)
