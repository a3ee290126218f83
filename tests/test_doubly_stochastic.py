"""``doubly_stochastic`` in every dialect, and ``sinkhorn_routing``."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from logitless.backends import cpu
from logitless.ops.sinkhorn import doubly_stochastic, sinkhorn_routing
from logitless.ops.sinkhorn.doubly_stochastic import DIALECTS


def reference(logits, iterations: int, dialect: str):
    """Each dialect from its formula."""
    if dialect == "exact":
        log = logits
        for _ in range(iterations):
            log = log - torch.logsumexp(log, -1, keepdim=True)
            log = log - torch.logsumexp(log, -2, keepdim=True)
        return log.exp()
    if dialect == "deepseek":
        p = logits.softmax(-1) + 1e-6
        p = p / (p.sum(-2, keepdim=True) + 1e-6)
        for _ in range(iterations - 1):
            p = p / (p.sum(-1, keepdim=True) + 1e-6)
            p = p / (p.sum(-2, keepdim=True) + 1e-6)
        return p
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    for _ in range(iterations):
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-6)
        p = p / p.sum(-2, keepdim=True).clamp(min=1e-6)
    return p


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("n", [1, 4, 7, 64])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_definition(dialect: str, n: int, iterations: int) -> None:
    logits = (2 * torch.randn(3, 2, n, n, dtype=torch.float64)).requires_grad_()
    found, exact = doubly_stochastic(logits, iterations, dialect), reference(logits, iterations, dialect)
    torch.testing.assert_close(found.matrix, exact, rtol=1e-11, atol=1e-14)
    sums = torch.cat([exact.sum(-1), exact.sum(-2)], -1)
    torch.testing.assert_close(found.residual, (sums - 1).abs().amax(-1), rtol=1e-9, atol=1e-13)
    assert not found.residual.requires_grad
    upstream = torch.randn_like(exact)
    for _ in range(2):  # a second backward too
        gradients = [torch.autograd.grad(x, logits, upstream, retain_graph=True)[0] for x in (found.matrix, exact)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_gradcheck(dialect: str) -> None:
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: doubly_stochastic(x, 5, dialect).matrix, logits)


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few matrices at a time, or all: the same bits."""
    from logitless.ops.sinkhorn import torch_kernels

    logits = torch.randn(11, 4, 4, dtype=torch.float64, requires_grad=True)
    outcomes = []
    for limit in (1 << 20, 48):
        monkeypatch.setattr(torch_kernels, "_limit", lambda tensor, limit=limit: limit)
        matrix = doubly_stochastic(logits).matrix
        outcomes.append((matrix, *torch.autograd.grad((matrix**2).sum(), logits)))
    assert all(torch.equal(*x) for x in zip(*outcomes))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_history_is_kept(dialect: str) -> None:
    logits, kept = torch.randn(8, 4, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        doubly_stochastic(logits, 20, dialect)
    assert [x.numel() for x in kept] == [logits.numel()]


def test_dialects_agree_where_eps_does_not_matter() -> None:
    logits = torch.randn(50, 4, 4, dtype=torch.float64)
    exact, deepseek, megatron = (doubly_stochastic(logits, 20, dialect).matrix for dialect in DIALECTS)
    torch.testing.assert_close(megatron, exact, rtol=1e-12, atol=1e-15)
    assert 1e-7 < (deepseek - exact).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(dtype: torch.dtype) -> None:
    """Held against float64, beside the same definition in float32."""
    logits = (2 * torch.randn(500, 4, 4)).to(dtype)
    outcomes = []
    for kind in (None, torch.float64, torch.float32):
        leaf = logits.to(kind or dtype).requires_grad_()
        matrix = doubly_stochastic(leaf).matrix if kind is None else reference(leaf, 20, "exact")
        outcomes.append((matrix.detach(), *torch.autograd.grad((matrix**2).sum(), leaf)))
    for i, (mine, exact, baseline) in enumerate(zip(*outcomes)):
        assert mine.dtype == (dtype if i else torch.float32)
        mistakes = [(x.to(mine.dtype).double() - exact).norm() for x in (mine, baseline)]
        assert mistakes[0] <= 1.5 * mistakes[1]


def test_logits_of_any_size() -> None:
    """Offsets of rows and columns, +-1e4 and forbidden entries: no NaN, and rows of nothing stay 0."""
    logits = torch.randn(6, 4, 4, dtype=torch.float64)
    moved = logits + 1e4 * torch.randn(6, 4, 1).double() - 1e4 * torch.randn(6, 1, 4).double()
    torch.testing.assert_close(doubly_stochastic(moved).matrix, doubly_stochastic(logits).matrix, rtol=1e-7, atol=1e-9)
    logits *= 1e4
    logits[0, 0] = -torch.inf
    logits[1] = torch.where(torch.eye(4, dtype=torch.bool), 0.0, -torch.inf)
    logits[2, 0, 0] = -torch.inf
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        found = doubly_stochastic(leaf)
        (gradient,) = torch.autograd.grad((found.matrix**2).sum(), leaf)
        assert found.matrix.isfinite().all() and gradient.isfinite().all()
        assert not found.matrix[0, 0].any() and found.residual[0] >= 1
        assert torch.equal(found.matrix[1], torch.eye(4, dtype=dtype)) and found.residual[1] == 0
        assert found.matrix[2, 0, 0] == 0 and gradient[2, 0, 0] == 0


# ---- kernels

COPIES = [] if cpu.PROBLEM else cpu._C.isas()


@pytest.fixture
def copy(request: pytest.FixtureRequest) -> None:
    best = cpu._C.isa()
    request.addfinalizer(lambda: cpu._C.force_isa(best))
    cpu._C.force_isa(request.param)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("copy", COPIES, indirect=True)
def test_accuracy_of_copies(copy: None, dialect: str, n: int) -> None:
    """Every C++ copy, below and above the size that fits lanes, with logits that leave float's range among others."""
    logits, upstream = 2 * torch.randn(3 + 2000 // n**2, n, n), torch.randn(3 + 2000 // n**2, n, n)
    if dialect == "exact":
        logits[1::4] *= 20
    outcomes = []
    for kind in (None, torch.float64, torch.float32):
        leaf = logits.to(kind or torch.float32, copy=True).requires_grad_()
        matrix, residual = (
            doubly_stochastic(leaf, 20, dialect) if kind is None else (reference(leaf, 20, dialect), None)
        )
        outcomes.append((matrix.detach(), *torch.autograd.grad(matrix, leaf, upstream.to(matrix.dtype))))
        if kind is None:
            sums = torch.cat([matrix.sum(-1), matrix.sum(-2)], -1)
            torch.testing.assert_close(residual, (sums - 1).abs().amax(-1), rtol=1e-4, atol=2e-6)
    for mine, exact, baseline in zip(*outcomes):
        mistakes = [(x.double() - exact).norm() for x in (mine, baseline)]
        assert mistakes[0] <= 1.5 * mistakes[1] + 1e-7 * exact.norm()


@pytest.mark.parametrize("n", [3, 4, 20])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("copy", COPIES, indirect=True)
def test_neighbours_change_nothing(copy: None, dialect: str, n: int) -> None:
    """A matrix has the same bits alone as among others, also NaN ones and those of the log domain; on any threads."""
    logits, upstream = torch.randn(37, n, n), torch.randn(37, n, n)
    logits[5] *= 1e4
    logits[9, 0, 0] = torch.nan
    logits[11, 0, :2] = -torch.inf

    def outcome(some: slice) -> tuple:
        leaf = logits[some].clone().requires_grad_()
        found = doubly_stochastic(leaf, 20, dialect)
        return found.matrix.detach(), found.residual, *torch.autograd.grad(found.matrix, leaf, upstream[some])

    whole = outcome(slice(None))
    assert all(x[9].isnan().all() and x.isnan().sum() == x[9].numel() for x in whole)
    for some in (slice(0, 1), slice(4, 7), slice(10, 37)):
        for part, x in zip(outcome(some), whole):
            assert torch.equal(part, x[some])


@pytest.mark.parametrize("dialect", ["exact", "megatron"])
@pytest.mark.parametrize("n", [4, 6, 20])
def test_log_domain(dialect: str, n: int) -> None:
    """Ranges of logits that floats of exp(logits) do not have."""
    logits = 200 * torch.randn(30, n, n)
    if dialect == "exact":
        logits[3, 0] = -torch.inf
        logits[4, :, 1] = -torch.inf
    outcomes = []
    for dtype in (torch.float32, torch.float64):  # the latter in torch
        leaf = logits.to(dtype).requires_grad_()
        found = doubly_stochastic(leaf, 20, dialect)
        outcomes.append((*found, *torch.autograd.grad((found.matrix**2).sum(), leaf)))
    for mine, exact in zip(*outcomes):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)


def test_no_matrices() -> None:
    found = doubly_stochastic(torch.rand(0, 4, 4))
    assert found.matrix.shape == (0, 4, 4) and found.residual.shape == (0,)


@pytest.mark.parametrize(
    "name, error, change",
    [
        ("logits", TypeError, {"logits": torch.ones(3, 3, dtype=torch.long)}),
        ("logits", ValueError, {"logits": torch.ones(3, 4)}),
        ("logits", ValueError, {"logits": torch.ones(65, 65)}),
        ("iterations", ValueError, {"iterations": 0}),
        ("dialect", ValueError, {"dialect": "liger"}),
    ],
)
def test_bad_arguments(name: str, error: type, change: dict) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        doubly_stochastic(**({"logits": torch.rand(3, 3)} | change))


# ---- routing


def test_routing_is_balanced() -> None:
    """Rows and columns of equal mass, for logits that overflow where they are exponentiated."""
    logits = 3 * torch.randn(2, 60, 8)
    found = sinkhorn_routing(logits, tolerance=1e-5, max_iterations=2000)
    assert found.converged.all()
    plan = found.plan()
    torch.testing.assert_close(plan.sum(-2), torch.full((2, 8), 1 / 8), rtol=1e-4, atol=0)
    assert ((plan.sum(-1) - 1 / 60).abs().sum(-1) < 2e-5).all()
    moved = sinkhorn_routing(logits + 1e3, tolerance=1e-5, max_iterations=2000).plan()
    torch.testing.assert_close(moved, plan, rtol=2e-3, atol=1e-6)


def test_routing_is_megatrons() -> None:
    logits = torch.randn(30, 4, dtype=torch.float64)
    scores = logits.exp()
    d0, d1 = torch.ones(30).double(), torch.ones(4).double()
    for _ in range(500):
        d0 = 1 / (30 * (scores @ d1))
        d1 = 1 / (4 * (d0 @ scores))
    found = sinkhorn_routing(logits, tolerance=1e-13, max_iterations=1000)
    torch.testing.assert_close(found.plan(), d0[:, None] * scores * d1, rtol=1e-9, atol=1e-12)


def test_routing_ends_and_says_so() -> None:
    found = sinkhorn_routing(1000 * torch.randn(40, 4), max_iterations=3)
    assert found.iterations == 3 and not found.converged and found.residual > 0
    assert found.plan().isfinite().all()


def test_routing_of_masked_tokens() -> None:
    logits = torch.randn(2, 20, 4, dtype=torch.float64)
    logits[0, 15:] = torch.nan
    options = {"tolerance": 1e-10, "max_iterations": 1000}
    plan = sinkhorn_routing(logits, mask=torch.tensor([15, 20]), **options).plan()
    assert not plan[0, 15:].any()
    torch.testing.assert_close(plan[0, :15], sinkhorn_routing(logits[0, :15], **options).plan())
    torch.testing.assert_close(plan[1], sinkhorn_routing(logits[1], **options).plan())


def test_routing_of_logits_that_are_none() -> None:
    with pytest.raises(TypeError, match="^logits: "):
        sinkhorn_routing([1.0])
    with pytest.raises(ValueError, match="^temperature: "):
        sinkhorn_routing(torch.rand(3, 2), temperature=0.0)
