"""torch's default type and device are those of tensors that a user makes: results do not depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import logitless as ll


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def results() -> list[Tensor]:
    """Of a call to every kind of kernel, with gradients, from float32 tensors on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, device="cpu")

    logprob, matrices, student = (normal(*shape).requires_grad_() for shape in ((9,), (2, 4, 4), (5, 9)))
    old, teacher = normal(9), ll.DenseLogits(normal(5, 9))
    described, targets = ll.DenseLogits(student), integers(0, 3, -100, 8, 1)
    policy = ll.policy.gspo(beta=0.1).from_logprobs(
        logprob=logprob, old_logprob=old, ref_logprob=old, advantages=old, cu_seqlens=integers(0, 4, 9)
    )
    doubly = ll.doubly_stochastic(matrices)
    transport = ll.sinkhorn(ll.ProbabilityCost(described, teacher), epsilon=0.1, iterations=5).transport_cost
    filtered = ll.logprobs(described, targets, entropy=True, keep=ll.TopK(4))
    loss = (ll.CrossEntropy(label_smoothing=0.1) + ll.Divergence("jsd"))(described, targets=targets, teacher=teacher)
    total = policy.loss + doubly.matrix[..., 0, 0].sum() + transport + filtered.entropy.sum() + loss.loss
    gradients = torch.autograd.grad(total, (logprob, matrices, student))
    return [policy.loss, *policy.metrics.values(), *doubly, transport, filtered.logprob, loss.loss, *gradients]


@pytest.mark.parametrize("change", ["type", "device"])
def test_defaults_change_nothing(change: str) -> None:
    before = results()
    if change == "type":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    for x, y in zip(before, results(), strict=True):
        assert (x.dtype, x.device) == (y.dtype, y.device) and torch.equal(x, y)
