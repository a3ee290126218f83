"""The Sinkhorn kernels of every backend against their definitions in float64.

The bar is relative: each kernel may err, in the norm over a result, 1.5 times what the torch kernels err on the same
float32 inputs, and a few roundings. Whole runs are held against the solver's loop of half-iterations, on torch kernels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from logitless import backends
from logitless.backends import cpu
from logitless.ops.sinkhorn import PointCost, kernels, sinkhorn, solve, torch_kernels
from logitless.ops.sinkhorn.doubly_stochastic import DIALECTS
from logitless.ops.sinkhorn.kernels import Dense, Points, Schedule
from logitless.ops.sinkhorn.problem import Problem, Side

INFINITY = float("inf")
EPS = torch.finfo(torch.float32).eps
COPIES = [] if cpu.PROBLEM else [f"cpu-{copy}" for copy in cpu._C.isas()]
GPU = os.environ.get("TRITON_INTERPRET") != "1"
SUBJECTS = [*([] if GPU else COPIES)]
SUBJECTS += [name for name in kernels.WRITTEN if name not in ("cpu", "torch") and not isinstance(
    backends.available()[name], str) and (GPU or name == "triton")]  # fmt: skip


RUN_CASES = {  # parameters of the tests of whole runs, and which of them Triton's slow interpreter gets without --slow
    ("name", "size"): (
        ("plain", (1, 5)),
        ("unbalanced", (6, 1)),
        ("annealed, unbalanced", (33, 47)),
        ("small epsilon", (33, 47)),
        ("tiny epsilon, unbalanced", (16, 16)),
        ("costs of -1e4, unbalanced", (16, 16)),
    ),
    ("annealed", "rhos"): (((0.5, 0.2), (1.0, 0.5)),),
    ("scale",): ((1e25,),),
    ("options",): ((dict(iterations=4),),),
}


def interpreted(subject: str) -> bool:
    return subject == "triton" and not GPU


def is_slow(parameters: dict) -> bool:
    """Left to --slow: the copies for lesser instruction sets, but for one size, and most interpreted runs."""
    subject, names = parameters.get("subject"), tuple(sorted(parameters.keys() - {"subject"}))
    if interpreted(subject) and names in RUN_CASES:
        return tuple(parameters[name] for name in names) not in RUN_CASES[names]
    return subject in COPIES[1:] and parameters.get("size", (33, 47)) != (33, 47)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend under test, forced."""
    name, _, copy = request.param.partition("-")
    monkeypatch.setenv("LOGITLESS_BACKEND", name)
    if copy:
        before = cpu._C.isa()
        cpu._C.force_isa(copy)
        yield name
        cpu._C.force_isa(before)
    else:
        yield name


@pytest.fixture
def runner(subject: str) -> str:
    """A backend that has whole runs."""
    if not hasattr(chosen(), "run"):
        pytest.skip("no whole runs")
    return subject


def chosen():
    device = torch.get_default_device()
    return kernels.select(device, torch.float32)


def check(ours: Tensor, baseline: Tensor, exact: Tensor, slack: float, size: float = 0) -> None:
    """Infinities and NaNs agree; what is finite is as good as torch's, but for ``slack`` roundings, of ``size`` too."""
    assert ours.shape == exact.shape and ours.dtype == baseline.dtype
    assert torch.equal(ours.isfinite(), baseline.isfinite())
    finite = exact.isfinite() & baseline.isfinite()
    ours, baseline, exact = (torch.where(finite, x.detach().double(), 0) for x in (ours, baseline, exact))
    wrong, size = (ours - exact).norm(), exact.norm() + size * math.sqrt(exact.numel())
    allowed = 1.5 * (baseline - exact).norm() + slack * EPS * size + 1e-37
    assert wrong <= allowed, f"wrong by {wrong:.2e}, torch by {(baseline - exact).norm():.2e} of {size:.2e}"


def condition(cost: Tensor, epsilon: float) -> float:
    """How many roundings one in an exponent is worth."""
    return 8 + float(torch.where(cost.isfinite(), cost, 0).abs().max()) / epsilon


def compared(call, inputs: list, slack: float) -> None:
    """``call(kernels, *inputs)`` gives tensors or Nones."""

    def doubled(x):
        if isinstance(x, Tensor):
            return x.double()
        return kernels.make(x.kind, [t.double() for t in x.tensors]) if isinstance(x, (Dense, Points)) else x

    outcomes = (call(chosen(), *inputs), call(torch_kernels, *inputs), call(torch_kernels, *map(doubled, inputs)))
    for ours, baseline, exact in zip(*outcomes):
        assert (ours is None) == (exact is None)
        if ours is not None:
            check(ours, baseline, exact, slack)


# ---- single readings

