"""Row kernels: the contract every backend meets, and the choice between them.

A backend is a module with a ``NAME``, a ``supports(device, dtype)``, ``LOW_PRECISION`` (whether ``z`` and ``out`` may
be float16 or bfloat16) and these functions, on *chunks* of logits (some rows of a head, some or all of its columns):

    statistics(student, teacher, *, targets, weights, wanted)   -> accumulators       one reading of the chunk
    generic(student, teacher, normalizers, row_sum, parameters) -> value, slope        sums given both lse
    gradient(student, teacher, normalizers, combination, out)   -> None               one writing of the chunk
    fused(student, teacher, *, targets, weights, wanted, combination, out) -> accumulators       optional, see below
    floors(student, kind, number)                               -> floors             optional, see below

**Chunk.** A chunk holds raw products ``z`` and what turns them into scaled logits,
``s = outer * phi(inner * (z + bias))``, with ``phi`` the identity (``inner is None``) or tanh. ``outer`` is one number
per row; temperature, scale and softcap are folded into ``inner`` and ``outer``. Beside a ``floor`` columns with
``z + bias < floor`` do not exist: s is -inf there (of a target too), and ds/dz is 0 wherever s is -inf, whatever it
multiplies. So kernels drop a one-hot at such a column; that its balance goes too is up to who gives the coefficient.

**Accumulators** are joined, never finished, inside a kernel: :func:`logitless.engine.statistics.join` joins those of
column ranges, :func:`~logitless.engine.statistics.finish` turns them into statistics. Float64, per row [rows], or
[parts, rows] where a kernel splits rows into column ranges; with ``m = max_j s_j`` (-inf for an empty or fully masked
range; then every difference to it is taken to 0):

    max        m                                    always
    sum        sum_j e^(s_j - m)                    always
    target     s_y, or 0 where y is outside         targets given (column of this chunk, int64)
    first      sum_j e^(s_j - m) (s_j - m)          "entropy"
    square     sum_j e^(2 (s_j - m))                "collision"
    weighted   sum_j w_j (s_j - m)                  "weighted"  (weights None: w_j = 1)
    mass       sum_j w_j                            "weighted"
    argmax     first j with s_j = m, int64          "argmax"
    teacher_max, teacher_sum                        a teacher given
    forward    sum_j e^(t_j - m_t) d_j              "moments", with d_j = (t_j - m_t) - (s_j - m)
    reverse    sum_j e^(s_j - m) d_j                "moments"

A factor e^(..) that is 0 makes its product 0, whatever the other factor: masked columns give no NaN.

**Combination.** Every gradient here is one combination, with per-row coefficients, of a small basis; with
``log q_j = (s_j - m) - log_sum``, ``log p_j`` alike:

    dz_j = ds_j/dz_j * [ one_hot 1[j=y] + q q_j + p p_j + weights w_j + q_log_q q_j log q_j + q_squared q_j^2
                         + q_log_ratio q_j (log q_j - log p_j) + sum_k c_k h_k(p_j, q_j) + rows_j ]

with h_k as :mod:`logitless.divergences` has it for the row sums of its families "generic" and "log_sum". ``generic``
gives their value and sum_j h_kj, per row [rows] float64. A log_sum's h is b softmax(a log p + b log q)_j: ``gradient``
gets the value as its third parameter, and ``fused`` is not asked for one.

Rows that are not ``live`` get exact zeros. ``out`` may be ``student.z`` itself.

**Product.** ``product_statistics(student, teacher, *, targets, weights, wanted)``, optional, takes :class:`Factors` in
place of chunks: the product itself is folded into accumulators, and no logit is written.

**Fused.** Statistics and gradient of whole rows in one call, without a word from the host in between: the combination
is *open* (its coefficients do not depend on statistics, and there is one more, "q_lse"), and the kernels close it as
:func:`logitless.engine.statistics.close` does. The accumulators have, for divergence number k of the combination,
``(k, "value")`` and ``(k, "slope")``. A backend without it is asked for statistics, generic and gradient in turn.

**Floors.** Of whole rows, those of a filter of :mod:`logitless.support`: ("MinP", p), ("TopP", p) or ("TopK", k), as
:func:`logitless.engine.floors.find` defines them. It serves where a backend has none.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor, device, dtype

from logitless.divergences import RowSum

WANTED = frozenset({"entropy", "collision", "weighted", "argmax", "moments"})
if TYPE_CHECKING:
    from logitless.backends.dispatch import Dispatch

NAMES = ("cpu", "cuda", "triton", "torch")
BASIS = ("one_hot", "q", "p", "weights", "q_log_q", "q_squared", "q_log_ratio")


@dataclass(frozen=True)
class Chunk:
    """Raw products of some rows and columns of one head, and how they become scaled logits."""

    z: Tensor  # [rows, columns], compute type (float32 or float64) or, see LOW_PRECISION, a lower one; last stride 1
    bias: Tensor | None  # [columns], compute type
    inner: float | None  # softcap: scale / softcap; None without one
    outer: Tensor  # [rows], compute type: (softcap or scale) / temperature
    floor: Tensor | None = None  # [rows], compute type: filtered support


@dataclass(frozen=True)
class Factors:
    """A linear head before its product: z = hidden weight^T. The rest as in :class:`Chunk`, without a floor."""

    hidden: Tensor  # [rows, H], last stride 1
    weight: Tensor  # [columns, H] of the same type, last stride 1
    bias: Tensor | None
    inner: float | None
    outer: Tensor


@dataclass(frozen=True)
class Normalizers:
    """Per row [rows], compute type: maxima and log-sums, kept apart so that a common offset costs no digits."""

    max: Tensor
    log_sum: Tensor
    teacher_max: Tensor | None = None
    teacher_log_sum: Tensor | None = None


@dataclass(frozen=True)
class Combination:
    """One combination of the basis: per-row coefficients [rows] in the compute type, and the vectors they multiply."""

    coefficients: dict[str, Tensor]  # keys from BASIS
    targets: Tensor | None = None  # [rows] int64: the column of the one-hot, outside the chunk where there is none
    weights: Tensor | None = None  # [columns]: w; None means ones
    generic: tuple[tuple[RowSum, tuple[Tensor, ...], Tensor], ...] = ()  # (what, parameters [rows], c [rows])
    rows: Tensor | None = None  # [rows, columns]: gradient of row functions with respect to s
    live: Tensor | None = None  # [rows] bool; None means all


def accumulator_names(pair: bool, targets: Tensor | None, wanted: frozenset[str]) -> list[str]:
    """Of those in float64, in the order in which the Triton kernels store them."""
    names = ["max", "sum"]
    names += ["target"] if targets is not None else []
    names += ["first"] if "entropy" in wanted else []
    names += ["square"] if "collision" in wanted else []
    names += ["weighted", "mass"] if "weighted" in wanted else []
    if pair:
        names += ["teacher_max", "teacher_sum"]
        names += ["forward", "reverse"] if "moments" in wanted else []
    return names


def available() -> dict[str, ModuleType | str]:
    """Every backend by name: its module, or the reason why it cannot run here."""
    modules = {name: importlib.import_module(f"logitless.backends.{name}") for name in NAMES}
    return {name: getattr(module, "PROBLEM", None) or module for name, module in modules.items()}


def select(where: device, compute: dtype) -> ModuleType | Dispatch:
    """The backend for a device and a compute type: of those that support them, the fastest.

    ``LOGITLESS_BACKEND`` forces one by name.

    Raises:
        ValueError: the forced backend does not exist, cannot run here or does not support the input.
    """
    serving = candidates(where, compute)
    return _both(where) if len(serving) == 3 else serving[0]


def candidates(where: device, compute: dtype) -> list[ModuleType]:
    """The backends that support a device and a compute type, the fastest first; the forced one alone, as above."""
    found = available()
    forced = os.environ.get("LOGITLESS_BACKEND")
    if forced:
        if forced not in found:
            raise ValueError(f"LOGITLESS_BACKEND={forced!r}: no such backend; there are {sorted(found)}")
        backend = found[forced]
        if isinstance(backend, str):
            raise ValueError(f"LOGITLESS_BACKEND={forced!r} cannot run here: {backend}")
        if not backend.supports(where, compute):
            raise ValueError(f"LOGITLESS_BACKEND={forced!r} does not support {compute} on {where.type}")
        return [backend]
    if where.type == "cpu" and isinstance(found["cpu"], str):
        _warn_once(f"logitless: the C++ kernels cannot run ({found['cpu']}); the slower torch backend serves instead")
    order = (
        ("cpu", "torch") if where.type == "cpu" else ("cuda", "triton", "torch")
    )  # interpreted ones must be asked for
    usable = [found[name] for name in order if not isinstance(found[name], str)]
    return [backend for backend in usable if backend.supports(where, compute)]


@functools.lru_cache
def _both(where: device) -> Dispatch:
    """The cuda and the triton backend together."""
    from torch.cuda import get_device_capability

    from logitless.backends import dispatch

    found = available()
    major, minor = get_device_capability(where)
    seconds = dispatch.measured().get(f"{major}.{minor}", {}).get("seconds", {})
    return dispatch.Dispatch((found["cuda"], found["triton"]), seconds)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
