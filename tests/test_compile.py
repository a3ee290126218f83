"""torch.library: fake kernels tell the truth, and torch.compile takes every operation whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import logitless as ll
from logitless.engine import library
from logitless.engine.problem import Problem

OBJECTIVE = 0.5 * ll.CrossEntropy(label_smoothing=0.1) + 0.5 * ll.Divergence("jsd", beta=0.3)


def tensors(n=12, h=8, v=40):
    torch.manual_seed(n)
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    return hidden, weight, torch.randn(n, 5), torch.randn(v, 5), torch.randint(0, v, (n,))


def scalar(hidden, weight, teacher_hidden, teacher_weight, targets):
    result = OBJECTIVE(
        ll.LinearLogits(hidden, weight, temperature=1.3),
        targets=targets,
        teacher=ll.LinearLogits(teacher_hidden, teacher_weight),
    )
    return result.loss + 0 * result.terms["jsd"]


def per_token(hidden, weight, teacher_hidden, teacher_weight, targets):
    teacher = ll.LinearLogits(teacher_hidden, teacher_weight)
    return ll.divergence(ll.LinearLogits(hidden, weight), teacher, "forward_kl", reduction="none").square().mean()


def statistics(hidden, weight, teacher_hidden, teacher_weight, targets):
    stats = ll.logprobs(ll.LinearLogits(hidden, weight), targets, entropy=True)
    return (stats.logprob + 0.1 * stats.entropy).mean() + 0 * stats.argmax.sum()


def frozen(hidden, weight, teacher_hidden, teacher_weight, targets):
    return ll.logprobs(ll.LinearLogits(hidden, weight.detach()), targets).logprob.mean()


def stashed(hidden, weight, teacher_hidden, teacher_weight, targets):
    return ll.logprobs(ll.LinearLogits(hidden, weight), targets, strategy="stash").logprob.mean()


ROWS = ll.CrossEntropy() + 0.3 * ll.row_term(lambda s, t: (s - t).square().mean(-1), teacher=True)


def row_function(hidden, weight, teacher_hidden, teacher_weight, targets):
    teacher = ll.LinearLogits(teacher_hidden, teacher_weight)
    return ROWS(ll.LinearLogits(hidden, weight), targets=targets, teacher=teacher).loss


def several_temperatures(hidden, weight, teacher_hidden, teacher_weight, targets):
    parameter = torch.linspace(0.1, 0.9, hidden.shape[0])
    objective = ll.CrossEntropy() + ll.Divergence("jsd", beta=parameter, temperature=2.0, temperature_squared=True)
    teacher = ll.LinearLogits(teacher_hidden, teacher_weight)
    return objective(ll.LinearLogits(hidden, weight), targets=targets, teacher=teacher).loss


def top_k(hidden, weight, teacher_hidden, teacher_weight, targets):
    logprobs, indices = (teacher_hidden @ teacher_weight.T).log_softmax(-1).topk(4)
    teacher = ll.TopKLogits(indices, logprobs)
    return (
        (ll.Divergence("reverse_kl") + ll.CrossEntropy())(
            ll.LinearLogits(hidden, weight), targets=targets, teacher=teacher, reduction="none"
        )
        .loss.square()
        .mean()
    )


def top_k_alone(hidden, weight, teacher_hidden, teacher_weight, targets):
    logprobs, indices = (teacher_hidden @ teacher_weight.T).log_softmax(-1).topk(4)
    teacher = ll.TopKLogits(indices, logprobs, tail="renormalize", temperature=2.0)
    return ll.Divergence("jsd")(ll.LinearLogits(hidden, weight), teacher=teacher).loss


def filtered(hidden, weight, teacher_hidden, teacher_weight, targets):
    student = ll.LinearLogits(hidden, weight, softcap=5.0)
    stats = ll.logprobs(student, targets, entropy=True, keep=(ll.TopK(30), ll.TopP(0.95)))
    inside = stats.logprob > -torch.inf
    loss = (ll.LogProb() + ll.Entropy())(student, targets=torch.where(inside, targets, -100), keep=ll.MinP(0.01)).loss
    several = [loss, stats.entropy.mean(), torch.where(inside, stats.logprob, 0).mean()]
    return torch.stack(several).square().sum()  # a plain sum would cancel


def recorded(hidden, weight, teacher_hidden, teacher_weight, targets):
    keep = ll.KeepIds(torch.cat([targets[:, None], targets[:, None] - 1], -1))
    student = ll.LinearLogits(hidden, weight)
    stats = ll.logprobs(student, targets, keep=keep)
    loss = ll.CrossEntropy()(student, targets=targets, keep=keep).loss
    return loss - stats.logprob.mean() + 0 * stats.argmax.sum()


NEW = [row_function, several_temperatures, top_k, top_k_alone, filtered, recorded]


def torch_signature(hidden, weight, teacher_hidden, teacher_weight, targets):
    return ll.linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [scalar, per_token, statistics, frozen, stashed, torch_signature, *NEW])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph(backend: str, function, dynamic: bool, compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    for n in (12, 30):
        arguments = tensors(n)
        leaves = [x for x in arguments[:2] if x.requires_grad]
        if function is frozen:
            leaves = leaves[:1]
        expected = function(*arguments)
        found = compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()


class Recorder:
    """Takes down the operations that functions call, with their arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple] = []
        for name in ("reduced", "per_row", "per_row_backward"):
            monkeypatch.setattr(library.loop, name, self.record(name, getattr(library.loop, name)))

    def record(self, name, original):
        def call(problem: Problem, *arguments):
            self.calls.append((name, problem, arguments))
            return original(problem, *arguments)

        return call


@pytest.mark.parametrize("function", [scalar, per_token, statistics, frozen, *NEW])
@pytest.mark.parametrize("strategy", ["auto", "recompute"])
def test_opcheck(function, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    arguments = tensors()
    torch.autograd.grad(function(*arguments), arguments[:2], allow_unused=True)
    monkeypatch.undo()
    operations = {"reduced": "loss", "per_row": "rows", "per_row_backward": "rows_backward"}
    assert recorder.calls
    for name, problem, rest in recorder.calls:
        if problem.strategy == "auto" and name != "reduced":  # compiled graphs decide before, see ops.loss.resolved
            problem = replace(problem, strategy="frozen" if function is frozen else "recompute")
        first, *others = rest
        plain = [x.detach() for x in first]
        operation = getattr(torch.ops.logitless, operations[name]).default
        torch.library.opcheck(operation, (plain, *others, problem.encode()))


def test_problems_survive_encoding() -> None:
    problem_text = []
    original = Problem.encode

    def encode(self):
        problem_text.append((self, original(self)))
        return problem_text[-1][1]

    Problem.encode = encode
    try:
        arguments = tensors()
        for function in (scalar, per_token, statistics, frozen, stashed, *NEW):
            function(*arguments)
    finally:
        Problem.encode = original
    for problem, text in problem_text:
        decoded = Problem.decode(text)
        assert original(decoded) == text
        assert decoded.student == problem.student and decoded.channels == problem.channels
        assert [t.encode() for t in decoded.terms] == [t.encode() for t in problem.terms]
