"""Losses of optimal transport against dense definitions, written with loops over sequences, tokens and groups."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import logitless as ll
import reference
from logitless.losses.rows import sorted_l1
from logitless.losses.transport import alignment, multilevel, universal

LEAD, T, U, V, W = (2, 2), 6, 5, 11, 14
OPTIONS = {"plain": {}, "capped": {"softcap": 3.0, "scale": 1.3, "vocab_size": 9}}


def close(found, exact, rtol=1e-9, atol=1e-12) -> None:
    torch.testing.assert_close(found, exact, rtol=rtol, atol=atol)


def make(kind: str, tokens: int, vocabulary: int, options=None, lead=LEAD):
    """(leaves, logits, the dense ones)."""
    if kind == "dense":
        shapes = [(*lead, tokens, vocabulary)]
    else:
        shapes = [(*lead, tokens, 3), (vocabulary, 3), (vocabulary,)]
    leaves = [(2 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]
    options = options or {}
    if kind == "dense":
        return leaves, ll.DenseLogits(*leaves, **options), reference.transform(*leaves, **options)
    return leaves, ll.LinearLogits(*leaves, **options), reference.logits(*leaves, **options)


def compare(found, exact, leaves) -> None:
    """Values and gradients of two tensors of the same shape."""
    close(found, exact)
    upstream = torch.rand_like(exact)
    gradients = (torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (found, exact))
    for mine, wanted in zip(*gradients):
        close(mine, wanted, 1e-8, 1e-11)


def live_rows(mask, index) -> list[int]:
    return mask[index].nonzero()[:, 0].tolist()


def reduced(values: dict, shape, average: str, reduction: str, denominator=None):
    """``values``: by (sequence..., token). Over all tokens, or over the means of sequences."""
    if reduction == "none":
        dense = torch.zeros(shape, dtype=torch.float64)
        return torch.stack([values.get(at, dense[at]) for at in itertools.product(*(range(n) for n in shape))]).view(
            shape
        )
    if average == "sequence":
        sequences = {}
        for at, value in values.items():
            sequences.setdefault(at[:-1], []).append(value)
        values = {at: sum(found) / len(found) for at, found in sequences.items()}
    total = sum(values.values())
    return total if reduction == "sum" else total / (denominator or len(values))


def l1(q, p):
    """Of two rows, sorted."""
    q, p = (x.sort(descending=True).values for x in (q, p))
    n = max(len(q), len(p))
    return (F.pad(q, (0, n - len(q))) - F.pad(p, (0, n - len(p)))).abs().sum()


REDUCTIONS = [("token", "mean", None), ("token", "sum", None), ("token", "none", None), ("token", "mean", 7.0)]
REDUCTIONS += [("sequence", "mean", None), ("sequence", "sum", None)]


def dense_uld(s, t, live, teacher_live, weights, *how):
    values = {}
    for at in itertools.product(*(range(n) for n in s.shape[:-2])):
        for i, j in zip(live_rows(live, at), live_rows(teacher_live, at)):
            values[(*at, i)] = weights[(*at, i)] * l1(s[(*at, i)].softmax(-1), t[(*at, j)].softmax(-1))
    return reduced(values, s.shape[:-1], *how)


@pytest.mark.parametrize("how", REDUCTIONS, ids=str)
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_uld(kind: str, options: str, how: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies and lengths of their own, gaps, a sequence without tokens; rows padded as on a GPU give the same."""
    average, reduction, denominator = how
    leaves, student, s = make(kind, T, V, OPTIONS[options])
    _, teacher, t = make(kind, U, W, {"temperature": 1.7})
    live, teacher_live = torch.rand(*LEAD, T) < 0.7, torch.rand(*LEAD, U) < 0.7
    live[0, 1], live[1] = False, torch.tensor([[True] * T, [False, True, True, True, False, True]])
    weights = torch.rand(*LEAD, T)
    exact = dense_uld(s / 2, t / 2, live, teacher_live, weights, *how)
    given_ = {"targets": live.long() - 1, "teacher_targets": teacher_live.int() - 1, "ignore_index": -1}
    options = {"average": average, "reduction": reduction, "denominator": denominator, "weights": weights}
    for pairs in (alignment.paired, alignment.padded):
        monkeypatch.setattr(universal, "paired", pairs)
        found = ll.transport.uld(student, teacher, temperature=2.0, **given_, **options)
        compare(found.loss, exact, leaves)
        assert torch.equal(found.terms["uld"], found.loss) and not found.terms["uld"].requires_grad
        assert found.metrics["tokens"] == torch.minimum(live.sum(-1), teacher_live.sum(-1)).sum()
        assert not found.metrics["bound"].any()


