"""Bad input is either right, and tested so elsewhere, or a clear error that names the argument, before any work."""

from __future__ import annotations

import pytest
import torch

import logitless as ll
from logitless import divergences

N, H, V = 6, 8, 20


def hidden(*shape, **options):
    return torch.randn(*(shape or (N, H)), **options)


def weight(*shape, **options):
    return torch.randn(*(shape or (V, H)), **options)


def targets(n=N, v=V):
    return torch.randint(0, v, (n,))


def student(**options):
    return ll.LinearLogits(hidden(), weight(), **options)


def teacher(**options):
    return ll.LinearLogits(hidden(N, 5), weight(V, 5), **options)


def divergence(name, **parameters):
    return lambda: ll.divergence(student(), teacher(), name, **parameters)


def wrong_target(value):
    y = targets()
    y[2] = value
    return y


CASES = {
    # descriptions
    "hidden is a list": (lambda: ll.LinearLogits([[1.0]], weight()), TypeError, "hidden"),
    "hidden of integers": (lambda: ll.LinearLogits(torch.ones(N, H, dtype=torch.long), weight()), TypeError, "hidden"),
    "hidden is 0-d": (lambda: ll.LinearLogits(torch.tensor(1.0), weight()), ValueError, "hidden"),
    "weight is None": (lambda: ll.LinearLogits(hidden(), None), TypeError, "weight"),
    "weight of three dimensions": (lambda: ll.LinearLogits(hidden(), weight(2, V, H)), ValueError, "weight"),
    "weight transposed": (lambda: ll.LinearLogits(hidden(), weight(H, V)), ValueError, "weight: hidden size"),
    "empty vocabulary": (lambda: ll.LinearLogits(hidden(), weight(0, H)), ValueError, "weight"),
    "weight on another device": (
        lambda: ll.LinearLogits(hidden(), weight(device="meta")),
        ValueError,
        "weight: on meta",
    ),
    "mixed types": (lambda: ll.LinearLogits(hidden(), weight(dtype=torch.bfloat16)), ValueError, "weight: torch.bf"),
    "bias of another size": (lambda: ll.LinearLogits(hidden(), weight(), torch.zeros(V + 1)), ValueError, "bias"),
    "bias of integers": (lambda: ll.LinearLogits(hidden(), weight(), torch.ones(V).int()), TypeError, "bias"),
    "scale 0": (lambda: student(scale=0), ValueError, "scale"),
    "scale nan": (lambda: student(scale=float("nan")), ValueError, "scale"),
    "softcap negative": (lambda: student(softcap=-3.0), ValueError, "softcap"),
    "temperature 0": (lambda: student(temperature=0.0), ValueError, "temperature"),
    "temperature negative": (lambda: student(temperature=-1), ValueError, "temperature"),
    "temperature infinite": (lambda: student(temperature=float("inf")), ValueError, "temperature"),
    "temperature a string": (lambda: student(temperature="hot"), TypeError, "temperature"),
    "temperature of another shape": (lambda: student(temperature=torch.ones(N + 1)), ValueError, "temperature: shape"),
    "temperature trained": (lambda: student(temperature=torch.ones(N).requires_grad_()), ValueError, "temperature"),
    "temperature of a token 0": (
        lambda: ll.logprobs(student(temperature=torch.arange(N).float()), targets()),
        ValueError,
        "temperature",
    ),
    "vocab_size too large": (lambda: student(vocab_size=V + 1), ValueError, "vocab_size"),
    "vocab_size 0": (lambda: student(vocab_size=0), ValueError, "vocab_size"),
    "vocab_size a float": (lambda: student(vocab_size=3.0), TypeError, "vocab_size"),
    "dense of integers": (lambda: ll.DenseLogits(torch.ones(3, 4).long()), TypeError, "logits"),
    "dense without columns": (lambda: ll.DenseLogits(torch.ones(3, 0)), ValueError, "logits"),
    # targets and per-token inputs
    "no targets": (lambda: ll.CrossEntropy()(student()), ValueError, "targets: needed by cross_entropy"),
    "targets of floats": (lambda: ll.cross_entropy(student(), torch.zeros(N)), TypeError, "targets"),
    "targets of booleans": (lambda: ll.cross_entropy(student(), torch.zeros(N).bool()), TypeError, "targets"),
    "targets of another shape": (lambda: ll.cross_entropy(student(), targets(N + 1)), ValueError, "targets: shape"),
    "targets on another device": (
        lambda: ll.cross_entropy(student(), targets().to("meta")),
        ValueError,
        "targets: on meta",
    ),
    "target V": (lambda: ll.cross_entropy(student(), wrong_target(V)), ValueError, f"targets: .* got {V}"),
    "target -1": (lambda: ll.logprobs(student(), wrong_target(-1)), ValueError, "targets: .* got -1"),
    "target -100 not ignored": (
        lambda: ll.cross_entropy(student(), wrong_target(-100), ignore_index=0),
        ValueError,
        "targets",
    ),
    "target beyond vocab_size": (
        lambda: ll.cross_entropy(student(vocab_size=V - 1), wrong_target(V - 1)),
        ValueError,
        "targets",
    ),
    "weights trained": (
        lambda: ll.cross_entropy(student(), targets(), weights=torch.ones(N).requires_grad_()),
        ValueError,
        "weights: gets no gradient",
    ),
    "weights of another shape": (
        lambda: ll.cross_entropy(student(), targets(), weights=torch.ones(N, 1)),
        ValueError,
        "weights: shape",
    ),
    "weights of integers": (
        lambda: ll.cross_entropy(student(), targets(), weights=torch.ones(N).long()),
        TypeError,
        "weights",
    ),
    # terms
    "label_smoothing above 1": (lambda: ll.CrossEntropy(label_smoothing=1.5), ValueError, "label_smoothing"),
    "class_weights of another size": (
        lambda: ll.cross_entropy(student(), targets(), class_weights=torch.ones(V + 1)),
        ValueError,
        "class_weights",
    ),
    "class_weights trained": (
        lambda: ll.CrossEntropy(class_weights=torch.ones(V).requires_grad_()),
        ValueError,
        "class_weights",
    ),
    "two class_weights": (
        lambda: (ll.CrossEntropy(class_weights=torch.ones(V)) + ll.CrossEntropy(class_weights=torch.ones(V)))(
            student(), targets=targets()
        ),
        ValueError,
        "class_weights: .* share",
    ),
    "unknown divergence": (lambda: ll.Divergence("kl"), ValueError, "unknown name 'kl'; known are forward_kl"),
    "beta above 1": (lambda: ll.Divergence("jsd", beta=1.1), ValueError, "beta"),
    "beta nan": (lambda: ll.Divergence("jsd", beta=float("nan")), ValueError, "beta"),
    "beta a string": (lambda: ll.Divergence("jsd", beta="half"), TypeError, "beta"),
    "beta for forward_kl": (
        lambda: ll.divergence(student(), teacher(), "forward_kl", beta=0.5),
        ValueError,
        "beta: divergence 'forward_kl' takes no parameter",
    ),
    "alpha below 0": (divergence("skew_forward_kl", alpha=-0.1), ValueError, r"alpha: must lie in \[0, 1\], got -0.1"),
    "weight above 1": (divergence("symmetric_kl", weight=2), ValueError, "weight: must lie in"),
    "alpha of renyi 0": (divergence("renyi", alpha=0), ValueError, "alpha: must lie in"),
    "alpha infinite": (divergence("alpha", alpha=float("inf")), ValueError, "alpha: .* got inf"),
    "a nan": (divergence("alpha_beta", a=float("nan")), ValueError, "a: .* got nan"),
    "b a boolean": (divergence("alpha_beta", b=True), TypeError, "b: a number or a tensor"),
    "mu above 1": (divergence("adaptive_kl", mu=1.5), ValueError, "mu: must lie in"),
    "mu per token": (divergence("adaptive_kl", mu=torch.full((N,), 0.5)), TypeError, "mu: one number for all tokens"),
    "detach_mixture a number": (divergence("skew_reverse_kl", detach_mixture=1), TypeError, "detach_mixture: True or"),
    "beta for renyi": (divergence("renyi", beta=0.5), ValueError, "beta: divergence 'renyi' takes alpha"),
    "alpha for alpha_beta": (divergence("alpha_beta", alpha=0.5), ValueError, "alpha: .* takes a, b"),
    "beta of another shape": (divergence("jsd", beta=torch.full((N, 1), 0.5)), ValueError, "beta: shape"),
    "beta 0-d": (divergence("jsd", beta=torch.tensor(0.5)), ValueError, "beta: shape"),
    "beta trained": (
        divergence("jsd", beta=torch.full((N,), 0.5).requires_grad_()),
        ValueError,
        "beta: gets no gradient",
    ),
    "beta of integers": (divergence("jsd", beta=torch.ones(N).long()), TypeError, "beta: a floating-point tensor"),
    "beta on another device": (
        divergence("jsd", beta=torch.full((N,), 0.5, device="meta")),
        ValueError,
        "beta: on meta",
    ),
    "beta of a token above 1": (
        divergence("jsd", beta=torch.linspace(0.5, 1.5, N)),
        ValueError,
        r"beta: must lie in \[0, 1\] .* for every token, got 1.1",
    ),
    "beta of a token 0": (divergence("jsd", beta=torch.arange(N) / N), ValueError, "beta: .* differ from 0 .* got 0"),
    "beta of a token nan": (divergence("jsd", beta=torch.full((N,), torch.nan)), ValueError, "beta: .* got nan"),
    "alpha of a token 0": (divergence("skew_forward_kl", alpha=torch.zeros(N)), ValueError, "alpha: .* differ from 0"),
    "alpha of a token 1": (divergence("renyi", alpha=torch.ones(N)), ValueError, "alpha: .* differ from 1 .* got 1"),
    "a of a token infinite": (divergence("alpha_beta", a=torch.full((N,), torch.inf)), ValueError, "a: .* got inf"),
    "temperature of a term 0": (lambda: ll.Divergence("jsd", temperature=0), ValueError, "temperature"),
    "temperature of a term per token": (
        lambda: ll.Divergence("jsd", temperature=torch.ones(N)),
        TypeError,
        "temperature: a number",
    ),
    "factor nan": (lambda: float("nan") * ll.CrossEntropy(), ValueError, "factor"),
    "factor a tensor": (lambda: torch.tensor(2.0) * ll.CrossEntropy(), TypeError, "factor: a number"),
    "sum with a number": (lambda: ll.CrossEntropy() + 1.0, TypeError, "unsupported operand"),
    "z_loss negative": (lambda: ll.cross_entropy(student(), targets(), z_loss=-1.0), ValueError, "z_loss"),
    "row_term of a number": (lambda: ll.row_term(3), TypeError, "function"),
    "row_term of another shape": (
        lambda: ll.row_term(lambda s: s, name="mine")(student()),
        ValueError,
        "row_term 'mine'",
    ),
    # pairs
    "no teacher": (lambda: ll.Divergence("jsd")(student()), ValueError, "teacher: needed by jsd"),
    "teacher is a tensor": (lambda: ll.divergence(student(), hidden(), "jsd"), TypeError, "teacher"),
    "student is a tensor": (lambda: ll.cross_entropy(hidden(), targets()), TypeError, "student"),
    "unequal vocabularies": (
        lambda: ll.divergence(student(), ll.LinearLogits(hidden(N, 5), weight(V + 4, 5)), "jsd"),
        ValueError,
        f"teacher: vocabulary of {V + 4}, student has {V}; .* vocab_size",
    ),
    "unequal tokens": (
        lambda: ll.divergence(student(), ll.LinearLogits(hidden(N + 1, 5), weight(V, 5)), "jsd"),
        ValueError,
        "teacher: leading shape",
    ),
    # options
    "unknown reduction": (
        lambda: ll.cross_entropy(student(), targets(), reduction="batchmean"),
        ValueError,
        "reduction: one of mean, sum, none",
    ),
    "denominator 0": (lambda: ll.cross_entropy(student(), targets(), denominator=0), ValueError, "denominator"),
    "denominator of a sum": (
        lambda: ll.cross_entropy(student(), targets(), reduction="sum", denominator=3),
        ValueError,
        "denominator",
    ),
    "denominator of a shape": (
        lambda: ll.cross_entropy(student(), targets(), denominator=torch.ones(2)),
        ValueError,
        "denominator",
    ),
    "unknown strategy": (lambda: ll.logprobs(student(), targets(), strategy="fast"), ValueError, "strategy: one of"),
    "eager per token": (
        lambda: ll.cross_entropy(
            ll.LinearLogits(hidden().requires_grad_(), weight()), targets(), reduction="none", strategy="eager"
        ),
        ValueError,
        "strategy: 'eager' needs a reduced loss",
    ),
    "frozen with a trained weight": (
        lambda: ll.logprobs(ll.LinearLogits(hidden(), weight().requires_grad_()), targets(), strategy="frozen"),
        ValueError,
        "strategy: 'frozen' needs a weight without gradient",
    ),
    "forward with gradient": (
        lambda: ll.logprobs(ll.LinearLogits(hidden(), weight().requires_grad_()), targets(), strategy="forward"),
        ValueError,
        "strategy: 'forward' is for results without gradient",
    ),
    "unknown product": (lambda: ll.logprobs(student(), targets(), product="mine"), ValueError, "product: one of"),
    "fused product without a kernel": (
        lambda: ll.logprobs(student(), targets(), product="fused"),
        ValueError,
        "product: 'fused'",
    ),
    "workspace a string": (lambda: ll.logprobs(student(), targets(), workspace="1GB"), TypeError, "workspace"),
    "workspace negative": (lambda: ll.logprobs(student(), targets(), workspace=-1), ValueError, "workspace"),
    "workspace of one byte": (
        lambda: ll.logprobs(student(), targets(), workspace=1),
        ValueError,
        "workspace: 1 bytes are too few, this needs at least",
    ),
    "ignore_index a float": (
        lambda: ll.cross_entropy(student(), targets(), ignore_index=1.5),
        TypeError,
        "ignore_index",
    ),
    "compact a string": (lambda: ll.cross_entropy(student(), targets(), compact="yes"), TypeError, "compact"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_clear_error(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_least_workspace_is_enough() -> None:
    for make in (lambda w: ll.logprobs(student(), targets(), workspace=w), lambda w: jsd(w)):
        with pytest.raises(ValueError, match="at least") as raised:
            make(1)
        least = int(str(raised.value).split()[-1])
        make(least)
        with pytest.raises(ValueError, match="at least"):
            make(least - 1)


def jsd(workspace):
    return ll.divergence(student(), teacher(), "jsd", workspace=workspace)


def test_layouts_are_right() -> None:
    """Transposed, expanded and sliced inputs give what their contiguous copies give."""
    y = targets()
    h, w = torch.randn(H, N).T, torch.randn(H, V).T
    expanded = torch.randn(1, H).expand(N, H)
    for a, b in ((h, w), (expanded, w), (torch.randn(N, 2 * H)[:, ::2], torch.randn(2 * V, H)[::2])):
        leaves = [a.detach().requires_grad_(), b.detach().requires_grad_()]
        copies = [x.detach().contiguous().clone().requires_grad_() for x in leaves]
        found = torch.autograd.grad(ll.cross_entropy(ll.LinearLogits(*leaves), y), leaves)
        expected = torch.autograd.grad(ll.cross_entropy(ll.LinearLogits(*copies), y), copies)
        for x, e in zip(found, expected, strict=True):
            torch.testing.assert_close(x, e, rtol=1e-5, atol=1e-7)
    logits = torch.randn(V, N).T.requires_grad_()
    copy = logits.detach().contiguous().requires_grad_()
    (found,) = torch.autograd.grad(ll.cross_entropy(ll.DenseLogits(logits), y), logits)
    (expected,) = torch.autograd.grad(ll.cross_entropy(ll.DenseLogits(copy), y), copy)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_single_token_without_leading_dimensions() -> None:
    result = ll.CrossEntropy()(ll.LinearLogits(hidden(H), weight()), targets=torch.tensor(3), reduction="none")
    assert result.loss.shape == ()


def test_on_devices_without_checks_wrong_values_poison_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with them, shown here by leaving the check out."""
    from logitless.engine import inputs

    monkeypatch.setattr(inputs, "check_values", lambda *_: None)
    temperature = torch.ones(N)
    temperature[1] = -1.0
    stats = ll.logprobs(student(temperature=temperature), wrong_target(V), compact=False)
    bad = torch.tensor([False, True, True, False, False, False])
    assert torch.equal(stats.logprob.isnan(), bad)


def test_on_devices_without_checks_wrong_parameters_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    beta = torch.tensor([0.5, 0.0, 1.0, 1.5, torch.nan, 0.1])
    (found,) = divergences.checked("jsd", (beta,))
    assert torch.equal(found.isnan(), torch.tensor([False, True, True, True, True, False]))