SIZES = [(1, 1), (1, 5), (6, 1), (16, 16), (33, 47), (150, 70)]


def stored(layout: str, n: int, m: int) -> Dense:
    if layout == "transposed":
        return Dense(torch.rand(2, m, n)).mT
    if layout == "strided":
        return Dense(torch.rand(2, n, m + 3, 2)[..., :m, 1])
    if layout == "shared":
        return Dense(torch.rand(n, m).expand(2, n, m))
    cost = torch.rand(2, n, m)
    if layout == "infinite":
        cost[0, 0], cost[1, :, -1] = INFINITY, INFINITY
        cost[:, -1, -1] = INFINITY
    if layout == "large":
        cost[1] = cost[1] * 10 - 1e4
    return Dense(cost)


def points(kind: str, n: int, m: int) -> Points:
    x, y = torch.randn(2, n, 5), torch.randn(2, m, 5)
    if kind == "cosine":
        x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    return Points(x, y, kind)


LAYOUTS = ["adjacent", "transposed", "strided", "shared", "infinite", "large"]
COSTS = [(stored, layout) for layout in LAYOUTS] + [(points, k) for k in ("sqeuclidean", "euclidean", "l1", "cosine")]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("make, kind", COSTS, ids=[kind for _, kind in COSTS])
def test_readings(subject: str, make, kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-iterations and plans, their gradients too, of rows and of columns; with weights of 0."""
    monkeypatch.setattr(torch_kernels, "_limit", lambda tensor: size[0] * size[1] // 2 + 1)  # blocks of rows
    n, m = size
    cost, epsilon = make(kind, n, m), 0.3
    r, c = torch.rand(2, n), torch.rand(2, m)
    c[0, : m // 3] = -INFINITY
    for cost, r, c in ((cost, r, c), (cost.mT, c, r)):  # noqa: PLR1704, B020
        slack = condition(cost.tensors[0], epsilon)
        s = torch_kernels.half_iteration(cost, c, epsilon)
        down = -torch.where(s == INFINITY, INFINITY, -s)  # exponents of at most 0
        compared(lambda on, cost, c: [on.half_iteration(cost, c, epsilon)], [cost, c], 8)
        upstream = torch.randn(r.shape)
        for wanted in (True, False):
            compared(
                lambda on, cost, c, s, up: flat(on.half_iteration_backward(cost, c, s, up, epsilon, wanted)),  # noqa: B023
                [cost, c, s, upstream],
                slack,
            )
        for power in (0, 1):
            for k in (1, 3):
                left, right = torch.randn(*r.shape, k), torch.randn(*c.shape, k)
                compared(
                    lambda on, cost, r, c, v: [on.apply_plan(cost, r, c, v, epsilon, power)],  # noqa: B023
                    [cost, down, c, right],
                    slack,
                )
                for wanted in (True, False):
                    compared(
                        lambda on, *given: flat(on.plan_backward(*given, epsilon, power, wanted)),  # noqa: B023
                        [cost, down, c, left, right],
                        slack,
                    )


@pytest.mark.parametrize("kind", ["sqeuclidean", "cosine"])
def test_half_iterations_of_deep_points(subject: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which blocks of products serve better than a kernel that forms them where it reads."""
    monkeypatch.setattr(torch_kernels, "_limit", lambda tensor: 25)
    x, y, c = torch.randn(2, 7, 200), torch.randn(2, 9, 200), torch.rand(2, 9)
    if kind == "cosine":
        x, y = (points / points.norm(dim=-1, keepdim=True) for points in (x, y))
    compared(lambda on, cost, c: [on.half_iteration(cost, c, 10.0)], [Points(x, y, kind), c], 40)


def test_which_costs_between_points_are_stored(subject: str) -> None:
    """All that fit, but for those of few coordinates where a kernel forms them faster than it would read them."""
    for depth, size in ((2, 2000), (64, 2000), (2, 20)):
        x = torch.rand(1, size, depth)
        cost = PointCost(x, x).lowered(None, None, 1 << 30)
        assert isinstance(cost, Points) == (subject in ("triton", "cuda") and (depth, size) == (2, 2000))
        assert isinstance(PointCost(x, x).lowered(None, None, 1), Points)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [kind for make, kind in COSTS if make is points])