def test_uld_without_targets_is_the_term() -> None:
    """Of one vocabulary and equal lengths, and as an objective; whatever the chunks."""
    leaves, student, _ = make("linear", T, V)
    _, teacher, _ = make("dense", T, V)
    exact = ll.distillation.uld()(student, teacher=teacher).loss
    compare(ll.transport.uld(student, teacher).loss, exact, leaves)
    compare(ll.transport.uld(student, teacher, workspace=V * 8 * 9).loss, exact, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("k", [1, 3, 9, 12, 14, 100])
def test_top_k_of_uld(k: int, reduction: str) -> None:
    """A lower bound, with what it may lack; the gradient is its own. From the larger vocabulary on it is exact."""
    leaves, student, s = make("linear", T, 10, lead=(2,))
    _, teacher, t = make("linear", T, W, lead=(2,))
    q, p = s.softmax(-1), t.softmax(-1)
    top = []
    for x in (q, p):
        ranked = x.sort(-1, descending=True).values
        top.append((F.pad(ranked[..., :k], (0, max(0, k - x.shape[-1]))), ranked[..., k:].sum(-1)))
    lower = (top[0][0] - top[1][0]).abs().sum(-1) + (top[0][1] - top[1][1]).abs()
    bound = 2 * torch.minimum(top[0][1], top[1][1])
    exact = torch.stack([l1(*rows) for rows in zip(q.flatten(0, 1), p.flatten(0, 1))]).view(2, T)
    assert (lower <= exact + 1e-12).all() and (exact <= lower + bound + 1e-12).all()
    lower, bound = (x.mean() if reduction == "mean" else x for x in (lower, bound))
    found = ll.transport.uld(student, teacher, k=k, reduction=reduction)
    compare(found.loss, lower, leaves)
    close(found.metrics["bound"], bound.detach())
    if k >= 10:
        assert not found.metrics["bound"].any()


def rows_of_numbers():
    numbers = st.floats(0, 1, allow_subnormal=False)
    return st.tuples(st.lists(numbers, min_size=1, max_size=12), st.lists(numbers, min_size=1, max_size=12))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rows_of_numbers(), st.integers(1, 13))
def test_bound_of_the_top_k(rows: tuple, k: int) -> None:
    """Of any two rows of numbers that are not negative."""
    q, p = (torch.tensor([row], dtype=torch.float64) for row in rows)
    value, bound = sorted_l1(q, p, k)
    exact = l1(q[0], p[0])
    assert value <= exact + 1e-12 and exact <= value + bound + 1e-12


def test_bound_is_attained() -> None:
    """One rest is a single number, the other many small ones: all but the share of the first is lacking."""
    n = 1000
    q = torch.tensor([[0.6, 0.4]], dtype=torch.float64)
    p = torch.tensor([[0.6] + n * [0.4 / n]], dtype=torch.float64)
    value, bound = sorted_l1(q, p, 1)
    close(value, torch.zeros(1).double())
    close(l1(q[0], p[0]), bound[0] * (1 - 1 / n))


# ---- groups of tokens


def split(length: int, pieces: int) -> list[int]:
    """Ends of so many pieces of a text, the last one at its end."""
    cuts = (torch.randperm(length - 1)[: pieces - 1] + 1).sort().values.tolist()
    return [*cuts, length]


def tokenized(tokens: int, counts: list[int], length=20) -> torch.Tensor:
    """[B, tokens] ends, with places that do not count among them."""
    ends = torch.full((len(counts), tokens), -1)
    for row, count in zip(ends, counts):
        if count:
            row[torch.randperm(tokens)[:count].sort().values] = torch.tensor(split(length, count))
    return ends


def dense_groups(ends, teacher_ends) -> list[tuple[list[int], list[int]]]:
    """As the two walk along the text, of one sequence."""
    found, mine, other = [], [], []
    left = [(e, 0, i) for i, e in enumerate(ends.tolist()) if e >= 0]
    right = [(e, 1, i) for i, e in enumerate(teacher_ends.tolist()) if e >= 0]
    for end in range(25):
        mine += [i for e, _, i in left if e == end]
        other += [i for e, _, i in right if e == end]
        if any(e == end for e, _, _ in left) and any(e == end for e, _, _ in right):
            found.append((mine, other))
            mine, other = [], []
    return found


def dense_gold(s, t, tokens, teacher_tokens, ends, teacher_ends, matched, weights, beta, merge, *how):
    values = {}
    for at in itertools.product(*(range(n) for n in s.shape[:-2])):
        for group in dense_groups(ends[at], teacher_ends[at]):
            sides = []
            for x, ids, members in zip((s[at], t[at]), (tokens[at], teacher_tokens[at]), group):
                base = members[0] if merge == "observed" else members[-1]
                row = x[base].softmax(-1)
                for i in members:
                    row = row if i == base else row * x[i].softmax(-1)[ids[i]].clamp(min=1e-8)
                sides.append(row)
            q, p = sides
            base = group[0][0] if merge == "observed" else group[0][-1]
            if matched is None:
                values[(*at, base)] = l1(q, p)
                continue
            a, b = (x[ids].clamp(min=1e-8) for x, ids in zip((q, p), matched))
            if beta in (0, 1):
                same = (b * (b / a).log()).sum() if beta == 0 else (a * (a / b).log()).sum()
            else:
                m = beta * b + (1 - beta) * a
                same = beta * (b * (b / m).log()).sum() + (1 - beta) * (a * (a / m).log()).sum()
            others = []
            for x, ids in zip((q, p), matched):
                kept = torch.ones(len(x), dtype=torch.bool)
                kept[ids] = False
                others.append(x[kept])
            unlike = l1(*others) if all(len(x) for x in others) else 0
            values[(*at, base)] = weights[0] * same + weights[1] * unlike
    return reduced(values, s.shape[:-1], *how)


def texts():
    """Both sides' ends and ids; of the four sequences one is empty on one side, one alike on both."""
    ends, teacher_ends = tokenized(T, [4, 6, 0, 3]), tokenized(U, [5, 3, 4, 3])
    ends[3], teacher_ends[3] = torch.tensor([-1, 7, 7, 12, 20, -1]), torch.tensor([7, -1, 12, 12, 18])
    ids = [torch.randint(0, v, (*LEAD, n)) for v, n in ((9, T), (W, U))]
    ids[0].view(4, T)[2] = 1000  # they do not count
    return *ids, ends.view(*LEAD, T), teacher_ends.view(*LEAD, U)


