"""Operations without a head: token objectives from log-probabilities, Sinkhorn. One row of :data:`OPERATIONS` each.

Contenders get the same tensors and compute the same number, forward and backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import logitless as ll
from benchmarks import peers
from benchmarks.peers import Tensors

Forward = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation, forward and backward.

    Attributes:
        size: what is measured, in words.
        inputs: (quick) -> tensors by name, those that want a gradient with ``requires_grad``.
        logitless: tensors -> the number, 0-d.
        peers: the same by other means; "torch", as one would write it, is always there.
        against: the peer and the ratio of medians that is the target.
        agreement: how far number and gradients may differ from torch's, relative to the largest.
        inexact: the same of peers that are not as accurate.
        rounds: at most so many, where a peer takes long.
    """

    name: str
    size: str
    inputs: Callable[[bool], Tensors]
    logitless: Forward
    peers: dict[str, Forward]
    against: tuple[str, float]
    agreement: tuple[float, float] = (1e-5, 1e-4)
    inexact: dict[str, tuple[float, float]] = field(default_factory=dict)
    rounds: int | None = None

    def forwards(self) -> dict[str, Forward]:
        return {**self.peers, "logitless": self.logitless}


def step(forward: Forward, tensors: Tensors) -> Tensor:
    result = forward(tensors)
    result.backward()
    return result.detach()


def leaves(tensors: Tensors) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.requires_grad]


# ---- token objectives from log-probabilities


def tokens(quick: bool) -> Tensors:
    """About a million (a thousand) tokens in sequences of up to 2048 (40), advantages per sequence."""
    generator = torch.Generator().manual_seed(0)
    count, longest = (40, 50) if quick else (1000, 2096)
    lengths = torch.randint(1, longest, (count,), generator=generator)
    n = int(lengths.sum())
    old = -2 * torch.rand(n, generator=generator)

    def near(scale: float) -> Tensor:
        return (old + scale * torch.randn(n, generator=generator)).clamp(max=0)

    return {
        "logprob": near(0.2).requires_grad_(),
        "old_logprob": old,
        "ref_logprob": near(0.3),
        "rollout_logprob": near(0.1),
        "advantages": torch.randn(count, generator=generator),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
    }


def token_objective(objective: ll.policy.TokenObjective) -> Forward:
    """With metrics, as a trainer calls it."""
    return lambda x: (
        objective.from_logprobs(
            **{name: tensor for name, tensor in x.items() if name in objective.reads | {"cu_seqlens"}}
        ).loss
    )


def on_torch_backend(forward: Forward) -> Forward:
    """The same call on plain torch operations: its backward is autograd's."""

    def forced(x: Tensors) -> Tensor:
        before = os.environ.get("LOGITLESS_BACKEND")
        os.environ["LOGITLESS_BACKEND"] = "torch"
        try:
            return forward(x)
        finally:
            del os.environ["LOGITLESS_BACKEND"]
            if before is not None:
                os.environ["LOGITLESS_BACKEND"] = before

    return forced


def _tokens(name: str, objective: ll.policy.TokenObjective) -> Operation:
    forward = token_objective(objective)
    on_torch = {"torch": on_torch_backend(forward)}
    return Operation(f"tokens: {name}", "1 M tokens", tokens, forward, on_torch, ("torch", 0.2))


# ---- Sinkhorn


def two_logits(quick: bool) -> Tensors:
    """Of 16 samples, students and teachers."""
    torch.manual_seed(0)
    shape = (16, 300 if quick else 32000)
    return {"student": torch.randn(shape).mul_(2).requires_grad_(), "teacher": torch.randn(shape).mul_(2)}


def sinkd(x: Tensors) -> Tensor:
    return ll.transport.sinkd(ll.DenseLogits(x["student"]), ll.DenseLogits(x["teacher"]))


def costs(quick: bool) -> Tensors:
    torch.manual_seed(0)
    return {"cost": torch.rand((5, 9, 9) if quick else (256, 64, 64)).requires_grad_()}


def batched(x: Tensors) -> Tensor:
    return ll.sinkhorn(x["cost"], epsilon=peers.EPSILON, iterations=20).transport_cost.sum()


def mixing_logits(quick: bool) -> Tensors:
    torch.manual_seed(0)
    shape = (50 if quick else 32768, 4, 4)
    return {"logits": torch.randn(shape).requires_grad_(), "upstream": torch.randn(shape)}


def doubly_stochastic(x: Tensors) -> Tensor:
    return (ll.doubly_stochastic(x["logits"], 20).matrix * x["upstream"]).sum()


def points(quick: bool) -> Tensors:
    torch.manual_seed(0)
    n = 60 if quick else 4096
    x, y = torch.randn(2, n, 64) / 8
    return {"x": x.requires_grad_(), "y": y + 0.04}


def between_points(x: Tensors) -> Tensor:
    return ll.sinkhorn(ll.PointCost(x["x"], x["y"]), epsilon=peers.EPSILON, tolerance=1e-6).kl_value


# fmt: off
OPERATIONS = (
    _tokens("ppo", ll.policy.ppo()),
    _tokens("grpo, k3, tis", ll.policy.grpo((0.2, 0.28), beta=0.04, correction=(ll.policy.tis(),))),
    _tokens("cispo", ll.policy.cispo()),
    _tokens("gspo", ll.policy.gspo()),
    Operation("sinkd", "16 x 16, V = 32000", two_logits, sinkd, {"torch": peers.released_sinkd}, ("torch", 0.10),
              (1e-5, 0.01)),  # its gradient jumps where p = q: on which side rounding leaves an entry is chance
    Operation("sinkhorn, batched", "256 x 64 x 64, 20 iterations", costs, batched, peers.batched_sinkhorn(),
              ("pot", 0.20)),
    Operation("doubly_stochastic", "32768 x 4 x 4, 20 iterations", mixing_logits, doubly_stochastic,
              {"torch": peers.eager_doubly_stochastic}, ("torch", 0.05)),
    Operation("sinkhorn, points", "4096 x 4096, d = 64, to 1e-6", points, between_points, peers.point_sinkhorn(),
              ("geomloss", 0.33), inexact={"geomloss": (1e-4, 0.1)}, rounds=3),
)
# fmt: on
