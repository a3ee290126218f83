"""How logits come about: descriptions that the engine turns into chunks, and the validation of every input.

    logit = softcap * tanh(scale * (h w^T + b) / softcap) / temperature
    logit = scale * (h w^T + b) / temperature                                without a softcap

Errors are raised here, before any work, and name the argument. Values *inside* tensors (targets out of range, a
temperature that is not positive) are checked by the engine, see :mod:`logitless.engine.problem`.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits of a linear head, never materialised: ``hidden @ weight.T + bias``.

    Args:
        hidden: [..., H] floating point. Leading dimensions are free; per-token inputs and results have that shape.
        weight: [V, H], the lm_head. Same type and device as ``hidden``; under autocast both are cast, as
            ``torch.nn.functional.linear`` does.
        bias: [V] or None.
        scale: factor on the logits (Cohere's and Granite's logit_scale).
        softcap: cap of the logits by tanh (Gemma's final_logit_softcapping), in logits after ``scale``.
        temperature: number, or one per token [...], that divides the logits last.
        vocab_size: the true size where the head is padded; later columns do not exist for the softmax, and their
            weights get gradient 0.

    Raises:
        TypeError: an argument of another kind than the above.
        ValueError: shapes, types, devices or numbers that do not fit.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_floating("hidden", self.hidden)
        check_floating("weight", self.weight)
        if self.bias is not None:
            check_floating("bias", self.bias)
        if torch.is_autocast_enabled(self.hidden.device.type):
            dtype = torch.get_autocast_dtype(self.hidden.device.type)
            for name in ("hidden", "weight", "bias"):
                tensor = getattr(self, name)
                if tensor is not None and tensor.dtype != torch.float64:
                    object.__setattr__(self, name, tensor.to(dtype))
        if self.hidden.dim() < 1:
            raise ValueError("hidden: needs the shape [..., H], got a 0-d tensor")
        if self.weight.dim() != 2:
            raise ValueError(f"weight: needs the shape [V, H], got {list(self.weight.shape)}")
        if self.weight.shape[0] < 1:
            raise ValueError("weight: an empty vocabulary")
        if self.weight.shape[1] != self.hidden.shape[-1]:
            raise ValueError(
                f"weight: hidden size {self.weight.shape[1]} differs from that of hidden, {self.hidden.shape[-1]}"
            )
        _check_same_kind("weight", self.weight, "hidden", self.hidden)
        if self.bias is not None:
            if list(self.bias.shape) != [self.weight.shape[0]]:
                raise ValueError(f"bias: needs the shape [{self.weight.shape[0]}], got {list(self.bias.shape)}")
            _check_same_kind("bias", self.bias, "weight", self.weight)
        _check_options(self, padded=self.weight.shape[0])

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions [...]: the shape of per-token inputs and results."""
        return self.hidden.shape[:-1]

    @property
    def columns(self) -> int:
        """The true vocabulary size."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype


@dataclass(frozen=True, eq=False)
class DenseLogits:
    """Logits that are materialised already.

    Args:
        logits: [..., V] floating point; low precision is upcast on load.
        scale, softcap, temperature, vocab_size: as in :class:`LinearLogits`.

    Raises:
        TypeError, ValueError: as :class:`LinearLogits`.
    """

    logits: Tensor
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_floating("logits", self.logits)
        if self.logits.dim() < 1 or self.logits.shape[-1] < 1:
            raise ValueError(f"logits: needs the shape [..., V] with V >= 1, got {list(self.logits.shape)}")
        _check_options(self, padded=self.logits.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions [...]: the shape of per-token inputs and results."""
        return self.logits.shape[:-1]

    @property
    def columns(self) -> int:
        """The true vocabulary size."""
        return self.logits.shape[-1] if self.vocab_size is None else self.vocab_size

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype


TAILS = ("none", "renormalize", "bucket", "uniform", "sampled")


@dataclass(frozen=True, eq=False)
class TopKLogits:
    """A teacher of which K log-probabilities per token are known: stored, or served (vLLM's ``prompt_logprobs``).

    Args:
        indices: [..., K] integer token ids, in any order; -1 pads, and an id that occurs twice counts with the sum.
        logprobs: [..., K] floating, without gradient: natural logarithms of probabilities over the full vocabulary.
        tail: what is assumed of the other tokens. "bucket": they are one event, of the remaining mass. "renormalize":
            they do not exist, for teacher and student; then the student's other columns are not even multiplied.
            "none": they contribute nothing (forward KL alone; no divergence: it can be negative). "uniform": the
            remaining mass is spread evenly over them (KL in either direction). "sampled": ids were drawn from the
            teacher, ``logprobs`` are the logarithms of their importance weights, which sum to 1: log(1/n) each for n
            ids drawn as they are distributed (forward KL alone; unbiased in its gradient).
        served_temperature: at which the log-probabilities were taken.
        temperature: at which the teacher is wanted (default: the served one). Another one needs tail="renormalize",
            where p^(served/wanted), normalised over the K ids, is exact.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    indices: Tensor
    logprobs: Tensor
    _: KW_ONLY
    tail: str = "bucket"
    served_temperature: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.indices, Tensor) or self.indices.dtype not in _INTEGERS:
            got = self.indices.dtype if isinstance(self.indices, Tensor) else type(self.indices).__name__
            raise TypeError(f"indices: an integer tensor, got {got}")
        check_floating("logprobs", self.logprobs)
        check_constant("logprobs", self.logprobs)
        if self.indices.dim() < 1 or self.indices.shape[-1] < 1:
            raise ValueError(f"indices: needs the shape [..., K] with K >= 1, got {list(self.indices.shape)}")
        if self.logprobs.shape != self.indices.shape:
            raise ValueError(f"logprobs: shape {list(self.logprobs.shape)}, indices have {list(self.indices.shape)}")
        if self.logprobs.device != self.indices.device:
            raise ValueError(f"logprobs: on {self.logprobs.device}, indices are on {self.indices.device}")
        if self.tail not in TAILS:
            raise ValueError(f"tail: one of {', '.join(TAILS)}, got {self.tail!r}")
        check_number("served_temperature", self.served_temperature, above=0)
        if self.temperature is not None:
            check_number("temperature", self.temperature, above=0)
            if self.temperature != self.served_temperature and self.tail != "renormalize":
                raise ValueError(
                    f"temperature: {self.temperature} differs from the served {self.served_temperature}, which needs "
                    f"tail='renormalize', got {self.tail!r}"
                )

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions [...]: the shape of per-token inputs and results."""
        return self.indices.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def power(self) -> float:
        """Of the served probabilities, before normalisation."""
        return 1.0 if self.temperature is None else self.served_temperature / self.temperature


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
Logits = LinearLogits | DenseLogits


