"""No operation waits for a GPU: run on torch's "meta" device, where whatever reads a value of a tensor raises.

That device also takes the engine through a GPU's path (planning, groups of rows, masks in place of compaction) at real
sizes, without memory or work; results have shapes and types, and that is all that can be checked of them.
"""

from __future__ import annotations

import pytest
import torch

import logitless as ll
from logitless.backends import torch as backend
from logitless.engine import library, loop

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Captured(Exception):
    """Ends a call where it would enter the engine."""


CALLS = {
    "cross_entropy": lambda s, t, y, w: ll.cross_entropy(s, y, label_smoothing=0.1, z_loss=1e-4),
    "weighted": lambda s, t, y, w: ll.cross_entropy(s, y, weights=w, denominator=torch.tensor(7.0)),
    "two heads": lambda s, t, y, w: (ll.CrossEntropy() + ll.Divergence("jsd") + ll.Divergence("reverse_kl"))(
        s, targets=y, teacher=t
    ),
    "no targets": lambda s, t, y, w: ll.divergence(s, t, "tvd"),
    "teacher_grad": lambda s, t, y, w: ll.Divergence("jsd")(s, teacher=t, teacher_grad=True),
    "per token": lambda s, t, y, w: ll.cross_entropy(s, y, reduction="none"),
    "logprobs": lambda s, t, y, w: ll.logprobs(s, y, entropy=True, collision=True),
    "recompute": lambda s, t, y, w: ll.logprobs(s, y, strategy="recompute"),
}


def top_k(s, y, tail):
    teacher = ll.TopKLogits(torch.zeros(*s.shape, 4, dtype=torch.long), torch.zeros(*s.shape, 4), tail=tail)
    return (ll.Divergence("reverse_kl") + ll.CrossEntropy())(s, targets=y, teacher=teacher)


CALLS |= {
    "sum of logs": lambda s, t, y, w: ll.divergence(s, t, "renyi", alpha=w / 2, reduction="sum"),
    "two temperatures": lambda s, t, y, w: (ll.CrossEntropy() + ll.Divergence("jsd", temperature=2.0))(
        s, targets=y, teacher=t
    ),
    "row function": lambda s, t, y, w: ll.divergence(s, t, "adaptive_kl"),
    "top-k, bucket": lambda s, t, y, w: top_k(s, y, "bucket"),
    "top-k, uniform": lambda s, t, y, w: top_k(s, y, "uniform"),
    "top-k, renormalized": lambda s, t, y, w: top_k(s, y, "renormalize"),
}
CALLS |= {
    "filtered": lambda s, t, y, w: (ll.CrossEntropy() - ll.Entropy())(s, targets=y, keep=(ll.TopK(9), ll.TopP(0.9))),
    "filtered logprobs": lambda s, t, y, w: ll.logprobs(s, y, keep=ll.MinP(0.1)),
    "recorded": lambda s, t, y, w: ll.cross_entropy(s, y, keep=ll.KeepIds(torch.zeros(*s.shape, 4, dtype=torch.long))),
}
SIZES = {"small": (64, 32, 513), "real": (8192, 4096, 128256)}


@pytest.mark.parametrize(("size", "dtype"), [*(("small", dtype) for dtype in TYPES), ("real", "bfloat16")])
@pytest.mark.parametrize("gradients", ["none", "frozen head", "all"])
@pytest.mark.parametrize("call", list(CALLS))
def test_no_value_is_read(call: str, gradients: str, dtype: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITLESS_BACKEND", "torch")
    monkeypatch.setattr(backend, "BLOCK", 1 << 60)  # temporaries cost nothing here
    n, h, v = SIZES["small"]
    kind = TYPES[dtype]
    if gradients == "none" and call == "recompute":
        pytest.skip("needs a gradient")
    hidden = torch.zeros(n, h, dtype=kind, requires_grad=gradients != "none")
    weight = torch.zeros(v, h, dtype=kind, requires_grad=gradients == "all")
    teacher = ll.LinearLogits(torch.zeros(n, h, dtype=kind, requires_grad=True), torch.zeros(v, h, dtype=kind))
    captured = []

    def capture(problem, tensors):
        captured.append((problem, tensors))
        raise Captured

    monkeypatch.setattr(library, "loss", capture)
    monkeypatch.setattr(library, "rows", capture)
    with pytest.raises(Captured):
        targets = torch.zeros(n, dtype=torch.long)
        CALLS[call](ll.LinearLogits(hidden, weight), teacher, targets, torch.ones(n))
    problem, tensors = captured[0]
    sizes = dict(zip(SIZES["small"], SIZES[size], strict=True))
    moved = [
        torch.empty([sizes.get(x, x) for x in tensor.shape], dtype=tensor.dtype, device="meta") for tensor in tensors
    ]
    with torch.no_grad():
        if len(problem.channels) == 1 and call not in ("per token",):
            value, terms, _, _, found = loop.reduced(problem, moved)
            assert value.shape == () and terms.shape == (len(problem.terms),)
        else:
            values, terms, _, state = loop.per_row(problem, moved)
            assert values.shape == (len(problem.channels), moved[0].shape[0])
            found = loop.per_row_backward(problem, moved, state, torch.empty_like(values)) if state else []
    heads = [problem.student] + ([] if problem.teacher is None else [problem.teacher])
    wanting = [moved[i] for head in heads for i, wants in zip(head.inputs, head.wants_grad, strict=True) if wants]
    assert [(g.shape, g.dtype) for g in found] == [(x.shape, x.dtype) for x in wanting]
