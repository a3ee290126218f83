"""``sinkhorn`` against a dense log-domain reference: values, plans, every gradient, costs, degenerate problems."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import logitless as ll
from logitless.ops.sinkhorn import PointCost, ProbabilityCost, sinkhorn, sinkhorn_divergence, torch_kernels
from logitless.ops.sinkhorn.kernels import Points
from logitless.ops.sinkhorn.problem import Problem, Side
from logitless.ops.sinkhorn.solve import Options, solve

METHODS = ["alternating", "symmetric", "anderson", "over_relaxed"]
RHOS = {"balanced": (None, None), "unbalanced": (1.0, 2.0), "semi": (None, 0.7), "semi_rows": (0.7, None)}
EPSILON = 0.2
VALUES = ("transport_cost", "kl_value", "entropy_value")
KINDS = ("sqeuclidean", "euclidean", "l1", "cosine")


def solved(cost, a, b, epsilon, rhos=(None, None), iterations=1000, start=None) -> tuple:
    """(f, g) of one problem after so many alternating iterations, all points alive."""
    g = torch.zeros_like(b) if start is None else start
    first, second = (1.0 if rho is None else rho / (rho + epsilon) for rho in rhos)
    for _ in range(iterations):
        f = -first * epsilon * torch.logsumexp(b.log() + (g - cost) / epsilon, 1)
        g = -second * epsilon * torch.logsumexp(a.log() + (f - cost.T) / epsilon, 1)
    return f, g


def dense(cost, a, b, epsilon, rhos=(None, None), iterations=1000) -> dict:
    """Plan and values of one problem, from their definitions."""
    f, g = solved(cost, a, b, epsilon, rhos, iterations)
    plan = a[:, None] * b * ((f[:, None] + g - cost) / epsilon).exp()
    transport = (plan * cost).sum()

    def kl(p, q):
        return torch.where(p > 0, p * (torch.where(p > 0, p, 1) / q).log(), 0).sum() - p.sum() + q.sum()

    value = transport + epsilon * kl(plan, a[:, None] * b)
    for rho, marginal, weights in zip(rhos, (plan.sum(1), plan.sum(0)), (a, b)):
        value = value + (0 if rho is None else rho * kl(marginal, weights))
    return {
        "plan": plan,
        "transport_cost": transport,
        "kl_value": value,
        "entropy_value": transport + epsilon * (plan * plan.log()).sum(),
    }


def double(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, requires_grad=True)


def close(found, exact, rtol=1e-9, atol=1e-12) -> None:
    torch.testing.assert_close(found, exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rhos", list(RHOS))
@pytest.mark.parametrize("method", METHODS)
def test_converged_values(method: str, rhos: str) -> None:
    """Ragged problems in one batch, each as if it were alone."""
    cost, sizes = torch.rand(2, 3, 5, 6, dtype=torch.float64), torch.tensor([[5, 3, 1], [4, 2, 5]])
    a, b = torch.rand(2, 3, 5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    b /= b.sum()
    alive = torch.arange(5) < sizes[..., None]
    a = a / (a * alive).sum(-1, keepdim=True)
    cost[~alive] = torch.nan
    found = sinkhorn(
        cost, a, b, epsilon=EPSILON, rho_a=RHOS[rhos][0], rho_b=RHOS[rhos][1],
        mask_a=sizes, method=method, tolerance=1e-13, max_iterations=5000,
    )  # fmt: skip
    plan = found.plan()
    assert found.converged.all() and (found.residual <= 1e-13).all()
    assert not plan[~alive].any() and not found.f[~alive].any()
    for at in [(i, j) for i in range(2) for j in range(3)]:
        n = sizes[at]
        exact = dense(cost[at][:n], a[at][:n], b, EPSILON, RHOS[rhos])
        close(plan[at][:n], exact["plan"])
        for name in VALUES:
            close(getattr(found, name)[at], exact[name])
        v = torch.rand(6, 2, dtype=torch.float64)
        close(found.apply(v.expand(2, 3, 6, 2))[at][:n], exact["plan"] @ v)
        close(found.apply(v[:, 0].expand(2, 3, 6))[at][:n], exact["plan"] @ v[:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_every_problem_stops_on_its_own(method: str) -> None:
    cost = torch.rand(4, 6, 5, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 8])[:, None, None]
    options = {"epsilon": 0.1, "method": method, "tolerance": 1e-8, "max_iterations": 20000}
    together = sinkhorn(cost, **options)
    assert together.iterations.unique().numel() == 4 and together.converged.all()
    marginal = (together.plan().sum(-1) - 1 / 6).abs().sum(-1)
    close(together.residual, marginal, atol=1e-15, rtol=1e-6)
    for i in range(4):
        alone = sinkhorn(cost[i], **options)
        assert alone.iterations == together.iterations[i]
        close(alone.f, together.f[i])
        close(alone.kl_value, together.kl_value[i])


def test_acceleration_needs_fewer_iterations() -> None:
    cost = torch.rand(20, 20, dtype=torch.float64)
    options = {"epsilon": 0.02, "tolerance": 1e-8, "max_iterations": 100000}
    count = {method: sinkhorn(cost, method=method, **options).iterations for method in METHODS}
    assert count["anderson"] * 5 < count["alternating"] < count["symmetric"]
    assert count["over_relaxed"] < count["alternating"]


@pytest.mark.parametrize("rhos", list(RHOS))
def test_finite_run(rhos: str) -> None:
    """Exactly the iterations asked for, from a start, through an annealed epsilon."""
    cost, a, b = torch.rand(5, 4, dtype=torch.float64), torch.rand(5).double(), torch.rand(4).double()
    rho_a, rho_b = RHOS[rhos]
    start = (torch.zeros(5), torch.rand(4).double())
    options = {"rho_a": rho_a, "rho_b": rho_b, "warm_start": start}
    found = sinkhorn(cost, a, b, epsilon=0.1, iterations=7, annealing=(0.9, 0.5), **options)
    g = start[1]
    for epsilon in (0.9, 0.45, 0.225, 0.1125, 0.1, 0.1, 0.1):
        f, g = solved(cost, a, b, epsilon, RHOS[rhos], 1, g)
    assert found.iterations == 7 and not found.converged
    close(found.f, f)
    close(found.g, g)


def test_warm_start_and_annealing_reach_the_same() -> None:
    cost = torch.rand(8, 8, dtype=torch.float64)
    options = {"epsilon": 0.02, "tolerance": 1e-11, "max_iterations": 50000}
    cold = sinkhorn(cost, **options)
    warm = sinkhorn(cost, warm_start=(cold.f, cold.g), **options)
    annealed = sinkhorn(cost, annealing=(1.0, 0.7), **options)
    assert warm.iterations == 1 and annealed.converged
    close(warm.kl_value, cold.kl_value, 1e-10)
    close(annealed.kl_value, cold.kl_value, 1e-10)


# ---- gradients


def outputs(result) -> tuple:
    v = torch.arange(1.0, result.g.shape[-1] + 1).double().expand(result.g.shape)
    return (*(getattr(result, name) for name in VALUES), result.plan(), result.apply(v.cos()))


@pytest.mark.parametrize("rhos", list(RHOS))
@pytest.mark.parametrize("method", METHODS)
def test_unrolled_gradients(method: str, rhos: str) -> None:
    """Of a run that is far from converged: in the cost, and in any weights (of masses that can be met, where steps
    depend on whether the residual falls)."""
    met = method in ("anderson", "over_relaxed") and rhos == "balanced"
    m = 6 if method == "anderson" else 4  # with fewer columns than steps to combine, the combination is any
    mask = torch.arange(m) < torch.tensor([[m], [m - 1]])

    def values(cost, a, b):
        if met:
            a, b = (x / x.sum(-1, keepdim=True) for x in (a, torch.where(mask, b, 0)))
        options = {"rho_a": RHOS[rhos][0], "rho_b": RHOS[rhos][1], "mask_b": mask}
        result = sinkhorn(cost, a, b, epsilon=EPSILON, iterations=4, method=method, **options)
        return *outputs(result), result.f, result.g

    assert gradcheck(values, [double(2, 3, m), double(2, 3), double(2, m)], fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
def test_unrolled_gradients_where_problems_stop(method: str) -> None:
    scale = torch.tensor([0.1, 2.0]).double()[:, None, None]

    def values(cost, a, b):
        options = {"tolerance": 1e-3, "annealing": (0.5, 0.5)}
        result = sinkhorn(cost * scale, a, b, epsilon=EPSILON, method=method, gradient="unrolled", **options)
        assert result.iterations[0] < result.iterations[1]
        return outputs(result)

    a, b = (torch.rand(2, n).double().softmax(-1).requires_grad_() for n in (3, 4))
    assert gradcheck(values, [double(2, 3, 4), a, b], fast_mode=True)


TIGHT = {"epsilon": EPSILON, "tolerance": 1e-14, "method": "anderson", "max_iterations": 200}


@pytest.mark.parametrize("rhos", list(RHOS))
@pytest.mark.parametrize("method", METHODS)
def test_both_half_iterations_at_once(method: str, rhos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend's ``iteration`` gives the run of two half-iterations, its gradient too."""
    cost, a, b = double(2, 4, 5), double(2, 4), double(2, 5)
    cost.data[0, 2], cost.data[1, :, 3], a.data[0, 1], b.data[1, 0] = torch.inf, torch.inf, 0, 0
    calls = []

    def iteration(cost, c, log_a, damping, epsilon):
        calls.append(epsilon)
        s = torch_kernels.half_iteration(cost, c, epsilon)
        f = torch.where((log_a > -torch.inf) & (s < torch.inf), damping * s, 0)
        t = torch_kernels.half_iteration(cost.mT, f + epsilon * log_a, epsilon)
        return s, torch.where(c == -torch.inf, torch.inf, t)

    def whole(iterates: bool) -> tuple:
        monkeypatch.setattr(torch_kernels, "iterates", lambda cost: iterates)
        monkeypatch.setattr(torch_kernels, "iteration", iteration, raising=False)
        found = sinkhorn(
            cost, a, b, epsilon=0.3, rho_a=RHOS[rhos][0], rho_b=RHOS[rhos][1], iterations=8, method=method
        )  # fmt: skip
        weights = torch.linspace(1, 2, 4, dtype=torch.float64), torch.linspace(-1, 1, 5, dtype=torch.float64)
        value = (found.f * weights[0]).sum() + (found.g * weights[1]).sum()
        return found.f, found.g, *torch.autograd.grad(value, (cost, a, b))

    for at_once, apart in zip(whole(True), whole(False), strict=True):
        close(at_once, apart)
    assert len(calls) == (8 if method in ("alternating", "anderson") else 0)


