"""The seam between the solver and what computes: every reading of a cost happens behind :class:`SinkhornKernels`.

A plan over its column sums is ``E_ij = exp((r_i + c_j - C_ij) / epsilon)``, r or c -inf where a weight is 0. No entry
is above 1: exponents above 0 are rounding (of potentials whose last digit is more than epsilon), and are taken for 0,
so that nothing overflows. Everything is batched: B problems of n x m.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor

from logitless import backends
from logitless.backends import Chunk


@dataclass(frozen=True, eq=False)
class Dense:
    """A stored cost [B, n, m]; +inf forbids an entry. Any strides, also 0 where problems share a cost."""

    cost: Tensor

    @property
    def mT(self) -> Dense:
        return Dense(self.cost.mT)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.cost,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.cost.shape)

    kind = "stored"


@dataclass(frozen=True, eq=False)
class Points:
    """A cost between points x [B, n, d] and y [B, m, d], formed where it is read. "cosine": of points of norm 1."""

    x: Tensor
    y: Tensor
    kind: str

    @property
    def mT(self) -> Points:
        return Points(self.y, self.x, self.kind)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, self.y)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.x.shape[:2], self.y.shape[1])


Cost = Dense | Points


def make(kind: str, tensors: Sequence[Tensor]) -> Cost:
    """A cost from its kind and its tensors."""
    return Dense(*tensors) if kind == Dense.kind else Points(*tensors, kind)


@dataclass(frozen=True)
class Schedule:
    """How a whole run goes."""

    epsilon: float
    annealed: tuple[float, ...]  # the epsilons of the first iterations
    limit: int  # iterations, those included; more than those
    tolerance: float | None  # a problem stops where its residual is at most that; None: at the limit
    rhos: tuple[float, float]  # of rows and columns, inf: balanced

    def at(self, iteration: int) -> float:
        """Its epsilon."""
        return self.annealed[iteration] if iteration < len(self.annealed) else self.epsilon


@dataclass(frozen=True, eq=False)
class Run:
    """What a whole run gives, per problem."""

    f: Tensor  # [B, n]
    g: Tensor  # [B, m]
    rows: Tensor  # [B, n]: sum_j a_i b_j exp((f_i + g_j - C_ij) / epsilon), over columns that are reached
    reached: Tensor  # [B, m] bool: t_j < inf
    iterations: Tensor  # [B] int64
    stopped: Tensor  # [B] bool: at the tolerance
    history: tuple[Tensor, ...] = ()  # what the backend's run_backward wants besides cost and weights


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Softmaxes of ``tokens`` rows per problem, in some columns: p = exp(s - max) / sum, s as the chunk says."""

    chunk: Chunk
    max: Tensor  # per row, float64, as the row kernels' statistics have them
    sum: Tensor
    tokens: int


