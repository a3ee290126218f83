"""What an objective is beside the inputs of a call: terms that the engine knows, over the columns that are read.

Objectives of log-probabilities become terms of the one pass, or those log-probabilities (:mod:`logitless.tokenwise`).
Divergences from a top-k teacher become functions of the student at its ids (:mod:`logitless.sparse`); where nothing
else is read, they stay what they are, between distributions over K columns. Recorded support is K columns too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless import sparse
from logitless.engine.problem import ABSENT, HeadSpec, Request
from logitless.logits import DenseLogits, LinearLogits, Logits, TopKLogits
from logitless.ops.kept import IGNORED, Recorded
from logitless.support import Keep, KeepIds
from logitless.terms import Term
from logitless.tokenwise import Prepared


@dataclass(frozen=True)
class Lowered:
    """For the engine; tensors are among those of the request, or to be."""

    terms: list[Term]  # of the objective, in its order
    metrics: list[Term]  # of a top-k teacher
    class_weights: Tensor | None
    student: HeadSpec
    teacher: Logits | None
    targets: Tensor | None  # columns of the student's head
    ignore_index: int  # among those


def lowered(
    summands: list,
    request: Request,
    student: Logits,
    *,
    policies: Prepared,
    targets: Tensor | None,
    teacher: Logits | TopKLogits | None,
    keep: Keep | None,
    ignore_index: int,
) -> Lowered:
    """Of checked inputs.

    Raises:
        ValueError: what the summands, the teacher and the support do not define together.
    """
    terms = [term.placed(student, request.place) for term in policies.placed(summands, request.place)]
    check_support(keep, terms, teacher)
    metrics, ids = [], ABSENT
    if isinstance(teacher, TopKLogits):
        indices, logprobs = sparse.merged(teacher, student.columns)
        places = (request.place(indices), request.place(logprobs))
        if _reads_ids_alone(terms, student, teacher):
            ids = places[0]
            teacher = DenseLogits(logprobs if student.dtype == torch.float64 else logprobs.float())
            targets = None if targets is None else torch.where(targets == ignore_index, targets, 0)
        else:
            terms = [sparse.lowered(term, teacher, places) for term in terms]
            metrics = sparse.masses(teacher, places)
            teacher = None
    class_weights = class_weights_of(terms, student)
    if isinstance(keep, KeepIds):
        recorded = Recorded(student, keep, targets, ignore_index)
        head, targets, ignore_index = recorded.head(request), recorded.targets, IGNORED
    else:
        head = request.head(student, ids=ids)
    return Lowered(terms, metrics, class_weights, head, teacher, targets, ignore_index)


def _reads_ids_alone(terms: list, student: Logits, teacher: TopKLogits) -> bool:
    """Whether the K columns of every token are all that the terms read of the student."""
    alone = teacher.tail == "renormalize" and all(term.needs_teacher and not term.calls_function for term in terms)
    return alone and isinstance(student, LinearLogits)


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
