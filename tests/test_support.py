"""Filtered support: floors by their definition, and what is particular to distributions over kept tokens alone.

That every statistic, loss and gradient is the renormalised one is in test_logprobs.py and test_contract.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

import logitless as ll
import reference
from logitless.backends import Chunk, cpu
from logitless.backends import torch as plain
from logitless.engine import floors
from logitless.support import decode, encode

INFINITY = float("inf")
ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"  # conftest.py
COPIES = [] if cpu.PROBLEM or ON_GPU else cpu._C.isas()
FILTERS = {
    "min_p": (ll.MinP(0.05), ("min_p", 0.05)),
    "min_p 1": (ll.MinP(1.0), ("min_p", 1.0)),
    "top_k": (ll.TopK(5), ("top_k", 5)),
    "top_k 1": (ll.TopK(1), ("top_k", 1)),
    "top_p": (ll.TopP(0.8), ("top_p", 0.8)),
    "top_p, long": (ll.TopP(0.999), ("top_p", 0.999)),
    "top_p, short": (ll.TopP(1e-6), ("top_p", 1e-6)),
}


def rows(kind: str, columns: int, dtype: torch.dtype) -> Tensor:
    """Scaled logits [64, columns] of some kind."""
    s = 2 * torch.randn(64, columns, dtype=torch.float64)
    if kind == "ties":
        s = s.round()
    if kind == "equal":
        s = torch.zeros_like(s)
    if kind == "masked":
        s[torch.rand(s.shape) < 0.7] = -INFINITY
        s[:, 0] = 0.0
    if kind == "far apart":
        s *= 40
    if kind == "offset":
        s += 1e3
    return s.to(dtype)


@pytest.fixture(params=["torch", *COPIES])
def serving(request: pytest.FixtureRequest) -> ModuleType:
    """What finds floors: torch operations, or a copy of the C++ kernel."""
    if request.param == "torch":
        return plain
    best = cpu._C.isa()
    request.addfinalizer(lambda: cpu._C.force_isa(best))
    cpu._C.force_isa(request.param)
    return cpu


@pytest.mark.parametrize("columns", [1, 2, 7, 300])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "masked", "far apart", "offset"])
@pytest.mark.parametrize("name", list(FILTERS))
def test_floors_keep_what_sorting_keeps(serving, name, kind, columns):
    mine, definition = FILTERS[name]
    for dtype in (torch.float32, torch.float64):
        if not serving.supports(torch.get_default_device(), dtype):
            continue
        s = rows(kind, columns, dtype)
        if definition[0] == "top_p":  # rows whose nucleus is not a matter of rounding
            mass = s.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
            s = s[((mass - definition[1]).abs() > 1e-6).all(-1)]
        expected = reference.kept(s.double(), definition) & (s > -INFINITY)
        filters = decode(encode(mine, columns))
        if not filters:
            assert bool((expected == (s > -INFINITY)).all())
            continue
        floor = floors.find(filters, Chunk(s, None, None, torch.ones(len(s), dtype=dtype)), serving)
        assert torch.equal((s >= floor[:, None]) & (s > -INFINITY), expected)


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "masked", "far apart", "lowest"])
def test_floors_of_long_rows(serving, kind):
    """The k largest exactly; a nucleus has its mass, and without what ties for its last place less than that."""
    s = rows("masked" if kind == "lowest" else kind, 3000, torch.float32)
    if kind == "lowest":  # not -inf, but as far off as can be
        s = s.clamp(min=torch.finfo(torch.float32).min)
    chunk = Chunk(s, None, None, torch.ones(len(s)))
    for k in (1, 700, 2999):
        kept = (s >= floors.find([ll.TopK(k)], chunk, serving)[:, None]) & (s > -INFINITY)
        assert torch.equal(kept, reference.kept(s.double(), ("top_k", k)) & (s > -INFINITY))
    q = s.double().softmax(-1)
    for p in (0.1, 0.9, 0.999):
        kept = s >= floors.find([ll.TopP(p)], chunk, serving)[:, None]
        last = torch.where(kept, s, INFINITY).amin(-1, keepdim=True)
        assert bool(((q * kept).sum(-1) > p - 1e-6).all() and ((q * (s > last)).sum(-1) < p + 1e-6).all())


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap"])
def test_floors_lie_between_columns(serving, softcap):
    """Products that come out a little different are kept alike: but for less than half of the gap at the floor."""
    z, bias = torch.randn(200, 60)[:, 5:55], torch.randn(50)
    outer = torch.rand(200) + 0.5
    chunk = Chunk(z, bias, None if softcap is None else 1 / softcap, outer * (softcap or 1.0))
    x, s = z + bias, plain.scaled(chunk)
    for given in (["top_k"], ["top_p", "min_p"], ["top_k", "top_p", "min_p"]):
        filters, definition = zip(*(FILTERS[name] for name in given))
        floor = floors.find(filters, chunk, serving)
        kept = reference.kept(s.double(), *definition)
        assert torch.equal(x >= floor[:, None], kept)
        gap = torch.where(kept, x, INFINITY).amin(-1) - torch.where(kept, -INFINITY, x).amax(-1)
        noise = 0.49 * gap[:, None] * (2 * torch.rand(x.shape) - 1)
        assert torch.equal(x + noise >= floor[:, None], kept)
        assert torch.equal(plain.scaled(replace(chunk, floor=floor)), torch.where(kept, s, -INFINITY))


def test_low_precision_logits_that_tie_are_kept(backend):
    """bf16 has 8 bits: among 500 logits many tie with the fifth."""
    logits = (2 * torch.randn(20, 500)).bfloat16()
    targets = torch.zeros(20, dtype=torch.long)
    stats = ll.logprobs(ll.DenseLogits(logits), targets, keep=ll.TopK(30))
    mask = logits >= logits.float().topk(30).values[:, -1:]
    assert bool((mask.sum(-1) > 30).any())
    exact = reference.lse(reference.filtered(logits.double(), mask))
    torch.testing.assert_close(stats.lse.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("keep", [FILTERS[name][0] for name in ("min_p", "top_k", "top_p")], ids=str)
def test_odd_rows(backend, keep):
    """Masked by the smallest number, all masked, NaN, infinite: what that row is without a filter, and no other."""
    logits = torch.randn(8, 30)
    logits[0, 4:] = torch.finfo(torch.float32).min
    logits[1], logits[2, 7], logits[3, 7] = -INFINITY, torch.nan, INFINITY
    targets = logits.argmax(-1)
    stats = ll.logprobs(ll.DenseLogits(logits.requires_grad_()), targets, keep=keep)
    assert stats.lse[1] == -INFINITY and bool(stats.lse[2:4].isnan().all())
    whole = torch.tensor([0, 4, 5, 6, 7])
    (gradient,) = torch.autograd.grad(stats.logprob[whole].sum(), logits)
    assert bool(gradient[whole].isfinite().all()) and not gradient[0, 4:].any()
    assert bool((stats.logprob[whole] > -4).all())
    none = ll.logprobs(ll.DenseLogits(torch.empty(0, 30)), torch.empty(0, dtype=torch.long), keep=keep)
    assert none.logprob.shape == (0,)


def linear(n=24, h=8, v=60, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, h, dtype=dtype, requires_grad=True), torch.randn(v, h, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("keep", [ll.TopP(1), ll.TopK(60), (ll.TopK(10**6), ll.TopP(1.0))], ids=str)
def test_filters_that_keep_all_change_no_bit(backend, keep):
    hidden, weight = linear()
    targets = torch.randint(0, 60, (24,))
    found = []
    for given in (None, keep):
        stats = ll.logprobs(ll.LinearLogits(hidden, weight), targets, entropy=True, collision=True, keep=given)
        gradients = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), (hidden, weight))
        found.append([*vars(stats).values(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_min_p_of_one_keeps_the_maxima(backend):
    logits = torch.randn(10, 40)
    logits[3, 5] = logits[3, 9] = 9.0
    stats = ll.logprobs(ll.DenseLogits(logits), logits.argmax(-1), entropy=True, keep=ll.MinP(1.0))
    expected = torch.zeros(10)
    expected[3] = math.log(2)
    torch.testing.assert_close(stats.entropy, expected)
    torch.testing.assert_close(stats.logprob, -expected)


@pytest.mark.parametrize("strategy", ["auto", "recompute", "stash"])
def test_gradients_outside_are_exactly_zero(backend, strategy):
    """Of dense logits; d log q_y / d s_j = 1[j = y] - q_j inside."""
    logits = torch.randn(12, 50, requires_grad=True)
    mask = reference.kept(logits.double(), ("top_k", 6))
    targets = mask.double().multinomial(1)[:, 0]
    stats = ll.logprobs(ll.DenseLogits(logits), targets, entropy=True, keep=ll.TopK(6), strategy=strategy)
    (by_logprob,) = torch.autograd.grad(stats.logprob.sum(), logits, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(stats.entropy.sum(), logits)
    assert not by_logprob[~mask].any() and not by_entropy[~mask].any()
    q = reference.filtered(logits.detach().double(), mask).softmax(-1)
    expected = torch.nn.functional.one_hot(targets, 50) - q
    torch.testing.assert_close(by_logprob.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["auto", "recompute", "frozen"])
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["", "softcap"])
@pytest.mark.parametrize("kind", ["linear", "dense", "ids", "dense ids"])
def test_a_target_that_is_not_kept(backend, kind, softcap, strategy):
    """Log-probability and logit are -inf; its row gets no gradient from those, but from lse as ever."""
    hidden, weight = linear()
    n, v = 24, 60
    options = {"softcap": softcap, "temperature": torch.rand(n) + 0.5}
    inputs = [hidden, weight]
    if "dense" in kind:
        inputs = [(hidden @ weight.T).detach().requires_grad_()]
    if strategy == "frozen":
        if kind != "linear":
            pytest.skip("a frozen head has a weight, and whole rows")
        inputs[1] = weight.detach()
    describe = ll.DenseLogits if "dense" in kind else ll.LinearLogits
    dense = (reference.transform if "dense" in kind else reference.logits)(*(x.double() for x in inputs), **options)
    ids = torch.randint(-1, v, (n, 6))
    ids[5] = -1  # a row that keeps nothing
    filters = [("ids", ids)] if "ids" in kind else [("top_p", 0.7)]
    mask = reference.kept(dense, *filters)
    inside = torch.arange(n) % 3 > 0
    inside[5] = False
    targets = (mask ^ ~inside[:, None]).double().multinomial(1)[:, 0]
    keep = ll.KeepIds(ids) if "ids" in kind else ll.TopP(0.7)
    stats = ll.logprobs(describe(*inputs, **options), targets, keep=keep, strategy=strategy)
    assert bool((stats.logprob[~inside] == -INFINITY).all() and (stats.target_logit[~inside] == -INFINITY).all())

    s = reference.filtered(dense, mask)
    per_row = torch.randn(n)
    some = mask.any(-1)
    for name in ("logprob", "target_logit", "lse"):
        exact = getattr(reference, name)(*(s,) if name == "lse" else (s, targets))
        counts = some if name == "lse" else inside
        torch.testing.assert_close(getattr(stats, name)[counts].double(), exact[counts], rtol=1e-5, atol=1e-5)
        leaves = [x for x in inputs if x.requires_grad]
        found = torch.autograd.grad(getattr(stats, name), leaves, per_row, retain_graph=True)
        wanted = torch.autograd.grad((exact * per_row)[counts].sum(), leaves, retain_graph=True)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
        assert not found[0][~counts].any()


def test_a_loss_spares_targets_that_are_not_kept(backend):
    """In the eager pass, fused or not: gradients have the rest of the sum, and a loss that stands -inf stays finite."""
    hidden, weight = linear()
    bias = torch.randn(60)
    student = ll.LinearLogits(hidden, weight, bias)
    s = reference.logits(hidden, weight, bias)
    inside = torch.arange(24) % 2 > 0
    targets = torch.where(inside, s.argmax(-1), s.argmin(-1))
    s = reference.filtered(s, reference.kept(s.double(), ("top_k", 9)))
    logprob = torch.where(inside, reference.logprob(s, targets), 0)
    given = {"old_logprob": logprob.detach(), "advantages": torch.randn(24)}
    ratios = ll.policy.ppo(dual=None).from_logprobs(logprob=torch.where(inside, logprob, -INFINITY), **given)
    of_ratios = -(given["advantages"] * logprob).mean()  # in its gradient, where all ratios are 1
    for term, inputs, expected in (
        (ll.LogProb(), {}, logprob.mean()),
        (ll.policy.ppo(dual=None), given, of_ratios),
    ):
        result = (term - 0.2 * ll.Entropy())(student, targets=targets, keep=ll.TopK(9), **inputs)
        expected = expected - 0.2 * reference.entropy(s).mean()
        both = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (result.loss, expected))
        for pair in zip(*both, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.loss, ratios.loss - 0.2 * reference.entropy(s).mean())


def test_temperature_comes_before_the_filter(backend):
    logits = torch.tensor([[2.0, 1.0, 0.0, -4.0]]).expand(2, 4)
    temperature = torch.tensor([1.0, 2.0])
    student = ll.DenseLogits(logits, temperature=temperature)
    stats = ll.logprobs(student, torch.zeros(2, dtype=torch.long), keep=ll.MinP(0.3))
    expected = torch.stack([logits[0, :2].logsumexp(-1), (logits[1, :3] / 2).logsumexp(-1)])
    torch.testing.assert_close(stats.lse, expected)


def test_terms_of_another_temperature_share_the_support(backend):
    """It is the sampler's, at the student's temperature."""
    hidden, weight = linear()
    teacher = torch.randn(24, 60)
    objective = ll.Divergence("reverse_kl", temperature=3.0) + 0.5 * ll.Divergence("tvd", temperature=0.5)
    found = objective(ll.LinearLogits(hidden, weight), teacher=ll.DenseLogits(teacher), keep=ll.TopP(0.6)).loss
    s = reference.logits(hidden, weight)
    s = reference.filtered(s, reference.kept(s, ("top_p", 0.6)))
    expected = (reference.reverse_kl(s / 3, teacher / 3) + 0.5 * reference.tvd(s / 0.5, teacher / 0.5)).mean()
    torch.testing.assert_close(found, expected)
    for pair in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


def test_recorded_tokens_are_all_that_is_read(backend):
    """Other rows of the weight may hold anything; -1 pads and repetitions count for nothing, order for nothing."""
    hidden, weight = linear()
    ids = torch.tensor([[7, 3, -1, 7, 9]]).expand(24, 5)
    read = torch.zeros(60, 1, dtype=torch.bool).index_fill(0, torch.tensor([3, 7, 9]), True)
    broken = torch.where(read, weight.detach(), torch.nan).requires_grad_()
    targets = ids[0, torch.randint(0, 2, (24,))]
    stats = ll.logprobs(ll.LinearLogits(hidden, broken), targets, entropy=True, keep=ll.KeepIds(ids))
    s = reference.logits(hidden.double(), weight.double())[:, [3, 7, 9]]
    torch.testing.assert_close(stats.entropy.double(), reference.entropy(s), rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.argmax, torch.tensor([3, 7, 9])[s.argmax(-1)])
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), broken)
    assert not gradient[~read[:, 0]].any() and bool(gradient[read[:, 0]].any(-1).all())


def test_ignored_tokens_of_any_index(backend):
    """An ignore_index that is a token's place among the recorded ones ignores no other token."""
    hidden, weight = linear()
    ids = torch.arange(10).expand(24, 10)
    targets = torch.arange(24) % 5
    for keep in (ll.KeepIds(ids), ll.TopK(30)):
        stats = ll.logprobs(ll.LinearLogits(hidden, weight), targets, keep=keep, ignore_index=2)
        assert torch.equal(stats.lse == 0, targets == 2) and not stats.argmax[targets == 2].any()


