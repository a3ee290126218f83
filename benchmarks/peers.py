"""Peers: the same loss by their kernels, with their defaults, where they are installed; Sinkhorn as others have it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Inputs, torch_cross_entropy

Forward = Callable[[Inputs], Tensor]
Tensors = dict[str, Tensor]
EPSILON = 0.1  # of the Sinkhorn problems


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


# ---- Sinkhorn


def released_sinkd(x: Tensors) -> Tensor:
    """SinKD as released (2402.17110), from its formula: unit marginals, linear domain, autograd through everything."""
    p, q = ((x[name] / 2).softmax(-1) for name in ("student", "teacher"))
    cost = torch.cdist(p, q, p=1)
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return 0.001 * (plan * cost).sum()


def eager_doubly_stochastic(x: Tensors) -> Tensor:
    """In the log domain, under autograd."""
    log = x["logits"]
    for _ in range(20):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    return (log.exp() * x["upstream"]).sum()


def batched_sinkhorn() -> dict[str, Callable[[Tensors], Tensor]]:
    return {"torch": _torch_batch, **({"pot": _pot_batch} if importlib.util.find_spec("ot") else {})}


def point_sinkhorn() -> dict[str, Callable[[Tensors], Tensor]]:
    return {"torch": _torch_points, **({"geomloss": _geomloss} if importlib.util.find_spec("geomloss") else {})}


def _torch_batch(x: Tensors) -> Tensor:
    """Uniform weights, mass 1; in the log domain, autograd through all 20 iterations."""
    cost = x["cost"]
    n, m = cost.shape[-2:]
    f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros(cost.shape[:-2] + (m,))
    for _ in range(20):
        f = -math.log(n) - (g[..., None, :] - cost / EPSILON).logsumexp(-1)
        g = -math.log(m) - (f[..., None] - cost / EPSILON).logsumexp(-2)
    return ((f[..., None] + g[..., None, :] - cost / EPSILON).exp() * cost).sum()


def _torch_points(x: Tensors) -> Tensor:
    """The same until rows are met to 1e-6; the gradient of <P, C> + epsilon KL is that of <P, C> with P held."""
    cost = torch.cdist(x["x"], x["y"]) ** 2
    n, m = cost.shape
    with torch.no_grad():
        g, off = cost.new_zeros(m), torch.inf
        while off > 1e-6:
            log_rows = (g - cost / EPSILON).logsumexp(1)
            f = -math.log(n) - log_rows
            g = -math.log(m) - (f[:, None] - cost / EPSILON).logsumexp(0)
            off = ((f + (g - cost / EPSILON).logsumexp(1)).exp() - 1 / n).abs().sum()
        log_plan = f[:, None] + g - cost / EPSILON
        plan = log_plan.exp()
    return (plan * cost).sum() + EPSILON * (plan * (log_plan + math.log(n * m))).sum()


def _pot_batch(x: Tensors) -> Tensor:
    from ot.batch import solve_batch

    options = {"max_iter": 20, "tol": 0.0, "method": "log_sinkhorn", "grad": "autodiff"}
    return solve_batch(x["cost"], EPSILON, **options).value_linear.sum()


def _geomloss(x: Tensors) -> Tensor:
    """Its cost is half ours, and so is its value; it has no tolerance: ``scaling`` is what its accuracy comes from."""
    from geomloss import SamplesLoss

    options = {"p": 2, "blur": (EPSILON / 2) ** 0.5, "scaling": 0.99, "debias": False, "backend": "tensorized"}
    return 2 * SamplesLoss("sinkhorn", **options)(x["x"], x["y"])
