"""Gradients: every reading of a cost as a differentiable operation, and the implicit gradient of a converged run.

* unrolled: exact for a finite run, in O(iterations (n + m)) memory. A backend that runs whole problems keeps a history
  of its own, or none where the plan's cost is all that is asked for: then its gradient is formed with it. Otherwise
  the solver's loop is recorded by autograd as it stands: a half-iteration keeps two vectors (what went in, what came
  out) and recomputes its plan in backward.
* implicit: the loop is not recorded. At a fixed point z = Phi(z) a cotangent of z becomes one of Phi's inputs by
  solving w = dz + J^T w, see :class:`FixedPoint`.
* envelope: the potentials are constants, and the value's gradient is that of the dual, see :mod:`.result`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitless.ops.sinkhorn import kernels
from logitless.ops.sinkhorn.kernels import Cost, Dense, Points, Run, Schedule


def softmin(cost: Cost, c: Tensor, epsilon: float) -> Tensor:
    """s_i = -epsilon log sum_j exp((c_j - C_ij) / epsilon), [B, n]; +inf where there is nothing to sum."""
    return _SoftMin.apply(cost.kind, epsilon, c, *cost.tensors)


def iteration(cost: Dense, c: Tensor, log_a: Tensor, damping: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """Both half-iterations in one reading of the cost, (s, t); see ``SinkhornKernels.iteration``."""
    return _Iteration.apply(damping, epsilon, c, log_a, cost.cost)


def apply_plan(cost: Cost, r: Tensor, c: Tensor, values: Tensor, epsilon: float, power: int = 0) -> Tensor:
    """sum_j E_ij C_ij^power values_jk, [B, n, k], E = exp((r + c - C) / epsilon) <= 1."""
    return _ApplyPlan.apply(cost.kind, epsilon, power, r, c, values, *cost.tensors)


def build(points: Points) -> Dense:
    """The cost between points, stored."""
    return Dense(_Build.apply(points.kind, *points.tensors))


def whole_run(cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule) -> Run:
    """A run in one call of the backend, see ``SinkhornKernels.run``; f and g have its exact gradient."""
    return Run(*_WholeRun.apply(schedule, torch.is_grad_enabled(), g, a, b, cost.cost))


def whole_transport(cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, lead: torch.Size) -> Tensor:
    """<P, C> of a run and its exact gradient in one call of the backend, see ``SinkhornKernels.transport``; as lead."""
    return _Transport.apply(schedule, torch.is_grad_enabled(), lead, g, a, b, cost.cost)


class _SoftMin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind: str, epsilon: float, c: Tensor, *tensors: Tensor):
        s = kernels.select(c.device, c.dtype).half_iteration(kernels.make(kind, tensors), c, epsilon)
        ctx.kind, ctx.epsilon = kind, epsilon
        ctx.save_for_backward(c, s, *tensors)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        c, s, *tensors = ctx.saved_tensors
        of_c, found = kernels.select(c.device, c.dtype).half_iteration_backward(
            kernels.make(ctx.kind, tensors), c, s, upstream, ctx.epsilon, any(ctx.needs_input_grad[3:])
        )
        return None, None, of_c, *found


class _Iteration(torch.autograd.Function):
    @staticmethod
    def forward(ctx, damping: float, epsilon: float, c: Tensor, log_a: Tensor, cost: Tensor):
        s, t = kernels.select(c.device, c.dtype).iteration(Dense(cost), c, log_a, damping, epsilon)
        ctx.damping, ctx.epsilon = damping, epsilon
        ctx.save_for_backward(c, log_a, cost, s, t)
        return s, t

    @staticmethod
    @once_differentiable
    def backward(ctx, of_s: Tensor, of_t: Tensor):
        c, log_a, cost, s, t = ctx.saved_tensors
        epsilon, wanted = ctx.epsilon, ctx.needs_input_grad[4]
        back = kernels.select(c.device, c.dtype).half_iteration_backward
        sent = (log_a > -torch.inf) & (s < torch.inf)
        weighted = torch.where(sent, ctx.damping * s, 0) + epsilon * log_a
        of_weighted, (through_t,) = back(Dense(cost.mT), weighted, t, of_t, epsilon, wanted)
        of_s = of_s + torch.where(sent, ctx.damping * of_weighted, 0)
        of_c, (through_s,) = back(Dense(cost), c, s, of_s, epsilon, wanted)
        return None, None, of_c, epsilon * of_weighted, through_s.add_(through_t.mT) if wanted else None


class _ApplyPlan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind: str, epsilon: float, power: int, r: Tensor, c: Tensor, values: Tensor, *tensors: Tensor):
        out = kernels.select(c.device, c.dtype).apply_plan(kernels.make(kind, tensors), r, c, values, epsilon, power)
        ctx.kind, ctx.epsilon, ctx.power = kind, epsilon, power
        ctx.save_for_backward(r, c, values, out, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        r, c, values, out, *tensors = ctx.saved_tensors
        of_values, found = kernels.select(c.device, c.dtype).plan_backward(
            kernels.make(ctx.kind, tensors),
            r,
            c,
            upstream,
            values,
            ctx.epsilon,
            ctx.power,
            any(ctx.needs_input_grad[6:]),
        )
        of_r, of_c = ((x * y).sum(-1) / ctx.epsilon for x, y in ((upstream, out), (of_values, values)))
        return None, None, None, of_r, of_c, of_values, *found


class _WholeRun(torch.autograd.Function):
    @staticmethod
    def forward(ctx, schedule: Schedule, recorded: bool, g: Tensor, a: Tensor, b: Tensor, cost: Tensor):
        keep = recorded and any(ctx.needs_input_grad)
        found = kernels.select(a.device, a.dtype).run(Dense(cost), a, b, g, schedule, keep)
        rest = (found.rows, found.reached, found.iterations, found.stopped)
        ctx.schedule = schedule
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(a, b, cost, *found.history)
        return found.f, found.g, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, of_f: Tensor, of_g: Tensor, *_):
        a, b, cost, *history = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5]
        of_cost, of_a, of_b = kernels.select(a.device, a.dtype).run_backward(
            Dense(cost), a, b, ctx.schedule, tuple(history), of_f, of_g, wanted
        )
        return None, None, None, of_a, of_b, of_cost


class _Transport(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, schedule: Schedule, recorded: bool, lead: torch.Size, g: Tensor, a: Tensor, b: Tensor, cost: Tensor
    ):
        *_, of_a, of_b, of_cost = ctx.needs_input_grad
        wanted = (recorded and of_cost, recorded and (of_a or of_b))
        transport = kernels.select(a.device, a.dtype).transport
        value, of_cost, of_weights = transport(Dense(cost), a, b, g, schedule, wanted)
        ctx.save_for_backward(*(of_weights or (None, None)), of_cost)
        return value.view(lead)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        found = (None if x is None else upstream.reshape(-1, *[1] * (x.dim() - 1)) * x for x in ctx.saved_tensors)
        return None, None, None, None, *found


class _Build(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind: str, *tensors: Tensor):
        cost = kernels.select(tensors[0].device, tensors[0].dtype).build(kernels.make(kind, tensors))
        ctx.kind = kind
        ctx.save_for_backward(cost, *tensors)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        cost, *tensors = ctx.saved_tensors
        points = kernels.make(ctx.kind, tensors)
        return None, *kernels.select(cost.device, cost.dtype).build_backward(points, cost, upstream)


@dataclass(frozen=True, eq=False)
class Linearized:
    """The plan P = E diag(columns) of a fixed point, normalised by its marginals to spectral norm 1:

    N = diag(rows)^-1/2 P diag(columns)^-1/2 = diag(rows)^-1/2 E diag(columns)^1/2.
    """

    cost: Cost
    r: Tensor
    c: Tensor
    roots: tuple[Tensor, Tensor]  # of rows and columns
    epsilon: float
    damping: tuple[float, float]  # rho / (rho + epsilon) of either side, 1 if balanced

    def apply(self, vector: Tensor) -> Tensor:
        """N x."""
        values = (self.roots[1] * vector)[..., None]
        return _divided(apply_plan(self.cost, self.r, self.c, values, self.epsilon)[..., 0], self.roots[0])

    def apply_transposed(self, vector: Tensor) -> Tensor:
        """N^T x."""
        values = _divided(vector, self.roots[0])[..., None]
        return self.roots[1] * apply_plan(self.cost.mT, self.c, self.r, values, self.epsilon)[..., 0]


class FixedPoint(torch.autograd.Function):
    """The potentials (f, g), as those of a converged run; (f1, g1) are one more simultaneous half-iteration of each.

    df1/dg = -l_a diag(rows)^-1 P and dg1/df = -l_b diag(columns)^-1 P^T, l the damping. Cotangents (u, v) of (f, g) are
    taken to w = (u, v) + J^T w. In x = w_f / sqrt(rows), y = w_g / sqrt(columns) this is

        x = u / sqrt(rows) - l_b N y,    (I - l_a l_b N^T N) y = v / sqrt(columns) - l_a N^T (u / sqrt(rows)),

    symmetric and positive, solved by conjugate gradients in O(n + m) memory. Balanced potentials are defined up to a
    constant: there the matrix is singular along sqrt(columns), which is projected away.
    """

    @staticmethod
    def forward(ctx, at: Linearized, f: Tensor, g: Tensor, f1: Tensor, g1: Tensor):
        ctx.at = at
        return f.clone(), g.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, of_f: Tensor, of_g: Tensor):
        at: Linearized = ctx.at
        rows, columns = at.roots
        first, second = at.damping
        x, y = _divided(of_f, rows), _divided(of_g, columns)
        carried = first * at.apply_transposed(x)
        null = _divided(columns, columns.norm(dim=-1, keepdim=True)) if first * second == 1 else None
        scale = y.norm(dim=-1, keepdim=True) + carried.norm(dim=-1, keepdim=True)
        y = _conjugate_gradients(
            lambda v: v - first * second * at.apply_transposed(at.apply(v)), y - carried, scale, null
        )
        x = x - second * at.apply(y)
        return None, None, None, rows * x, columns * y


def _conjugate_gradients(matrix, right: Tensor, scale: Tensor, null: Tensor | None) -> Tensor:
    """Per problem, until the residual is rounding of ``scale``, the size of what the right side is a difference of.

    What is smaller than that is noise, and directions in which the matrix is as small would amplify it: a plan that is
    a permutation has no others.
    """
    tiny = torch.finfo(right.dtype).eps
    solution = torch.zeros_like(right)
    residual = right if null is None else right - null * (null * right).sum(-1, keepdim=True)
    direction, square = residual, (residual * residual).sum(-1, keepdim=True)
    for step in range(min(2 * right.shape[-1] + 20, 1000)):
        image = matrix(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        active = (square.sqrt() > 4 * tiny * scale) & (curvature > tiny * (direction * direction).sum(-1, keepdim=True))
        if done(active, step):
            break
        length = torch.where(active, square / torch.where(active, curvature, 1), 0)
        solution = solution + length * direction
        residual = residual - length * image
        before, square = square, torch.where(active, (residual * residual).sum(-1, keepdim=True), square)
        direction = torch.where(active, residual + square / torch.where(active, before, 1) * direction, direction)
    return solution


def done(active: Tensor, step: int) -> bool:
    """Whether no problem is active any more. On a GPU it is asked every tenth step: the answer waits for the device."""
    return (active.device.type == "cpu" or step % 10 == 9) and not active.any()


def _divided(x: Tensor, root: Tensor) -> Tensor:
    return torch.where(root == 0, 0, x / torch.where(root == 0, 1, root))
