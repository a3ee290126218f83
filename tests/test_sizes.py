"""Real sizes, on a GPU: vocabularies up to 262144, 32768 tokens, N V beyond 2^31. Small ones stand in on a CPU.

Cross-entropy per token and its gradients against float64, chunk by chunk; the bar is that of tests/test_contract.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import logitless as ll

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {  # tokens, hidden, vocabulary
    "cuda": [(8192, 256, 128256), (8192, 256, 151936), (4096, 256, 256000), (16384, 256, 262144), (32768, 128, 131071)],
    "cpu": [(70, 24, 1003)],
}
CHUNK = 1024  # rows of reference logits at a time


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", SIZES[metafunc.config.getoption("--device")], ids=str)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Mean cross-entropy by definition in ``dtype``: losses per token, and gradients in float64."""
    w = weight.to(dtype)
    losses, hidden_grad, weight_grad = [], [], torch.zeros(weight.shape, dtype=torch.float64)
    for start in range(0, len(hidden), CHUNK):
        h, y = hidden[start : start + CHUNK].to(dtype), targets[start : start + CHUNK]
        log_q = (h @ w.T).log_softmax(-1)
        losses.append(-log_q.gather(1, y[:, None])[:, 0])
        dz = log_q.exp_()
        dz[torch.arange(len(y)), y] -= 1
        dz /= len(hidden)
        hidden_grad.append(dz @ w)
        weight_grad += (dz.T @ h).double()
    return {"loss": torch.cat(losses), "hidden": torch.cat(hidden_grad).double(), "weight": weight_grad}


@pytest.mark.parametrize("dtype", list(TYPES))
def test_cross_entropy(backend: str, size: tuple[int, int, int], dtype: str) -> None:
    tokens, width, vocabulary = size
    if backend == "torch" and tokens * vocabulary > 2**30:
        pytest.skip("the fallback's largest size is the smallest one here")
    kind = TYPES[dtype]
    hidden = torch.randn(tokens, width).to(kind).requires_grad_()
    weight = (2 * width**-0.5 * torch.randn(vocabulary, width)).to(kind).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    student = ll.LinearLogits(hidden, weight)
    ll.cross_entropy(student, targets).backward()
    with torch.no_grad():
        ours = {"loss": ll.cross_entropy(student, targets, reduction="none")}
        ours |= {"hidden": hidden.grad, "weight": weight.grad}
        exact = reference(hidden, weight, targets, torch.float64)
        baseline = reference(hidden, weight, targets, torch.float32)
        for name, found in ours.items():
            rounded = baseline[name] if name == "loss" else baseline[name].to(kind)
            error, bar = ((x.double() - exact[name]).norm() for x in (found, rounded))
            factor = 1.5 if dtype == "float32" or name == "loss" else 2.0
            assert error <= factor * bar + 2 * torch.finfo(found.dtype).eps * exact[name].norm(), name