def test_costs_between_points(subject: str, kind: str, size: tuple[int, int]) -> None:
    """Also of points that coincide: their distance has the gradient 0."""
    cost = points(kind, *size)
    upstream = torch.randn(cost.shape)
    compared(lambda on, cost: [on.build(cost)], [cost], 8)
    distances = torch_kernels.build(cost).clamp(min=1e-2)
    compared(lambda on, *given: on.build_backward(*given), [cost, distances, upstream], 8)
    same = Points(cost.x, cost.x.clone(), kind)
    distances = chosen().build(same)
    assert (distances.diagonal(dim1=1, dim2=2).abs() <= 1e-5).all()
    if kind in ("l1", "euclidean"):
        assert not distances.diagonal(dim1=1, dim2=2).any()
        diagonal = torch.eye(size[0]).expand(2, -1, -1)
        assert not any(x.any() for x in chosen().build_backward(same, distances, diagonal))


def flat(found: tuple) -> list:
    return [found[0], *found[1]]


def test_exponents_above_zero_count_as_zero(subject: str) -> None:
    cost, r, c = Dense(torch.rand(1, 4, 5)), torch.full((1, 4), 1e30), torch.full((1, 5), 3.0)
    found = chosen().apply_plan(cost, r, c, torch.ones(1, 5, 1), 1e-3, 0)
    assert torch.equal(found, torch.full((1, 4, 1), 5.0))


@pytest.mark.parametrize("epsilon", [1e-30, 0.3, 1e6])
@pytest.mark.parametrize("make, kind", COSTS, ids=[kind for _, kind in COSTS])
def test_half_iterations_of_long_rows(subject: str, make, kind: str, epsilon: float) -> None:
    """Which several programs may share; any epsilon."""
    for cost in (make(kind, 5, 700), make(kind, 700, 5).mT):
        c = torch.rand(2, 700)
        c[:, 100:400] = -INFINITY
        compared(lambda on, cost, c: [on.half_iteration(cost, c, epsilon)], [cost, c], 8)


def test_nan_stays_in_its_row(subject: str) -> None:
    cost = torch.rand(2, 40, 50)
    cost[1, 33, 49] = math.nan
    found = chosen().half_iteration(Dense(cost), torch.rand(2, 50), 0.1)
    assert found[1, 33].isnan() and found.isnan().sum() == 1


# ---- iterations in one reading


def half_by_half(cost: Tensor, c: Tensor, log_a: Tensor, damping: float, epsilon: float) -> tuple[Tensor, Tensor]:
    s = torch_kernels.half_iteration(Dense(cost), c, epsilon)
    f = torch.where((log_a > -INFINITY) & (s < INFINITY), damping * s, 0)
    t = torch_kernels.half_iteration(Dense(cost.mT), f + epsilon * log_a, epsilon)
    return s, torch.where(c == -INFINITY, INFINITY, t)


@pytest.fixture
def iterator(subject: str) -> str:
    """A backend that reads a cost once for both half-iterations."""
    if not hasattr(chosen(), "iteration"):
        pytest.skip("no iterations in one reading")
    return subject


@pytest.mark.parametrize("damping, epsilon", [(1.0, 0.1), (0.4, 0.1), (1.0, 1e-4)])
@pytest.mark.parametrize("count, n, m", [(1, 1, 1), (3, 7, 5), (2, 41, 130), (1, 5, 1030)])
def test_iteration(iterator: str, count: int, n: int, m: int, damping: float, epsilon: float) -> None:
    """With an epsilon of 1e-4 and potentials that are far from theirs most columns are read anew."""
    cost = torch.full((count, n, m + 3), math.nan)[..., :m].copy_(torch.rand(count, n, m))
    c, log_a = 0.1 * torch.randn(count, m), torch.rand(count, n).log()
    if n > 4:
        cost[0, 1] = cost[0, :, 2] = cost[-1, 0, 0] = INFINITY
        c[0, 3] = log_a[-1, 2] = -INFINITY
    assert chosen().iterates(Dense(cost)) and not chosen().iterates(points("l1", n, m))
    found = chosen().iteration(Dense(cost), c, log_a, damping, epsilon)
    exact = half_by_half(*(x.double() for x in (cost, c, log_a)), damping, epsilon)
    for values in zip(found, half_by_half(cost, c, log_a, damping, epsilon), exact, strict=True):
        check(*values, 4, epsilon)


def test_iteration_of_nothing_and_of_nan(iterator: str) -> None:
    cost, c, log_a, on = torch.rand(4, 6, 40), torch.zeros(4, 40), torch.zeros(4, 6), chosen()
    cost[0, 2, 3] = c[1, 5] = log_a[2, 1] = math.nan
    log_a[3] = -INFINITY
    found = on.iteration(Dense(cost), c, log_a, 1.0, 0.1)
    for x, y in zip(found, half_by_half(cost, c, log_a, 1.0, 0.1), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-6)
    empty = on.iteration(Dense(cost[:0]), c[:0], log_a[:0], 1.0, 0.1)
    assert [x.shape for x in empty] == [(0, 6), (0, 40)]