@pytest.mark.parametrize("keep", [ll.TopP(0.8), ll.KeepIds(torch.arange(20).expand(24, 20))], ids=["top_p", "ids"])
@pytest.mark.parametrize("row_local", [True, False], ids=["token ratios", "sequence ratios"])
def test_policy_objectives_of_filtered_samplers(backend, keep, row_local):
    """With the sampler's own filter, ratios to its log-probabilities are 1."""
    hidden, weight = linear()
    s = reference.logits(hidden, weight)
    filters = ("ids", keep.ids) if isinstance(keep, ll.KeepIds) else ("top_p", 0.8)
    s = reference.filtered(s, reference.kept(s.double(), filters))
    targets = s.detach().softmax(-1).multinomial(1)[:, 0]
    logprob = reference.logprob(s, targets)
    given = {"old_logprob": logprob.detach(), "advantages": torch.randn(24)}
    if not row_local:
        given |= {"advantages": torch.randn(2), "cu_seqlens": torch.tensor([0, 10, 24])}
    objective = ll.policy.ppo() if row_local else ll.policy.gspo()
    result = objective(ll.LinearLogits(hidden, weight), targets=targets, keep=keep, **given)
    expected = objective.from_logprobs(logprob=logprob, **given)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-4, atol=1e-6)
    for pair in zip(*(torch.autograd.grad(x.loss, (hidden, weight)) for x in (result, expected)), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ll.MinP(0), ValueError, "p: must be greater than 0"),
        (lambda: ll.MinP(1.5), ValueError, r"p: must lie in \(0, 1\]"),
        (lambda: ll.TopP("0.9"), TypeError, "p: a number"),
        (lambda: ll.TopK(0), ValueError, "k: must be at least 1"),
        (lambda: ll.TopK(2.0), TypeError, "k: an integer"),
        (lambda: ll.KeepIds([1, 2]), TypeError, "ids: an integer tensor"),
        (lambda: ll.KeepIds(torch.ones(3)), TypeError, "ids: an integer tensor, got torch.float32"),
        (lambda: stats_of(0.9), TypeError, "keep: a MinP"),
        (lambda: stats_of((ll.TopK(3), 0.9)), TypeError, "keep: a MinP.*got float"),
        (lambda: stats_of((ll.TopK(3), pairs())), TypeError, "got KeepIds"),
        (lambda: stats_of(pairs(23)), ValueError, "ids: shape"),
        (lambda: stats_of(pairs(token=60)), ValueError, r"ids: must lie in \[0, 60\)"),
        (lambda: stats_of(pairs(), 60), ValueError, r"targets: must lie in \[0, 60\)"),
        (lambda: stats_of(ll.TopK(3), product="fused"), ValueError, "product: 'fused' never sees whole rows"),
        (lambda: loss_of(ll.CrossEntropy(label_smoothing=0.1), ll.TopK(3)), ValueError, "keep: label smoothing"),
        (lambda: loss_of(ll.CrossEntropy(0.0, torch.ones(60)), pairs()), ValueError, "keep: KeepIds"),
    ],
)  # fmt: skip
def test_errors(make, error, words, monkeypatch):
    if "fused" in words:
        monkeypatch.setenv("LOGITLESS_BACKEND", "triton")
    with pytest.raises(error, match=words):
        make()


def pairs(n: int = 24, token: int = 0) -> ll.KeepIds:
    return ll.KeepIds(torch.full((n, 2), token))


def stats_of(keep, target: int = 0, **options):
    hidden, weight = linear()
    return ll.logprobs(
        ll.LinearLogits(hidden.detach(), weight.detach()), torch.full((24,), target), keep=keep, **options
    )


def loss_of(term, keep):
    return term(ll.LinearLogits(*linear()), targets=torch.zeros(24, dtype=torch.long), keep=keep)


def test_top_k_teachers_and_recorded_tokens_do_not_go_together():
    student = ll.LinearLogits(*linear())
    ids = torch.arange(4).expand(24, 4)
    served = ll.TopKLogits(ids, torch.full((24, 4), -2.0))
    for keep, teacher in ((ll.TopK(3), served), (ll.KeepIds(ids), ll.DenseLogits(torch.randn(24, 60)))):
        with pytest.raises(ValueError, match="keep:"):
            ll.Divergence("reverse_kl")(student, teacher=teacher, keep=keep)