MATCHED = (torch.tensor([0, 8, 3]), torch.tensor([13, 2, 3]))
FORMS = {
    "extended": (None, {}, None),
    "hybrid": (MATCHED, {}, (3 / W, 1 - 3 / W)),
    "weighted": (MATCHED, {"matched_weight": 0.3, "unmatched_weight": 2.0}, (0.3, 2.0)),
    "contained": ((torch.arange(9), torch.arange(9)), {}, (9 / W, 1 - 9 / W)),
}


@pytest.mark.parametrize("how", REDUCTIONS, ids=str)
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize("form", list(FORMS))
def test_gold(form: str, merge: str, how: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    average, reduction, denominator = how
    matched, options, weights = FORMS[form]
    kind = "linear" if merge == "observed" else "dense"
    leaves, student, s = make(kind, T, V, OPTIONS["capped"])
    _, teacher, t = make(kind, U, W)
    given_ = texts()
    for beta in (0.5,) if form != "hybrid" else (0.0, 0.3, 1.0):
        exact = dense_gold(s / 1.5, t / 1.5, *given_, matched, weights, beta, merge, *how)
        options |= {"average": average, "reduction": reduction, "denominator": denominator}
        for pairs in (alignment.paired, alignment.padded):
            monkeypatch.setattr(universal, "paired", pairs)
            found = ll.transport.gold(
                student, teacher, *given_, merge=merge, matched=matched, beta=beta, temperature=1.5, **options
            )
            compare(found.loss, exact, leaves)
        number = sum(len(dense_groups(*x)) for x in zip(given_[2].flatten(0, 1), given_[3].flatten(0, 1)))
        assert found.metrics["tokens"] == number
        if matched is not None:
            parts = weights[0] * found.terms["matched"] + weights[1] * found.terms["unmatched"]
            close(parts, found.loss.detach())


def test_gold_of_the_same_tokens_is_uld() -> None:
    _, student, _ = make("linear", T, V)
    _, teacher, _ = make("linear", T, W)
    ends = torch.arange(T).expand(*LEAD, T)
    ids = torch.zeros(*LEAD, T, dtype=torch.long)
    for options in ({}, {"k": 3}):
        found = ll.transport.gold(student, teacher, ids, ids, ends, ends, **options)
        exact = ll.transport.uld(student, teacher, **options)
        close(found.loss, exact.loss)
        close(found.metrics["bound"], exact.metrics["bound"])


def test_groups_that_merge_keep_the_joint_probability() -> None:
    """The chain rule: the merged distribution has the probability of the whole group at the tokens that were read."""
    _, student, s = make("dense", 3, V, lead=())
    ends, other = torch.tensor([1, 2, 3]), torch.tensor([3])
    ids = torch.tensor([4, 2, 7])
    joint = s.log_softmax(-1).gather(-1, ids[:, None]).sum()
    for merge, at in (("observed", 4), ("bayesian", 7)):
        row = torch.full((1, V), -torch.inf, dtype=torch.float64)
        row[0, 0] = 0  # a certain teacher: the loss is 1 - q_(1) + the others
        found = ll.transport.gold(student, ll.DenseLogits(row), ids, ids[:1], ends, other, merge=merge).loss
        base = s.softmax(-1)[0 if merge == "observed" else 2]
        merged = base * joint.exp() / base[at]
        close(found, 1 - merged.max() + merged.sum() - merged.max())


# ---- multi-level transport


def sinkhorn_cost(cost, a, b, epsilon, iterations):
    """<P, C> in the linear domain, rows first."""
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan * (a / plan.sum(1))[:, None]
        plan = plan * (b / plan.sum(0))
    return (plan * cost).sum()


def pairwise(q, p):
    return (q[:, None] - p).abs().sum(-1)


def kept_columns(x, live, k):
    """Rows of all that count, of each sequence, cut to the columns that are the largest in sum."""
    rows = [[(z / (z.std() + 1e-4) / 1.2).softmax(-1) for z in sequence[mask]] for sequence, mask in zip(x, live)]
    order = sum(row for sequence in rows for row in sequence).argsort(descending=True)[:k]
    return [torch.stack([F.pad(row[order], (0, k - len(order))) for row in sequence]) for sequence in rows]


def dense_multilevel(s, t, live, teacher_live, k, form, epsilon=0.1, iterations=10, scale=0.001):
    q, p = kept_columns(s, live, k), kept_columns(t, teacher_live, k)
    number = [min(len(x), len(y)) for x, y in zip(q, p)]
    if form == "masked":
        matched = [(x[:n], y[:n]) for x, y, n in zip(q, p, number)]
        difference = sum((x - y).abs().sum() for x, y in matched) / sum(number)
        logarithm = sum(-(y * torch.where(x > 0, x, 1).log()).sum() for x, y in matched) / sum(number)
        distance = 0
        for x, y in zip(q, p):
            a, b = torch.ones(len(x)), torch.full((len(y),), len(x) / len(y), dtype=torch.float64)
            distance = distance + sinkhorn_cost(pairwise(x, y), a, b, epsilon, iterations)
        return difference, logarithm, scale * distance / len(q)
    longest = max(len(x) for x in q + p)
    padded = [[F.pad(x, (0, 0, 0, longest - len(x))) for x in side] for side in (q, p)]
    difference = sum((x[:n] - y[:n]).abs().sum(-1).mean() for x, y, n in zip(q, p, number)) / len(q)
    q, p = (torch.stack(side) for side in padded)
    logarithm = -(q.softmax(-1) * p.log_softmax(-1)).sum(-1).mean()
    ones = torch.ones(longest)
    distance = 0
    for x, y in zip(q, p):
        cost = pairwise((y / 2).softmax(-1), (x / 2).softmax(-1))
        distance = distance + sinkhorn_cost(cost, ones, ones, epsilon, iterations)
    return difference, logarithm, scale * distance


@pytest.mark.parametrize("k", [4, 13])
@pytest.mark.parametrize("form", ["masked", "released"])
@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_multilevel_ot(kind: str, form: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, student, s = make(kind, T, V, OPTIONS["capped"])
    _, teacher, t = make(kind, U, W)
    live, teacher_live = torch.rand(*LEAD, T) < 0.6, torch.rand(*LEAD, U) < 0.6
    live[..., 1], teacher_live[..., 2] = True, True
    given_ = {"targets": live.long() - 1, "teacher_targets": teacher_live.long() - 1, "ignore_index": -1}
    options = {"epsilon": 0.005, "iterations": 2, "scale": 1.0} if k == 4 else {}
    terms = dense_multilevel(*(x.flatten(0, 1) for x in (s, t, live, teacher_live)), k, form, **options)
    exact = terms[0] + 0.2 * terms[1] + 3 * terms[2]
    for pairs in (alignment.paired, alignment.padded):
        monkeypatch.setattr(multilevel, "paired", pairs)
        found = ll.transport.multilevel_ot(
            student, teacher, form=form, k=k, temperature=1.2, logarithm_weight=0.2, sinkhorn_weight=3.0,
            **given_, **options,
        )  # fmt: skip
        compare(found.loss, exact, leaves)
        for term, wanted in zip(found.terms.values(), terms):
            close(term, wanted.detach())


def test_multilevel_ot_does_not_see_padding() -> None:
    """More tokens that do not count change nothing, in its masked form."""
    _, student, s = make("dense", T, V)
    _, teacher, t = make("dense", U, W)
    exact = ll.transport.multilevel_ot(student, teacher)
    longer = ll.DenseLogits(F.pad(s, (0, 0, 2, 3), value=5.0))
    targets = F.pad(torch.zeros(*LEAD, T, dtype=torch.long), (2, 3), value=-100)
    close(ll.transport.multilevel_ot(longer, teacher, targets).loss, exact.loss)


# ---- Sinkhorn distances


def dense_sinkd(s, t, live, epsilon=0.1, iterations=20, temperature=2.0):
    """Of [n, V]."""
    q, p = ((x[live] / temperature).softmax(-1) for x in (s, t))
    ones = torch.ones(len(q))
    return 0.001 * sinkhorn_cost(pairwise(q, p), ones, ones, epsilon, iterations) if len(q) else s.sum() * 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("samples", ["batch", "token"])
@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_sinkd(kind: str, samples: str, reduction: str) -> None:
    temperature = torch.rand(3, 2, T).double() + 0.5
    leaves, student, s = make(kind, T, V, {"temperature": temperature}, lead=(3, 2))
    _, teacher, t = make(kind, T, V, lead=(3, 2))
    live = torch.rand(3, 2, T) < 0.7
    live[:, 0] &= torch.arange(T) > 0
    live[0, :, 2] = True
    live[:, 1, 3] = False
    live[1, 1] = False
    problems = (
        [(i, j, slice(None)) for i in range(3) for j in range(2)]
        if samples == "token"
        else [(slice(None), i, j) for i in range(2) for j in range(T)]
    )
    values = torch.stack([dense_sinkd(s[at], t[at], live[at]) for at in problems])
    number = sum(bool(live[at].any()) for at in problems)
    exact = {
        "sum": values.sum(),
        "mean": values.sum() / number,
        "none": values.view((3, 2) if samples == "token" else (2, T)),
    }[reduction]
    found = ll.transport.sinkd(student, teacher, live.long() - 1, ignore_index=-1, samples=samples, reduction=reduction)
    compare(found, exact, leaves)


def test_sinkd_of_a_batch() -> None:
    """The released form, defaults and all."""
    leaves, student, s = make("linear", 7, V, lead=())
    _, teacher, t = make("linear", 7, V, lead=())
    q, p = (s / 2).softmax(1), (t / 2).softmax(1)
    cost = torch.cdist(q, p, p=1)
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    for samples in ("batch", "token"):
        compare(ll.transport.sinkd(student, teacher, samples=samples), 0.001 * (plan * cost).sum(), leaves)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("samples", ["batch", "token"])
def test_sinkd_in_float32(samples: str, masked: bool) -> None:
    """Of the kernels for it, as exact as a softmax in float32; backward twice, and without gradients."""
    leaves, student, _ = make("dense", 7, 900, lead=(6,))
    _, teacher, _ = make("dense", 7, 900, lead=(6,))
    targets = (torch.rand(6, 7) < 0.7).long() - 1 if masked else None
    options = {"samples": samples, "ignore_index": -1, "reduction": "none"}
    exact = ll.transport.sinkd(student, teacher, targets, **options)
    upstream = torch.rand_like(exact)
    (wanted,) = torch.autograd.grad(exact, leaves, upstream)
    logits = leaves[0].detach().float().requires_grad_()
    low = ll.DenseLogits(logits), ll.DenseLogits(teacher.logits.detach().float())
    found = ll.transport.sinkd(*low, targets, **options)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-9)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(found, logits, upstream.float(), retain_graph=True)
        assert (gradient - wanted).norm() <= 2e-5 * wanted.norm()
    with torch.no_grad():
        assert torch.equal(ll.transport.sinkd(*low, targets, **options), found)


def points(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_multi_cost(reduction: str) -> None:
    """A matrix, points and distributions, in a mixture that is learned; ragged."""
    matrix, x, y, weights = points(2, 4, 5), points(2, 4, 3), points(2, 5, 3), points(3)
    leaves, student, s = make("linear", 4, V, lead=(2,))
    _, teacher, t = make("dense", 5, V, lead=(2,))
    matrix.data[0, 2:] = torch.nan
    sizes = [2, 4]
    values = []
    for b, n in enumerate(sizes):
        q, p = s[b, :n].softmax(-1), t[b].softmax(-1)
        mixed = [matrix[b, :n], ((x[b, :n, None] - y[b]) ** 2).sum(-1), pairwise(q, p)]
        cost = sum(w * c for w, c in zip(weights, mixed))
        values.append(sinkhorn_cost(cost, *(torch.full((z,), 1 / z, dtype=s.dtype) for z in (n, 5)), 10.0, 100))
    exact = {"mean": sum(values) / 2, "sum": sum(values), "none": torch.stack(values)}[reduction]
    costs = [matrix, ll.PointCost(x, y), ll.ProbabilityCost(student, teacher)]
    found = ll.transport.multi_cost(costs, weights, mask_a=torch.tensor(sizes), reduction=reduction)
    compare(found, exact, [matrix, x, y, weights, *leaves])


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.2])
def test_mixture_weights(floor: float) -> None:
    """The optimum: of all that costs least, where gradients at positive weights are equal and no larger elsewhere."""
    values = torch.tensor([[0.1, 3.0, 2.0, 0.4], [1.0, 1.0, 1.0, 1.0], [0.0, 50.0, 90.0, 0.0]], dtype=torch.float64)
    found = ll.transport.mixture_weights(values, sigma=2.0, floor=floor)
    close(found.sum(-1), torch.ones(3).double())
    assert (found >= floor - 1e-12).all()
    slope = values + 4 * (found - 0.25)
    level = slope.amin(-1, keepdim=True)
    assert ((slope - level).abs() * (found - floor) < 1e-9).all()
    close(found[1], torch.full((4,), 0.25).double())


