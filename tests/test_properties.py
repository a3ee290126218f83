"""Properties that hold for all inputs, searched by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitless as ll
import reference
from logitless import backends
from logitless.backends import Chunk
from logitless.engine import statistics

SETTINGS = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DIVERGENCES = st.sampled_from(
    [("forward_kl", {}), ("reverse_kl", {}), ("symmetric_kl", {"weight": 0.3})]
    + [("jsd", {"beta": beta}) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)]
    + [(f"skew_{side}_kl", {"alpha": alpha}) for side in ("forward", "reverse") for alpha in (0.0, 0.1, 0.7, 1.0)]
    + [("tvd", {}), ("squared_hellinger", {})]
)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 70))


def pair(sizes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(*sizes, generator=generator)).to(dtype) for _ in range(2)]


def outcome(objective, s, t, **options):
    leaf = s.clone().requires_grad_()
    loss = objective(ll.DenseLogits(leaf), teacher=ll.DenseLogits(t), reduction="none", **options).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def is_slow(parameters: dict) -> bool:
    """Many examples of small shapes: minutes under Triton's interpreter."""
    return parameters.get("backend") == "triton"


@SETTINGS
@given(SIZES, DIVERGENCES, st.integers(0, 1000))
def test_divergences_are_distances_of_distributions(backend, sizes, divergence, seed):
    """Non-negative; gradients sum to 0 over the vocabulary; a permutation of the vocabulary permutes gradients."""
    name, parameters = divergence
    s, t = pair(sizes, seed)
    loss, gradient = outcome(ll.Divergence(name, **parameters), s, t)
    assert (loss >= -1e-6).all()
    assert gradient.sum(-1).abs().max() <= 1e-6 * (1 + gradient.abs().sum(-1).max())
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    permuted_loss, permuted = outcome(ll.Divergence(name, **parameters), s[:, order], t[:, order])
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(permuted, gradient[:, order], rtol=1e-5, atol=1e-6)


@SETTINGS
@given(SIZES, st.integers(0, 1000), st.lists(st.integers(0, 5), min_size=1, max_size=5, unique=True))
def test_a_sum_of_terms_is_the_terms_summed(backend, sizes, seed, chosen):
    terms = [
        ll.CrossEntropy(),
        ll.ZLoss(),
        ll.Entropy(),
        ll.Divergence("jsd"),
        ll.Divergence("forward_kl"),
        ll.LogProb(),
    ]
    s, t = pair(sizes, seed)
    targets = torch.randint(0, sizes[1], (sizes[0],), generator=torch.Generator().manual_seed(seed))
    factors = [0.5 + i for i in chosen]
    objective = sum((f * terms[i] for f, i in zip(factors[1:], chosen[1:])), start=factors[0] * terms[chosen[0]])
    loss, gradient = outcome(objective, s, t, targets=targets)
    parts = [outcome(terms[i], s, t, targets=targets) for i in chosen]
    torch.testing.assert_close(loss, sum(f * p[0] for f, p in zip(factors, parts)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, sum(f * p[1] for f, p in zip(factors, parts)), rtol=1e-5, atol=1e-5)


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 1000), st.integers(1, 40))
def test_chunks_do_not_matter(backend, n, v, seed, kib):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 4, generator=generator), torch.randn(v, 4, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator)
    found = []
    for options in (
        {},
        {"workspace": 12 * v + 1024 * kib},
        {"strategy": "recompute", "workspace": 12 * v + 1024 * kib},
    ):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = (ll.CrossEntropy() + ll.Entropy())(ll.LinearLogits(*leaves), targets=targets, **options).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@SETTINGS
@given(st.integers(2, 200), st.integers(0, 1000), st.data())
def test_split_vocabulary_is_the_whole(backend, v, seed, data):
    """Accumulators of column ranges merge into those of the row, wherever it is cut and whatever is masked."""
    s, t = pair((5, v), seed)
    cut = data.draw(st.integers(0, v))
    s[0, :cut] = -torch.inf
    t[1, cut:] = -torch.inf
    s[2, : v // 2] = -torch.inf
    t[2, : v // 2] = -torch.inf
    if cut == v:
        s[0, 0] = 0.0
    if cut == 0:
        t[1, 0] = 0.0
    targets, weights, ones = torch.randint(0, v, (5,)), torch.rand(v), torch.ones(5)
    kernel = backends.select(s.device, s.dtype).statistics

    def accumulate(start, stop):
        found = kernel(
            Chunk(s[:, start:stop], None, None, ones),
            Chunk(t[:, start:stop], None, None, ones),
            targets=targets - start,
            weights=weights[start:stop],
            wanted=backends.WANTED,
        )
        found["mass"] = torch.full_like(found["max"], 1.0) * weights[start:stop].double().sum()
        found["argmax"] = found["argmax"] + start
        return found

    whole = statistics.finish(accumulate(0, v))
    if 0 < cut < v:
        split = statistics.finish(statistics.merge(accumulate(0, cut), accumulate(cut, v)))
        for name, expected in whole.items():
            torch.testing.assert_close(split[name].double(), expected.double(), rtol=1e-6, atol=1e-6, msg=name)
    exact_s, exact_t = s.double(), t.double()
    rows = [3, 4] if 0 < cut < v else [2, 3, 4]
    torch.testing.assert_close(
        whole["forward_kl"][rows], reference.forward_kl(exact_s, exact_t)[rows], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(whole["entropy"], reference.entropy(exact_s), rtol=1e-5, atol=1e-6)


@SETTINGS
@given(st.integers(2, 60), st.integers(0, 1000))
def test_limits_in_beta(v, seed):
    """jsd(beta) / beta -> forward KL and jsd(beta) / (1 - beta) -> reverse KL; at the ends they are taken."""
    s, t = pair((4, v), seed, torch.float64)
    forward, reverse = outcome(ll.Divergence("forward_kl"), s, t), outcome(ll.Divergence("reverse_kl"), s, t)
    for beta, end, expected in ((1e-8, 0.0, forward), (1 - 1e-8, 1.0, reverse)):
        for near, far in zip(outcome(ll.Divergence("jsd", beta=beta), s, t), expected, strict=True):
            torch.testing.assert_close(near / 1e-8, far, rtol=1e-4, atol=1e-5)
        found = outcome(ll.Divergence("jsd", beta=end), s, t)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
