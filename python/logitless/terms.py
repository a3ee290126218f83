"""Losses are terms, terms add and scale, and a sum of terms is one pass over the vocabulary.

A term says which statistics of a row it reads, its value from them, and the coefficients of its gradient on the basis
of :mod:`logitless.backends`; a sum of terms adds coefficients. In the formulas s are the student's scaled logits,
q = softmax(s), lse = logsumexp(s), p the teacher's distribution, y the target; u is the upstream gradient of the term's
value, per row. Statistics are float64 [rows], see :func:`logitless.engine.statistics.finish`.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from logitless import divergences
from logitless.engine.problem import register_term
from logitless.engine.statistics import Coefficients, RowContext
from logitless.logits import Logits, check_constant, check_floating, check_number, check_per_token
from logitless.ops.loss import LossResult, evaluate
from logitless.support import Keep


class Summand:
    """What adds and scales: sums are an :class:`Objective`."""

    def __call__(self, student: Logits, **inputs) -> LossResult:
        return Objective(((1.0, self),))(student, **inputs)

    def __add__(self, other: Summand | Objective) -> Objective:
        return Objective(((1.0, self),)) + other

    def __sub__(self, other: Summand | Objective) -> Objective:
        return Objective(((1.0, self),)) - other

    def __mul__(self, factor: float) -> Objective:
        return Objective(((1.0, self),)) * factor

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return -1.0 * self


@dataclass(frozen=True, eq=False)
class Term(Summand):
    """A loss of one row of logits. Subclasses give ``value`` and ``coefficients``."""

    needs_targets: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    wanted: ClassVar[frozenset[str]] = frozenset()  # what the statistics kernel must collect
    generic: ClassVar[tuple] = ()  # (name, parameters) of the sums that the generic kernel must collect
    topk: ClassVar[tuple[int, int] | None] = None  # places of a top-k teacher's ids and log-probabilities
    needs_rest: ClassVar[bool] = False  # whether it reads the student's mass outside those ids
    adjoint: ClassVar[Term | None] = None  # the same number with student and teacher exchanged, where both have a part
    is_open: ClassVar[bool] = True  # whether coefficients depend on u and on the inputs alone, not on statistics
    calls_function: ClassVar[bool] = False  # whether rows are handed to a user's function
    temperature = 1.0  # divides the logits of both sides for this term
    weighted_classes = False  # whether the target's class weight counts in a mean; a field of CrossEntropy

    @property
    def name(self) -> str:
        """The key of this term in ``result.terms``."""
        raise NotImplementedError

    def value(self, rows: RowContext) -> Tensor:
        """The term's value per row, float64 [rows]."""
        raise NotImplementedError

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        """Adds the open coefficients of u * d value / d s: those without the balance, see :func:`statistics.close`."""
        raise NotImplementedError

    def placed(self, student: Logits, place: Callable[[Tensor], int]) -> Term:
        """The term with its tensors (one number per token) handed to ``place``: what that returns is in their stead."""
        return self

    def encode(self) -> tuple:
        """(class name, *arguments): plain values from which :meth:`decode` makes an equal term."""
        return (type(self).__name__,)

    @classmethod
    def decode(cls, *arguments) -> Term:
        return cls(*arguments)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, computed in one pass: ``0.5 * CrossEntropy() + 0.5 * Divergence("jsd")``."""

    terms: tuple[tuple[float, Summand], ...]

    def __call__(
        self,
        student: Logits,
        *,
        targets: Tensor | None = None,
        teacher: Logits | None = None,
        weights: Tensor | None = None,
        reduction: str = "mean",
        denominator: float | Tensor | None = None,
        keep: Keep | None = None,
        ignore_index: int = -100,
        teacher_grad: bool = False,
        compact: bool | None = None,
        strategy: str = "auto",
        product: str = "auto",
        workspace: int | str = "auto",
        **inputs: Tensor | None,
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
            keep: a filter of the student's tokens, or several in order, see :func:`logitless.logprobs`: terms see the
                distribution renormalised over the kept tokens. A target that is not kept has log-probability -inf, so
                make it ignored (or give its term a factor of 0) unless the loss stands that; its gradient is 0. A
                teacher is not filtered: p need not vanish where q does, and forward KL is then infinite.
            ignore_index: tokens with this target contribute exactly 0 and do not count.
            teacher_grad: whether the teacher gets a gradient too.
            compact: drop ignored tokens before the matrix products; None: on CPUs (on a GPU it synchronises once).
            strategy, product, workspace: see :mod:`logitless.engine.plan`.
            inputs: what policy objectives read, by name: advantages, old_logprob, ..., mask and cu_seqlens, see
                ``TokenObjective.from_logprobs``. Those objectives aggregate by themselves, with ``denominator``;
                ``reduction`` is for the other terms.

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
            keep=keep,
            ignore_index=ignore_index,
            teacher_grad=teacher_grad,
            compact=compact,
            strategy=strategy,
            product=product,
            workspace=workspace,
            inputs=inputs,
        )

    def __add__(self, other: Summand | Objective) -> Objective:
        if isinstance(other, Summand):
            other = Objective(((1.0, other),))
        if not isinstance(other, Objective):
            return NotImplemented
        return Objective(self.terms + other.terms)

    def __sub__(self, other: Summand | Objective) -> Objective:
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
        into.add("one_hot_alone", u)  # alone among these, it is not invariant to a shift of the logits


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
    skew_reverse_kl(alpha)  KL(q || alpha q + (1 - alpha) p), differentiated through both places of q; reverse_kl at
                            alpha = 0. ``detach_mixture=True``: through the first alone (DistiLLM-2, Ko et al. 2025)
    tvd                     total variation, sum_v |p_v - q_v| / 2 (f-distill, Wen et al. 2023)
    squared_hellinger       1 - sum_v sqrt(p_v q_v), with no factor of 2
    bhattacharyya           -log sum_v sqrt(p_v q_v)
    alpha(alpha)            (1 - sum_v p_v^alpha q_v^(1-alpha)) / (alpha (1 - alpha)), any alpha (Amari; AlphaNet, Wang
                            et al. 2021); forward_kl at alpha = 1, reverse_kl at 0
    renyi(alpha)            log sum_v p_v^alpha q_v^(1-alpha) / (alpha - 1), alpha > 0; forward_kl at alpha = 1
    chi2_pearson            sum_v (p_v - q_v)^2 / q_v: infinite in float32 where p / q is, unlike renyi(2)
    chi2_neyman             sum_v (p_v - q_v)^2 / p_v
    cauchy_schwarz          -log(sum_v p_v q_v / sqrt(sum_v p_v^2 sum_v q_v^2)) (Principe 2010)
    alpha_beta(a, b)        sum_v (a p_v^(a+b) + b q_v^(a+b)) / ((a+b) a b) - p_v^a q_v^b / (a b), and its limits where
                            a, b or a + b is 0 (ABKD, Wang et al. 2025, equation 6); any a, b
    softened_reverse_kl     2 KL((p + q)/2 || p) (f-distill, Xu et al. 2025, table 1)
    adaptive_kl(mu)         c KL(p || q) + (1 - c) KL(q || p) with c, a constant for the gradient, the share of sum_v
                            |p_v - q_v| that lies in the head of p: its most probable tokens, of mass up to mu (AKL, Wu
                            et al. 2024, section 4)
    ======================  =======================================================================================

    Args:
        name: which.
        temperature: divides the logits of both sides, after their own temperatures. Terms of different temperature
            still share their products.
        temperature_squared: multiply by the student's temperature squared (Hinton et al. 2015, section 2), all of it.
            Off, as in TRL, Liger, torchtune and verl; DistillKit, Model Optimizer and Automodel do it.
        parameters: ``weight``, ``beta`` and ``mu`` in [0, 1], 0.5 by default; ``alpha`` of the skew divergences in
            [0, 1], 0.1 by default; ``alpha`` of the others 0.5 by default; ``a`` 0.2 and ``b`` 0.7 by default. Each a
            number or (but for ``mu``) a tensor [...] with one per token, without gradient; those of jsd must then lie
            inside (0, 1), those of the skew divergences be above 0, those of renyi differ from 1.

    Raises:
        ValueError: unknown name or parameter, or a parameter outside its range.
    """

    divergence: str
    parameters: tuple[divergences.Number, ...]
    temperature: float
    temperature_squared: bool
    parts: divergences.Parts  # numbers, or as ("token", place) those of a tensor among the problem's
    adjoint_parts: divergences.Parts

    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        **parameters: divergences.Number,
    ) -> None:
        name, values = divergences.resolve(name, parameters)
        check_number("temperature", temperature, above=0)
        parts = ()
        if divergences.TABLE[name].parts is not None:
            parts = divergences.TABLE[name].parts(*values)
        self._set(name, values, float(temperature), bool(temperature_squared), parts, divergences.adjoint(parts))

    def _set(self, *values) -> Divergence:
        for field, value in zip(Divergence.__annotations__, values):  # needs_teacher, which is the class's, comes last
            object.__setattr__(self, field, value)
        return self

    @property
    def name(self) -> str:
        return self.divergence

    def placed(self, student: Logits, place: Callable[[Tensor], int]) -> Divergence:
        if not any(isinstance(value, Tensor) for value in self.parameters):
            return self
        for parameter, value in zip(divergences.TABLE[self.divergence].parameters, self.parameters, strict=True):
            if isinstance(value, Tensor):
                check_per_token(parameter.name, value, student)
        values = divergences.checked(self.divergence, self.parameters)
        parts = divergences.TABLE[self.divergence].parts(*values)

        def stored(number: divergences.Number) -> divergences.Number | tuple:
            return ("token", place(number.reshape(-1))) if isinstance(number, Tensor) else number

        both = (
            tuple([(stored(factor), name, tuple([stored(x) for x in numbers])) for factor, name, numbers in some])
            for some in (parts, divergences.adjoint(parts))
        )
        return copy.copy(self)._set(self.divergence, (), self.temperature, self.temperature_squared, *both)

    def _of_family(self, *families: str) -> list[tuple]:
        return [part for part in self.parts if divergences.SUMS[part[1]].family in families]

    @property
    def wanted(self) -> frozenset[str]:
        return frozenset({"moments"}) if self._of_family("moments") else frozenset()

    @property
    def generic(self) -> tuple[tuple[str, tuple], ...]:
        """(name, parameters) of what the generic kernel must sum: the keys of its statistics and coefficients."""
        return tuple([part[1:] for part in self._of_family("generic", "log_sum")])

    @property
    def adjoint(self) -> Divergence:
        """The same number as a divergence with student and teacher exchanged."""
        rest = (self.divergence, self.parameters, self.temperature, self.temperature_squared)
        return copy.copy(self)._set(*rest, self.adjoint_parts, self.parts)

    @property
    def calls_function(self) -> bool:
        return divergences.TABLE[self.divergence].function is not None

    targets, teacher = False, True  # what the function of a row takes

    @property
    def key(self) -> object:
        """Where the value of the function of a row is found."""
        return self.divergence, self.parameters, self.temperature

    def function(self, s: Tensor, t: Tensor) -> Tensor:
        function = divergences.TABLE[self.divergence].function
        return function(s / self.temperature, t / self.temperature, *self.parameters)

    def value(self, rows: RowContext) -> Tensor:
        if self.calls_function:
            return self._squared(rows, rows[self.key, "value"])
        value = 0.0
        for factor, name, parameters in self.parts:
            moments = divergences.SUMS[name].family == "moments"
            value = value + rows.number(factor) * (rows[name] if moments else rows[(name, parameters), "value"])
        return self._squared(rows, value)

    def coefficients(self, rows: RowContext, u: Tensor, into: Coefficients) -> None:
        u = self._squared(rows, u)
        for factor, name, parameters in self.parts:
            c = rows.number(factor) * u
            if name == "forward_kl":
                into.add("p", -c)
            elif name == "reverse_kl":
                into.add("q_log_ratio", c)
            else:
                into.add((name, parameters), c)

    def row_upstream(self, rows: RowContext, u: Tensor) -> Tensor:
        return self._squared(rows, u)

    def _squared(self, rows: RowContext, x: Tensor) -> Tensor:
        return x * (self.temperature * rows.temperature) ** 2 if self.temperature_squared else x

    def encode(self) -> tuple:
        rest = (self.temperature, self.temperature_squared, self.parts, self.adjoint_parts)
        return ("Divergence", self.divergence, self.parameters, *rest)

    @classmethod
    def decode(cls, *values) -> Divergence:
        return cls.__new__(cls)._set(*values)


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

    @property
    def key(self) -> object:
        return self.token

    def value(self, rows: RowContext) -> Tensor:
        return rows[self.token, "value"]

    def row_upstream(self, rows: RowContext, u: Tensor) -> Tensor:
        return u

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