@pytest.mark.parametrize("kind", ["euclidean", "l1", "sqeuclidean"])
def test_wasserstein_dependency(kind: str) -> None:
    x, y = points(2, 4, 3), points(2, 4, 2)
    norm = {"l1": lambda d: d.abs().sum(-1), "sqeuclidean": lambda d: d.square().sum(-1)}.get(
        kind, lambda d: d.norm(2, -1)
    )
    exact = []
    for a, b in zip(x, y):
        pairs = torch.stack([torch.cat([a[i], b[i]]) for i in range(4)])
        independent = torch.stack([torch.cat([a[i], b[j]]) for i in range(4) for j in range(4)])
        cost = norm(pairs[:, None] - independent)
        f, g = torch.zeros(4).double(), torch.zeros(16).double()
        for _ in range(2000):
            f = -0.1 * ((g - cost) / 0.1).logsumexp(1) + 0.1 * torch.log(torch.tensor(16.0))
            g = -0.1 * ((f - cost.T) / 0.1).logsumexp(1) + 0.1 * torch.log(torch.tensor(4.0))
        exact.append(f.mean() + g.mean())
    options = {"epsilon": 0.1, "kind": kind, "tolerance": 1e-13, "max_iterations": 5000}
    found = ll.transport.wasserstein_dependency(x, y, **options)
    close(found, torch.stack(exact), 1e-6)
    compare_loose = [torch.autograd.grad(z.sum(), [x, y], retain_graph=True) for z in (found, torch.stack(exact))]
    for mine, wanted in zip(*compare_loose):
        close(mine, wanted, 1e-5, 1e-8)


