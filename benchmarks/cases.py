"""What is measured: one row of :data:`CASES` per loss, with its products, its targets and its peers.

G is one product of [tokens, hidden, vocabulary]. The bare products of a case are those that its mathematics needs, as
one would write them in torch, each with an output of its own: ``z = h @ w.T``, ``t = ht @ wt.T``, ``dh = dz @ w``,
``dw = dz.T @ h``. ``products_into`` are the same with outputs allocated beforehand: a stricter yardstick, since on CPUs
the first touch of fresh memory costs time.

A new loss is a row; a new peer is an entry in the ``peers`` of the rows that it can compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll

MEMORY_SLACK = 32 * 10**6  # bytes that a call may take beyond inputs, gradients, accumulators and workspace


@dataclass(frozen=True)
class Size:
    """Tokens N, hidden size H of student and teacher, vocabulary V."""

    tokens: int
    hidden: int
    vocab: int


FULL = Size(1024, 576, 49152)
QUICK = Size(24, 16, 509)  # runs in milliseconds and measures nothing


@dataclass(frozen=True)
class Inputs:
    """hidden and teacher_hidden [N, H], weight and teacher_weight [V, H], targets [N], upstream [N] float32."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    upstream: Tensor

    @property
    def student(self) -> ll.LinearLogits:
        return ll.LinearLogits(self.hidden, self.weight)

    @property
    def teacher(self) -> ll.LinearLogits:
        return ll.LinearLogits(self.teacher_hidden, self.teacher_weight)

    @property
    def gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in (self.hidden, self.weight) if tensor.grad is not None]

    def clear(self) -> None:
        """Drops the gradients, as ``zero_grad(set_to_none=True)`` does."""
        self.hidden.grad = self.weight.grad = None


Forward = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Case:
    """One loss, forward and (where its products say so) backward.

    Attributes:
        products: of "logits", "teacher", "hidden_grad" and "weight_grad", those that its mathematics needs.
        logitless: (inputs, workspace) -> result, 0-d or [N].
        peers: the same result by other means; "torch" with materialised logits is always there.
        against: the contender ("products" or a peer) and the ratio of medians that is the target.
        workspace: bytes, or "auto".
    """

    name: str
    products: tuple[str, ...]
    logitless: Callable[[Inputs, int | str], Tensor]
    peers: dict[str, Forward]
    against: tuple[str, float]
    dtype: torch.dtype = torch.float32
    workspace: int | str = field(default="auto", kw_only=True)

    def flops(self, size: Size) -> int:
        """Of the products."""
        return 2 * len(self.products) * size.tokens * size.hidden * size.vocab

    def bytes(self, size: Size) -> int:
        """Of inputs and gradients, each counted once: what must move at least."""
        hidden, weight = size.tokens * size.hidden, size.vocab * size.hidden
        moved = {"logits": hidden + weight, "teacher": hidden + weight, "hidden_grad": hidden, "weight_grad": weight}
        return self.dtype.itemsize * sum(moved[product] for product in self.products)

    def inputs(self, size: Size, device: torch.device | str = "cpu") -> Inputs:
        """Fresh inputs, the same at every call: logits of standard deviation 1."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, grad: str = "") -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=device).mul_(scale).to(self.dtype)
            return drawn.requires_grad_(grad in self.products)

        n, h, v = size.tokens, size.hidden, size.vocab
        teacher = "teacher" in self.products
        return Inputs(
            hidden=normal(n, h, grad="hidden_grad"),
            weight=normal(v, h, scale=h**-0.5, grad="weight_grad"),
            teacher_hidden=normal(n * teacher, h),
            teacher_weight=normal(v * teacher, h, scale=h**-0.5),
            targets=torch.randint(v, (n,), generator=generator, device=device),
            upstream=torch.randn(n, generator=generator, device=device),
        )

    def forwards(self) -> dict[str, Forward]:
        """The contenders that compute the loss, ours among them."""
        return {**self.peers, "logitless": lambda inputs: self.logitless(inputs, self.workspace)}


def step(forward: Forward, inputs: Inputs) -> Tensor:
    """Forward, and backward where inputs require it; the result, without its graph."""
    result = forward(inputs)
    if result.requires_grad:
        result.backward(inputs.upstream if result.dim() else None)
    return result.detach()


def bare_products(case: Case, inputs: Inputs) -> Callable[[], object]:
    """The products of a case in float32 (low-precision inputs are upcast beforehand); z stands in for its gradient."""
    h, w, ht, wt = _float32(inputs)

    def run() -> object:
        z = h @ w.T
        _teacher = ht @ wt.T if "teacher" in case.products else None
        dh = z @ w if "hidden_grad" in case.products else None
        dw = z.T @ h if "weight_grad" in case.products else None
        return dh, dw  # gradients outlive the step, logits do not

    return run


def products_into(case: Case, inputs: Inputs) -> Callable[[], object]:
    """The products of a case, into outputs that exist and have been touched."""
    h, w, ht, wt = _float32(inputs)
    z, t = torch.zeros(len(h), len(w)), torch.zeros(len(ht), len(wt))
    dh, dw = torch.zeros_like(h), torch.zeros_like(w)

    def run() -> None:
        torch.mm(h, w.T, out=z)
        if "teacher" in case.products:
            torch.mm(ht, wt.T, out=t)
        if "hidden_grad" in case.products:
            torch.mm(z, w, out=dh)
        if "weight_grad" in case.products:
            torch.mm(z.T, h, out=dw)

    return run


def _float32(inputs: Inputs) -> list[Tensor]:
    tensors = (inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight)
    return [tensor.detach().float() for tensor in tensors]


# ---- materialised torch, as one would write it


def _logits(x: Inputs) -> Tensor:
    return x.hidden.float() @ x.weight.float().T


def _log_softmaxes(x: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher = F.log_softmax(x.teacher_hidden.float() @ x.teacher_weight.float().T, -1)
    return F.log_softmax(_logits(x), -1), teacher


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), mean over tokens."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def torch_cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy(_logits(x), x.targets)


def torch_forward_kl(x: Inputs) -> Tensor:
    student, teacher = _log_softmaxes(x)
    return _kl(teacher, student)


def torch_reverse_kl(x: Inputs) -> Tensor:
    student, teacher = _log_softmaxes(x)
    return _kl(student, teacher)


def torch_jsd(x: Inputs) -> Tensor:
    """As in TRL's GKD trainer, beta = 0.5."""
    student, teacher = _log_softmaxes(x)
    mixture = torch.logsumexp(torch.stack([student, teacher]), 0) - torch.tensor(2.0).log()
    return 0.5 * _kl(teacher, mixture) + 0.5 * _kl(student, mixture)


