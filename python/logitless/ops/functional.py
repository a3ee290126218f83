"""Single losses as functions, under the signatures that users of torch, TRL and Liger know."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.logits import LinearLogits, Logits, TopKLogits, check_number
from logitless.terms import CrossEntropy, Divergence, ZLoss


def cross_entropy(
    student: Logits,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    **options,
) -> Tensor:
    """Cross-entropy of logits that are described, never held.

    Args:
        student: logits of [...] tokens.
        targets: [...] integer token ids.
        label_smoothing, class_weights: see :class:`logitless.CrossEntropy`.
        z_loss: coefficient of the squared log-normaliser, added to the loss.
        options: weights, reduction, denominator, keep, ignore_index, compact, strategy, product, workspace as in
            ``Objective.__call__``.

    Returns:
        The loss: 0-d, or [...] for reduction="none".

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_number("z_loss", z_loss, low=0)
    objective = 1.0 * CrossEntropy(label_smoothing, class_weights)
    if z_loss:
        objective = objective + z_loss * ZLoss()
    return objective(student, targets=targets, **options).loss


def divergence(
    student: Logits,
    teacher: Logits | TopKLogits,
    name: str,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    beta: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    weight: float | Tensor | None = None,
    a: float | Tensor | None = None,
    b: float | Tensor | None = None,
    mu: float | None = None,
    detach_mixture: bool | None = None,
    targets: Tensor | None = None,
    **options,
) -> Tensor:
    """A divergence between the teacher's and the student's next-token distributions.

    Args:
        student, teacher: logits of [...] tokens over one vocabulary. The teacher gets no gradient unless
            ``teacher_grad=True``. It may be :class:`logitless.TopKLogits`.
        name, temperature, temperature_squared, and the parameters of the divergences, each for those that have it: see
            :class:`logitless.Divergence`.
        targets: [...] integers, only to leave out tokens equal to ``ignore_index``.
        options: as for :func:`cross_entropy`, and teacher_grad.

    Returns:
        The loss: 0-d, or [...] for reduction="none".

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    given = {
        "beta": beta, "alpha": alpha, "weight": weight, "a": a, "b": b, "mu": mu, "detach_mixture": detach_mixture
    }  # fmt: skip
    parameters = {key: value for key, value in given.items() if value is not None}
    term = Divergence(name, temperature=temperature, temperature_squared=temperature_squared, **parameters)
    return term(student, teacher=teacher, targets=targets, **options).loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.linear_cross_entropy``: the same arguments, and these differences in results.

    Losses are float32 whatever the input type (float64 for float64), logits are never rounded, and a batch in which
    every token is ignored gives 0 instead of NaN.

    Args:
        input: [..., H] floating hidden states.
        linear_weight: [V, H].
        target: [...] integer classes.
        linear_bias: [V] or None.
        weight: [V] class weights or None.
        reduction, ignore_index, label_smoothing: as torch has them.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    logits = LinearLogits(input, linear_weight, linear_bias)
    if isinstance(target, Tensor) and target.dtype == torch.uint8:
        target = target.long()
    return cross_entropy(
        logits,
        target,
        label_smoothing=label_smoothing,
        class_weights=weight,
        reduction=reduction,
        ignore_index=ignore_index,
    )