def test_wasserstein_dependency_of_independent_samples() -> None:
    """All pairs of a grid: debiased it is 0; not so where one decides the other. Pairs that are masked have no part."""
    x, y = (z.reshape(6, 1).double() for z in torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"))
    options = {"epsilon": 0.1, "tolerance": 1e-11, "method": "anderson"}
    independent = ll.transport.wasserstein_dependency(x, y, debias=True, **options)
    assert independent.abs() < 1e-9
    assert ll.transport.wasserstein_dependency(y, y, debias=True, **options) > 0.3
    mask = torch.arange(6) < 5
    x[5:] = torch.nan
    found = ll.transport.wasserstein_dependency(x, y, mask=mask, **options)
    close(found, ll.transport.wasserstein_dependency(x[:5], y[:5], **options), 1e-8)


# ---- what all keep


def hidden_states(n: int, dtype=torch.float32, hidden=8, vocabulary=500):
    leaves = [torch.randn(n, hidden).to(dtype), (torch.randn(vocabulary, hidden) / 2).to(dtype)]
    return [x.requires_grad_() for x in leaves]


def logits_methods():
    """name: (student, teacher of another vocabulary, ids, ends) -> the loss."""
    return {
        "uld": lambda s, t, y: ll.transport.uld(s, t, y, y).loss,
        "uld, k": lambda s, t, y: ll.transport.uld(s, t, y, y, k=20).loss,
        "uld, none": lambda s, t, y: ll.transport.uld(s, t, y, y, reduction="none").loss.sum(),
        "gold": lambda s, t, y: (
            ll.transport.gold(s, t, y, y, *[torch.where(y < 0, -1, torch.arange(len(y)) // 3)] * 2).loss
        ),
        "multilevel_ot": lambda s, t, y: ll.transport.multilevel_ot(s, t, y, y).loss,
        "multilevel_ot, released": lambda s, t, y: ll.transport.multilevel_ot(s, t, y, y, form="released").loss,
    }


WITH_SINKD = logits_methods() | {
    "sinkd": lambda s, t, y: ll.transport.sinkd(s, dataclasses.replace(t, vocab_size=s.columns), y)
}


@pytest.mark.parametrize("method", list(WITH_SINKD))
def test_ignored_tokens(method: str) -> None:
    """NaN in them goes nowhere, gradients there are 0; without any token the loss is 0, and so is its gradient."""
    leaves, teacher = hidden_states(8), hidden_states(8, vocabulary=600)
    targets = torch.tensor([3, -100, 0, 4, -100, 2, 1, -100])
    call = WITH_SINKD[method]
    exact = call(ll.LinearLogits(*leaves), ll.LinearLogits(*teacher), targets)
    exact_gradients = torch.autograd.grad(exact, leaves)
    for x in (leaves, teacher):
        x[0].data[targets < 0] = torch.nan
    loss = call(ll.LinearLogits(*leaves), ll.LinearLogits(*teacher), targets)
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert torch.equal(loss, exact) and not gradients[0][targets < 0].any()
    assert all(map(torch.equal, gradients, exact_gradients))
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), gradients))  # a second backward
    nothing = call(ll.LinearLogits(*leaves), ll.LinearLogits(*teacher), torch.full_like(targets, -100))
    assert nothing == 0 and not any(x.any() for x in torch.autograd.grad(nothing, leaves))


@pytest.mark.parametrize("method", list(logits_methods()))
def test_padded_rows_of_nan(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are there only since their number may not depend on values, as on a GPU, have no gradient."""
    z, t, targets = torch.randn(6, 40), torch.randn(6, 50), torch.tensor([3, -100, 0, -100, 2, 1])
    call, found = logits_methods()[method], []
    for pairs in (alignment.paired, alignment.padded):
        monkeypatch.setattr(universal, "paired", pairs)
        monkeypatch.setattr(multilevel, "paired", pairs)
        x = torch.where(targets[:, None] < 0, torch.nan, z).requires_grad_()
        loss = call(ll.DenseLogits(x), ll.DenseLogits(torch.where(targets[:, None] < 0, torch.nan, t)), targets)
        found.append((loss, *torch.autograd.grad(loss, x)))
    for mine, wanted in zip(*found):
        close(mine, wanted, 1e-6, 1e-9)


@pytest.mark.parametrize("method", list(logits_methods()))
def test_columns_that_do_not_exist(method: str) -> None:
    """Logits of -inf are as if their columns were not there."""
    z, t, targets = torch.randn(6, 40), torch.randn(6, 50), torch.arange(6)
    call = logits_methods()[method]
    inputs = [z.clone().requires_grad_(), F.pad(z, (0, 7), value=-torch.inf).requires_grad_()]
    losses = [call(ll.DenseLogits(x), ll.DenseLogits(F.pad(t, (3, 0), value=-torch.inf)), targets) for x in inputs]
    close(losses[1], losses[0], 1e-6)
    gradients = [torch.autograd.grad(*x)[0] for x in zip(losses, inputs)]
    assert not gradients[1][:, 40:].any()
    close(gradients[1][:, :40], gradients[0], 1e-5, 1e-7)


@pytest.mark.parametrize("method", list(logits_methods()))
def test_empty(method: str) -> None:
    leaves, teacher = hidden_states(0), hidden_states(0, vocabulary=600)
    loss = logits_methods()[method](ll.LinearLogits(*leaves), ll.LinearLogits(*teacher), torch.zeros(0).long())
    assert loss == 0 and not torch.autograd.grad(loss, leaves)[1].any()


@pytest.mark.parametrize("method", list(WITH_SINKD))
def test_teachers_are_constants(method: str) -> None:
    leaves, teacher = hidden_states(6), hidden_states(6, vocabulary=600)
    loss = WITH_SINKD[method](ll.LinearLogits(*leaves), ll.LinearLogits(*teacher), torch.arange(6))
    gradients = torch.autograd.grad(loss, [*leaves, *teacher], allow_unused=True)
    assert [x is None for x in gradients] == [False, False, True, True]


def test_no_sequence() -> None:
    student, teacher = ll.DenseLogits(torch.rand(0, 4, 5)), ll.DenseLogits(torch.rand(0, 3, 6))
    y, z = ids(0, 4), ids(0, 3)
    assert ll.transport.uld(student, teacher).loss == 0 and ll.transport.sinkd(student, student, samples="token") == 0
    assert ll.transport.gold(student, teacher, y, z, y, z).loss == 0
    assert all(ll.transport.multilevel_ot(student, teacher, form=form).loss == 0 for form in ("masked", "released"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", list(WITH_SINKD))
def test_accuracy(method: str, dtype: torch.dtype) -> None:
    """Against float64; beside float32 logits that torch materialised. A low-precision gradient is rounded on top."""
    inputs = [x.detach() for x in (*hidden_states(24, dtype), *hidden_states(24, dtype, vocabulary=600))]
    targets, outcomes = torch.arange(24), []
    for kind in (None, torch.float64, torch.float32):
        h, w, teacher_h, teacher_w = (x.to(kind or dtype) for x in inputs)
        leaves = [h.requires_grad_(), w.requires_grad_()]
        if kind is None:
            student, teacher = ll.LinearLogits(*leaves), ll.LinearLogits(teacher_h, teacher_w)
        else:
            student, teacher = ll.DenseLogits(h @ w.T), ll.DenseLogits(teacher_h @ teacher_w.T)
        loss = WITH_SINKD[method](student, teacher, targets)
        outcomes.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for mine, exact, baseline in zip(*outcomes):
        assert mine.dtype == (dtype if mine.dim() else torch.float32)
        scale, kind = exact.abs().max(), torch.finfo(mine.dtype)
        error, allowed = ((x - exact).abs().max() for x in (mine, baseline))
        rounding = kind.eps * (scale + kind.tiny)
        assert error <= 1.5 * allowed + rounding + 2e-7 * scale


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


@pytest.mark.parametrize("method", [*logits_methods(), "sinkd"])
def test_logits_are_never_held(method: str) -> None:
    """Within a workspace that has room for a few rows, nothing of [tokens, vocabulary] is made."""
    n, vocabulary = 64, 20000
    leaves, teacher = (
        hidden_states(n, hidden=2, vocabulary=vocabulary),
        hidden_states(n, hidden=2, vocabulary=vocabulary),
    )
    sides, targets = (ll.LinearLogits(*leaves), ll.LinearLogits(*teacher)), torch.arange(n)
    limited = {"workspace": 16 * vocabulary * 4}
    y = {"targets": targets, "teacher_targets": targets}
    calls = {
        "uld": lambda: ll.transport.uld(*sides, **y, **limited).loss,
        "uld, k": lambda: ll.transport.uld(*sides, **y, k=20, **limited).loss,
        "uld, none": lambda: ll.transport.uld(*sides, **y, reduction="none", **limited).loss.sum(),
        "gold": lambda: ll.transport.gold(*sides, targets, targets, targets // 2, targets // 2, **limited).loss,
        "multilevel_ot": lambda: ll.transport.multilevel_ot(*sides, **y, **limited).loss,
        "multilevel_ot, released": lambda: ll.transport.multilevel_ot(*sides, **y, form="released", **limited).loss,
        "sinkd": lambda: ll.transport.sinkd(*sides, **limited),
    }
    with Largest() as largest:
        calls[method]().backward()
    assert largest.elements < n * vocabulary * 2 // 3


@pytest.mark.parametrize("kind", ["linear", "dense"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_a_gpu(reduction: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the "meta" device whatever reads a value raises."""
    monkeypatch.setenv("LOGITLESS_BACKEND", "torch")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know that device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        if kind == "linear":
            leaves = [torch.empty(4, 64, 32, requires_grad=True), torch.empty(5000, 32, requires_grad=True)]
            student, teacher = ll.LinearLogits(*leaves), ll.LinearLogits(torch.empty(4, 70, 16), torch.empty(7000, 16))
        else:
            leaves = [torch.empty(4, 64, 5000, requires_grad=True, dtype=torch.bfloat16)]
            student, teacher = ll.DenseLogits(*leaves), ll.DenseLogits(torch.empty(4, 70, 7000))
        y, z = torch.empty(4, 64, dtype=torch.long), torch.empty(4, 70, dtype=torch.long)
        ids, how = (y[0], z[0, :64]), {"reduction": reduction}
        losses = [ll.transport.uld(student, teacher, y, z, k=k, **how).loss for k in (None, 64)]
        losses += [ll.transport.gold(student, teacher, y, z, y, z, matched=x, **how).loss for x in (None, ids)]
        if reduction == "mean":
            losses += [ll.transport.multilevel_ot(student, teacher, y, z, form=x).loss for x in ("masked", "released")]
            same = ll.DenseLogits(torch.empty(4, 64, 5000))
            losses += [ll.transport.sinkd(student, same, y, samples=x) for x in ("batch", "token")]
        for loss in losses:
            assert loss.shape == ((4, 64) if reduction == "none" else ())
            gradients = torch.autograd.grad(loss.sum(), leaves)
            assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in leaves]


def heads():
    return ll.DenseLogits(torch.rand(2, 3, 5)), ll.DenseLogits(torch.rand(2, 4, 6))


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long)