def check_logits(name: str, logits: object) -> None:
    if not isinstance(logits, (LinearLogits, DenseLogits)):
        raise TypeError(f"{name}: a LinearLogits or DenseLogits, got {type(logits).__name__}")


def tempered(logits: Logits, temperature: float) -> Logits:
    """The same logits, divided by a further temperature."""
    return logits if temperature == 1 else replace(logits, temperature=logits.temperature * temperature)


def check_pair(student: Logits, teacher: Logits | TopKLogits) -> None:
    """Teacher and student must describe the same tokens over the same vocabulary, on one device."""
    if not isinstance(teacher, TopKLogits):
        check_logits("teacher", teacher)
    _check_same_tokens("student", student, "teacher", teacher)


def check_alike(**named: Logits) -> None:
    """Logits of the same tokens over the same vocabulary, on one device; ``named`` as the arguments are."""
    first_name, first = next(iter(named.items()))
    for name, logits in named.items():
        check_logits(name, logits)
        _check_same_tokens(first_name, first, name, logits)


def _check_same_tokens(first_name: str, first: Logits, name: str, logits: Logits | TopKLogits) -> None:
    if logits.shape != first.shape:
        raise ValueError(f"{name}: leading shape {list(logits.shape)}, that of {first_name} is {list(first.shape)}")
    if not isinstance(logits, TopKLogits) and logits.columns != first.columns:
        raise ValueError(
            f"{name}: vocabulary of {logits.columns}, {first_name} has {first.columns}; "
            "if one is padded, pass the true size as vocab_size to it"
        )
    if logits.device != first.device:
        raise ValueError(f"{name}: on {logits.device}, {first_name} is on {first.device}")


def check_floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: a tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: a floating-point tensor, got {tensor.dtype}")


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name}: gets no gradient, but requires grad; pass {name}.detach()")


def check_per_token(name: str, tensor: object, logits: Logits) -> None:
    """A floating tensor, one number per token of ``logits``, on its device, without gradient."""
    check_floating(name, tensor)
    check_token_shape(name, tensor, logits)
    check_constant(name, tensor)


def check_targets(targets: object, logits: Logits) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: an integer tensor, got {type(targets).__name__}")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TypeError(f"targets: an integer tensor, got {targets.dtype}")
    check_token_shape("targets", targets, logits)


def check_token_shape(name: str, tensor: Tensor, logits: Logits) -> None:
    if tensor.shape != logits.shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, one per token needs {list(logits.shape)}")
    if tensor.device != logits.device:
        raise ValueError(f"{name}: on {tensor.device}, the logits are on {logits.device}")


def check_number(name: str, value: object, *, above: float | None = None, low: float | None = None) -> None:
    """A finite number, greater than ``above`` or at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # comparisons, which torch.compile can follow
        raise ValueError(f"{name}: must be finite, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: must be greater than {above:g}, got {value}")
    if low is not None and not value >= low:
        raise ValueError(f"{name}: must be at least {low:g}, got {value}")


def _check_same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: on {tensor.device}, {other_name} is on {other.device}")
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{name}: {tensor.dtype}, {other_name} is {other.dtype}; cast one of them, or use torch.autocast"
        )


def _check_options(logits: Logits, padded: int) -> None:
    check_number("scale", logits.scale, above=0)
    if logits.softcap is not None:
        check_number("softcap", logits.softcap, above=0)
    if isinstance(logits.temperature, Tensor):
        check_per_token("temperature", logits.temperature, logits)
    else:
        check_number("temperature", logits.temperature, above=0)
    if logits.vocab_size is not None:
        if isinstance(logits.vocab_size, bool) or not isinstance(logits.vocab_size, int):
            raise TypeError(f"vocab_size: an integer, got {type(logits.vocab_size).__name__}")
        if not 1 <= logits.vocab_size <= padded:
            raise ValueError(f"vocab_size: must lie in [1, {padded}], got {logits.vocab_size}")