@pytest.mark.parametrize("rhos", list(RHOS))
def test_implicit_gradients(rhos: str) -> None:
    """Balanced weights through a normalisation: then their gradient is defined."""

    def values(cost, a, b):
        a, b = (x / x.sum(-1, keepdim=True) if rhos != "unbalanced" else x for x in (a, b * torch.tensor([1, 1, 0, 1])))
        result = sinkhorn(cost, a, b, rho_a=RHOS[rhos][0], rho_b=RHOS[rhos][1], **TIGHT)
        potentials = () if rhos == "balanced" else (result.f, result.g)  # balanced ones are defined up to a constant
        return *outputs(result), result.f[:, :1] + result.g[:, :1], *potentials

    assert gradcheck(values, [double(2, 3, 4), double(2, 3), double(2, 4)])


@pytest.mark.parametrize("rhos", list(RHOS))
def test_envelope_gradients(rhos: str) -> None:
    def values(cost, a, b):
        a, b = (x / x.sum(-1, keepdim=True) if rhos != "unbalanced" else x for x in (a, b))
        result = sinkhorn(cost, a, b, rho_a=RHOS[rhos][0], rho_b=RHOS[rhos][1], gradient="envelope", **TIGHT)
        return result.kl_value

    assert gradcheck(values, [double(2, 3, 4), double(2, 3), double(2, 4)])


