"""Evaluation of an objective: inputs checked and flattened, one pass of the engine, results shaped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logitless.engine import library
from logitless.engine.problem import PRODUCTS, STRATEGIES, Problem, Request
from logitless.logits import (
    Logits,
    TopKLogits,
    check_constant,
    check_logits,
    check_number,
    check_pair,
    check_per_token,
    check_targets,
)
from logitless.support import Keep, check_keep, encode

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossResult:
    """``loss`` (0-d, or [...] for reduction="none"); ``terms``: each term's own value by name, unscaled, reduced alike,
    without gradient; ``metrics``: "tokens", how many were not ignored; those of policy objectives; and with
    :class:`logitless.TopKLogits` as teacher "student_mass" and "teacher_mass", both sides' probability on its ids,
    reduced like the terms (but not for sampled ids, nor where only those ids were multiplied)."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


def evaluate(
    objective,
    student: Logits,
    *,
    targets: Tensor | None,
    teacher: Logits | None,
    weights: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
    keep: Keep | None,
    ignore_index: int,
    teacher_grad: bool,
    compact: bool | None,
    strategy: str,
    product: str,
    workspace: int | str,
    inputs: dict[str, Tensor | None],
) -> LossResult:
    """See ``Objective.__call__``."""
    from logitless.ops.lowering import lowered  # both are about terms, which import this
    from logitless.tokenwise import prepared

    summands = [term for _, term in objective.terms]
    check_inputs(summands, student, targets, teacher, weights)
    check_reduction(reduction, denominator)
    workspace_bytes = check_execution(ignore_index, compact, strategy, product, workspace)
    check_keep(keep)
    if not any(term.needs_teacher for term in summands):
        teacher = None
    if isinstance(teacher, TopKLogits) and teacher_grad:
        raise ValueError("teacher_grad: log-probabilities of TopKLogits get no gradient")
    one_pass = strategy in ("auto", "eager", "forward")
    given = inputs | {"weights": weights}
    policies = prepared(objective.terms, given, student, targets, ignore_index, denominator, reduction, one_pass)

    request = Request()
    low = lowered(
        summands,
        request,
        student,
        policies=policies,
        targets=targets,
        teacher=teacher,
        keep=keep,
        ignore_index=ignore_index,
    )
    weighted_sum = tuple([(float(scale), i) for i, (scale, _) in enumerate(objective.terms)])
    channels, raw, observed = policies.channels(weighted_sum, len(low.terms) + len(low.metrics))
    metrics = [*low.metrics, *policies.read]
    problem = Problem(
        student=low.student,
        teacher=None if low.teacher is None else request.head(low.teacher, differentiable=teacher_grad),
        terms=(*low.terms, *metrics),
        channels=channels,
        raw=raw,
        observed=observed,
        targets=request.place(None if low.targets is None else low.targets.reshape(-1)),
        weights=request.place(None if weights is None else weights.reshape(-1)),
        class_weights=request.place(low.class_weights),
        denominators=request.place(denominator if reduction == "mean" and isinstance(denominator, Tensor) else None),
        denominator=None if denominator is None or isinstance(denominator, Tensor) else float(denominator),
        mean=reduction == "mean",
        keep=encode(keep, student.columns),
        restricted=keep is not None,
        ignore_index=low.ignore_index,
        compact=compact,
        strategy=strategy,
        product=product,
        workspace=workspace_bytes,
    )
    if policies.local and reduction != "none" and one_pass:
        loss, values, tokens, seen = library.loss(problem, request.tensors)
    else:
        found, values, _ = library.rows(resolved(problem, one_scalar=len(channels) == 1), request.tensors)
        others = len(found) - len(policies.read)  # one, or none beside policies
        loss, seen = found[:others].sum(0), found[others:]
        if targets is None:
            tokens = torch.tensor(student.shape.numel(), device=student.device)
        else:
            tokens = (targets != ignore_index).sum()
        if reduction == "none":
            loss, values = loss.view(student.shape), values.view(len(values), *student.shape)
        else:
            loss, values = loss.sum(), values.sum(1)
    by_term = dict(zip(objective.names, values[: len(low.terms)], strict=True))
    by_metric = {"tokens": tokens}
    by_metric |= {metric.name: value for metric, value in zip(metrics, values[len(low.terms) :], strict=True)}
    return LossResult(*policies.results(loss, seen, by_term, by_metric))


def resolved(problem: Problem, one_scalar: bool) -> Problem:
    """While compiling, the strategy is decided from what is static, so that the shape of the kept state is known.

    A stash, whose size depends on sizes, is not kept then: its rows are recomputed.
    """
    if problem.strategy not in ("auto", "stash") or not torch.compiler.is_compiling():
        return problem
    head = problem.student
    teacher_grad = problem.teacher is not None and any(problem.teacher.wants_grad)
    if not any(head.wants_grad) and not teacher_grad:
        return problem
    frozen = one_scalar and head.wants_grad == (True, False, False) and not teacher_grad
    return replace(problem, strategy="frozen" if frozen and problem.strategy == "auto" else "recompute")


def check_inputs(
    terms: list, student: object, targets: object, teacher: Logits | TopKLogits | None, weights: object
) -> None:
    """What an objective is called with, against each other and against what its terms need."""
    check_logits("student", student)
    if not terms:
        raise ValueError("objective: has no terms")
    if targets is not None:
        check_targets(targets, student)
    elif needy := [term.name for term in terms if term.needs_targets]:
        raise ValueError(f"targets: needed by {', '.join(needy)}")
    if teacher is not None:
        check_pair(student, teacher)
    elif needy := [term.name for term in terms if term.needs_teacher]:
        raise ValueError(f"teacher: needed by {', '.join(needy)}")
    if weights is not None:
        check_per_token("weights", weights, student)


def check_reduction(reduction: object, denominator: object) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(f"denominator: is for reduction='mean', got {reduction!r}")
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(f"denominator: a number or 0-d tensor, got the shape {list(denominator.shape)}")
        check_constant("denominator", denominator)
    else:
        check_number("denominator", denominator, above=0)


def check_execution(ignore_index: object, compact: object, strategy: object, product: object, workspace: object):
    """Checks how an operation is to run; returns the workspace in bytes, None for "auto"."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: an integer, got {type(ignore_index).__name__}")
    if compact is not None and not isinstance(compact, bool):
        raise TypeError(f"compact: True, False or None, got {type(compact).__name__}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if product not in PRODUCTS:
        raise ValueError(f"product: one of {', '.join(PRODUCTS)}, got {product!r}")
    if isinstance(workspace, str) and workspace == "auto":
        return None
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace: bytes as an integer, or 'auto', got {workspace!r}")
    if workspace <= 0:
        raise ValueError(f"workspace: must be positive, got {workspace}")
    return workspace
