"""What is measured: one row of :data:`CASES` per loss, with its products, its targets and its peers.

G is one product of [tokens, hidden, vocabulary]. The bare products of a case are those that its mathematics needs, as
one would write them in torch, each with an output of its own: ``z = h @ w.T``, ``t = ht @ wt.T``, ``dh = dz @ w``,
``dw = dz.T @ h``. ``products_into`` are the same with outputs allocated beforehand: a stricter yardstick, since on CPUs
the first touch of fresh memory costs time.

A new loss is a row; a new peer is an entry in the ``peers`` of the rows that it can compute.
"""

from __future__ import annotations

import math
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
K = 64  # log-probabilities per token of a top-k teacher


@dataclass(frozen=True)
class Inputs:
    """hidden and teacher_hidden [N, H], weight and teacher_weight [V, H], targets [N], upstream [N] float32.

    Of a top-k teacher indices [N, K], different in every row, and logprobs [N, K] float32, which hold 0.9.
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    upstream: Tensor
    indices: Tensor
    logprobs: Tensor

    @property
    def student(self) -> ll.LinearLogits:
        return ll.LinearLogits(self.hidden, self.weight)

    @property
    def teacher(self) -> ll.LinearLogits:
        return ll.LinearLogits(self.teacher_hidden, self.teacher_weight)

    def topk(self, tail: str) -> ll.TopKLogits:
        return ll.TopKLogits(self.indices, self.logprobs, tail=tail)

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
        agreement: how far results and gradients may differ from torch's, relative to the largest; None: as the type has
            it.
    """

    name: str
    products: tuple[str, ...]
    logitless: Callable[[Inputs, int | str], Tensor]
    peers: dict[str, Forward]
    against: tuple[str, float]
    dtype: torch.dtype = torch.float32
    workspace: int | str = field(default="auto", kw_only=True)
    agreement: float | None = field(default=None, kw_only=True)

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
            indices=torch.randint(v // K, (n, K), generator=generator, device=device)
            + torch.arange(K, device=device) * (v // K),
            logprobs=torch.randn(n, K, generator=generator, device=device).log_softmax(-1) + math.log(0.9),
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
        if case.products.count("logits") == 2:
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
        for _ in range(case.products.count("logits")):
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


def torch_divergence(pointwise: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """Of (log p, log q) [N, V], a sum over columns or a value per token; mean over tokens."""

    def forward(x: Inputs) -> Tensor:
        student, teacher = _log_softmaxes(x)
        found = pointwise(teacher, student)
        return (found if found.dim() == 1 else found.sum(-1)).mean()

    return forward


def _skew_kl(a: Tensor, b: Tensor, alpha: float = 0.1) -> Tensor:
    """Of KL(a || alpha a + (1 - alpha) b)."""
    return a.exp() * (a - torch.logaddexp(a + math.log(alpha), b + math.log1p(-alpha)))


def _power_sum(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    """log sum_v p_v^a q_v^b."""
    return torch.logsumexp(a * p + b * q, -1)


def _chi2(a: Tensor, b: Tensor) -> Tensor:
    """Of sum_v (a_v - b_v)^2 / b_v."""
    return (a.exp() - b.exp()) ** 2 / b.exp()


def _alpha_beta(p: Tensor, q: Tensor, a: float = 0.2, b: float = 0.7) -> Tensor:
    powers = a * ((a + b) * p).exp() + b * ((a + b) * q).exp()
    return (powers / (a + b) - (a * p + b * q).exp()) / (a * b)


def _softened_reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    both = torch.logaddexp(p, q)
    return both.exp() * (both - p - math.log(2))


def _adaptive_kl(p: Tensor, q: Tensor) -> Tensor:
    with torch.no_grad():
        sorted_p, order = p.exp().sort(-1, descending=True)
        gap = (sorted_p - q.exp().gather(-1, order)).abs()
        head = sorted_p.cumsum(-1) <= 0.5
        head[:, 0] = True
        share = (gap * head).sum(-1, keepdim=True) / gap.sum(-1, keepdim=True)
    return share * p.exp() * (p - q) + (1 - share) * q.exp() * (q - p)


def torch_topk_forward_kl(x: Inputs) -> Tensor:
    """Over K + 1 events, the last "another token"."""
    student = F.log_softmax(_logits(x), -1).gather(-1, x.indices)
    both = [torch.cat([log, (-log.exp().sum(-1, keepdim=True)).log1p()], -1) for log in (x.logprobs, student)]
    return _kl(*both)


def torch_topk_renormalized(x: Inputs) -> Tensor:
    student = _logits(x).gather(-1, x.indices)
    return _kl(x.logprobs.log_softmax(-1), student.log_softmax(-1))


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


def topk(tail: str) -> Callable[[Inputs, int | str], Tensor]:
    return lambda x, workspace: ll.divergence(x.student, x.topk(tail), "forward_kl", workspace=workspace)


def distillation(x: Inputs, workspace: int | str) -> Tensor:
    objective = 0.5 * ll.CrossEntropy() + 0.5 * ll.Divergence("forward_kl")
    return objective(x.student, targets=x.targets, teacher=x.teacher, workspace=workspace).loss


def logprobs(x: Inputs, workspace: int | str) -> Tensor:
    return ll.logprobs(x.student, x.targets, workspace=workspace).logprob


LOGITS = ("logits",)
FROZEN = ("logits", "hidden_grad")
TRAINED = ("logits", "hidden_grad", "weight_grad")
RECOMPUTED = ("logits", "logits", "hidden_grad", "weight_grad")  # all rows must be known before any gradient is
REFERENCED = ("logits", "logits", "teacher", "hidden_grad", "weight_grad")  # the same, with a reference model
DISTILLED = ("logits", "teacher", "hidden_grad", "weight_grad")
MIB = 1 << 20


def _divergence(name: str, target: float, pointwise: Callable[[Tensor, Tensor], Tensor], **options) -> Case:
    """Of linear heads, at its default parameters, against its four products."""
    peers = {"torch": torch_divergence(pointwise)}
    return Case(name, DISTILLED, divergence(name), peers, ("products", target), **options)


def torch_ppo(x: Inputs) -> Tensor:
    logprob = torch_logprobs(x)
    return -(x.upstream * (logprob - logprob.detach()).exp()).mean()


def policy(objective: ll.policy.TokenObjective) -> Callable[[Inputs, int | str], Tensor]:
    """On-policy."""
    return lambda x, workspace: objective(x.student, targets=x.targets, advantages=x.upstream, workspace=workspace).loss


def torch_cispo(x: Inputs) -> Tensor:
    return -(x.upstream * torch_logprobs(x)).mean()


def torch_kdrl(x: Inputs) -> Tensor:
    student, teacher = _log_softmaxes(x)
    logprob = student.gather(-1, x.targets[:, None])[:, 0]
    return 0.1 * _kl(student, teacher) - (x.upstream * (logprob - logprob.detach()).exp()).mean()


def kdrl(x: Inputs, workspace: int | str) -> Tensor:
    objective = ll.policy.ppo() + 0.1 * ll.Divergence("reverse_kl")
    given = {"targets": x.targets, "advantages": x.upstream, "workspace": workspace}
    return objective(x.student, teacher=x.teacher, **given).loss


def torch_gspo(x: Inputs) -> Tensor:
    logprob = torch_logprobs(x).view(-1, 8)
    ratio = (logprob - logprob.detach()).mean(-1, keepdim=True).exp()
    return -(x.upstream.view(-1, 8) * ratio).mean()


def gspo(x: Inputs, workspace: int | str) -> Tensor:
    cu_seqlens = torch.arange(0, len(x.targets) + 1, 8, device=x.targets.device)
    given = {"targets": x.targets, "advantages": x.upstream, "workspace": workspace}
    return ll.policy.gspo()(x.student, cu_seqlens=cu_seqlens, **given).loss


PAIRED = 4  # tokens per sequence: chosen ones in the first half, rejected ones in the second


def torch_dpo(x: Inputs) -> Tensor:
    student, reference = (both.gather(-1, x.targets[:, None]).view(-1, PAIRED).sum(-1) for both in _log_softmaxes(x))
    chosen, rejected = (student - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def dpo(x: Inputs, workspace: int | str) -> Tensor:
    cu_seqlens = torch.arange(0, len(x.targets) + 1, PAIRED, device=x.targets.device)
    given = {"reference": x.teacher, "cu_seqlens": cu_seqlens, "workspace": workspace}
    return ll.preference.dpo()(x.student, targets=x.targets, **given).loss


# fmt: off
CASES = (
    Case("cross_entropy", TRAINED, cross_entropy, {"torch": torch_cross_entropy}, ("products", 1.05)),
    Case("forward_kl", DISTILLED, divergence("forward_kl"), {"torch": torch_forward_kl}, ("products", 1.10)),
    Case("reverse_kl", DISTILLED, divergence("reverse_kl"), {"torch": torch_reverse_kl}, ("products", 1.10)),
    Case("jsd", DISTILLED, divergence("jsd"), {"torch": torch_jsd}, ("products", 1.15)),
    _divergence("skew_reverse_kl", 1.25, lambda p, q: _skew_kl(q, p)),
    _divergence("tvd", 1.25, lambda p, q: (p.exp() - q.exp()).abs() / 2,
                agreement=0.05),  # its gradient jumps where p = q: on which side rounding leaves a token is chance
    _divergence("squared_hellinger", 1.25, lambda p, q: ((p / 2).exp() - (q / 2).exp()) ** 2 / 2),
    _divergence("alpha_beta", 1.25, _alpha_beta),
    _divergence("renyi", 1.15, lambda p, q: -2 * _power_sum(p, q, 0.5, 0.5)),
    Case("cross_entropy+forward_kl", DISTILLED, distillation, {"torch": torch_distillation}, ("products", 1.12)),
    Case("topk_forward_kl", TRAINED, topk("bucket"), {"torch": torch_topk_forward_kl}, ("products", 1.10)),
    Case("topk_renormalized", TRAINED, topk("renormalize"), {"torch": torch_topk_renormalized}, ("products", 0.20)),
    Case("ppo", TRAINED, policy(ll.policy.ppo()), {"torch": torch_ppo}, ("products", 1.10)),
    Case("ppo_frozen_head", FROZEN, policy(ll.policy.ppo()), {"torch": torch_ppo}, ("products", 1.10)),
    Case("cispo", TRAINED, policy(ll.policy.cispo()), {"torch": torch_cispo}, ("products", 1.10)),
    Case("ppo+reverse_kl", DISTILLED, kdrl, {"torch": torch_kdrl}, ("products", 1.12)),
    Case("gspo", RECOMPUTED, gspo, {"torch": torch_gspo}, ("products", 1.10)),
    Case("dpo", REFERENCED, dpo, {"torch": torch_dpo}, ("products", 1.10)),
    Case("logprobs_frozen_head", FROZEN, logprobs, {"torch": torch_logprobs}, ("products", 1.10)),
    Case("logprobs_no_grad", LOGITS, logprobs, {"torch": torch_logprobs}, ("products", 1.08)),
    Case("forward_kl_64MiB", DISTILLED, divergence("forward_kl"), {"torch": torch_forward_kl}, ("products", 1.20),
         workspace=64 * MIB),
    Case("cross_entropy_bf16", TRAINED, cross_entropy, {"torch": torch_cross_entropy}, ("torch", 1.00),
         torch.bfloat16),
    Case("forward_kl_bf16", DISTILLED, divergence("forward_kl"), {"torch": torch_forward_kl}, ("torch", 1.00),
         torch.bfloat16),
)
# The other divergences, which share kernels with those above.
MORE_CASES = (
    _divergence("symmetric_kl", 1.15, lambda p, q: (p.exp() - q.exp()) * (p - q) / 2),
    _divergence("skew_forward_kl", 1.25, _skew_kl),
    _divergence("bhattacharyya", 1.15, lambda p, q: -_power_sum(p, q, 0.5, 0.5)),
    _divergence("alpha", 1.25, lambda p, q: 2 * ((p / 2).exp() - (q / 2).exp()) ** 2),
    _divergence("chi2_pearson", 1.25, _chi2),
    _divergence("chi2_neyman", 1.25, lambda p, q: _chi2(q, p)),
    _divergence("cauchy_schwarz", 1.15,
                lambda p, q: (_power_sum(p, q, 2, 0) + _power_sum(p, q, 0, 2)) / 2 - _power_sum(p, q, 1, 1)),
    _divergence("softened_reverse_kl", 1.25, _softened_reverse_kl),
    Case("adaptive_kl", DISTILLED, divergence("adaptive_kl"), {"torch": torch_divergence(_adaptive_kl)},
         ("torch", 1.00)),  # sorts
)
# fmt: on
BY_NAME = {case.name: case for case in (*CASES, *MORE_CASES)}
