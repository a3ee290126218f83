"""The seam between policy objectives and what computes them: one call gives value, derivatives and metrics.

A backend reads every input once (twice where sums over sequences come first) and writes each derivative once; results
are added up in a fixed order. Where none serves (float64, a part of an objective that no recipe describes), the
objective's own torch expression does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from logitless.ops.tokens.recipe import Recipe


class TokenKernels(Protocol):
    def forward(
        self,
        recipe: Recipe,
        inputs: tuple[Tensor, ...],
        mask: Tensor | None,
        offsets: Tensor | None,
        denominator: Tensor | None,
        wanted: bool,
    ) -> tuple[Tensor, Any]:
        """Results, float64 [len(recipe.results)], and what :meth:`backward` needs (None unless ``wanted``).

        Args:
            recipe: what to compute.
            inputs: by slot; float32, contiguous, [T] per token or, where there are ``offsets``, [B, 1] per sequence.
            mask: [T] bool, or None: all count.
            offsets: [B + 1] int64, sequence i is offsets[i] : offsets[i + 1]; tokens after the last do not count.
                None: there are no sequences.
            denominator: 0-d float32, for ``recipe.denominator == "given"``.
            wanted: whether derivatives are.
        """

    def backward(self, recipe: Recipe, state: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        """``upstream`` (0-d float32) times the derivatives, [T] float32 each, one per slot of ``recipe.gradients``.

        The state is left as it is: a second call gives the same.
        """


def select(device: torch.device, dtype: torch.dtype) -> TokenKernels | None:
    """The kernels for tensors of a device and type; None: the torch expression serves."""
    return None
