"""Divergences between the distributions of two prompts, or of two inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.logits import Logits, check_alike, check_floating
from logitless.losses.checks import check_count
from logitless.ops.functional import divergence


@torch.no_grad()
def uscd_gate(standard: Logits, lame: Logits, *, workspace: int | str = "auto") -> Tensor:
    """Jensen-Shannon divergence of the next-token distributions of two prompts, [...] in nats, in [0, log 2].

    Uncertainty-aware selective contrastive decoding (USCD, Wang et al. 2024, arXiv 2409.05923) subtracts the noise that
    a lame prompt (the standard one without its examples) brings out, at some tokens only:
    ``guided([standard, lame], [1, -mu])`` with mu per token, 0 where the gate is shut. The paper takes a low divergence
    (about 0.25) for a sign that the two are related, and opens its gate by the uncertainty of the standard distribution
    besides, for which ``guided([standard], [1]).entropy`` serves. Symmetric in its arguments. Products: 2G.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_alike(standard=standard, lame=lame)
    return divergence(standard, lame, "jsd", beta=0.5, reduction="none", workspace=workspace)


@dataclass(frozen=True)
class KLTrace:
    """``map`` [...] in nats; ``location`` [..., dims] int64: where each map has its maximum."""

    map: Tensor
    location: Tensor


@torch.no_grad()
def kl_tracing(clean: Logits, perturbed: Logits, *, dims: int = 2, workspace: int | str = "auto") -> KLTrace:
    """KL(clean || perturbed) at every patch, and where it is largest (Kim et al. 2025, arXiv 2507.09082).

    A tracer is put into one patch of a frame; the patch of the next frame whose predicted distribution changes most is
    where the traced point went. Average ``map`` over several tracers, and call :func:`peak` on that. Products: 2G.

    Args:
        clean, perturbed: logits of [..., *patches], one distribution per patch.
        dims: how many of the last leading dimensions are those of a map: 2 for [..., rows, columns].

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    check_alike(clean=clean, perturbed=perturbed)
    _check_dims(dims, clean.shape)
    found = divergence(perturbed, clean, "forward_kl", reduction="none", workspace=workspace)
    return KLTrace(found, peak(found, dims))


def peak(values: Tensor, dims: int = 2) -> Tensor:
    """Indices [..., dims] of the largest entry over the last ``dims`` dimensions, the first one of several."""
    check_floating("values", values)
    _check_dims(dims, values.shape)
    index = values.flatten(-dims).argmax(-1)
    return torch.stack(torch.unravel_index(index, values.shape[-dims:]), -1)


def _check_dims(dims: object, shape: torch.Size) -> None:
    check_count("dims", dims, len(shape))
    if 0 in shape[-dims:]:
        raise ValueError(f"dims: the map {list(shape[-dims:])} is empty")