def torch_distillation(x: Inputs) -> Tensor:
    student, teacher = _log_softmaxes(x)
    return 0.5 * F.nll_loss(student, x.targets) + 0.5 * _kl(teacher, student)


def torch_logprobs(x: Inputs) -> Tensor:
    return F.log_softmax(_logits(x), -1).gather(-1, x.targets[:, None])[:, 0]


# ---- logitless


def cross_entropy(x: Inputs, workspace: int | str) -> Tensor:
    return ll.cross_entropy(x.student, x.targets, workspace=workspace)


def divergence(name: str) -> Callable[[Inputs, int | str], Tensor]:
    return lambda x, workspace: ll.divergence(x.student, x.teacher, name, workspace=workspace)


def distillation(x: Inputs, workspace: int | str) -> Tensor:
    objective = 0.5 * ll.CrossEntropy() + 0.5 * ll.Divergence("forward_kl")
    return objective(x.student, targets=x.targets, teacher=x.teacher, workspace=workspace).loss


def logprobs(x: Inputs, workspace: int | str) -> Tensor:
    return ll.logprobs(x.student, x.targets, workspace=workspace).logprob


LOGITS = ("logits",)
FROZEN = ("logits", "hidden_grad")
TRAINED = ("logits", "hidden_grad", "weight_grad")
DISTILLED = ("logits", "teacher", "hidden_grad", "weight_grad")
MIB = 1 << 20

# fmt: off
CASES = (
    Case("cross_entropy", TRAINED, cross_entropy, {"torch": torch_cross_entropy}, ("products", 1.05)),
    Case("forward_kl", DISTILLED, divergence("forward_kl"), {"torch": torch_forward_kl}, ("products", 1.10)),
    Case("reverse_kl", DISTILLED, divergence("reverse_kl"), {"torch": torch_reverse_kl}, ("products", 1.10)),
    Case("jsd", DISTILLED, divergence("jsd"), {"torch": torch_jsd}, ("products", 1.15)),
    Case("cross_entropy+forward_kl", DISTILLED, distillation, {"torch": torch_distillation}, ("products", 1.12)),
    Case("logprobs_frozen_head", FROZEN, logprobs, {"torch": torch_logprobs}, ("products", 1.10)),
    Case("logprobs_no_grad", LOGITS, logprobs, {"torch": torch_logprobs}, ("products", 1.08)),
    Case("forward_kl_64MiB", DISTILLED, divergence("forward_kl"), {"torch": torch_forward_kl}, ("products", 1.20),
         workspace=64 * MIB),
    Case("cross_entropy_bf16", TRAINED, cross_entropy, {"torch": torch_cross_entropy}, ("torch", 1.00),
         torch.bfloat16),
    Case("forward_kl_bf16", DISTILLED, divergence("forward_kl"), {"torch": torch_forward_kl}, ("torch", 1.00),
         torch.bfloat16),
)
# fmt: on
BY_NAME = {case.name: case for case in CASES}
