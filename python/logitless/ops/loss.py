"""Evaluation of an objective: inputs checked and flattened, one pass of the engine, results shaped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logitless.engine import library
from logitless.engine.problem import ABSENT, PRODUCTS, STRATEGIES, Problem, Request
from logitless.logits import (
    DenseLogits,
    LinearLogits,
    Logits,
    TopKLogits,
    check_constant,
    check_logits,
    check_number,
    check_pair,
    check_per_token,
    check_targets,
)
from logitless.ops.kept import IGNORED, Recorded
from logitless.support import Keep, KeepIds, check_keep, encode

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
    from logitless import sparse  # whose terms are terms, which import this
    from logitless.tokenwise import Tokenwise, gathered

    check_logits("student", student)
    terms = [term for _, term in objective.terms]
    if not terms:
        raise ValueError("objective: has no terms")
    if targets is not None:
        check_targets(targets, student)
    elif needy := [term.name for term in terms if term.needs_targets]:
        raise ValueError(f"targets: needed by {', '.join(needy)}")
    if teacher is not None:
        if not isinstance(teacher, TopKLogits):
            check_logits("teacher", teacher)
        check_pair(student, teacher)
    elif needy := [term.name for term in terms if term.needs_teacher]:
        raise ValueError(f"teacher: needed by {', '.join(needy)}")
    if weights is not None:
        check_per_token("weights", weights, student)
    check_reduction(reduction, denominator)
    workspace_bytes = check_execution(ignore_index, compact, strategy, product, workspace)
    if not any(term.needs_teacher for term in terms):
        teacher = None
    check_keep(keep)
    tokenwise = None
    if any(isinstance(term, Tokenwise) for term in terms):
        if reduction == "none":
            raise ValueError("reduction: 'none' has no meaning for a policy objective, which aggregates by itself")
        tokenwise = gathered(
            objective.terms, inputs | {"weights": weights}, student, targets, ignore_index, denominator
        )
    elif inputs:
        raise TypeError(f"{sorted(inputs)[0]}: no term of this objective takes it")

    request = Request()
    local = tokenwise is None or (tokenwise.row_local and strategy in ("auto", "eager", "forward"))
    if tokenwise is not None:
        terms = tokenwise.placed(terms, request.place, local)
    terms = [term.placed(student, request.place) for term in terms]
    check_support(keep, terms, teacher)
    names, metrics, ids = objective.names, [], ABSENT
    if isinstance(teacher, TopKLogits):
        if teacher_grad:
            raise ValueError("teacher_grad: log-probabilities of TopKLogits get no gradient")
        indices, logprobs = sparse.merged(teacher, student.columns)
        places = (request.place(indices), request.place(logprobs))
        if gathers(terms, student, teacher):
            ids = places[0]
            teacher = DenseLogits(logprobs if student.dtype == torch.float64 else logprobs.float())
            targets = None if targets is None else torch.where(targets == ignore_index, targets, 0)
        else:
            terms = [sparse.lowered(term, teacher, places) for term in terms]
            metrics = sparse.masses(teacher, places)
            teacher = None
    per_row = not local or reduction == "none" or strategy in ("recompute", "frozen", "stash")
    channels = (tuple([(float(scale), i) for i, (scale, _) in enumerate(objective.terms)]),)
    raw = observed = ()
    if tokenwise is not None:
        channels, raw, observed = tokenwise.channels(channels[0], len(terms) + len(metrics), local)
        metrics = [*metrics, *tokenwise.read]
    class_weights = request.place(class_weights_of(terms, student))
    if isinstance(keep, KeepIds):
        recorded = Recorded(student, keep, targets, ignore_index)
        student, targets, ignore_index = recorded.student, recorded.targets, IGNORED
        head = recorded.head(request)
    else:
        head = request.head(student, ids=ids)
    problem = Problem(
        student=head,
        teacher=None if teacher is None else request.head(teacher, differentiable=teacher_grad),
        terms=(*terms, *metrics),
        channels=channels,
        raw=raw,
        observed=observed,
        targets=request.place(None if targets is None else targets.reshape(-1)),
        weights=request.place(None if weights is None else weights.reshape(-1)),
        class_weights=class_weights,
        denominators=request.place(denominator if reduction == "mean" and isinstance(denominator, Tensor) else None),
        denominator=None if denominator is None or isinstance(denominator, Tensor) else float(denominator),
        mean=reduction == "mean",
        keep=encode(keep, student.columns),
        restricted=keep is not None,
        ignore_index=ignore_index,
        compact=compact,
        strategy=strategy,
        product=product,
        workspace=workspace_bytes,
    )
    if not per_row:
        loss, values, tokens, seen = library.loss(problem, request.tensors)
    else:
        found, values, _ = library.rows(resolved(problem, one_scalar=len(channels) == 1), request.tensors)
        others = len(found) - (0 if tokenwise is None else len(tokenwise.read))  # one, or none beside policies
        loss, seen = found[:others].sum(0), found[others:]
        if targets is None:
            tokens = torch.tensor(student.shape.numel(), device=student.device)
        else:
            tokens = (targets != ignore_index).sum()
        if reduction == "none":
            loss, values = loss.view(student.shape), values.view(len(values), *student.shape)
        else:
            loss, values = loss.sum(), values.sum(1)
    found = dict(zip([*names, *(f"metric {metric.name}" for metric in metrics)], values.unbind(0), strict=True))
    by_term = {name: found[name] for name in names}
    by_metric = {"tokens": tokens} | {metric.name: found[f"metric {metric.name}"] for metric in metrics}
    if tokenwise is not None:
        loss, by_term, by_metric = tokenwise.results(loss, seen, local, by_term, by_metric)
    return LossResult(loss, by_term, by_metric)


def gathers(terms: list, student: Logits, teacher: TopKLogits) -> bool:
    """Whether the K columns of every token are all that the terms read of the student."""
    alone = teacher.tail == "renormalize" and all(term.needs_teacher and not term.calls_function for term in terms)
    return alone and isinstance(student, LinearLogits)


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


def class_weights_of(terms: list, student: Logits) -> Tensor | None:
    """The class weights of an objective, checked against the vocabulary; all terms must share one tensor."""
    found = [term.class_weights for term in terms if term.weighted_classes]
    if not found:
        return None
    if any(weights is not found[0] for weights in found):
        raise ValueError("class_weights: the terms of one objective must share one tensor")
    if any("weighted" in term.wanted and not term.weighted_classes for term in terms):
        raise ValueError("class_weights: the smoothed terms of one objective must share one tensor")
    if list(found[0].shape) != [student.columns]:
        raise ValueError(f"class_weights: needs the shape [{student.columns}], got {list(found[0].shape)}")
    if found[0].device != student.device:
        raise ValueError(f"class_weights: on {found[0].device}, the logits are on {student.device}")
    return found[0]


def check_support(keep: Keep | None, terms: list, teacher: Logits | TopKLogits | None) -> None:
    """ValueError for what is about tokens that are not kept."""
    if keep is None:
        return
    if any("weighted" in term.wanted for term in terms):
        raise ValueError("keep: label smoothing is over the whole vocabulary")
    if isinstance(teacher, TopKLogits):
        raise ValueError("keep: not beside a teacher that is TopKLogits")
    if isinstance(keep, KeepIds) and (teacher is not None or any(term.weighted_classes for term in terms)):
        raise ValueError("keep: KeepIds reads no other columns, so it serves neither a teacher nor class weights")


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
