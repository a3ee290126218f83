"""Peers on a GPU, where they are installed: the same loss by their kernels, with their defaults."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import Tensor

from benchmarks.cases import Inputs, torch_cross_entropy

Forward = Callable[[Inputs], Tensor]


def cross_entropy() -> dict[str, Forward]:
    """By Liger-Kernel (bf16 logits) and Apple's cut-cross-entropy (filters small gradients), and materialised."""
    found: dict[str, Forward] = {"torch": torch_cross_entropy}
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = _liger_cross_entropy
    if importlib.util.find_spec("cut_cross_entropy"):
        found["cce"] = _cut_cross_entropy
    return found


def jsd() -> dict[str, Forward]:
    return {"liger": _liger_jsd} if importlib.util.find_spec("liger_kernel") else {}


def _liger_cross_entropy(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(x.weight, x.hidden, x.targets)


def _cut_cross_entropy(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.targets)


def _liger_jsd(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)
    return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.targets)