def test_envelope_of_the_entropy_value() -> None:
    options = TIGHT | {"gradient": "envelope"}
    cost, a = double(3, 4), torch.rand(3).softmax(-1).double().requires_grad_()
    a = a / a.sum()
    assert gradcheck(lambda cost: sinkhorn(cost, a.detach(), **options).entropy_value, [cost])
    with pytest.raises(ValueError, match="gradient: 'envelope' gives entropy_value's"):
        _ = sinkhorn(cost, a, **options).entropy_value
    with pytest.raises(ValueError, match="gradient: 'envelope' gives entropy_value's"):
        _ = sinkhorn(cost, rho_a=1.0, **options).entropy_value


def test_envelope_is_refused_for_the_transport_cost() -> None:
    result = sinkhorn(double(3, 4), epsilon=EPSILON, gradient="envelope")
    with pytest.raises(ValueError, match="'envelope' is wrong for transport_cost"):
        _ = result.transport_cost
    with torch.no_grad():
        close(result.transport_cost, sinkhorn(result._problem.cost.cost[0], epsilon=EPSILON).transport_cost)
    assert not result.plan().requires_grad
    values = double(4)
    (found,) = torch.autograd.grad(result.apply(values).sum(), values)
    close(found, result.plan().sum(0))


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_gradients_of_thousands_of_iterations(gradient: str, name: str) -> None:
    cost, a, b = double(6, 7), double(6), double(7)
    a, b = (x.detach() / x.detach().sum() for x in (a, b))
    a.requires_grad_(), b.requires_grad_()
    exact = torch.autograd.grad(dense(cost, a, b, 0.05, iterations=3000)[name], [cost, a, b])
    result = sinkhorn(cost, a, b, epsilon=0.05, tolerance=1e-14, max_iterations=3000, gradient=gradient)
    for _ in range(2):  # a second backward too
        found = torch.autograd.grad(getattr(result, name), [cost, a, b], retain_graph=True)
        close(found[0], exact[0], 1e-8, 1e-10)
        for mine, wanted in zip(found[1:], exact[1:]):
            close(mine - mine.mean(), wanted - wanted.mean(), 1e-8, 1e-10)


