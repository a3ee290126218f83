"""The L1 cost between softmaxes: every backend's kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from logitless import backends
from logitless.backends import Chunk, cpu
from logitless.backends import torch as rows
from logitless.ops.sinkhorn import kernels, torch_kernels
from logitless.ops.sinkhorn.kernels import Probabilities

COPIES = [] if cpu.PROBLEM else [f"cpu-{copy}" for copy in cpu._C.isas()]


@pytest.fixture(params=["torch", *COPIES])
def subject(request: pytest.FixtureRequest):
    """A module of kernels; of the C++ ones, every copy."""
    if request.param == "torch":
        return torch_kernels
    best = cpu._C.isa()
    request.addfinalizer(lambda: cpu._C.force_isa(best))
    cpu._C.force_isa(request.param.removeprefix("cpu-"))
    return kernels.select(torch.device("cpu"), torch.float32)


def draw(problems: int, tokens: int, columns: int, *, softcap: float | None = None, bias: bool = False) -> Chunk:
    """Logits of some spread, rows further apart than they are long, between NaNs."""
    count = problems * tokens
    storage = torch.full((count, columns + 5), torch.nan)
    storage[:, 3 : 3 + columns] = 3 * torch.randn(count, columns)
    outer = (1 if softcap is None else softcap) / (torch.rand(count) + 0.5)
    return Chunk(
        storage[:, 3 : 3 + columns],
        torch.randn(columns) if bias else None,
        None if softcap is None else 1.3 / softcap,
        outer,
    )


def scaled(chunk: Chunk, dtype: torch.dtype) -> Tensor:
    z, outer = chunk.z.to(dtype), chunk.outer.to(dtype)[:, None]
    z = z if chunk.bias is None else z + chunk.bias.to(dtype)
    return outer * (z if chunk.inner is None else (chunk.inner * z).tanh())


def normalized(chunk: Chunk, tokens: int, backend=rows) -> Probabilities:
    found = backend.statistics(chunk, None, targets=None, weights=None, wanted=frozenset())
    return Probabilities(chunk, found["max"], found["sum"], tokens)


def definition(
    p: Chunk, q: Chunk, tokens: tuple[int, int], gradient: Tensor | None, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Costs, moments, and the gradient of the own side's z, by autograd."""
    z = p.z.to(dtype, copy=True).requires_grad_()
    own, other = (
        scaled(Chunk(x, chunk.bias, chunk.inner, chunk.outer), dtype).softmax(-1).unflatten(0, (-1, size))
        for x, chunk, size in zip((z, q.z), (p, q), tokens, strict=True)
    )
    difference = own[:, :, None] - other[:, None]
    cost, moments = difference.abs().sum(-1), (own[:, :, None] * difference.sign()).sum(-1)
    found = [cost.detach(), moments.detach()]
    if gradient is not None:
        found += torch.autograd.grad(cost, z, gradient.to(dtype))
    return found


def measured(subject, p: Chunk, q: Chunk, tokens: tuple[int, int], gradient: Tensor) -> list[Tensor]:
    backend = rows if subject is torch_kernels else cpu
    own, other = normalized(p, tokens[0], backend), normalized(q, tokens[1], backend)
    cost, moments = subject.l1(own, other, True)
    alone, none = subject.l1(own, other, False)
    assert none is None
    torch.testing.assert_close(alone, cost, rtol=0, atol=0, equal_nan=True)
    out = torch.full_like(p.z, torch.nan)
    subject.l1_backward(gradient, moments, own, other, out)
    return [cost, moments, out]


