"""The Sinkhorn kernels in CUDA on the CPU (tests/cuda_host) against torch's in float64.

The bar is that of test_contract.py: errors of at most 1.5 times torch's in float32, from the same inputs.
"""

from __future__ import annotations

import math
import os
import re
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import cuda_build
import logitless as ll
from logitless.backends import Chunk, cuda, triton
from logitless.backends import torch as specification
from logitless.ops.sinkhorn import cuda_kernels, kernels, torch_kernels
from logitless.ops.sinkhorn.doubly_stochastic import DIALECTS
from logitless.ops.sinkhorn.gradients import apply_plan
from logitless.ops.sinkhorn.kernels import Dense, Points, Probabilities, Schedule
from logitless.ops.sinkhorn.problem import Problem, Side
from logitless.ops.sinkhorn.solve import Options, _loop
from test_cuda_kernels import host, library, make, needs_host  # noqa: F401 (fixtures)
from test_row_kernels import double

pytestmark = needs_host
INFINITY = math.inf


DEVICES = {  # processors, bytes of shared memory of a block, largest cluster: rows go in few stages, and in clusters
    "large": dict(processors=2, shared_per_block=227 << 10, most_cluster=8),
    "small": dict(processors=20, shared_per_block=20 << 10, most_cluster=8),
    "alone": dict(processors=2, shared_per_block=20 << 10, most_cluster=0),
}


def use(name: str, host, monkeypatch) -> None:  # noqa: F811
    shared = DEVICES[name]["shared_per_block"] + 1024
    cuda_build.serve(monkeypatch, host, list(DEVICES).index(name), shared_per_processor=shared, **DEVICES[name])


@pytest.fixture(autouse=True)
def _on_the_host(host, monkeypatch) -> Iterator[None]:  # noqa: F811
    use("large", host, monkeypatch)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child would wait for the others for ever
    yield
    torch.set_num_threads(threads)
    host.drop_barrier(0)


def check(name: str, found: Tensor, torchs: Tensor, exact: Tensor, slack: float = 2, size: float = 0) -> None:
    errors = [(x.double() - exact).nan_to_num(0, 0, 0).norm() for x in (found, torchs)]
    assert torch.equal(found.isfinite(), exact.isfinite()), name
    assert errors[0] <= 1.5 * errors[1] + slack * torch.finfo(torch.float32).eps * (exact.norm() + size), (name, errors)


# ---------------------------------------------------------------------------------------- doubly stochastic matrices


@pytest.mark.parametrize("iterations", [1, 2, 20, 70])  # 140 halves: more than are kept at a time
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 31, 33, 64])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_doubly_stochastic(dialect: str, n: int, iterations: int) -> None:
    logits = 3 * torch.randn(130 // n, n, n)
    upstream = torch.randn_like(logits)
    matrix, residual = cuda_kernels.doubly_stochastic(logits, iterations, dialect)
    gradient = cuda_kernels.doubly_stochastic_backward(logits, upstream, iterations, dialect)
    values = [torch_kernels.doubly_stochastic(x, iterations, dialect)[0] for x in (logits, logits.double())]
    gradients = [
        torch_kernels.doubly_stochastic_backward(x, upstream.to(x.dtype), iterations, dialect)
        for x in (logits, logits.double())
    ]
    check("matrix", matrix, *values)
    check("gradient", gradient, *gradients)
    off = (torch.cat([values[1].sum(-1), values[1].sum(-2)], -1) - 1).abs().amax(-1)
    torch.testing.assert_close(residual.double(), off, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [3, 4, 12])
@pytest.mark.parametrize("scale", [30, 1e4])
def test_exact_for_any_logits(scale: float, n: int) -> None:
    """Entries far below what float32 holds beside the largest, masked ones, whole rows masked."""
    logits = scale * torch.randn(40, n, n)
    logits[0, 0, 1] = logits[1, 1] = logits[2, :, 0] = -INFINITY
    logits[3] = torch.tensor([0.0, -300, -300])[torch.arange(n) % 3] * (torch.arange(n) > 0)[:, None]  # 2^n a half
    upstream = torch.randn_like(logits)
    for iterations in (3, 50):
        found = cuda_kernels.doubly_stochastic(logits, iterations, "exact")[0]
        gradient = cuda_kernels.doubly_stochastic_backward(logits, upstream, iterations, "exact")
        exact = torch_kernels.doubly_stochastic(logits.double(), iterations, "exact")[0]
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)
        wanted = torch_kernels.doubly_stochastic_backward(logits.double(), upstream.double(), iterations, "exact")
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


