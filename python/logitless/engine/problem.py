"""What the engine is asked to compute: a static description beside a flat list of tensors.

A :class:`Problem` holds everything but tensors, and refers to those by their place in the list. It travels through
``torch.library`` operations as a string (:meth:`Problem.encode`), which ``torch.compile`` sees as a constant.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from logitless.logits import DenseLogits, Logits

ABSENT = -1  # the place of a tensor that is not there
STRATEGIES = ("auto", "forward", "eager", "recompute", "frozen", "stash")
PRODUCTS = ("auto", "vendor", "fused")


@dataclass(frozen=True)
class HeadSpec:
    """One logits description; ``inputs`` are the places of (hidden, weight, bias) or (logits,)."""

    inputs: tuple[int, ...]
    wants_grad: tuple[bool, ...]  # for each of ``inputs``
    vocab_size: int | None
    scale: float
    softcap: float | None
    temperature: float
    temperatures: int  # the place of per-token temperatures [N]; where ABSENT, ``temperature`` holds
    ids: int = ABSENT  # the place of [N, K] columns: the only ones that exist for each row, -1 where none does

    @property
    def linear(self) -> bool:
        return len(self.inputs) == 3


@dataclass(frozen=True)
class Problem:
    """Channels of weighted sums of terms over the rows of a student and, perhaps, a teacher.

    A *channel* is a weighted sum of terms, one differentiable number per row: a loss has one channel, statistics such
    as log-probabilities have one each. ``terms`` are instances of the term classes of :mod:`logitless.terms`.
    """

    student: HeadSpec
    teacher: HeadSpec | None
    terms: tuple
    channels: tuple[tuple[tuple[float, int], ...], ...]  # per channel ((factor, index into terms), ...)
    targets: int = ABSENT
    weights: int = ABSENT  # per token; used where the loss is reduced
    class_weights: int = ABSENT
    denominators: int = ABSENT  # the place of a 0-d tensor; where ABSENT, ``denominator`` holds
    denominator: float | None = None  # None: for a mean the number of tokens that count
    mean: bool = False
    raw: tuple[int, ...] = ()  # terms whose values are neither weighted nor divided: they have seen to that themselves
    observed: tuple[int, ...] = ()  # terms of which a reduced problem also returns the values per token
    argmax: bool = False
    keep: tuple[tuple[str, float], ...] = ()  # filters of the student's columns, see :mod:`logitless.support`
    restricted: bool = False  # whether targets may be columns that do not exist: those get no gradient
    ignore_index: int = -100
    compact: bool | None = None  # None: on CPUs only
    strategy: str = "auto"
    product: str = "auto"
    workspace: int | None = None  # bytes; None: "auto"

    @property
    def heads(self) -> list[HeadSpec]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def encode(self) -> str:
        terms = tuple([term.encode() for term in self.terms])
        fields = tuple([getattr(self, name) for name in _PLAIN_FIELDS])
        value = (_head_fields(self.student), _head_fields(self.teacher), terms, fields)
        if torch.compiler.is_compiling():
            return _encode(value)
        text = repr(value)  # as exact, and faster
        return _encode(value) if "inf" in text or "nan" in text else text

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> Problem:
        student, teacher, terms, fields = _decode(ast.literal_eval(text))
        return Problem(
            HeadSpec(*student),
            None if teacher is None else HeadSpec(*teacher),
            tuple(_TERMS[kind](*arguments) for kind, *arguments in terms),
            **dict(zip(_PLAIN_FIELDS, fields, strict=True)),
        )


_PLAIN_FIELDS = (
    "channels targets weights class_weights denominators denominator mean raw observed argmax keep restricted "
    "ignore_index compact strategy product workspace"
).split()
_TERMS: dict[str, Callable] = {}


def register_term(cls: type) -> type:
    """Makes a term class known to :meth:`Problem.decode`: ``cls.decode(*arguments)`` undoes ``term.encode()``."""
    _TERMS[cls.__name__] = cls.decode
    return cls


def _head_fields(head: HeadSpec | None) -> tuple | None:
    if head is None:
        return None
    return (
        head.inputs,
        head.wants_grad,
        head.vocab_size,
        head.scale,
        head.softcap,
        head.temperature,
        head.temperatures,
        head.ids,
    )


def _encode(value: object) -> str:
    """The literal of nested tuples of str, int, float, bool and None, in steps that torch.compile can follow."""
    if isinstance(value, tuple):
        return "(" + "".join([_encode(item) + "," for item in value]) + ")"
    if isinstance(value, str):
        return "'" + value + "'"
    if isinstance(value, float):
        return "'" + value.hex() + "'"  # exact; and unlike str() it pins numbers that torch.compile made symbolic
    return str(value)


def _decode(value: object) -> object:
    """Undoes :func:`_encode` on what its literal holds: floats are hexadecimal strings there."""
    if isinstance(value, tuple):
        return tuple(_decode(item) for item in value)
    return float.fromhex(value) if isinstance(value, str) and value.lstrip("-").startswith("0x") else value


class Request:
    """Collects the tensors of a call, flattened to tokens, and describes its heads."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def place(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return ABSENT
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def head(self, logits: Logits, differentiable: bool = True, ids: int = ABSENT) -> HeadSpec:
        """Describes a head; without ``differentiable`` its tensors get no gradient even if they require one.

        ``ids``: the place of the columns that exist for each row, if those are not all.
        """
        if isinstance(logits, DenseLogits):
            inputs = [_matrix(logits.logits)]
        else:
            inputs = [_matrix(logits.hidden), logits.weight, logits.bias]
        if not differentiable:
            inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        grad = differentiable and torch.is_grad_enabled()
        per_token = isinstance(logits.temperature, Tensor)
        return HeadSpec(
            inputs=tuple([self.place(tensor) for tensor in inputs]),
            wants_grad=tuple([grad and tensor is not None and tensor.requires_grad for tensor in inputs]),
            vocab_size=logits.vocab_size,
            scale=float(logits.scale),
            softcap=None if logits.softcap is None else float(logits.softcap),
            temperature=1.0 if per_token else float(logits.temperature),
            temperatures=self.place(logits.temperature.reshape(-1)) if per_token else ABSENT,
            ids=ids,
        )