def gold_inputs(step: int = 1) -> tuple:
    return ids(2, 3), ids(2, 4), 3 + step * torch.arange(3).expand(2, 3), torch.arange(4).expand(2, 4)


ot, PAIR = ll.transport, (ids(1), ids(1))
dependency = functools.partial(ot.wasserstein_dependency, epsilon=0.1)


BAD = [
    ("student", TypeError, lambda s, t: ot.uld(torch.rand(2, 3), t)),
    ("student", ValueError, lambda s, t: ot.uld(ll.DenseLogits(torch.rand(5)), t)),
    ("teacher", ValueError, lambda s, t: ot.uld(s, ll.DenseLogits(torch.rand(4, 6)))),
    ("targets", ValueError, lambda s, t: ot.uld(s, t, ids(2, 4))),
    ("teacher_targets", TypeError, lambda s, t: ot.uld(s, t, None, torch.rand(2, 4))),
    ("k", ValueError, lambda s, t: ot.uld(s, t, k=0)),
    ("k", TypeError, lambda s, t: ot.uld(s, t, k=2.0)),
    ("temperature", ValueError, lambda s, t: ot.uld(s, t, temperature=0.0)),
    ("weights", ValueError, lambda s, t: ot.uld(s, t, weights=torch.rand(2))),
    ("average", ValueError, lambda s, t: ot.uld(s, t, average="batch")),
    ("average", ValueError, lambda s, t: ot.uld(s, t, average="sequence", reduction="none")),
    ("reduction", ValueError, lambda s, t: ot.uld(s, t, reduction="max")),
    ("denominator", ValueError, lambda s, t: ot.uld(s, t, denominator=-1.0)),
    ("ignore_index", TypeError, lambda s, t: ot.uld(s, t, ignore_index=None)),
    ("workspace", ValueError, lambda s, t: ot.uld(s, t, workspace=1)),
    ("student_tokens", ValueError, lambda s, t: ot.gold(s, t, ids(2, 4), *gold_inputs()[1:])),
    ("student_tokens", ValueError, lambda s, t: ot.gold(s, t, ids(2, 3) + 5, *gold_inputs()[1:])),
    ("teacher_ends", TypeError, lambda s, t: ot.gold(s, t, *gold_inputs()[:3], torch.rand(2, 4))),
    ("student_ends", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(-1))),
    ("merge", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), merge="first")),
    ("matched", TypeError, lambda s, t: ot.gold(s, t, *gold_inputs(), matched=ids(2, 2))),
    ("matched", TypeError, lambda s, t: ot.gold(s, t, *gold_inputs(), matched=([1], [1]))),
    ("matched", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), matched=(ids(1), ids(2)))),
    ("matched", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), matched=(ids(1) + 5, ids(1)))),
    ("matched", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), matched=(ids(2), ids(2)))),
    ("matched_weight", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), matched_weight=1.0)),
    ("unmatched_weight", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), matched=PAIR, matched_weight=1.0)),
    ("beta", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), beta=1.5)),
    ("floor", ValueError, lambda s, t: ot.gold(s, t, *gold_inputs(), floor=0.0)),
    ("form", ValueError, lambda s, t: ot.multilevel_ot(s, t, form="paper")),
    ("k", ValueError, lambda s, t: ot.multilevel_ot(s, t, k=0)),
    ("scale", TypeError, lambda s, t: ot.multilevel_ot(s, t, scale="1")),
    ("epsilon", ValueError, lambda s, t: ot.multilevel_ot(s, t, epsilon=0.0)),
    ("iterations", ValueError, lambda s, t: ot.multilevel_ot(s, t, iterations=0)),
    ("student", ValueError, lambda s, t: ot.sinkd(ll.DenseLogits(torch.rand(5)), t)),
    ("teacher", ValueError, lambda s, t: ot.sinkd(s, t)),
    ("teacher", ValueError, lambda s, t: ot.sinkd(s, ll.DenseLogits(torch.rand(2, 3, 6)))),
    ("targets", TypeError, lambda s, t: ot.sinkd(s, s, torch.rand(2, 3))),
    ("samples", ValueError, lambda s, t: ot.sinkd(s, s, samples="rows")),
    ("iterations", TypeError, lambda s, t: ot.sinkd(s, s, iterations=2.0)),
    ("epsilon", ValueError, lambda s, t: ot.sinkd(s, s, epsilon=-1.0)),
    ("scale", ValueError, lambda s, t: ot.sinkd(s, s, scale=float("inf"))),
    ("costs", TypeError, lambda s, t: ot.multi_cost(torch.rand(1, 3, 4), torch.rand(1))),
    ("costs", TypeError, lambda s, t: ot.multi_cost([], torch.rand(0))),
    ("costs", ValueError, lambda s, t: ot.multi_cost([torch.rand(3, 4), torch.rand(3, 3)], torch.rand(2))),
    ("weights", ValueError, lambda s, t: ot.multi_cost([torch.rand(3, 4)], torch.rand(2))),
    ("mask_a", ValueError, lambda s, t: ot.multi_cost([torch.rand(3, 4)], torch.rand(1), mask_a=ids(2))),
    ("values", TypeError, lambda s, t: ot.mixture_weights([1.0])),
    ("floor", ValueError, lambda s, t: ot.mixture_weights(torch.rand(4), floor=0.3)),
    ("sigma", ValueError, lambda s, t: ot.mixture_weights(torch.rand(4), sigma=0.0)),
    ("x", ValueError, lambda s, t: dependency(torch.rand(3), torch.rand(3))),
    ("y", ValueError, lambda s, t: dependency(torch.rand(3, 1), torch.rand(4, 1))),
    ("kind", ValueError, lambda s, t: dependency(torch.rand(3, 1), torch.rand(3, 1), kind="cosine")),
    ("mask", TypeError, lambda s, t: dependency(torch.rand(3, 1), torch.rand(3, 1), mask=ids(3))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "call"), BAD, ids=range(len(BAD)))
def test_bad_arguments(name: str, error: type, call) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        call(*heads())