def test_one_bad_matrix_stays_alone() -> None:
    for n in (4, 12):
        logits = torch.randn(20, n, n)
        logits[7, 1, 2] = math.nan
        for dialect in DIALECTS:
            found = cuda_kernels.doubly_stochastic(logits, 5, dialect)[0]
            gradient = cuda_kernels.doubly_stochastic_backward(logits, torch.ones_like(logits), 5, dialect)
            for x in (found, gradient):
                assert x[7].isnan().any() and x[torch.arange(20) != 7].isfinite().all()
    assert cuda_kernels.doubly_stochastic(torch.empty(0, 4, 4), 5, "exact")[0].shape == (0, 4, 4)


# -------------------------------------------------------------------------------------------------------- whole runs

RUNS = {  # how large the costs are, schedule, what is special
    "plain": (1.0, dict(epsilon=0.1, limit=20), ""),
    "small epsilon": (1.0, dict(epsilon=0.01, limit=30), ""),
    "tiny epsilon": (1.0, dict(epsilon=1e-3, limit=30), ""),
    "large costs": (1e4, dict(epsilon=1.0, limit=10), ""),
    "far columns": (1.0, dict(epsilon=0.01, limit=6), "far"),
    "unbalanced": (1.0, dict(epsilon=0.05, limit=15, rhos=(0.5, 2.0)), ""),
    "semi-unbalanced": (1.0, dict(epsilon=0.05, limit=15, rhos=(0.05, INFINITY)), ""),
    "cheap to miss": (30.0, dict(epsilon=0.05, limit=10, rhos=(0.01, 0.02)), ""),
    "to a tolerance": (1.0, dict(epsilon=0.1, limit=200, tolerance=1e-4), ""),
    "annealed": (1.0, dict(epsilon=0.05, limit=200, tolerance=1e-4, annealed=(1.0, 0.4, 0.16)), ""),
    "annealed, exactly": (1.0, dict(epsilon=0.05, limit=9, annealed=(1.0, 0.4, 0.16)), ""),
    "no weight": (1.0, dict(epsilon=0.1, limit=15), "zero"),
    "forbidden": (1.0, dict(epsilon=0.1, limit=15), "forbidden"),
    "forbidden, to a tolerance": (1.0, dict(epsilon=0.1, limit=5, tolerance=1e-3), "forbidden"),
}
SIZES = [(1, 1), (5, 7), (16, 16), (31, 32), (33, 20), (40, 270)]  # the registers of a warp, twice; those of a block
CASES = [("plain", size) for size in SIZES]
CASES += [(name, size) for name in RUNS if name != "plain" for size in ((9, 12), (12, 19), (33, 10))]
CASES.remove(("forbidden, to a tolerance", (33, 10)))  # of potentials that drift at a residual that stays, any is best


def problem(name: str, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Schedule]:
    scale, schedule, special = RUNS[name]
    count = 3 if n * m > 1000 else 18  # many: where errors are those of rounded potentials, they are chance
    cost = torch.rand(count, n, m) * scale
    a, b, g = torch.rand(count, n) + 0.1, torch.rand(count, m) + 0.1, 0.01 * scale * torch.randn(count, m)
    if special == "zero":
        a[0, 2] = b[0, 3] = b[0, 0] = b[1] = 0
    if special == "forbidden":
        cost[0, 1] = cost[1, :, 2] = cost[2, 3:5, 4] = INFINITY
    if special == "far":
        cost[:, :, 3] += 50
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True).clamp(min=0.1)
    return cost, a, b, g, Schedule(**{"annealed": (), "tolerance": None, "rhos": (INFINITY, INFINITY)} | schedule)


