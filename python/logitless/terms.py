"""Losses are terms, terms add and scale, and a sum of terms is one pass over the vocabulary.

A term says which statistics of a row it reads, its value from them, and the coefficients of its gradient on the basis
of :mod:`logitless.backends`; a sum of terms adds coefficients. In the formulas s are the student's scaled logits,
q = softmax(s), lse = logsumexp(s), p the teacher's distribution, y the target; u is the upstream gradient of the term's
value, per row. Statistics are float64 [rows], see :func:`logitless.engine.statistics.finish`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from logitless import divergences
from logitless.engine.problem import register_term
from logitless.engine.statistics import Coefficients, RowContext
from logitless.logits import Logits, check_constant, check_floating, check_number
from logitless.ops.loss import LossResult, evaluate


@dataclass(frozen=True, eq=False)
class Term:
    """A loss of one row of logits. Subclasses give ``value`` and ``coefficients``; sums are an :class:`Objective`."""

    needs_targets: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    wanted: ClassVar[frozenset[str]] = frozenset()  # what the statistics kernel must collect
    generic: ClassVar[tuple | None] = None  # (divergence, parameters) that the generic kernel must evaluate
    adjoint: ClassVar[Term | None] = None  # the same number with student and teacher exchanged, where both have a part
    calls_function: ClassVar[bool] = False  # whether rows are handed to a user's function
    weighted_classes = False  # whether the target's class weight counts in a mean; a field of CrossEntropy

    @property
    def name(self) -> str:
        """The key of this term in ``result.terms``."""
        raise NotImplementedError

    def value(self, rows: RowContext) -> Tensor:
        """The term's value per row, float64 [rows]."""
        raise NotImplementedError

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        """Adds the open coefficients of u * d value / d s: those without the balance, see :func:`statistics.close`.

        They depend on u and on the inputs alone, not on statistics.
        """
        raise NotImplementedError

    def encode(self) -> tuple:
        """(class name, *arguments): plain values from which :meth:`decode` makes an equal term."""
        return (type(self).__name__,)

    @classmethod
    def decode(cls, *arguments) -> Term:
        return cls(*arguments)

    def __call__(self, student: Logits, **inputs) -> LossResult:
        return Objective(((1.0, self),))(student, **inputs)

    def __add__(self, other: Term | Objective) -> Objective:
        return Objective(((1.0, self),)) + other

    def __sub__(self, other: Term | Objective) -> Objective:
        return Objective(((1.0, self),)) - other

    def __mul__(self, factor: float) -> Objective:
        return Objective(((1.0, self),)) * factor

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return -1.0 * self


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, computed in one pass: ``0.5 * CrossEntropy() + 0.5 * Divergence("jsd")``."""

    terms: tuple[tuple[float, Term], ...]

    def __call__(
        self,
        student: Logits,
        *,
        targets: Tensor | None = None,
        teacher: Logits | None = None,
        weights: Tensor | None = None,
        reduction: str = "mean",
        denominator: float | Tensor | None = None,
        ignore_index: int = -100,
        teacher_grad: bool = False,
        compact: bool | None = None,
        strategy: str = "auto",
        product: str = "auto",
        workspace: int | str = "auto",
    ) -> LossResult:
        """Evaluates the sum over the tokens of ``student``.

        Args:
            student: the logits that are trained, [..., V].
            targets: [...] integer token ids; needed by terms that look at a target, and for ``ignore_index``.
            teacher: logits of the same leading shape and vocabulary; needed by divergences. Constant unless
                ``teacher_grad``.
            weights: [...] floating factors per token, without gradient. A token of weight 0 still counts in a mean.
            reduction: "mean" divides the weighted sum by ``denominator``, or where that is None by the number of tokens
                not ignored (for terms with class weights by the sum of their targets' class weights, as torch does);
                "sum" divides by nothing; "none" returns weighted losses per token, [...].
            denominator: positive number or 0-d tensor, for "mean".
            ignore_index: tokens with this target contribute exactly 0 and do not count.
            teacher_grad: whether the teacher gets a gradient too.
            compact: drop ignored tokens before the matrix products; None: on CPUs (on a GPU it synchronises once).
            strategy, product, workspace: see :mod:`logitless.engine.plan`.

        Returns:
            LossResult: ``loss`` (0-d, or [...] for "none"; float32, float64 for float64 inputs), ``terms`` (each term's
            own value, unscaled, reduced alike, without gradient) and ``metrics`` ("tokens": how many counted).

        Raises:
            TypeError, ValueError: naming the argument, before any work.
        """
        return evaluate(
            self,
            student,
            targets=targets,
            teacher=teacher,
            weights=weights,
            reduction=reduction,
            denominator=denominator,
            ignore_index=ignore_index,
            teacher_grad=teacher_grad,
            compact=compact,
            strategy=strategy,
            product=product,
            workspace=workspace,
        )

    def __add__(self, other: Term | Objective) -> Objective:
        if isinstance(other, Term):
            other = Objective(((1.0, other),))
        if not isinstance(other, Objective):
            return NotImplemented
        return Objective(self.terms + other.terms)

    def __sub__(self, other: Term | Objective) -> Objective:
        return self + -1.0 * other

    def __mul__(self, factor: float) -> Objective:
        check_number("factor", factor)
        return Objective(tuple([(float(factor) * scale, term) for scale, term in self.terms]))

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return -1.0 * self

    @property
    def names(self) -> list[str]:
        """Keys of ``result.terms``; a name that occurs again gets a number: jsd, jsd_2."""
        given = [term.name for _, term in self.terms]
        earlier = [given[:i].count(name) for i, name in enumerate(given)]
        return [f"{name}_{count + 1}" if count else name for name, count in zip(given, earlier, strict=True)]


@register_term
@dataclass(frozen=True, eq=False)
class CrossEntropy(Term):
    """Negative log-likelihood of the target, with torch's label smoothing and class weights.

    ``(1 - e) w_y nll_y + (e / V) sum_v w_v nll_v``, with nll_v = lse - s_v, e = ``label_smoothing`` and V the true
    vocabulary size (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7; definition of
    ``torch.nn.functional.cross_entropy``).

    Args:
        label_smoothing: e in [0, 1].
        class_weights: [V] floating, without gradient; None: ones.
    """

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    weighted_classes: bool = False  # set from class_weights; all that an encoded term knows of them

    needs_targets: ClassVar[bool] = True
    name: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        check_number("label_smoothing", self.label_smoothing, low=0)
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing: must lie in [0, 1], got {self.label_smoothing}")
        if self.class_weights is not None:
            check_floating("class_weights", self.class_weights)
            check_constant("class_weights", self.class_weights)
            if self.class_weights.dim() != 1:
                raise ValueError(f"class_weights: needs the shape [V], got {list(self.class_weights.shape)}")
            object.__setattr__(self, "weighted_classes", True)

    @property
    def wanted(self) -> frozenset[str]:
        return frozenset({"weighted"}) if self.label_smoothing else frozenset()

    def value(self, rows: RowContext) -> Tensor:
        value = (1 - self.label_smoothing) * self._class_weight(rows) * (rows["log_sum"] - rows["target"])
        if self.label_smoothing:
            smoothing = self.label_smoothing / rows.columns
            value = value + smoothing * (rows["mass"] * rows["log_sum"] - rows["weighted"])
        return value

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        hard = u * (1 - self.label_smoothing) * self._class_weight(rows)
        into.add("one_hot", -hard)
        if self.label_smoothing:
            into.add("weights", -u * (self.label_smoothing / rows.columns))

    def _class_weight(self, rows: RowContext) -> Tensor | float:
        return rows.class_weight if self.weighted_classes else 1.0

    def encode(self) -> tuple:
        return ("CrossEntropy", float(self.label_smoothing), None, self.weighted_classes)


@register_term
@dataclass(frozen=True, eq=False)
class ZLoss(Term):
    """``lse ** 2``, which keeps the normaliser of the softmax near 1 (PaLM, Chowdhery et al. 2022, section 5)."""

    name: ClassVar[str] = "z_loss"

    def value(self, rows: RowContext) -> Tensor:
        return (rows["max"] + rows["log_sum"]) ** 2

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        into.add("q_lse", 2 * u)


@register_term
@dataclass(frozen=True, eq=False)
class Entropy(Term):
    """Entropy of the student, ``H = lse - E_q[s]`` in nats; subtract it from a loss for an entropy bonus."""

    wanted: ClassVar[frozenset[str]] = frozenset({"entropy"})
    name: ClassVar[str] = "entropy"

    def value(self, rows: RowContext) -> Tensor:
        return rows["entropy"]

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        into.add("q_log_q", -u)


@register_term
@dataclass(frozen=True, eq=False)
class LogProb(Term):
    """Log-probability of the target, ``s_y - lse``: positive sign, unlike :class:`CrossEntropy`."""

    needs_targets: ClassVar[bool] = True
    name: ClassVar[str] = "logprob"

    def value(self, rows: RowContext) -> Tensor:
        return rows["target"] - rows["log_sum"]

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        into.add("one_hot", u)


@register_term
@dataclass(frozen=True, eq=False)
class TargetLogit(Term):
    """The scaled logit of the target, s_y."""

    needs_targets: ClassVar[bool] = True
    name: ClassVar[str] = "target_logit"

    def value(self, rows: RowContext) -> Tensor:
        return rows["target"] + rows["max"]

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        into.add("one_hot", u)
        into.add("q", u)  # against the balance: alone among these, it is not invariant to a shift of the logits


@register_term
@dataclass(frozen=True, eq=False)
class LogSumExp(Term):
    """The log-normaliser of the softmax, lse."""

    name: ClassVar[str] = "lse"

    def value(self, rows: RowContext) -> Tensor:
        return rows["max"] + rows["log_sum"]

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        into.add("q", u)


@register_term
@dataclass(frozen=True, eq=False)
class MaxLogit(Term):
    """The largest scaled logit, a statistic without gradient."""

    name: ClassVar[str] = "max_logit"

    def value(self, rows: RowContext) -> Tensor:
        return rows["max"]

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        pass


@register_term
@dataclass(frozen=True, eq=False)
class Collision(Term):
    """Collision probability ``sum_v q_v^2``; its gradient is 2 q_v (q_v - sum q^2)."""

    wanted: ClassVar[frozenset[str]] = frozenset({"collision"})
    name: ClassVar[str] = "collision"

    def value(self, rows: RowContext) -> Tensor:
        return rows["log_collision"].exp()

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        into.add("q_squared", 2 * u)


@register_term
@dataclass(frozen=True, eq=False, init=False)
class Divergence(Term):
    """A divergence D(p, q) between the teacher's distribution p and the student's q, by its name in the table.

    ======================  =======================================================================================
    forward_kl              KL(p || q): the student covers the teacher's modes (Hinton et al. 2015)
    reverse_kl              KL(q || p): the student seeks a mode of the teacher (MiniLLM, Gu et al. 2024, equation 1)
    symmetric_kl(weight)    (1 - weight) KL(p || q) + weight KL(q || p)
    jsd(beta)               beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, Agarwal et al.
                            2024, equation 1). beta = 0 is forward_kl and beta = 1 reverse_kl, as in TRL and Liger: a
                            jump, since jsd itself goes to 0 there (jsd / beta -> forward_kl)
    skew_forward_kl(alpha)  KL(p || alpha p + (1 - alpha) q) (DistiLLM, Ko et al. 2024, section 3.1); forward_kl at
                            alpha = 0
    skew_reverse_kl(alpha)  KL(q || alpha q + (1 - alpha) p), differentiated through both places of q (the same);
                            reverse_kl at alpha = 0
    tvd                     total variation, sum_v |p_v - q_v| / 2 (f-distill, Wen et al. 2023)
    squared_hellinger       1 - sum_v sqrt(p_v q_v), with no factor of 2
    ======================  =======================================================================================

    Args:
        name: which.
        temperature_squared: multiply by the student's temperature squared (Hinton et al. 2015, section 2). Off, as in
            TRL, Liger, torchtune and verl; DistillKit, Model Optimizer and Automodel do it.
        parameters: ``weight`` or ``beta`` in [0, 1], 0.5 by default; ``alpha`` in [0, 1], 0.1 by default.

    Raises:
        ValueError: unknown name or parameter, or a parameter outside its range.
    """

    divergence: str
    parameters: tuple[float, ...]
    temperature_squared: bool

    needs_teacher: ClassVar[bool] = True

    def __init__(self, name: str, *, temperature_squared: bool = False, **parameters: float) -> None:
        name, values = divergences.resolve(name, parameters)
        object.__setattr__(self, "divergence", name)
        object.__setattr__(self, "parameters", values)
        object.__setattr__(self, "temperature_squared", bool(temperature_squared))

    @property
    def name(self) -> str:
        return self.divergence

    @property
    def computed(self) -> tuple[str, tuple[float, ...]]:
        """The row of the table that serves, limits taken."""
        limit = divergences.TABLE[self.divergence].limits(*self.parameters)
        return (self.divergence, self.parameters) if limit is None else limit

    @property
    def definition(self) -> divergences.Definition:
        return divergences.TABLE[self.computed[0]]

    @property
    def wanted(self) -> frozenset[str]:
        return frozenset({"moments"}) if self.definition.family == "moments" else frozenset()

    @property
    def generic(self) -> tuple[str, tuple[float, ...]] | None:
        """The key of the generic kernel's statistics ``(key, "value")`` and ``(key, "slope")``, if it needs that."""
        return self.computed if self.definition.family == "generic" else None

    @property
    def adjoint(self) -> Divergence:
        """The same number as a divergence with student and teacher exchanged."""
        name, parameters = self.definition.adjoint(*self.computed[1])
        names = [parameter.name for parameter in divergences.TABLE[name].parameters]
        return Divergence(name, temperature_squared=self.temperature_squared, **dict(zip(names, parameters)))

    def value(self, rows: RowContext) -> Tensor:
        if self.generic is not None:
            return self._squared(rows, rows[self.generic, "value"])
        forward, reverse = self.definition.mix(*self.computed[1])
        value = 0.0
        if forward:
            value = value + forward * rows["forward_kl"]
        if reverse:
            value = value + reverse * rows["reverse_kl"]
        return self._squared(rows, value)

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        u = self._squared(rows, u)
        if self.generic is not None:
            into.add(self.generic, u)
            return
        forward, reverse = self.definition.mix(*self.computed[1])
        if forward:
            into.add("p", -forward * u)
        if reverse:
            into.add("q_log_ratio", reverse * u)

    def _squared(self, rows: RowContext, x: Tensor) -> Tensor:
        return x * rows.temperature**2 if self.temperature_squared else x

    def encode(self) -> tuple:
        return ("Divergence", self.divergence, self.parameters, self.temperature_squared)

    @classmethod
    def decode(cls, name: str, parameters: tuple[float, ...], temperature_squared: bool) -> Divergence:
        names = [parameter.name for parameter in divergences.TABLE[name].parameters]
        return cls(name, temperature_squared=temperature_squared, **dict(zip(names, parameters)))