def f_divergence(
    f: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor] | None = None, *, name: str = "f_divergence"
) -> RowTerm:
    """A user's own f-divergence ``D_f(p, q) = sum_v q_v f(p_v / q_v)`` (Csiszar 1967), as a term.

    Its gradient is ``q_v (g_v - E_q[g])`` with g(r) = f(r) - r f'(r) by the student's logits, and
    ``p_v (f'_v - E_p[f'])`` by the teacher's where they get one. Tokens of student probability 0 contribute nothing.

    Args:
        f: convex on (0, inf) with f(1) = 0, in torch operations, elementwise on ratios [C, V] (0 where p is 0).
        derivative: f', alike; without it autograd differentiates ``f``, which must then be differentiable at 0 too.
        name: key in ``result.terms``.

    Example:
        >>> triangular = ll.f_divergence(lambda r: (r - 1) ** 2 / (r + 1), name="triangular")
    """
    for label, function in (("f", f), ("derivative", derivative)):
        if not callable(function) and not (label == "derivative" and function is None):
            raise TypeError(f"{label}: a callable, got {type(function).__name__}")

    def rows(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        exists = log_q > -torch.inf
        q, r = log_q.exp(), torch.where(exists, log_p - log_q, 0).exp()
        if derivative is None:
            return torch.where(exists, q * f(r), 0).sum(-1)
        with torch.no_grad():
            p, slope = log_p.exp(), derivative(r)
            value = f(r)
            g = value - r * slope
            value = torch.where(exists, q * value, 0).sum(-1)
            by_s = q * (g - (q * g).sum(-1, keepdim=True))
            by_t = p * (slope - (p * slope).sum(-1, keepdim=True))
        linear = sum((by * torch.where(x == -torch.inf, 0, x)).sum(-1) for by, x in ((by_s, s), (by_t, t)))
        return value + (linear - linear.detach())

    return row_term(rows, name=name, teacher=True)