@pytest.mark.parametrize("options", [dict(iterations=4), dict(method="anderson", tolerance=1e-3)])
def test_solves_of_iterations(iterator: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that keeps reading the cost once, and its gradient, are torch's."""
    cost, a, b = torch.rand(2, 9, 130), torch.rand(2, 9) + 0.1, torch.rand(2, 130) + 0.1
    cost[0, 4, 7] = INFINITY
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    mask, weights = torch.arange(9) < torch.tensor([[9], [6]]), torch.randn(2, 9)

    def whole(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        monkeypatch.setenv("LOGITLESS_BACKEND", backend)
        leaves = [x.to(dtype).requires_grad_() for x in (cost, a, b)]
        found = sinkhorn(*leaves, epsilon=0.1, rho_b=2.0, mask_a=mask, annealing=(0.5, 0.5), **options)
        value = (found.f * weights).sum() + found.kl_value.sum()
        return found.f.detach(), found.g.detach(), *torch.autograd.grad(value, leaves)

    outcomes = whole("torch", torch.float64), whole("torch", torch.float32), whole(iterator, torch.float32)
    for exact, baseline, ours in zip(*outcomes, strict=True):
        check(ours, baseline, exact, 20)


# ---- doubly stochastic matrices


@pytest.mark.parametrize("n, iterations", [(1, 3), (3, 20), (4, 1), (33, 5), (64, 2)])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_doubly_stochastic(subject: str, dialect: str, n: int, iterations: int) -> None:
    logits = 3 * torch.randn(min(200, 900 // n**2 + 5), n, n)  # more than programs have in hand
    logits[0] *= 10  # sums below megatron's eps
    compared(lambda on, x: [on.doubly_stochastic(x, iterations, dialect)[0]], [logits], 2)
    compared(
        lambda on, *given: [on.doubly_stochastic_backward(*given, iterations, dialect)],
        [logits, torch.randn_like(logits)],
        2,
    )
    residuals = [
        on.doubly_stochastic(x, iterations, dialect)[1].double()
        for on, x in ((chosen(), logits), (torch_kernels, logits.double()))
    ]
    torch.testing.assert_close(*residuals, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("scale", [30, 1e4])
def test_doubly_stochastic_of_any_logits(subject: str, scale: float, n: int) -> None:
    """Entries far below what float32 holds beside the largest, masked ones, whole rows masked."""
    logits = scale * torch.randn(6, n, n)
    logits[0, 0, 1] = logits[1, 1] = logits[2, :, 0] = -INFINITY
    upstream, on = torch.randn_like(logits), chosen()
    found = on.doubly_stochastic(logits, 6, "exact")[0]
    exact = torch_kernels.doubly_stochastic(logits.double(), 6, "exact")[0]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)
    gradient = on.doubly_stochastic_backward(logits, upstream, 6, "exact")
    exact = torch_kernels.doubly_stochastic_backward(logits.double(), upstream.double(), 6, "exact")
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_bad_matrix_stays_alone(subject: str, dialect: str) -> None:
    logits, on = torch.randn(20, 5, 5), chosen()
    logits[7, 1, 2] = math.nan
    matrix, residual = on.doubly_stochastic(logits, 3, dialect)
    gradient = on.doubly_stochastic_backward(logits, torch.ones_like(logits), 3, dialect)
    others = torch.arange(20) != 7
    for x in (matrix, residual[:, None], gradient):
        assert x[7].isnan().any() and x[others].isfinite().all()
    assert on.doubly_stochastic(logits[:0], 3, dialect)[0].shape == (0, 5, 5)


# ---- whole runs

BALANCED = (INFINITY, INFINITY)
RUNS = {  # how the cost differs from one in [0, 1), and the schedule: epsilon, rhos, annealed
    "plain": (lambda C: C, 0.1, BALANCED, ()),
    "unbalanced": (lambda C: C, 0.1, (1.0, 0.5), ()),
    "rows free": (lambda C: C, 0.1, (0.3, INFINITY), ()),
    "columns free": (lambda C: C, 0.1, (INFINITY, 0.02), ()),
    "annealed": (lambda C: C, 0.05, BALANCED, (1.0, 0.3, 0.1)),
    "annealed, unbalanced": (lambda C: C, 0.05, (1.0, 0.5), (1.0, 0.3, 0.1)),
    "absorbed": (lambda C: 4 * C * C, 0.03, BALANCED, ()),
    "small epsilon": (lambda C: C, 1e-3, BALANCED, ()),
    "tiny epsilon": (lambda C: C, 1e-30, BALANCED, ()),
    "tiny epsilon, unbalanced": (lambda C: C, 1e-30, (1.0, 0.5), ()),
    "huge epsilon": (lambda C: C, 1e6, BALANCED, ()),
    "large costs": (lambda C: 1e4 * C, 10.0, BALANCED, ()),
    "costs of 1e4": (lambda C: C + 1e4, 0.1, BALANCED, ()),
    "costs of -1e4": (lambda C: C - 1e4, 0.1, BALANCED, ()),
    "costs of -1e4, unbalanced": (lambda C: C - 1e4, 0.1, (1e4, 1e4), ()),
}


def problems(name: str, n: int, m: int, iterations: int = 20) -> tuple:
    """A batch: ordinary; weights of 0; entries, rows and columns of +inf; no mass at all; tiny weights; a start."""
    change, epsilon, rhos, annealed = RUNS[name]
    cost = change(torch.rand(5, n, m))
    a, b, g = torch.rand(5, n) + 0.1, torch.rand(5, m) + 0.1, torch.zeros(5, m)
    a[1, n // 2 :], b[1, : m // 2] = 0, 0
    cost[2][torch.rand(n, m) < 0.3] = INFINITY
    cost[2, 0], cost[2, :, -1] = INFINITY, INFINITY
    a[3] = 0
    b[4, : (m + 2) // 3] *= 1e-20
    g[0] = torch.rand(m) * min(epsilon, 1)
    a, b = (x / x.sum(-1, keepdim=True).clamp(min=1e-30) for x in (a, b))
    return cost, a, b, g, Schedule(epsilon, annealed, iterations, None, rhos)


def posed(cost, a, b, g, schedule: Schedule) -> tuple:
    """What the solver is given."""
    options = solve.Options(
        schedule.limit, schedule.tolerance or 0.0, schedule.tolerance is not None, "alternating", 1.5, schedule.annealed
    )
    problem = Problem(Dense(cost), Side(a, schedule.rhos[0]), Side(b, schedule.rhos[1]), schedule.epsilon)
    return problem, options, (torch.zeros_like(a), g)


def looped(monkeypatch, cost, a, b, g, schedule: Schedule, cotangents=None):
    """The solver's loop on torch kernels, and its gradient."""
    cost, a, b = (x.clone().requires_grad_() for x in (cost, a, b))
    with monkeypatch.context() as patch:
        patch.setenv("LOGITLESS_BACKEND", "torch")
        found = solve.run(*posed(cost, a, b, g, schedule))
        gradients = cotangents and torch.autograd.grad((found.f, found.g), (cost, a, b), cotangents)
    return found, gradients


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_runs(runner: str, name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Potentials, row sums and gradients of a fixed number of iterations."""
    cost, a, b, g, schedule = problems(name, *size, 7 if interpreted(runner) else 20)
    on = chosen()
    if not on.runs(Dense(cost)):
        pytest.skip("no whole runs of this size")
    of = torch.randn(a.shape), torch.randn(b.shape)
    exact, exact_gradients = looped(
        monkeypatch, cost.double(), a.double(), b.double(), g.double(), schedule, tuple(x.double() for x in of)
    )
    baseline, gradients = looped(monkeypatch, cost, a, b, g, schedule, of)
    found = on.run(Dense(cost), a, b, g, schedule, True)
    assert torch.equal(found.reached | (b == 0), baseline.reached | (b == 0))
    assert torch.equal(found.iterations, exact.iterations) and not found.stopped.any()
    for i in range(len(cost)):
        size = schedule.epsilon + float(torch.where(cost[i].isfinite(), cost[i], 0).abs().max())
        for name in ("f", "g"):
            check(*(getattr(x, name)[i] for x in (found, baseline, exact)), 8, size)
        check(found.rows[i], baseline.rows[i], exact.rows[i], condition(cost[i], schedule.epsilon))
    mine = on.run_backward(Dense(cost), a, b, schedule, found.history, *of, True)
    strided = [x.mT.contiguous().mT for x in of]
    again = on.run_backward(Dense(cost), a, b, schedule, found.history, *strided, False)
    assert again[0] is None and torch.equal(again[1], mine[1]) and torch.equal(again[2], mine[2])
    for ours, torchs, wanted in zip(mine, gradients, exact_gradients):
        assert ours.isfinite().all()
        for i in range(len(cost) if schedule.epsilon > 1e-20 else 0):  # below, ties decide, and roundings those
            check(ours[i], torchs[i], wanted[i], 4 * condition(cost[i], schedule.epsilon))


@pytest.mark.parametrize("rhos", [BALANCED, (1.0, 0.5), (INFINITY, 0.5)], ids=str)
@pytest.mark.parametrize("annealed", [(), (0.5, 0.2)], ids=["fixed", "annealed"])
def test_every_problem_stops_on_its_own(runner: str, annealed: tuple, rhos, monkeypatch: pytest.MonkeyPatch) -> None:
    """When, and with what gradient, as the loop of half-iterations; one is not solved at the limit, and in one a row
    that nothing reaches counts for its weight."""
    n, m = 20, 30
    cost = torch.rand(6, n, m) * torch.tensor([0.0, 0.1, 1.0, 3.0, 30.0, 1.0])[:, None, None]
    a, b, g = torch.rand(6, n) + 0.1, torch.rand(6, m) + 0.1, torch.zeros(6, m)
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    cost[5, 0], a[5, 0] = INFINITY, 7e-4
    a[5, 1:] *= (1 - 7e-4) / a[5, 1:].sum()
    schedule, of = Schedule(0.1, annealed, 60, 1e-3, rhos), (torch.randn(6, n), torch.randn(6, m))
    on = chosen()
    found = on.run(Dense(cost), a, b, g, schedule, True)
    exact, exact_gradients = looped(
        monkeypatch, *(x.double() for x in (cost, a, b, g)), schedule, tuple(x.double() for x in of)
    )
    baseline, gradients = looped(monkeypatch, cost, a, b, g, schedule, of)
    assert torch.equal(found.iterations, exact.iterations) and torch.equal(found.stopped, exact.stopped)
    assert found.iterations.unique().numel() >= 3 and (rhos != BALANCED or not found.stopped.all())
    mine = on.run_backward(Dense(cost), a, b, schedule, found.history, *of, True)
    for i in range(5):  # of the last, potentials drift while the residual stands still: any pair may be the best
        check(found.f[i], baseline.f[i], exact.f[i], 8, 1)
        check(found.g[i], baseline.g[i], exact.g[i], 8, 1)
        for ours, torchs, wanted in zip(mine, gradients, exact_gradients):
            check(ours[i], torchs[i], wanted[i], 4 * condition(cost[i], 0.1))


def test_of_a_run_at_the_limit_of_rounding_the_best_pair_is_returned(runner: str, monkeypatch) -> None:
    """The residual is noise then; the gradient is that of the run up to it."""
    cost, a, b = torch.rand(1, 9, 8), torch.full((1, 9), 1 / 9), torch.full((1, 8), 1 / 8)
    on, g = chosen(), torch.zeros(1, 8)
    limits = (1, 41) if interpreted(runner) else (1, *range(41, 60))
    schedules = [Schedule(0.1, (), limit, 1e-30, BALANCED) for limit in limits]
    residuals = []
    for schedule in schedules:
        found = on.run(Dense(cost), a, b, g, schedule, False)
        assert found.iterations == schedule.limit and not found.stopped
        residuals.append(float((found.rows - a).abs().sum()))
    assert max(residuals[1:]) <= 1e-6 < residuals[0]
    of = torch.randn(1, 9), torch.randn(1, 8)
    exact, wanted = looped(monkeypatch, *(x.double() for x in (cost, a, b, g)), schedules[-1], [x.double() for x in of])
    baseline, gradients = looped(monkeypatch, cost, a, b, g, schedules[-1], of)
    found = on.run(Dense(cost), a, b, g, schedules[-1], True)
    check(found.f, baseline.f, exact.f, 8, 1)
    mine = on.run_backward(Dense(cost), a, b, schedules[-1], found.history, *of, True)
    check(mine[0], gradients[0], wanted[0], condition(cost, 0.1))


# ---- the plan's cost, of whole runs


@pytest.fixture
def transporter(runner: str) -> str:
    """A backend that has the plan's cost of those, with its gradient."""
    if not hasattr(chosen(), "transport"):
        pytest.skip("no transport in one call")
    return runner


def recorded(monkeypatch, cost, a, b, g, schedule: Schedule) -> list[Tensor]:
    """<P, C> of the solver's loop on torch kernels, and its gradients in the cost and the weights, by autograd."""
    leaves = cost, a, b = [x.clone().requires_grad_() for x in (cost, a, b)]
    with monkeypatch.context() as patch:
        patch.setenv("LOGITLESS_BACKEND", "torch")
        value = solve.solve(*posed(cost, a, b, g, schedule), "unrolled", cost.shape[:1]).transport_cost
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def check_transport(monkeypatch, cost, a, b, g, schedule: Schedule, problems: range) -> None:
    """Value and gradients, all that may be asked for, of a cost of any strides.

    Gradients in the cost are sums of plans, those in the weights of differences of costs: both may be 0."""
    exact = recorded(monkeypatch, *(x.double() for x in (cost, a, b, g)), schedule)
    baseline = recorded(monkeypatch, cost, a, b, g, schedule)
    on = chosen()
    value, of_cost, of_weights = on.transport(Dense(cost), a, b, g, schedule, (True, True))
    for i in problems:
        finite = cost[i][cost[i].isfinite()]
        spread = float(finite.max() - finite.min()) if finite.numel() else 0
        spread += (float(finite.abs().max()) if finite.numel() else 0) / condition(cost[i], schedule.epsilon)
        sizes = (0, 1 / max(cost.shape[1:]), spread, spread)
        for *results, size in zip((value, of_cost, *of_weights), baseline, exact, sizes, strict=True):
            check(*(x[i] for x in results), 8 * condition(cost[i], schedule.epsilon), size)
    strided = Dense(cost.mT.contiguous().mT)
    alone, first, none = on.transport(strided, a, b, g, schedule, (True, False))
    assert torch.equal(alone, value) and torch.equal(first, of_cost) and none is None
    alone, none, second = on.transport(strided, a, b, g, schedule, (False, True))
    assert torch.equal(alone, value) and none is None and all(map(torch.equal, second, of_weights))
    alone, *nothing = on.transport(strided, a, b, g, schedule, (False, False))
    assert torch.equal(alone, value) and nothing == [None, None]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [name for name in RUNS if "tiny" not in name])  # there ties decide
def test_transport(transporter: str, name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = problems(name, *size)
    if not chosen().runs(Dense(given[0])):
        pytest.skip("no whole runs of this size")
    check_transport(monkeypatch, *given, range(5))


@pytest.mark.parametrize("rhos", [BALANCED, (1.0, 0.5), (INFINITY, 0.5)], ids=str)
@pytest.mark.parametrize("annealed", [(), (0.5, 0.2)], ids=["fixed", "annealed"])
def test_transport_of_a_run_that_stops(transporter: str, annealed, rhos, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = torch.rand(4, 20, 30) * torch.tensor([0.1, 1.0, 3.0, 30.0])[:, None, None]
    a, b = (x / x.sum(-1, keepdim=True) for x in (torch.rand(4, 20) + 0.1, torch.rand(4, 30) + 0.1))
    schedule = Schedule(0.1, annealed, 60, 1e-3, rhos)
    check_transport(monkeypatch, cost, a, b, torch.zeros(4, 30), schedule, range(4))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_transport_of_costs_of_any_size(transporter: str, scale: float) -> None:
    """Costs and epsilon times so much: the same plan, and a gradient in the cost as large as before."""
    cost, a, b, g, schedule = problems("absorbed", 17, 19)
    on = chosen()
    plain, of_plain, _ = on.transport(Dense(cost), a, b, 0 * g, schedule, (True, False))
    larger = Schedule(scale * schedule.epsilon, (), schedule.limit, None, schedule.rhos)
    scaled, of_scaled, _ = on.transport(Dense(scale * cost), a, b, 0 * g, larger, (True, False))
    check(scaled / scale, plain, plain, 100)
    for x, y in zip(of_scaled, of_plain):
        check(x, y, y, 1000)


@pytest.mark.parametrize("masked", [True, False])
def test_transport_cost(subject: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a result's own, of any backend: weights, masks, gradients of some inputs or none."""
    cost, weight = torch.rand(2, 3, 9, 8), torch.rand(2, 3)
    masks = {"mask_a": torch.rand(2, 3, 9) < 0.7, "mask_b": torch.randint(1, 9, (2, 3))} if masked else {}
    for b in (None, torch.rand(8)):
        outcomes = []
        for call, backend, dtype in (
            (solve.transport_cost, subject, torch.float32),
            (lambda *x, **how: sinkhorn(*x, **how).transport_cost, "torch", torch.float32),
            (lambda *x, **how: sinkhorn(*x, **how).transport_cost, "torch", torch.float64),
        ):
            monkeypatch.setenv("LOGITLESS_BACKEND", backend)
            leaves = [x.to(dtype).requires_grad_() for x in (cost, b) if x is not None]
            mass = None if b is None else leaves[1] / leaves[1].sum()
            found = call(leaves[0], None, mass, epsilon=0.1, iterations=7, **masks)
            outcomes.append([found, *torch.autograd.grad((weight.to(dtype) * found).sum(), leaves)])
            with torch.no_grad():
                assert torch.equal(call(leaves[0], None, mass, epsilon=0.1, iterations=7, **masks), found)
        for ours, baseline, exact in zip(*outcomes, strict=True):
            check(ours, baseline, exact, 100)


def test_potentials_that_drift(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that can send to one column only, and has more than that takes: 2 epsilon further in every iteration."""
    cost = torch.tensor([[[0.0, INFINITY, 3.0], [0.3, 0.0, 0.2]]])
    a, b, g = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.89, 0.01]]), torch.zeros(1, 3)
    schedule, of = Schedule(0.01, (), 60, None, BALANCED), (torch.randn(1, 2), torch.randn(1, 3))
    exact, wanted = looped(monkeypatch, *(x.double() for x in (cost, a, b, g)), schedule, [x.double() for x in of])
    baseline, gradients = looped(monkeypatch, cost, a, b, g, schedule, of)
    found = chosen().run(Dense(cost), a, b, g, schedule, True)
    mine = chosen().run_backward(Dense(cost), a, b, schedule, found.history, *of, True)
    assert exact.f.abs().max() > 100 * schedule.epsilon
    for values in ((found.f, baseline.f, exact.f), (found.g, baseline.g, exact.g), *zip(mine, gradients, wanted)):
        check(*values, 4 * condition(cost, schedule.epsilon))


def test_absorption(subject: str) -> None:
    """Potentials that move far: the scaled plan is made anew, but not every time."""
    if subject != "cpu":
        pytest.skip("its history says how it ran")
    cost, a, b, g, schedule = problems("small epsilon", 33, 47)
    _, _, logs, returned = chosen().run(Dense(cost), a, b, g, schedule, True).history
    assert (returned == schedule.limit - 1).all()
    absorbed = logs[[0, 1]].sum(-1)  # half-iterations over columns in the log domain
    assert (absorbed >= 2).all() and (absorbed <= 5).all() and not logs[:, -5:].any()


def test_a_run_depends_on_nothing_but_its_inputs(runner: str) -> None:
    """Threads, neighbours in the batch, the layout of the cost."""
    size = (520, 530) if chosen().runs(Dense(torch.empty(1, 520, 530))) else (13, 9)
    cost, a, b, g, schedule = problems("plain", *size, 3 if interpreted(runner) else 20)
    on, of, threads = chosen(), (torch.randn(a.shape), torch.randn(b.shape)), torch.get_num_threads()
    outcomes = []
    try:
        for count, cost in ((1, cost), (2, cost), (2, cost.mT.contiguous().mT)):  # noqa: B020
            torch.set_num_threads(count)
            found = on.run(Dense(cost), a, b, g, schedule, True)
            outcomes.append(
                [found.f, found.rows, *on.run_backward(Dense(cost), a, b, schedule, found.history, *of, True)]
            )
    finally:
        torch.set_num_threads(threads)
    alone = on.run(Dense(cost[2:3]), a[2:3], b[2:3], g[2:3], schedule, False)
    assert torch.equal(alone.f[0], outcomes[0][0][2])
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_cotangents_of_any_size(runner: str, scale: float) -> None:
    cost, a, b, g, schedule = problems("absorbed", 17, 19, 7 if interpreted(runner) else 20)
    on, of = chosen(), (torch.randn(a.shape), torch.randn(b.shape))
    history = on.run(Dense(cost), a, b, g, schedule, True).history
    plain, scaled = (
        on.run_backward(Dense(cost), a, b, schedule, history, *(x * size for x in of), True) for size in (1.0, scale)
    )
    for x, y in zip(plain, scaled):
        for i in (0, 1, 2, 3):  # the weights of the last are tiny: their gradients overflow
            check(y[i] / scale, x[i], x[i], 100)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
@pytest.mark.parametrize("rhos", [(None, None), (1.0, 0.5)], ids=str)
def test_through_the_solver(subject: str, rhos: tuple, gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of ``sinkhorn`` in float32, masks and all, against those in float64 on torch."""
    cost, a, b = torch.rand(3, 20, 17), torch.rand(3, 20), torch.rand(3, 17)
    mask = torch.arange(20) < torch.tensor([[20], [13], [1]])
    weight, values = torch.rand(3), torch.rand(3, 17, 2)
    how = {"iterations": 15} if gradient == "unrolled" else {"tolerance": 1e-6}
    outcomes = []
    for dtype, backend in ((torch.float32, subject), (torch.float32, "torch"), (torch.float64, "torch")):
        monkeypatch.setenv("LOGITLESS_BACKEND", backend)
        leaves = [x.to(dtype).requires_grad_() for x in (cost, a, b)]
        mass = [x / x.sum(-1, keepdim=True) for x in (leaves[1] * mask, leaves[2])]
        options = {"rho_a": rhos[0], "rho_b": rhos[1], "mask_a": mask, "gradient": gradient, **how}
        found = sinkhorn(leaves[0], *mass, epsilon=0.1, **options)
        total = (found.kl_value * weight.to(dtype)).sum()
        if gradient != "envelope":
            total = (
                total + (found.transport_cost * weight.to(dtype)).sum() + found.apply(values.to(dtype)).square().sum()
            )
        outcomes.append([found.plan(), total, *torch.autograd.grad(total, leaves)])
    for ours, baseline, exact in zip(*outcomes):
        check(ours, baseline, exact, 100)
