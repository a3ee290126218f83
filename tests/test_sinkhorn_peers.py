"""``sinkhorn`` beside what others computed: POT to the last digits, GeomLoss to its own accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from logitless.ops.sinkhorn import sinkhorn, sinkhorn_divergence

N, M = 8, 9


def drawn() -> tuple:
    a, b = (torch.rand(n, dtype=torch.float64).softmax(-1) for n in (N, M))
    return torch.rand(N, M, dtype=torch.float64), a, b


def close(found, exact, rtol, atol=0.0) -> None:
    torch.testing.assert_close(found, exact, rtol=rtol, atol=atol)


def kl(p, q):
    return (p * (p / q).log()).sum() - p.sum() + q.sum()


RHOS = {
    "balanced": (None, None),
    "unbalanced": (1.0, 1.0),
    "unlike": (0.3, 5.0),
    "semi": (None, 0.7),
    "semi_rows": (0.7, None),
}


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.05])
@pytest.mark.parametrize("rhos", list(RHOS))
def test_values_of_pot(rhos: str, epsilon: float) -> None:
    """Plans and all three values to 1e-10, masses that differ too where that is allowed."""
    ot = pytest.importorskip("ot")
    cost, a, b = drawn()
    how = {"stopThr": 1e-16, "numItermax": 20000}
    if rhos == "balanced":
        plan = ot.bregman.sinkhorn_log(a, b, cost, epsilon, warn=False, **how)
    else:
        a = a if "semi" in rhos else 1.5 * a
        strength = tuple(math.inf if rho is None else rho for rho in RHOS[rhos])
        plan = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, epsilon, strength, reg_type="kl", warn=False, **how)
    options = {"rho_a": RHOS[rhos][0], "rho_b": RHOS[rhos][1], "tolerance": 1e-14, "max_iterations": 20000}
    found = sinkhorn(cost, a, b, epsilon=epsilon, **options)
    transport = (plan * cost).sum()
    value = transport + epsilon * kl(plan, a[:, None] * b)
    for rho, marginal, weights in zip(RHOS[rhos], (plan.sum(1), plan.sum(0)), (a, b)):
        value = value + (0 if rho is None else rho * kl(marginal, weights))
    close(found.plan(), plan, 1e-10, 1e-14)
    close(found.transport_cost, transport, 1e-10)
    close(found.kl_value, value, 1e-10)
    close(found.entropy_value, transport + epsilon * (plan * plan.log()).sum(), 1e-10)


@pytest.mark.parametrize("rho", [None, 1.0])
def test_gradients_of_pot(rho: float | None) -> None:
    """The implicit gradient of the transported cost, against autograd through all of POT's iterations."""
    ot = pytest.importorskip("ot")
    cost, a, b = drawn()
    cost.requires_grad_()
    if rho is None:
        plan = ot.bregman.sinkhorn_log(a, b, cost, 0.1, numItermax=1000, stopThr=0, warn=False)
    else:
        how = {"reg_type": "kl", "numItermax": 1000, "stopThr": 0, "warn": False}
        plan = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, 0.1, rho, **how)
    found = sinkhorn(cost, a, b, epsilon=0.1, rho_a=rho, rho_b=rho, tolerance=1e-14, max_iterations=2000)
    close(*(torch.autograd.grad(x, cost)[0] for x in (found.transport_cost, (plan * cost).sum())), 1e-9, 1e-13)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.8])
@pytest.mark.parametrize("p", [1, 2])
def test_divergence_of_geomloss(p: int, reach: float | None, debias: bool) -> None:
    """GeomLoss's p = 2 is half the square: half of our value, at half of our epsilon and rho.

    Its values end with the annealing (scaling), and its distances are at least 1e-4 for p = 1, that of a point from
    itself too. Gradients of its unbalanced values are (rho + epsilon / 2) / (rho + epsilon) times what finite
    differences of those values say.
    """
    geomloss = pytest.importorskip("geomloss")
    x, y = (torch.rand(n, 3, dtype=torch.float64, requires_grad=True) for n in (N, M))
    _, a, b = drawn()
    epsilon, rho = 0.4**p, None if reach is None else reach**p
    how = {"p": p, "blur": 0.4, "reach": reach, "scaling": 0.995, "debias": debias, "backend": "tensorized"}
    exact = geomloss.SamplesLoss("sinkhorn", **how)(a, x, b, y)
    kind = "euclidean" if p == 1 else "sqeuclidean"
    options = {"debias": debias, "tolerance": 1e-12, "max_iterations": 20000, "rho": rho and p * rho, "kind": kind}
    found = sinkhorn_divergence(x, y, a, b, epsilon=p * epsilon, **options).value / p
    close(found, exact, 1e-3)
    right = 1 if rho is None else (rho + epsilon) / (rho + epsilon / 2)
    for mine, theirs in zip(*(torch.autograd.grad(value, [x, y]) for value in (found, exact))):
        close(mine, theirs * right, 0, 2e-3 * float(mine.abs().max()))


def test_matrices_of_geomloss() -> None:
    """Whose averaged iterations come near as 1 / n."""
    ot = pytest.importorskip("geomloss.ot")
    cost, a, b = drawn()
    found = sinkhorn(cost, a, b, epsilon=0.1, tolerance=1e-13, max_iterations=20000)
    for iterations, bound in ((100, 1.0), (1000, 0.1)):
        peer = ot.solve(cost, reg=0.1, a=a, b=b, max_iter=iterations)
        close(found.plan(), peer.plan, 0, 0.05 * bound * float(peer.plan.max()))
        close(found.kl_value, peer.value, 1e-3 * bound**2)