def solved(cost: Tensor, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule) -> tuple:
    """The solver's own loop, recorded: leaves, the problem, (f, g), what was decided."""
    leaves = [x.clone().requires_grad_() for x in (cost, a, b)]
    sides = [Side(x, rho) for x, rho in zip(leaves[1:], schedule.rhos, strict=True)]
    options = Options(
        schedule.limit, schedule.tolerance or 0.0, schedule.tolerance is not None, "alternating", 1.5, schedule.annealed
    )
    whole = Problem(Dense(leaves[0]), *sides, schedule.epsilon)
    f, g, t, iterations, stopped = _loop(whole, options, (torch.zeros_like(a), g))
    return leaves, whole, (f, g), (t < INFINITY, iterations, stopped)


def expected(cost: Tensor, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, of: tuple[Tensor, Tensor]) -> tuple:
    leaves, _, (f, g), decided = solved(cost, a, b, g, schedule)
    found = torch.autograd.grad((f, g), leaves, [x.to(f.dtype) for x in of])
    return (f.detach(), g.detach(), *found), decided


def transported(cost: Tensor, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule) -> tuple[Tensor, ...]:
    """<P, C> and its gradients in the cost and the weights."""
    leaves, whole, potentials, (reached, *_) = solved(cost, a, b, g, schedule)
    r, c, columns = whole.factors(*potentials, reached)
    value = apply_plan(whole.cost, r, c, columns[..., None], schedule.epsilon, power=1).sum((1, 2))
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def rows_of(cost: Tensor, a: Tensor, b: Tensor, schedule: Schedule, f: Tensor, g: Tensor, reached: Tensor) -> Tensor:
    """The plan's row sums."""
    sides = [Side(x, rho) for x, rho in zip((a, b), schedule.rhos, strict=True)]
    r, c, columns = Problem(Dense(cost), *sides, schedule.epsilon).factors(f, g, reached)
    return torch_kernels.apply_plan(Dense(cost), r, c, columns[..., None], schedule.epsilon, 0)[..., 0]


def whole_run(cost: Tensor, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, of: tuple[Tensor, Tensor]) -> tuple:
    run = cuda_kernels.run(Dense(cost), a, b, g, schedule, keep=True)
    found = cuda_kernels.run_backward(Dense(cost), a, b, schedule, run.history, *of, wanted=True)
    return (run.f, run.g, *found), (run.reached, run.iterations, run.stopped), run.rows


@pytest.mark.parametrize("name, size", CASES)
def test_whole_run(name: str, size: tuple[int, int]) -> None:
    cost, a, b, g, schedule = problem(name, *size)
    of = torch.randn_like(a), torch.randn_like(b)
    assert cuda_kernels.runs(Dense(cost))
    found, decided, rows = whole_run(cost, a, b, g, schedule, of)
    single, _ = expected(cost, a, b, g, schedule, of)
    exact, wanted = expected(*(x.double() for x in (cost, a, b, g)), schedule, of)
    for what, x, y, z in zip(("f", "g", "of_cost", "of_a", "of_b"), found, single, exact, strict=True):
        check(what, x, y, z)
    assert all(torch.equal(x, y) for x, y in zip(decided, wanted, strict=True))
    given = (cost, a, b, schedule, *found[:2])  # row sums are those of the potentials that are returned
    widened = [x.double() if isinstance(x, Tensor) else x for x in given]
    check("rows", rows, rows_of(*given, decided[0]), rows_of(*widened, decided[0]))


@pytest.mark.parametrize("name, size", CASES)
def test_transport(name: str, size: tuple[int, int], monkeypatch) -> None:
    cost, a, b, g, schedule = problem(name, *size)
    value, of_cost, of_weights = cuda_kernels.transport(Dense(cost), a, b, g, schedule, (True, True))
    monkeypatch.setenv("LOGITLESS_BACKEND", "torch")
    single, exact = (transported(*(x.to(to) for x in (cost, a, b, g)), schedule) for to in (a.dtype, torch.double))
    for what, *results in zip(("value", "of_cost", "of_a", "of_b"), (value, of_cost, *of_weights), single, exact):
        slack = 10 + RUNS[name][0] / schedule.epsilon / 10  # one rounding of potentials is so many in the plan
        check(what, *results, slack=slack, size=value.norm() * (what in ("of_a", "of_b")))
    for wanted in ((True, False), (False, True), (False, False)):
        again = cuda_kernels.transport(Dense(cost), a, b, g, schedule, wanted)
        assert torch.equal(again[0], value) and [x is not None for x in again[1:]] == [*wanted]
        assert not wanted[0] or torch.equal(again[1], of_cost)
        assert not wanted[1] or all(map(torch.equal, again[2], of_weights))