def _matrix(tensor: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def compute_dtype(heads: Sequence[HeadSpec], tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if a head is, else float32."""
    double = any(tensors[head.inputs[0]].dtype == torch.float64 for head in heads)
    return torch.float64 if double else torch.float32


def true_columns(head: HeadSpec, tensors: Sequence[Tensor]) -> int:
    """The true vocabulary size."""
    if head.ids != ABSENT:
        return tensors[head.ids].shape[1]
    if head.vocab_size is not None:
        return head.vocab_size
    return tensors[head.inputs[1]].shape[0] if head.linear else tensors[head.inputs[0]].shape[1]


def check_values(problem: Problem, tensors: list[Tensor], columns: int) -> None:
    """Checks values inside tensors where that is done. Elsewhere the rows concerned come out as NaN.

    Raises:
        ValueError: targets outside [0, V) that are not ``ignore_index``; a temperature that is not positive.
    """
    if problem.targets != ABSENT:
        check_target_values(tensors[problem.targets], columns, problem.ignore_index)
    for head in problem.heads:
        if head.temperatures != ABSENT:
            temperature = tensors[head.temperatures]
            if _checks(temperature.device) and not (temperature > 0).all():
                raise ValueError("temperature: must be positive for every token")


def check_target_values(targets: Tensor, columns: int, ignore_index: int) -> None:
    if not _checks(targets.device):
        return
    wrong = ((targets < 0) | (targets >= columns)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"targets: must lie in [0, {columns}) or be ignore_index={ignore_index}, got {targets[wrong][0].item()}"
        )


def _checks(device: torch.device) -> bool:
    """Whether values are checked: on CPUs, and with ``LOGITLESS_CHECK=1`` (which synchronises) elsewhere."""
    return device.type == "cpu" or os.environ.get("LOGITLESS_CHECK") == "1"