class SinkhornKernels(Protocol):
    """What a backend provides. Tensors are float32 or float64, all of one type, and nothing here records gradients."""

    def half_iteration(self, cost: Cost, c: Tensor, epsilon: float) -> Tensor:
        """s_i = -epsilon log sum_j exp((c_j - C_ij) / epsilon), [B, n]; +inf where the sum is empty."""

    def half_iteration_backward(
        self, cost: Cost, c: Tensor, s: Tensor, upstream: Tensor, epsilon: float, wanted: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """With W the softmax of every row of (c_j - C_ij) / epsilon (0 where the sum was empty): ds_i/dC_ij = W_ij.

        Returns dL/dc = -W^T upstream, [B, m], and if ``wanted`` dL/d(tensors of the cost), else Nones."""

    def iterates(self, cost: Cost) -> bool:
        """Whether ``iteration`` is there for a cost of this kind, shape, strides and type."""

    def iteration(self, cost: Dense, c: Tensor, log_a: Tensor, damping: float, epsilon: float) -> tuple[Tensor, Tensor]:
        """Both half-iterations in one reading of the cost: with s = half_iteration(cost, c),

            f_i = damping s_i, 0 where log_a_i = -inf or not s_i < inf
            t = half_iteration(cost.mT, f + epsilon log_a)

        s [B, n] and t [B, m]; t_j = +inf also where c_j = -inf (such a column's potential is 0 whatever t_j is)."""

    def apply_plan(self, cost: Cost, r: Tensor, c: Tensor, values: Tensor, epsilon: float, power: int) -> Tensor:
        """sum_j E_ij C_ij^power values_jk, [B, n, k], for power 0 or 1."""

    def plan_backward(
        self, cost: Cost, r: Tensor, c: Tensor, left: Tensor, right: Tensor, epsilon: float, power: int, wanted: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Of L = sum_ijk left_ik E_ij C_ij^power right_jk, in one reading of the cost.

        Returns sum_i E_ij C_ij^power left_ik, [B, m, k], and if ``wanted`` dL/d(tensors of the cost), else Nones."""

    def runs(self, cost: Cost) -> bool:
        """Whether ``run`` is there for a cost of this kind, shape and type. Otherwise the solver loops."""

    def run(self, cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, keep: bool) -> Run:
        """A whole run of the alternating method from the potential g [B, m], of weights a [B, n] and b [B, m].

        Iteration k has epsilon e = schedule.at(k) and dampings l = rho / (rho + e), 1 where balanced:

            s_i = -e log sum_j b_j exp((g_j - C_ij) / e)     f_i  = l_a s_i, 0 where a_i = 0 or not s_i < inf
            t_j = -e log sum_i a_i exp((f_i - C_ij) / e)     g'_j = l_b t_j, 0 where b_j = 0 or not t_j < inf

        Without a tolerance the last (f, g') is returned. With one, (f, g) is judged, before g' replaces g:

            residual = sum_i |a_i exp((f_i - s_i) / e) - o_i| + sum_j |b_j exp((g_j - t_j) / e) - o_j|,
            o_i = a_i exp(-f_i / rho_a), o_j = b_j exp(-g_j / rho_b); exp(0) where balanced; NaN counts as inf

        (of the rows that is their weights where nothing reaches them, and else rounding). (f, g') is what to return so
        far where the residual is at most the least so far, and wherever k <= len(schedule.annealed). A problem stops
        with the first iteration k >= len(schedule.annealed) whose residual is at most the tolerance. No epsilon > 0 and
        no cost but NaN gives NaN. ``keep``: with the history."""

    def run_backward(
        self, cost: Dense, a: Tensor, b: Tensor, schedule: Schedule, history: tuple[Tensor, ...],
        of_f: Tensor, of_g: Tensor, wanted: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        """The exact gradient of the finite run that gave (f, g), from cotangents of those: dL/dC if ``wanted``, dL/da
        and dL/db, 0 where a weight is 0. The iterations walked are those up to the one returned; the potential that
        the run started from is a constant."""

    def transport(
        self, cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """<P, C> of a whole run, [B], and its exact gradient in one call: ``run``, the plan's cost, ``run_backward``.

        P_ij = E_ij columns_j of the potentials that the run returns, as ``Problem.factors`` has it (r, c, columns;
        columns_j is b_j exp(-g_j / rho_b), 0 where not reached; exponents above 0 count as 0), and an entry of infinite
        cost adds 0. The gradient is that of the finite run in the cost, d value_p / d C_p [B, n, m] if wanted[0], and
        in (a [B, n], b [B, m]) if wanted[1]; else None. For costs that ``runs``; optional."""

    def forms(self, points: Points) -> bool:
        """Whether an iteration forms this cost where it reads it, in less time than a stored one is read in."""

    def build(self, points: Points) -> Tensor:
        """The cost, [B, n, m]."""

    def build_backward(self, points: Points, cost: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and y."""

    def l1(self, p: Probabilities, q: Probabilities, moments: bool) -> tuple[Tensor, Tensor | None]:
        """sum_v |p_iv - q_jv|, float64 [B, n, m]; and the moments sum_v p_iv sign(p_iv - q_jv). No chunk is written."""

    def l1_backward(self, gradient: Tensor, moments: Tensor, p: Probabilities, q: Probabilities, out: Tensor) -> None:
        """dz_iv = ds_iv/dz_iv p_iv (sum_j G_ij sign(p_iv - q_jv) - sum_j G_ij D_ij), into ``out`` [B n, columns].

        The gradient G and the moments D (of whole rows) are [B, n, m], of any strides; ``out`` may be p's z."""

    def doubly_stochastic(self, logits: Tensor, iterations: int, dialect: str) -> tuple[Tensor, Tensor]:
        """[M, n, n] of the same shape, and the residuals [M]; see :func:`logitless.doubly_stochastic`."""

    def doubly_stochastic_backward(self, logits: Tensor, gradient: Tensor, iterations: int, dialect: str) -> Tensor:
        """The exact gradient of the finite run, [M, n, n], from nothing but the logits."""


WRITTEN = ("cuda", "triton", "cpu", "torch")  # backends that have a module of kernels here, <name>_kernels


def select(device: torch.device, dtype: torch.dtype) -> SinkhornKernels:
    """The kernels for tensors of a device and type: those of the backend that serves it, see ``backends.select``, and
    torch's for what it does not have."""
    return _select(device, dtype, os.environ.get("LOGITLESS_BACKEND"))


def rows(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend whose row kernels serve: ``backends.select``, remembered."""
    return _rows(device, dtype, os.environ.get("LOGITLESS_BACKEND"))


@functools.lru_cache
def _rows(device: torch.device, dtype: torch.dtype, forced: str | None) -> ModuleType:
    return backends.select(device, dtype)


@functools.lru_cache
def _select(device: torch.device, dtype: torch.dtype, forced: str | None) -> SinkhornKernels:
    names = dict.fromkeys((*backends.select(device, dtype).NAME.split("+"), "torch"))
    modules = [importlib.import_module(f"{__package__}.{name}_kernels") for name in names if name in WRITTEN]
    return modules[0] if len(modules) == 1 else SimpleNamespace(**ChainMap(*map(vars, modules)))
