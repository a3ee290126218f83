"""How logits come about: descriptions that the engine turns into chunks, and the validation of every input.

    logit = softcap * tanh(scale * (h w^T + b) / softcap) / temperature
    logit = scale * (h w^T + b) / temperature                                without a softcap

Errors are raised here, before any work, and name the argument. Values *inside* tensors (targets out of range, a
temperature that is not positive) are checked by the engine, see :mod:`logitless.engine.problem`.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

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
        _check_alike("weight", self.weight, "hidden", self.hidden)
        if self.bias is not None:
            if list(self.bias.shape) != [self.weight.shape[0]]:
                raise ValueError(f"bias: needs the shape [{self.weight.shape[0]}], got {list(self.bias.shape)}")
            _check_alike("bias", self.bias, "weight", self.weight)
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


Logits = LinearLogits | DenseLogits


def check_logits(name: str, logits: object) -> None:
    if not isinstance(logits, (LinearLogits, DenseLogits)):
        raise TypeError(f"{name}: a LinearLogits or DenseLogits, got {type(logits).__name__}")


def check_pair(student: Logits, teacher: Logits) -> None:
    """Teacher and student must describe the same tokens over the same vocabulary, on one device."""
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: leading shape {list(teacher.shape)}, the student's is {list(student.shape)}")
    if teacher.columns != student.columns:
        raise ValueError(
            f"teacher: vocabulary of {teacher.columns}, the student's has {student.columns}; "
            "if one is padded, pass the true size as vocab_size to it"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher: on {teacher.device}, the student is on {student.device}")


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


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
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