def test_a_plan_that_is_a_permutation_has_no_noise_for_gradient() -> None:
    """Every direction is a null direction then: the conjugate gradients must not divide rounding by rounding."""
    cost = (1000 * (1 - torch.eye(5)) + torch.rand(5, 5)).requires_grad_()
    result = sinkhorn(cost, epsilon=0.01)
    (found,) = torch.autograd.grad(result.transport_cost, cost)
    close(found, torch.eye(5) / 5, 1e-5, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unrolled_keeps_vectors(dtype: torch.dtype) -> None:
    """Between forward and backward: O(iterations (n + m)), not iterations x n x m."""
    n, m, iterations = 40, 50, 30
    cost, kept = torch.rand(n, m, dtype=dtype, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        _ = sinkhorn(cost, epsilon=0.1, iterations=iterations).transport_cost
    sizes = [x.numel() for x in kept.values() if x.data_ptr() != cost.data_ptr()]
    assert n * m not in sizes and sum(sizes) < 8 * iterations * (n + m) < iterations * n * m / 2


# ---- points


def pairs(x, y, kind):
    difference = x[..., :, None, :] - y[..., None, :, :]
    if kind == "sqeuclidean":
        return (difference**2).sum(-1)
    if kind == "l1":
        return difference.abs().sum(-1)
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x[..., :, None, :], y[..., None, :, :], -1)
    return difference.norm(dim=-1)


@pytest.mark.parametrize("workspace", ["auto", 100], ids=["stored", "streamed"])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
@pytest.mark.parametrize("kind", KINDS)
def test_points(kind: str, gradient: str, workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored or formed as it is read, in blocks of a few rows: the same as with the cost as a tensor."""
    from logitless.ops.sinkhorn import torch_kernels

    monkeypatch.setattr(torch_kernels, "_limit", lambda tensor: 10)
    x, y, a = double(2, 5, 3), double(2, 4, 3), torch.rand(2, 5).double().softmax(-1).requires_grad_()
    how = {"iterations": 5} if gradient == "unrolled" else {"tolerance": 1e-13}
    upstream = torch.rand(2).double()
    outcomes = []
    for cost in (PointCost(x, y, kind), pairs(x, y, kind)):
        result = sinkhorn(cost, a, epsilon=EPSILON, gradient=gradient, workspace=workspace, **how)
        total = (result.kl_value * upstream).sum()
        if gradient != "envelope":
            total = total + (result.transport_cost * upstream).sum() + (result.plan() ** 2).sum()
            total = total + result.apply(y).square().sum()
        outcomes.append([total.detach(), result.plan().detach(), *torch.autograd.grad(total, [x, y, a])])
    for found, exact in zip(*outcomes):
        close(found, exact, 1e-9, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_points(kind: str) -> None:
    def values(x, y):
        return outputs(sinkhorn(PointCost(x, y, kind), epsilon=EPSILON, iterations=3, workspace=1))

    assert gradcheck(values, [double(3, 2), double(4, 2)])


class Largest(TorchDispatchMode):
    """The most elements that any tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_streamed_points_never_make_a_matrix(gradient: str) -> None:
    n, m = 1500, 1400
    x, y = torch.rand(n, 2, requires_grad=True), torch.rand(m, 2, requires_grad=True)
    with Largest() as largest:
        how = {"iterations": 3} if gradient == "unrolled" else {"max_iterations": 3}
        result = sinkhorn(PointCost(x, y), epsilon=1.0, gradient=gradient, workspace=4 * n * m, **how)
        result.apply(torch.rand(m, 2))
        result.kl_value.backward()
    assert largest.elements < n * m / 8


def test_points_under_autocast() -> None:
    x, y = torch.randn(20, 5, requires_grad=True), torch.randn(30, 5)
    exact = sinkhorn(PointCost(x, y), epsilon=1.0, iterations=5)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn(PointCost(x, y), epsilon=1.0, iterations=5)
        assert torch.equal(found.f, exact.f)
        assert torch.equal(found.transport_cost, exact.transport_cost)
        gradients = [torch.autograd.grad(z.transport_cost, x)[0] for z in (found, exact)]
    assert torch.equal(*gradients)


def test_points_that_coincide() -> None:
    """Distance 0: no NaN in the gradient of a root, and zero vectors have the cosine 0."""
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        result = sinkhorn(PointCost(x, x, kind), epsilon=0.1)
        assert result.converged
        close(result.transport_cost, torch.tensor(float(kind == "cosine")).double())
        (found,) = torch.autograd.grad(result.transport_cost, x)
        assert not found.any()


# ---- probabilities


def described(leaves, options):
    import reference

    if len(leaves) == 1:
        return ll.DenseLogits(*leaves, **options), reference.transform(*leaves, **options)
    return ll.LinearLogits(*leaves, **options), reference.logits(*leaves, **options)


@pytest.mark.parametrize("workspace", ["auto", 3000, 1])
@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"softcap": 3.0, "scale": 1.3, "vocab_size": 9}])
@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_probability_cost(kind: str, options: dict, workspace) -> None:
    """The L1 distance between softmaxes, whatever the slices: value, and gradients of both sides."""

    def draw(n):
        shapes = [(2, n, 11)] if kind == "dense" else [(2, n, 3), (11, 3), (11,)]
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    student, teacher = draw(4), draw(3)
    (s, dense_s), (t, dense_t) = described(student, options), described(teacher, options)
    exact = pairs(dense_s.softmax(-1), dense_t.softmax(-1), "l1")
    outcomes = []
    for cost in (ProbabilityCost(s, t, teacher_grad=True), exact):
        result = sinkhorn(cost, epsilon=0.1, iterations=20, workspace=workspace)
        gradients = torch.autograd.grad(result.transport_cost.sum(), student + teacher, retain_graph=True)
        outcomes.append([result.transport_cost.detach(), result._problem.cost.cost.detach(), *gradients])
    for found, wanted in zip(*outcomes):
        close(found, wanted, 1e-9, 1e-13)
    alone = sinkhorn(ProbabilityCost(s, t), epsilon=0.1, iterations=20, workspace=workspace).transport_cost.sum()
    gradients = torch.autograd.grad(alone, student + teacher, allow_unused=True)
    assert all(x is None for x in gradients[len(student) :])
    for found, wanted in zip(gradients, outcomes[1][2:]):
        close(found, wanted, 1e-9, 1e-13) if found is not None else None


