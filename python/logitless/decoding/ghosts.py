"""Ghosts of Softmax: how long a step the Taylor series of the cross-entropy bears."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.decoding.rows import check_workspace, compute_dtype, concatenated, empty, row_blocks
from logitless.logits import LinearLogits, check_floating, check_logits, check_targets


@dataclass(frozen=True)
class GhostRadius:
    """``spread`` [...]: max minus min of the logits' derivatives, 0 where ignored; ``radius``: pi / max spread, 0-d."""

    spread: Tensor
    radius: Tensor


@torch.no_grad()
def ghost_radius(
    student: LinearLogits,
    *,
    hidden_tangent: Tensor | None = None,
    weight_tangent: Tensor | None = None,
    bias_tangent: Tensor | None = None,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    workspace: int | str = "auto",
) -> GhostRadius:
    """Radius within which the Taylor series of the cross-entropy converges along a step ("Ghosts of Softmax", Sao
    2026, arXiv 2603.13552). With logits linear along the step, the softmax's partition function has no complex zero
    nearer than

        rho = pi / max over tokens of Delta,    Delta = max_v a_v - min_v a_v,    a = d logits / d step

    ``a = hdot W^T + h Wdot^T + bdot`` is the Jacobian-vector product through the head, one product on the concatenated
    inputs ``[hdot, h] [W, Wdot]^T``: 2G, 1G where head or body is frozen, and 1G more for a softcap, whose slope needs
    the logits. The concatenated weight is a copy, [V, 2H].

    rho is a length along the tangent: take tangents for a direction of unit norm over all parameters, such as
    ``g / ||g||``, and hidden tangents from ``torch.func.jvp`` of the body. A step of length tau is within the radius
    for ``tau / rho < 1``; see :func:`ghost_step`. rho is a lower bound of the exact radius; for two classes that is
    :func:`binary_ghost_radius`. (The released optimizer RhoScaledAdam takes another quantity: pi over the mean spread
    of the logits themselves.)

    Args:
        student: the head where it stands; the derivative is that of its scaled logits.
        hidden_tangent: [..., H], how the hidden states move; None: they do not.
        weight_tangent: [V, H]; None: a frozen head. bias_tangent: [V]; None: no bias, or a frozen one.
        targets: [...] integers, only to leave out tokens equal to ``ignore_index``.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_logits("student", student)
    if not isinstance(student, LinearLogits):
        raise TypeError(f"student: a LinearLogits, got {type(student).__name__}")
    tangents = {"hidden": hidden_tangent, "weight": weight_tangent, "bias": bias_tangent}
    for name, tangent in tangents.items():
        if tangent is not None:
            _check_tangent(f"{name}_tangent", tangent, getattr(student, name), name)
    if hidden_tangent is None and weight_tangent is None:
        raise ValueError("hidden_tangent: needed, or weight_tangent")
    if targets is not None:
        check_targets(targets, student)
    hiddens, weights = [], []
    if hidden_tangent is not None:
        hiddens, weights = [hidden_tangent], [student.weight]
    if weight_tangent is not None:
        hiddens, weights = [*hiddens, student.hidden], [*weights, weight_tangent]
    tangent = LinearLogits(
        concatenated(hiddens),
        concatenated(weights),
        bias_tangent,
        scale=student.scale,
        temperature=student.temperature,
        vocab_size=student.columns,
    )
    budget = check_workspace(workspace, ignore_index)
    impossible = None if student.bias is None else student.bias[: student.columns] == -torch.inf
    spread = empty(student, compute_dtype([student]))
    for rows, (a, *logits) in row_blocks([tangent] + [student] * (student.softcap is not None), budget):
        if logits:
            temperature = student.temperature
            temperature = temperature.reshape(-1)[rows, None] if isinstance(temperature, Tensor) else temperature
            a = a * (1 - (logits[0] * temperature / student.softcap) ** 2)
        high, low = a, a
        if impossible is not None:  # these have no part in the partition function
            high, low = a.masked_fill(impossible, -torch.inf), a.masked_fill(impossible, torch.inf)
        spread[rows] = high.amax(-1) - low.amin(-1)
    spread = spread.view(student.shape)
    if targets is not None:
        spread = torch.where(targets != ignore_index, spread, 0)
    largest = spread.amax() if spread.numel() else spread.new_zeros(())
    return GhostRadius(spread, math.pi / largest)


def binary_ghost_radius(gap: Tensor, spread: Tensor) -> Tensor:
    """``sqrt(gap^2 + pi^2) / |spread|``: the exact radius of a binary decision, elementwise.

    ``gap`` is the difference of the two logits, ``spread`` that of their derivatives along the step.
    """
    return torch.hypot(gap, torch.full_like(gap, math.pi)) / spread.abs()


def ghost_step(learning_rate: float | Tensor, gradient_norm: Tensor, radius: Tensor) -> Tensor:
    """Length of the step ``min(learning_rate * ||g||, rho)`` along the unit direction; multiply that by it."""
    return torch.minimum(learning_rate * gradient_norm, radius)


def _check_tangent(name: str, tangent: object, primal: Tensor | None, primal_name: str) -> None:
    check_floating(name, tangent)
    if primal is None:
        raise ValueError(f"{name}: the student has no {primal_name}")
    if tangent.shape != primal.shape:
        raise ValueError(f"{name}: shape {list(tangent.shape)}, that of {primal_name} is {list(primal.shape)}")
    if tangent.dtype != primal.dtype or tangent.device != primal.device:
        raise ValueError(
            f"{name}: {tangent.dtype} on {tangent.device}, {primal_name} is {primal.dtype} on {primal.device}"
        )