@register_term
@dataclass(frozen=True, eq=False)
class RowTerm(Term):
    """A user's own function of rows of logits; made by :func:`row_term`."""

    function: Callable[..., Tensor]
    label: str
    teacher: bool
    targets: bool
    token: int

    calls_function: ClassVar[bool] = True
    _living: ClassVar[weakref.WeakValueDictionary[int, RowTerm]] = weakref.WeakValueDictionary()
    _tokens: ClassVar[itertools.count] = itertools.count()

    @property
    def name(self) -> str:
        return self.label

    @property
    def needs_teacher(self) -> bool:
        return self.teacher

    @property
    def needs_targets(self) -> bool:
        return self.targets

    def value(self, rows: RowContext) -> Tensor:
        return rows[self.token, "value"]

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        pass  # autograd gives the gradient

    def encode(self) -> tuple:
        return ("RowTerm", self.token)

    @classmethod
    def decode(cls, token: int) -> RowTerm:
        return cls._living[token]


def row_term(
    function: Callable[..., Tensor], *, name: str = "row", teacher: bool = False, targets: bool = False
) -> RowTerm:
    """A term from a function of rows of scaled logits, differentiated by autograd inside the chunk.

    It is added and scaled like any other, and the [tokens, V] tensor never exists: the function sees a chunk at a time.

    Args:
        function: called as ``function(student)``, with the teacher's logits and the targets appended if asked for;
            student and teacher are [C, V] in the compute type, targets [C] (0 where ignored). It returns [C], each
            entry a function of its own row alone, in torch operations.
        name: key in ``result.terms``.
        teacher, targets: whether the function takes them.

    Example:
        >>> margin = ll.row_term(lambda s: s.topk(2).values.diff().squeeze(-1), name="margin")
        >>> result = (ll.CrossEntropy() + 0.1 * margin)(student, targets=y)
    """
    if not callable(function):
        raise TypeError(f"function: a callable, got {type(function).__name__}")
    term = RowTerm(function, str(name), bool(teacher), bool(targets), next(RowTerm._tokens))
    RowTerm._living[term.token] = term
    return term