def test_gradcheck_of_probability_cost() -> None:
    def value(hidden, weight, logits):
        cost = ProbabilityCost(ll.LinearLogits(hidden, weight), ll.DenseLogits(logits), teacher_grad=True)
        return sinkhorn(cost, epsilon=0.1, iterations=5).transport_cost

    assert gradcheck(value, [double(3, 2), double(7, 2), double(4, 7)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_of_probability_cost(dtype: torch.dtype) -> None:
    """Held against float64, beside the released form: softmax and pairwise distances in float32."""
    inputs = [torch.randn(12, 30).to(dtype), (torch.randn(4000, 30) / 4).to(dtype), torch.randn(12, 4000).to(dtype)]
    outcomes = []
    for kind in (None, torch.float64, torch.float32):
        hidden, weight, logits = (x.clone().to(kind or dtype) for x in inputs)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        if kind is None:
            cost = ProbabilityCost(ll.LinearLogits(*leaves), ll.DenseLogits(logits))
        else:
            cost = torch.cdist((hidden @ weight.T).softmax(-1), logits.softmax(-1), p=1)
        result = sinkhorn(cost, epsilon=0.1, iterations=20)
        gradients = torch.autograd.grad(result.transport_cost, leaves)
        outcomes.append([result.f.detach(), result.transport_cost.detach(), *gradients])
    for i, (mine, exact, baseline) in enumerate(zip(*outcomes)):
        assert mine.dtype == (dtype if i > 1 else torch.float32)
        mistakes = [(x.to(mine.dtype).double() - exact).norm() for x in (mine, baseline)]
        assert mistakes[0] <= 1.5 * mistakes[1] + 1e-7 * exact.norm()


def test_probability_cost_is_built_in_slices() -> None:
    n, m, vocab, workspace = 16, 12, 20000, 1 << 19
    hidden, weight = torch.randn(n, 2, requires_grad=True), torch.randn(vocab, 2, requires_grad=True)
    teacher = ll.LinearLogits(torch.randn(m, 2), torch.randn(vocab, 2))
    with Largest() as largest:
        cost = ProbabilityCost(ll.LinearLogits(hidden, weight), teacher)
        sinkhorn(cost, epsilon=0.1, iterations=3, workspace=workspace).transport_cost.backward()
    assert largest.elements <= max(workspace // 4, 2 * vocab) < n * vocab  # 2 V: the weight's gradient


@pytest.mark.parametrize("mask", ["sizes", "flags"])
def test_what_stands_at_tokens_that_do_not_exist_reaches_no_gradient(mask: str) -> None:
    hidden, weight = torch.randn(2, 4, 3), torch.randn(9, 3)
    logits, sizes = torch.randn(2, 5, 9), torch.tensor([4, 2])
    live = torch.arange(4) < sizes[:, None]
    given = {
        "epsilon": 0.1,
        "iterations": 5,
        "mask_a": sizes if mask == "sizes" else live,
        "mask_b": torch.tensor([5, 3]),
    }
    found = []
    for nothing in (0.0, torch.nan):
        h, w = hidden.masked_fill(~live[..., None], nothing).requires_grad_(), weight.clone().requires_grad_()
        t = logits.clone()
        t[1, 3:] = nothing
        loss = sinkhorn(ProbabilityCost(ll.LinearLogits(h, w), ll.DenseLogits(t)), **given).transport_cost.sum()
        found.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    for zeros, nans in zip(*found, strict=True):
        assert nans.isfinite().all() and torch.equal(zeros, nans)
    assert (found[1][1][~live] == 0).all()


def test_logits_of_minus_infinity() -> None:
    """Columns that do not exist: probability 0, no NaN, no gradient."""
    s, t = torch.randn(3, 9), torch.randn(4, 9)
    s[:, 6:], t[:, 5:] = -torch.inf, -torch.inf
    s.requires_grad_()
    result = sinkhorn(ProbabilityCost(ll.DenseLogits(s), ll.DenseLogits(t)), epsilon=0.1, iterations=5, workspace=300)
    exact = sinkhorn(torch.cdist(s.softmax(-1), t.softmax(-1), p=1), epsilon=0.1, iterations=5)
    (found,), (wanted,) = (torch.autograd.grad(x.transport_cost, s) for x in (result, exact))
    close(found, wanted, 1e-5, 1e-7)
    assert not found[:, 6:].any()


# ---- problems at the edge


def finite(result, *leaves) -> None:
    """Values, plan and gradients."""
    assert all(x.isfinite().all() for x in outputs(result)) and result.residual.isfinite().all()
    total = sum(x.sum() for x in outputs(result))
    if leaves:
        assert all(x.isfinite().all() for x in torch.autograd.grad(total, leaves, retain_graph=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("rhos", [(None, None), (1.0, 1.0), (None, 1.0)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", [1e-30, 1e-3, 1.0, 1e6])
def test_never_nan(epsilon: float, method: str, rhos: tuple, gradient: str, dtype: torch.dtype) -> None:
    """A batch of everything: tiny and huge epsilon, costs of 1e4, equal rows, zero weights, nothing at all."""
    cost = torch.rand(7, 5, 4, dtype=torch.float64)
    cost[0] = 0
    cost[1] *= 1e4
    cost[2] = cost[2, :1]
    cost[3, :, 1:] = torch.inf  # allowed: one column
    cost[4] += 1e4
    a = torch.full((7, 5), 0.2, dtype=torch.float64)
    a[5] = torch.tensor([0, 0.5, 0, 0.5, 0])
    mask = torch.ones(7, 5, dtype=torch.bool)
    mask[6] = False
    b = torch.full((4,), 0.25, dtype=torch.float64)
    cost, a, b = (x.to(dtype).requires_grad_() for x in (cost, a, b))
    how = {"iterations": 20} if gradient == "unrolled" else {"max_iterations": 20}
    options = {"rho_a": rhos[0], "rho_b": rhos[1], "mask_a": mask}
    result = sinkhorn(cost, a, b, epsilon=epsilon, method=method, gradient=gradient, **how, **options)
    finite(result, cost, a, b)
    assert not result.plan()[6].any() and not result.plan()[3, :, 1:].any()
    (found,) = torch.autograd.grad(result.transport_cost.sum(), a)
    assert not found[6].any() and not found[5, ::2].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [1, -1])
def test_costs_of_ten_thousand(method: str, sign: int) -> None:
    """An offset of the cost changes potentials, not the plan."""
    cost = torch.rand(6, 5, dtype=torch.float64)
    options = {"epsilon": 0.1, "tolerance": 1e-11, "method": method, "max_iterations": 5000}
    moved, there = sinkhorn(cost + sign * 1e4, **options), sinkhorn(cost, **options)
    assert moved.converged
    close(moved.plan(), there.plan(), 1e-8, 1e-9)


def test_too_small_an_epsilon_is_said() -> None:
    result = sinkhorn(torch.rand(30, 30), epsilon=1e-6, max_iterations=50)
    assert not result.converged and 0 < result.residual < 2 and result.iterations == 50
    finite(result)


def test_a_huge_epsilon_gives_the_product_of_the_marginals() -> None:
    a, b = torch.rand(4).double().softmax(-1), torch.rand(5).double().softmax(-1)
    cost = torch.rand(4, 5).double()
    result = sinkhorn(cost, a, b, epsilon=1e9)
    close(result.plan(), a[:, None] * b, 1e-8)
    close(result.transport_cost, a @ cost @ b, 1e-8)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 4), (4, 1)])
def test_single_points(n: int, m: int) -> None:
    cost = double(n, m)
    result = sinkhorn(cost, epsilon=0.01)
    assert result.converged
    close(result.transport_cost, cost.mean())
    close(torch.autograd.grad(result.transport_cost, cost)[0], torch.full((n, m), 1 / (n * m)).double())


def test_fully_masked() -> None:
    cost = double(2, 3, 4)
    gone = torch.tensor([0, 3])
    result = sinkhorn(cost, epsilon=0.1, mask_a=gone, mask_b=torch.tensor([0, 4]))
    assert result.converged.all() and result.residual[0] == 0
    for name in VALUES:
        assert getattr(result, name)[0] == 0
        (found,) = torch.autograd.grad(getattr(result, name).sum(), cost, retain_graph=True)
        assert not found[0].any() and found[1].any()
    one_side = sinkhorn(cost, epsilon=0.1, mask_a=gone)
    assert not one_side.converged[0] and one_side.converged[1]
    close(one_side.residual[0], torch.tensor(1.0).double())


def test_masses_that_differ_do_not_converge() -> None:
    a, b = torch.ones(3), torch.ones(4)
    result = sinkhorn(torch.rand(3, 4), a, b, epsilon=0.1, max_iterations=30)
    assert not result.converged
    close(result.residual, torch.tensor(1.0), 1e-4)


def test_unit_marginals() -> None:
    """SinKD's: n times the problem of mass 1."""
    cost = torch.rand(6, 6, dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    kernel = (-cost / 0.1).exp()
    for _ in range(20):
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = kernel / kernel.sum(0, keepdim=True)
    found = sinkhorn(cost, ones, ones, epsilon=0.1, iterations=20)
    close(found.plan(), kernel)
    close(found.transport_cost, (kernel * cost).sum())


def test_nan_stays_in_its_problem() -> None:
    cost = torch.rand(3, 4, 4)
    cost[1, 0, 0] = torch.nan
    result = sinkhorn(cost, epsilon=0.1)
    assert result.converged.tolist() == [True, False, True]
    assert result.transport_cost.isfinite().tolist() == [True, False, True]


def test_empty_batch() -> None:
    result = sinkhorn(torch.rand(0, 3, 4), epsilon=0.1)
    assert result.plan().shape == (0, 3, 4) and result.kl_value.shape == (0,)
    logits = torch.rand(0, 3, 7, requires_grad=True)
    cost = ProbabilityCost(ll.DenseLogits(logits), ll.DenseLogits(torch.rand(0, 4, 7)))
    value = sinkhorn(cost, epsilon=0.1, iterations=2).transport_cost
    assert torch.autograd.grad(value.sum(), logits)[0].shape == (0, 3, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    cost = torch.rand(4, 5).to(dtype).requires_grad_()
    found, exact = sinkhorn(cost, epsilon=0.1, iterations=20), sinkhorn(cost.float(), epsilon=0.1, iterations=20)
    assert found.f.dtype == torch.float32 and torch.equal(found.plan(), exact.plan())
    assert torch.autograd.grad(found.transport_cost, cost)[0].dtype == dtype


def test_a_cost_shared_by_a_batch() -> None:
    cost, a = double(4, 5), torch.rand(3, 4).double().softmax(-1)
    found = sinkhorn(cost.expand(3, 4, 5), a, epsilon=0.1, iterations=20).transport_cost.sum()
    exact = sum(sinkhorn(cost, a[i], epsilon=0.1, iterations=20).transport_cost for i in range(3))
    close(found, exact)
    close(*(torch.autograd.grad(x, cost)[0] for x in (found, exact)))


# ---- the debiased divergence


@pytest.mark.parametrize("rho", [None, 1.0])
@pytest.mark.parametrize("sizes", [(5, 5), (5, 3)])
def test_divergence(sizes: tuple, rho: float | None) -> None:
    x, y = double(2, sizes[0], 3), double(2, sizes[1], 3)
    a, b = (torch.rand(n).double() for n in sizes)
    if rho is None:
        a, b = a / a.sum(), b / b.sum()
    found = sinkhorn_divergence(x, y, a, b, epsilon=0.3, rho=rho, tolerance=1e-13, max_iterations=10000)
    assert found.converged.all() and (found.value > 0).all()

    def value(x, y, a, b):
        return dense(pairs(x, y, "sqeuclidean"), a, b, 0.3, (rho, rho), 2000)["kl_value"]

    mass = 0.15 * (a.sum() - b.sum()) ** 2
    exact = torch.stack(
        [value(*z, a, b) - value(z[0], z[0], a, a) / 2 - value(z[1], z[1], b, b) / 2 + mass for z in zip(x, y)]
    )
    close(found.value, exact, 1e-9, 1e-11)
    gradients = [torch.autograd.grad(z.sum(), [x, y]) for z in (found.value, exact)]
    for mine, wanted in zip(*gradients):
        close(mine, wanted, 1e-8, 1e-10)
    biased = sinkhorn_divergence(x, y, a, b, epsilon=0.3, rho=rho, debias=False).value
    close(biased[0], value(x[0], y[0], a, b), 1e-7)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_a_measure_from_itself(kind: str, dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(7, 3, dtype=dtype, requires_grad=True)
    found = sinkhorn_divergence(x, x.detach(), epsilon=1.0, kind=kind, tolerance=bound, method="anderson")
    assert found.converged and found.value == 0
    assert torch.autograd.grad(found.value, x)[0].abs().max() < 10 * bound


def test_divergence_of_masked_points() -> None:
    x, y = torch.rand(2, 5, 2).double(), torch.rand(2, 4, 2).double()
    x[0, 3:] = torch.nan
    options = {"epsilon": 0.1, "tolerance": 1e-10, "max_iterations": 10000}
    found = sinkhorn_divergence(x, y, mask_a=torch.tensor([3, 5]), **options)
    close(found.value[0], sinkhorn_divergence(x[0, :3], y[0], **options).value, 1e-8, 1e-10)
    close(found.value[1], sinkhorn_divergence(x[1], y[1], **options).value, 1e-8, 1e-10)


# ---- arguments


@pytest.mark.parametrize(
    "name, error, change",
    [
        ("cost", TypeError, {"cost": [[1.0]]}),
        ("cost", TypeError, {"cost": torch.ones(2, 3, dtype=torch.long)}),
        ("cost", ValueError, {"cost": torch.ones(3)}),
        ("cost", ValueError, {"cost": torch.ones(0, 3)}),
        ("a", ValueError, {"a": torch.ones(4)}),
        ("a", ValueError, {"a": -torch.ones(2)}),
        ("b", TypeError, {"b": torch.ones(3, dtype=torch.long)}),
        ("epsilon", ValueError, {"epsilon": 0.0}),
        ("epsilon", ValueError, {"epsilon": 1e-40}),
        ("rho_a", ValueError, {"rho_a": -1.0}),
        ("rho_b", TypeError, {"rho_b": "1"}),
        ("mask_a", TypeError, {"mask_a": torch.ones(2)}),
        ("mask_a", ValueError, {"mask_a": torch.ones(3, dtype=torch.bool)}),
        ("mask_b", ValueError, {"mask_b": torch.tensor([1])}),
        ("iterations", ValueError, {"iterations": 0}),
        ("tolerance", ValueError, {"iterations": 3, "tolerance": 1e-3}),
        ("tolerance", ValueError, {"tolerance": 0.0}),
        ("max_iterations", TypeError, {"max_iterations": 2.0}),
        ("method", ValueError, {"method": "newton"}),
        ("relaxation", ValueError, {"relaxation": 2.0}),
        ("annealing", TypeError, {"annealing": 0.5}),
        ("annealing factor", ValueError, {"annealing": (1.0, 1.0)}),
        ("annealing", ValueError, {"annealing": (1.0, 0.9), "iterations": 5}),
        ("warm_start", TypeError, {"warm_start": torch.ones(2)}),
        ("warm_start", ValueError, {"warm_start": (torch.ones(2), torch.ones(2))}),
        ("gradient", ValueError, {"gradient": "exact"}),
        ("workspace", ValueError, {"workspace": 0}),
    ],
)
def test_bad_arguments(name: str, error: type, change: dict) -> None:
    arguments = {"cost": torch.rand(2, 3), "epsilon": 0.1} | change
    with pytest.raises(error, match=f"^{name}: "):
        sinkhorn(**arguments)


def test_bad_costs() -> None:
    x, head = torch.rand(3, 2), ll.DenseLogits(torch.rand(3, 5))
    for name, error, make in (
        ("x", TypeError, lambda: PointCost([1.0], x)),
        ("y", ValueError, lambda: PointCost(x, torch.rand(3, 4))),
        ("y", ValueError, lambda: PointCost(x, x.double())),
        ("x", ValueError, lambda: PointCost(x[:0], x)),
        ("kind", ValueError, lambda: PointCost(x, x, "lp")),
        ("student", TypeError, lambda: ProbabilityCost(x, head)),
        ("teacher", ValueError, lambda: ProbabilityCost(head, ll.DenseLogits(torch.rand(3, 6)))),
        ("teacher", ValueError, lambda: ProbabilityCost(head, ll.DenseLogits(torch.rand(2, 3, 5)))),
        ("values", ValueError, lambda: sinkhorn(x, epsilon=0.1).apply(torch.rand(3))),
        ("values", TypeError, lambda: sinkhorn(x, epsilon=0.1).apply([1.0, 2.0])),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            make()


@pytest.mark.parametrize("method", METHODS)
def test_fixed_iterations_ask_the_device_nothing(method: str) -> None:
    """Meta tensors have no values that could be waited for."""
    x, y, a, b = (
        torch.rand(shape, device="meta", requires_grad=True) for shape in ((2, 5, 3), (2, 4, 3), (2, 5), (2, 4))
    )
    problem = Problem(Points(x, y, "l1"), Side(a, 1.0), Side(b, math.inf), 0.1)
    options = Options(3, 1e-5, False, method, 1.5, (0.4, 0.2))
    result = solve(problem, options, (torch.zeros_like(a), torch.zeros_like(b)), "unrolled", torch.Size([2]))
    (result.transport_cost + result.kl_value + result.entropy_value).sum().backward()
    assert x.grad.shape == x.shape and b.grad.shape == b.shape