@pytest.mark.parametrize("size", [(7, 5), (20, 31), (33, 9)])
def test_a_cost_of_any_strides(size: tuple[int, int]) -> None:
    cost, a, b, g, schedule = problem("plain", *size)
    of = torch.randn_like(a), torch.randn_like(b)
    exact = whole_run(cost, a, b, g, schedule, of)
    for view in (cost.mT.contiguous().mT, cost.repeat_interleave(2, 2)[..., ::2]):
        for x, y in zip(exact[0], whole_run(view, a, b, g, schedule, of)[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    shared = whole_run(cost[:1].expand_as(cost), a, b, g, schedule, of)[0][0]
    torch.testing.assert_close(shared[:1], whole_run(cost[:1], a[:1], b[:1], g[:1], schedule, of)[0][0])


@pytest.mark.parametrize("n, m, count", [(1, 1, 1), (3, 5, 2), (33, 40, 2), (5, 5000, 1), (70, 600, 1)])
@pytest.mark.parametrize("lies", ["rows", "columns", "neither", "shared"])
def test_half_iteration(n: int, m: int, count: int, lies: str) -> None:
    cost, c = torch.rand(count, n, m), 0.1 * torch.randn(count, m)
    c[0, m // 2] = cost[0, 0] = -INFINITY if m > 1 else 0.0
    cost[0, 0] = INFINITY
    if lies == "columns":
        cost = cost.mT.contiguous().mT
    if lies == "neither":
        cost = cost.repeat_interleave(2, 2).mT.repeat_interleave(2, 2).mT[:, ::2, ::2]
    if lies == "shared":
        cost = cost[:1].expand(count, n, m)
    for epsilon in (0.1, 1e-4):
        found = cuda_kernels.half_iteration(Dense(cost), c, epsilon)
        of_torch = [torch_kernels.half_iteration(Dense(cost.to(x)), c.to(x), epsilon) for x in (c.dtype, torch.float64)]
        check("s", found, *of_torch)


def half_by_half(cost: Tensor, c: Tensor, log_a: Tensor, damping: float, epsilon: float) -> tuple[Tensor, Tensor]:
    s = torch_kernels.half_iteration(Dense(cost), c, epsilon)
    f = torch.where((log_a > -INFINITY) & (s < INFINITY), damping * s, 0)
    t = torch_kernels.half_iteration(Dense(cost.mT), f + epsilon * log_a, epsilon)
    return s, torch.where(c == -INFINITY, INFINITY, t)


ITERATIONS = [  # device, B, n, m
    ("large", 1, 1, 1),
    ("large", 3, 7, 5),
    ("large", 1, 70, 130),  # several rounds, of rows that are a warp's
    ("large", 2, 9, 2600),  # teams of 5 warps, and one without
    ("large", 1, 5, 8195),
    ("small", 2, 12, 600),  # several rows a stage, of several warps each
    ("small", 1, 3, 2052),  # clusters of 2
    ("small", 1, 2, 9001),  # of 8
    ("alone", 1, 5, 3000),  # one stage
]


@pytest.mark.parametrize("damping, epsilon", [(1.0, 0.1), (0.4, 0.1), (1.0, 1e-4), (0.01, 0.01)])
@pytest.mark.parametrize("device, count, n, m", ITERATIONS)
def test_iteration(host, monkeypatch, device, count, n, m, damping, epsilon) -> None:  # noqa: F811
    """With an epsilon of 1e-4 and potentials that are far from theirs most columns are read anew."""
    use(device, host, monkeypatch)
    cost, c, log_a = torch.rand(count, n, m), 0.1 * torch.randn(count, m), torch.rand(count, n).log()
    if n > 4:
        cost[0, 1] = cost[0, :, 2] = cost[-1, 0, 0] = INFINITY
        c[0, 3] = log_a[-1, 2] = -INFINITY
    assert cuda_kernels.iterates(Dense(cost))
    found = cuda_kernels.iteration(Dense(cost), c, log_a, damping, epsilon)
    exact = half_by_half(*(x.double() for x in (cost, c, log_a)), damping, epsilon)
    for name, *values in zip("st", found, half_by_half(cost, c, log_a, damping, epsilon), exact, strict=True):
        check(name, *values)


@pytest.mark.parametrize("m", [130, 132, 2601])
@pytest.mark.parametrize("lies", ["padded", "behind", "shared"])
def test_iteration_at_every_alignment(m: int, lies: str) -> None:
    """Nothing beside the cost is read that matters: it is NaN."""
    cost, c, log_a = torch.rand(2, 20, m), 0.1 * torch.randn(2, m), torch.randn(2, 20)
    if lies == "shared":
        cost = cost[:1].expand(2, 20, m)
    exact = cuda_kernels.iteration(Dense(cost.clone()), c, log_a, 1.0, 0.1)
    for offset in range(1 if lies == "shared" else 4):
        view = torch.full((2, 20, m + 8), math.nan)[..., offset : offset + m]
        if lies == "behind":
            view = torch.full((2 * 20 * m + offset,), math.nan)[offset:].view(2, 20, m)
        view = cost if lies == "shared" else view.copy_(cost)
        for x, y in zip(cuda_kernels.iteration(Dense(view), c, log_a, 1.0, 0.1), exact, strict=True):
            assert torch.equal(x, y)


def test_iteration_of_nothing_and_of_nan() -> None:
    cost, c, log_a = torch.rand(4, 6, 40), torch.zeros(4, 40), torch.zeros(4, 6)
    cost[0, 2, 3] = c[1, 5] = log_a[2, 1] = math.nan
    log_a[3] = -INFINITY
    found = cuda_kernels.iteration(Dense(cost), c, log_a, 1.0, 0.1)
    for x, y in zip(found, half_by_half(cost, c, log_a, 1.0, 0.1), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-6)
    empty = cuda_kernels.iteration(Dense(cost[:0]), c[:0], log_a[:0], 1.0, 0.1)
    assert [x.shape for x in empty] == [(0, 6), (0, 40)]


def test_what_does_not_iterate(host, monkeypatch) -> None:  # noqa: F811
    x = torch.randn(1, 3, 2)
    assert not cuda_kernels.iterates(Points(x, x, "l1")) and not cuda_kernels.iterates(Dense(torch.rand(1, 5, 4).mT))
    for device, most in (("large", 2 * 16384), ("small", 8 * 4096), ("alone", 4096)):
        use(device, host, monkeypatch)
        assert [cuda_kernels.iterates(Dense(torch.empty(1, 1, m))) for m in (most, most + 1)] == [True, False]


def test_a_run_of_iterations(monkeypatch) -> None:
    """A run too large for one launch, and its gradient."""
    cost, a, b = torch.rand(2, 30, 1100), torch.rand(2, 30) + 0.1, torch.rand(2, 1100) + 0.1
    cost[0, 4, 7] = INFINITY
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    mask, weights = torch.arange(30) < torch.tensor([[30], [23]]), torch.randn(2, 30)

    def whole(dtype=torch.float32) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (cost, a, b)]
        found = ll.sinkhorn(*leaves, epsilon=0.1, rho_b=2.0, mask_a=mask, annealing=(0.5, 0.5), iterations=6)
        value = (found.f * weights).sum() + found.kl_value.sum()
        return found.f.detach(), found.g.detach(), *torch.autograd.grad(value, leaves)

    monkeypatch.setenv("LOGITLESS_BACKEND", "torch")
    exact, single = whole(torch.float64), whole()
    both = SimpleNamespace(**ChainMap(vars(cuda_kernels), vars(torch_kernels)))
    calls = []
    both.iteration = lambda *given: calls.append(1) or cuda_kernels.iteration(*given)
    monkeypatch.setattr(kernels, "select", lambda *_: both)
    for name, *values in zip(("f", "g", "of_cost", "of_a", "of_b"), whole(), single, exact, strict=True):
        check(name, *values)
    assert len(calls) == 6


@pytest.mark.parametrize("depth", [3, 200])
def test_points(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near ones are formed where Triton's kernel reads them, deep ones in blocks that the kernel of stored costs reads,
    and all of them where there is no Triton."""
    monkeypatch.setattr(torch_kernels, "_limit", lambda tensor: 12)
    x, y, c = torch.randn(1, 5, depth), torch.randn(1, 4, depth), torch.randn(1, 4)
    points = Points(x, y, "sqeuclidean")
    wanted = torch_kernels.half_iteration(points, c, 0.5)
    stored = []
    monkeypatch.setattr(cuda._kernels, "softmin", counted(cuda._kernels.softmin, stored))
    torch.testing.assert_close(cuda_kernels.half_iteration(points, c, 0.5), wanted)
    assert len(stored) == (2 if depth == 200 else 0)
    assert cuda_kernels.forms(points) == (depth == 3)
    monkeypatch.setattr(triton, "PROBLEM", "none")
    torch.testing.assert_close(cuda_kernels.half_iteration(points, c, 0.5), wanted)
    assert len(stored) == (4 if depth == 200 else 2) and not cuda_kernels.forms(points)


def counted(function, calls: list):
    def call(**given):
        calls.append(given)
        return function(**given)

    return call


def test_what_does_not_fit() -> None:
    assert not cuda_kernels.runs(Dense(torch.empty(1, 300, 300))) and not cuda_kernels.runs(
        Dense(torch.empty(1, 1, 1025))
    )


# ------------------------------------------------------------------------------------------- L1 between softmaxes


def softmax(tokens: int, columns: int, problems: int, dtype=torch.float32, **options) -> Probabilities:
    chunk = make(columns, rows=problems * tokens, dtype=dtype, **options)
    return with_statistics(chunk, tokens)


def with_statistics(chunk: Chunk, tokens: int) -> Probabilities:
    found = specification.statistics(double(chunk), None, targets=None, weights=None, wanted=frozenset())
    return Probabilities(chunk, found["max"], found["sum"], tokens)


def both(p: Probabilities, q: Probabilities, gradient: Tensor, of) -> tuple[Tensor, Tensor, Tensor]:
    """Cost, moments and dz of a backend; in float64 if the chunks are."""
    cost, moments = of.l1(p, q, True)
    out = torch.empty_like(p.chunk.z, dtype=p.chunk.outer.dtype)
    of.l1_backward(gradient.to(out.dtype), moments, p, q, out)
    return cost, moments, out


@pytest.mark.parametrize(
    "n, m, columns, problems, options",
    [
        (16, 16, 700, 1, {}),
        (1, 3, 1, 2, {}),
        (5, 40, 257, 3, {"bias": True, "softcap": 3.0}),
        (33, 7, 1030, 1, {"dtype": torch.bfloat16}),
        (4, 4, 300, 2, {"dtype": torch.float16}),
    ],
)
def test_l1(n: int, m: int, columns: int, problems: int, options: dict) -> None:
    p, q = softmax(n, columns, problems, **options), softmax(m, columns, problems)
    if columns > 3:
        p.chunk.z[0, 2] = q.chunk.z[0, 1] = q.chunk.z[0, 2] = -INFINITY
        q.chunk.z[1] = p.chunk.z[1].to(q.chunk.z.dtype)  # ties, where they are alike otherwise
        p, q = with_statistics(p.chunk, n), with_statistics(q.chunk, m)
    gradient = torch.randn(problems, m, n).mT
    found = both(p, q, gradient, cuda_kernels)
    wide = [replace(side, chunk=double(side.chunk)) for side in (p, q)]
    single = [replace(side, chunk=replace(side.chunk, z=side.chunk.z.float())) for side in (p, q)]
    for what, x, y, z in zip(
        ("cost", "moments", "dz"), found, both(*single, gradient, torch_kernels), both(*wide, gradient, torch_kernels)
    ):
        check(what, x, y, z)


def test_l1_of_itself_is_zero_and_a_bad_row_stays_alone() -> None:
    p = softmax(6, 300, 2, bias=True, softcap=3.0)
    cost, moments, out = both(p, p, torch.randn(2, 6, 6), cuda_kernels)
    for x in (cost, moments):
        assert (x.diagonal(dim1=1, dim2=2) == 0).all()
    p.chunk.z[4, 17] = math.nan
    p = with_statistics(p.chunk, 6)
    q = softmax(3, 300, 2)
    cost, _, out = both(p, q, torch.randn(2, 6, 3), cuda_kernels)
    assert out[4].isnan().all() and out[torch.arange(12) != 4].isfinite().all()
    assert cost[0, 4].isnan().all() and cost[0, :4].isfinite().all() and cost[1].isfinite().all()
    in_place = p.chunk.z.clone()
    moments = cuda_kernels.l1(p, q, True)[1]
    cuda_kernels.l1_backward(torch.ones(2, 6, 3), moments, p, q, in_place)
    cuda_kernels.l1_backward(torch.ones(2, 6, 3), moments, p, q, p.chunk.z)
    torch.testing.assert_close(p.chunk.z, in_place, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------ threads


def everything() -> list[Tensor]:
    torch.manual_seed(1)
    found = []
    for dialect in DIALECTS:
        logits = 2 * torch.randn(7, 12, 12)
        logits[3] *= 1e3  # "exact" begins again
        found += cuda_kernels.doubly_stochastic(logits, 40, dialect)
        found.append(cuda_kernels.doubly_stochastic_backward(logits, torch.randn_like(logits), 40, dialect))
    for size in ((12, 9), (20, 31), (33, 9), (33, 270)):
        for name in ("plain",) if size[1] > 100 else ("tiny epsilon", "annealed", "far columns", "cheap to miss"):
            given = [x[:5] if isinstance(x, Tensor) else x for x in problem(name, *size)]
            values, decided, rows = whole_run(*given, (torch.randn_like(given[1]), torch.randn_like(given[2])))
            value, of_cost, of_weights = cuda_kernels.transport(Dense(given[0]), *given[1:], (True, True))
            found += [*values, *decided, rows, value, of_cost, *of_weights]
    p, q = softmax(40, 700, 1), softmax(37, 700, 1)
    found += both(p, q, torch.randn(1, 40, 37), cuda_kernels)
    cost, c = torch.rand(1, 40, 3000), torch.randn(1, 3000)
    found += [cuda_kernels.half_iteration(Dense(x), c, 0.1) for x in (cost, cost.mT.contiguous().mT)]
    return found


def iterations(host, monkeypatch) -> list[Tensor]:  # noqa: F811
    torch.manual_seed(1)
    found = []
    for device, count, n, m in (("large", 1, 60, 1500), ("small", 1, 6, 2100)):
        use(device, host, monkeypatch)
        cost, c, log_a = torch.rand(count, n, m + 1)[..., :m], torch.randn(count, m), torch.randn(count, n)
        for epsilon in (0.1, 1e-3):
            found += cuda_kernels.iteration(Dense(cost), c, log_a, 0.9, epsilon)
    return found


PARTS = {"iteration.cu": iterations}  # what the others have in common is `everything`
FILES = ("doubly_stochastic.cu", "sinkhorn.cu", "l1.cu", "softmin.cu", "softmin.cuh", "iteration.cu")


@pytest.fixture
def run(host, monkeypatch):  # noqa: F811
    """run(file): results of the kernels of a file of csrc/cuda, and of others."""
    return lambda file: PARTS[file](host, monkeypatch) if file in PARTS else everything()


_BEFORE: dict[str, list[Tensor]] = {}  # by file, of threads in their order


def before(file: str, run) -> list[Tensor]:
    if file not in _BEFORE:
        _BEFORE[file] = run(file)
    return _BEFORE[file]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", ["1", "2", "3"])
@pytest.mark.parametrize("file", ["sinkhorn.cu", "iteration.cu"])
def test_the_order_of_threads_changes_no_bit(monkeypatch, run, file: str, order: str) -> None:
    expected = before(file, run)
    monkeypatch.setenv("CUDA_HOST_ORDER", order)
    assert same(expected, run(file))


BARRIERS = {
    int(number): file
    for file in FILES
    for number in re.findall(r"barrier<(\d+)>\(", (cuda_build.ROOT / "csrc/cuda" / file).read_text())
}


@pytest.mark.parametrize("number", sorted(BARRIERS))
def test_no_barrier_can_be_left_out(host, monkeypatch, run, number: int) -> None:  # noqa: F811
    """Some order of threads gives other results without it, or makes threads wait for each other in vain."""
    expected = before(BARRIERS[number], run)
    host.drop_barrier(number)
    for order in range(8):
        monkeypatch.setenv("CUDA_HOST_ORDER", str(order))
        child = os.fork()  # it may abort
        if child == 0:
            os._exit(0 if same(expected, run(BARRIERS[number])) else 1)
        if os.waitpid(child, 0)[1] != 0:
            return
    raise AssertionError("nothing changes without it")