SIZES = [
    (4, 16, 16, 700),
    (40, 5, 2, 33),
    (9, 1, 1, 1),
    (5, 70, 3, 40),
    (20, 3, 70, 40),
    (5, 2, 3, 5000),
    (3, 33, 34, 17),
]


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"bias": True}], ids=["plain", "softcap", "bias"])
@pytest.mark.parametrize("problems, n, m, columns", SIZES)
def test_accuracy(subject, problems: int, n: int, m: int, columns: int, options: dict) -> None:
    """At most 1.5 times the error of the definition in float32."""
    p, q = draw(problems, n, columns, **options), draw(problems, m, columns, **options)
    gradient = torch.randn(problems, n, m)
    exact = definition(p, q, (n, m), gradient)
    baseline = definition(p, q, (n, m), gradient, torch.float32)
    for mine, truth, theirs in zip(measured(subject, p, q, (n, m), gradient), exact, baseline, strict=True):
        assert (mine - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-7 * truth.norm()


def test_over_the_logits(subject) -> None:
    """In place, and with a gradient of strides 0 or transposed: the same bits."""
    p, q, gradient = draw(2, 5, 600, softcap=4.0), draw(2, 7, 600), torch.randn(2, 5, 7)
    own, other = normalized(p, 5), normalized(q, 7)
    _, moments = subject.l1(own, other, True)
    out = torch.empty(10, 600)
    for g, d in ((gradient, moments), (gradient.mT.contiguous().mT, moments.mT.contiguous().mT)):
        subject.l1_backward(g, d, own, other, out)
        found = out.clone()
    subject.l1_backward(gradient, moments, own, other, p.z)
    assert torch.equal(p.z, found)
    p = draw(1, 4, 50)
    own, other = normalized(p, 4), normalized(draw(1, 3, 50), 3)
    _, moments = subject.l1(own, other, True)
    outs = [torch.empty(4, 50) for _ in range(2)]
    for g, out in zip((torch.ones(()).expand(1, 4, 3), torch.ones(1, 4, 3)), outs, strict=True):
        subject.l1_backward(g, moments, own, other, out)
    assert torch.equal(*outs)


def test_ties(subject) -> None:
    """Rows of equal logits: a cost and a gradient of exactly 0, whatever the other rows."""
    p = draw(1, 6, 900)
    q = Chunk(p.z.clone(), None, None, p.outer)
    gradient = torch.eye(6)[None]
    cost, moments, out = measured(subject, p, q, (6, 6), gradient)
    assert not cost.diagonal(dim1=1, dim2=2).any() and not moments.diagonal(dim1=1, dim2=2).any() and not out.any()
    assert (cost + torch.eye(6) > 0.1).all()


def test_columns_that_do_not_exist(subject) -> None:
    """Logits of -inf: probability 0, gradient 0; a row of nothing else is NaN alone."""
    p, q, gradient = draw(1, 4, 70), draw(1, 3, 70), torch.randn(1, 4, 3)
    p.z[:, 40:], q.z[:, 30:50] = -torch.inf, -torch.inf
    outcomes = list(zip(measured(subject, p, q, (4, 3), gradient), definition(p, q, (4, 3), gradient), strict=True))
    for mine, truth in outcomes:
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=2e-6)
    assert not outcomes[2][0][:, 40:].any()
    p.z[2], p.z[0, 5] = -torch.inf, torch.nan
    cost, _, out = measured(subject, p, q, (4, 3), gradient)
    assert cost[0, [0, 2]].isnan().all() and out[[0, 2]].isnan().any(-1).all()
    truth = definition(p, q, (4, 3), gradient)
    torch.testing.assert_close(cost[0, [1, 3]], truth[0][0, [1, 3]], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(out[[1, 3]].double(), truth[2][[1, 3]], rtol=1e-5, atol=2e-6)


def test_slices_add_up(subject) -> None:
    """Costs and moments of ranges of columns, of a column that is the whole probability too."""
    p, q = draw(1, 4, 100), draw(1, 5, 100)
    p.z[1, 7] = 60
    sides = [(normalized(p, 4), p), (normalized(q, 5), q)]
    whole = subject.l1(sides[0][0], sides[1][0], True)
    parts = [
        subject.l1(
            *(
                Probabilities(Chunk(chunk.z[:, columns], None, None, chunk.outer), side.max, side.sum, side.tokens)
                for side, chunk in sides
            ),
            True,
        )
        for columns in (slice(0, 1), slice(1, 64), slice(64, 100))
    ]
    for found, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(sum(pieces), found, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not COPIES, reason="no C++ kernels")
def test_any_number_of_threads() -> None:
    """The same bits; also where columns are shared out."""
    p, q, gradient = draw(1, 40, 9000), draw(1, 6, 9000), torch.randn(1, 40, 6)
    subject, before, outcomes = kernels.select(torch.device("cpu"), torch.float32), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outcomes.append(measured(subject, p, q, (40, 6), gradient))
    torch.set_num_threads(before)
    assert all(torch.equal(*x) for x in zip(*outcomes, strict=True))


@pytest.mark.skipif(not COPIES, reason="no C++ kernels")
def test_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.device("cpu")
    assert kernels.select(where, torch.float32).l1 is not torch_kernels.l1
    assert kernels.select(where, torch.float64) is torch_kernels
    monkeypatch.setenv("LOGITLESS_BACKEND", "torch")
    assert backends.select(where, torch.float32).NAME == "torch"
    assert kernels.select(where, torch.float32) is torch_kernels
