"""The kernels in CUDA C++ (csrc/cuda), float32 on an NVIDIA GPU. A module is a ``SinkhornKernels``.

Like the cuda backend it only passes addresses on, and never waits for the device. Costs between points are read by
Triton's kernel, where there is Triton, or formed in blocks by torch and read from there, whichever is faster.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from logitless.backends import cuda, triton
from logitless.ops.sinkhorn import torch_kernels
from logitless.ops.sinkhorn.kernels import Cost, Dense, Points, Probabilities, Run, Schedule


def half_iteration(cost: Cost, c: Tensor, epsilon: float) -> Tensor:
    if not isinstance(cost, Dense):
        return _of_points(cost, c, epsilon)
    count, n, m = cost.shape
    stored, c = cost.cost if 1 in cost.cost.stride()[1:] else cost.cost.contiguous(), c.contiguous()
    s, queue = c.new_empty((count, n)), cuda._queue(c.device)
    call = cuda._kernels.SoftMin(
        cost=stored.data_ptr(),
        strides=list(stored.stride()),
        c=c.data_ptr(),
        s=s.data_ptr(),
        count=count,
        n=n,
        m=m,
        epsilon=epsilon,
    )
    parts = call.parts(queue["device"])
    partials = c.new_empty((parts, count, n, 2) if parts > 1 else 0)
    cuda._kernels.softmin(**queue, call=call, parts=parts, partials=partials.data_ptr())
    return s


def iterates(cost: Cost) -> bool:
    """Rows that a block or a cluster of them can hold: of 131072 columns on an H100."""
    if not isinstance(cost, Dense) or cost.cost.stride(2) != 1:
        return False
    return _iteration(cost, {}, 1.0, 1.0).parts(**_device(cost.cost)) > 0


def iteration(cost: Dense, c: Tensor, log_a: Tensor, damping: float, epsilon: float) -> tuple[Tensor, Tensor]:
    tensors = {"c": c.contiguous(), "log_a": log_a.contiguous()}
    tensors |= {"s": torch.empty_like(tensors["log_a"]), "t": torch.empty_like(tensors["c"])}
    call, queue = _iteration(cost, tensors, damping, epsilon), cuda._queue(c.device)
    parts = call.parts(queue["device"])
    scratch = {
        "sums": c.new_empty((len(c), parts, c.shape[1])),
        "exponents": c.new_empty((len(c), parts)),
        "weighted": torch.empty_like(tensors["log_a"]),
    }
    cuda._kernels.iteration(**queue, call=call, parts=parts, scratch=_addresses(scratch))
    return tensors["s"], tensors["t"]


def _iteration(cost: Dense, tensors: dict[str, Tensor], damping: float, epsilon: float):
    count, n, m = cost.shape
    return cuda._kernels.Iteration(
        tensors=_addresses(tensors | {"cost": cost.cost}),
        strides=list(cost.cost.stride()[:2]),
        count=count,
        n=n,
        m=m,
        damping=damping,
        epsilon=epsilon,
    )


def forms(points: Points) -> bool:
    kernels = _tritons(points.x)
    return kernels is not None and kernels.forms(points)


def _of_points(points: Points, c: Tensor, epsilon: float) -> Tensor:
    kernels = _tritons(c)
    if kernels is None or kernels.deep(points):
        return torch_kernels.half_iteration_in_blocks(half_iteration, points, c, epsilon)
    return kernels.half_iteration(points, c, epsilon)


def _tritons(like: Tensor) -> ModuleType | None:
    if triton.PROBLEM is not None or not triton.supports(like.device, like.dtype):
        return None
    from logitless.ops.sinkhorn import triton_kernels

    return triton_kernels


def runs(cost: Cost) -> bool:
    if not isinstance(cost, Dense):
        return False
    _, n, m = cost.shape
    return bool(cuda._kernels.sinkhorn_fits(n, m, **_device(cost.cost)))


def run(cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, keep: bool) -> Run:
    tensors = {"a": a.contiguous(), "b": b.contiguous(), "g": g.contiguous()}
    out = {
        "f": torch.empty_like(tensors["a"]),
        "g": torch.empty_like(tensors["b"]),
        "rows": torch.empty_like(tensors["a"]),
    }
    out["reached"] = torch.empty_like(tensors["b"], dtype=torch.bool)
    out["iterations"] = a.new_empty(len(a), dtype=torch.int64)
    out["stopped"] = a.new_empty(len(a), dtype=torch.bool)
    if keep:
        out["history_f"], out["history_g"] = (x.new_empty(schedule.limit, *x.shape) for x in (a, b))
        out["last"] = a.new_empty(len(a), dtype=torch.int32)
    annealed = _annealed(schedule, a)
    problems = _problems(cost, tensors, schedule, annealed)
    cuda._kernels.sinkhorn_run(**cuda._queue(a.device), problems=problems, out=_addresses(out))
    history = (out["history_f"], out["history_g"], out["last"], tensors["g"]) if keep else ()
    return Run(**{name: out[name] for name in ("f", "g", "rows", "reached", "iterations", "stopped")}, history=history)


def run_backward(
    cost: Dense, a: Tensor, b: Tensor, schedule: Schedule, history: tuple[Tensor, ...],
    of_f: Tensor, of_g: Tensor, wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    tensors = {"a": a.contiguous(), "b": b.contiguous()}
    history_f, history_g, last, tensors["g"] = history
    found = {"of_a": torch.empty_like(tensors["a"]), "of_b": torch.empty_like(tensors["b"])}
    if wanted:
        found["of_cost"] = a.new_empty(cost.shape)
    given = {"history_f": history_f, "history_g": history_g, "last": last}
    given |= {"of_f": of_f.contiguous(), "of_g": of_g.contiguous()} | found
    annealed = _annealed(schedule, a)
    problems = _problems(cost, tensors, schedule, annealed)
    cuda._kernels.sinkhorn_run_backward(**cuda._queue(a.device), problems=problems, given=_addresses(given))
    return found.get("of_cost"), found["of_a"], found["of_b"]


def transport(
    cost: Dense, a: Tensor, b: Tensor, g: Tensor, schedule: Schedule, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    tensors = {"a": a.contiguous(), "b": b.contiguous(), "g": g.contiguous()}
    out = {"value": a.new_empty(len(a))}
    if any(wanted):
        out["history_f"], out["history_g"] = (x.new_empty(schedule.limit, *x.shape) for x in (a, b))
    if wanted[0]:
        out["of_cost"] = a.new_empty(cost.shape)
    if wanted[1]:
        out["of_a"], out["of_b"] = torch.empty_like(tensors["a"]), torch.empty_like(tensors["b"])
    annealed = _annealed(schedule, a)
    problems = _problems(cost, tensors, schedule, annealed)
    cuda._kernels.sinkhorn_transport(**cuda._queue(a.device), problems=problems, out=_addresses(out))
    return out["value"], out.get("of_cost"), (out["of_a"], out["of_b"]) if wanted[1] else None


def _problems(cost: Dense, tensors: dict[str, Tensor], schedule: Schedule, annealed: Tensor):
    count, n, m = cost.shape
    return cuda._kernels.SinkhornProblems(
        tensors=_addresses(tensors | {"cost": cost.cost, "annealed": annealed}),
        strides=list(cost.cost.stride()),
        count=count,
        n=n,
        m=m,
        annealed=len(schedule.annealed),
        limit=schedule.limit,
        epsilon=schedule.epsilon,
        tolerance=-1.0 if schedule.tolerance is None else schedule.tolerance,
        rho_a=schedule.rhos[0],
        rho_b=schedule.rhos[1],
    )


def _annealed(schedule: Schedule, like: Tensor) -> Tensor:
    return torch.tensor(schedule.annealed, dtype=like.dtype).to(like.device, non_blocking=True)


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _device(tensor: Tensor) -> dict[str, int]:
    return {"device": cuda._queue(tensor.device)["device"]}


def doubly_stochastic(logits: Tensor, iterations: int, dialect: str) -> tuple[Tensor, Tensor]:
    out, residual = torch.empty_like(logits, memory_format=torch.contiguous_format), logits.new_empty(len(logits))
    _doubly_stochastic(logits, None, out, residual, iterations, dialect)
    return out, residual


def doubly_stochastic_backward(logits: Tensor, gradient: Tensor, iterations: int, dialect: str) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _doubly_stochastic(logits, gradient, out, None, iterations, dialect)
    return out


def _doubly_stochastic(
    logits: Tensor, gradient: Tensor | None, out: Tensor, residual: Tensor | None, iterations: int, dialect: str
) -> None:
    read = [None if x is None else x.contiguous() for x in (logits, gradient)]  # until the launch
    cuda._kernels.doubly_stochastic(
        **cuda._queue(logits.device),
        **{name: 0 if x is None else x.data_ptr() for name, x in zip(("logits", "gradient"), read)},
        out=out.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        matrices=len(logits),
        n=logits.shape[-1],
        iterations=iterations,
        dialect=dialect,
    )


# ---- the L1 distance between softmaxes


def l1(p: Probabilities, q: Probabilities, moments: bool) -> tuple[Tensor, Tensor | None]:
    given = _Softmaxes(p, q)
    parts = given.call.parts(given.queue["device"])
    shape = (1 + moments, parts, given.problems, p.tokens, q.tokens)
    found = torch.empty(shape, dtype=torch.float64, device=p.chunk.z.device)
    cost, moment = [*(x.data_ptr() for x in found), 0][:2]
    cuda._kernels.l1(**given.queue, call=given.call, parts=parts, cost=cost, moments=moment)
    sums = found.sum(1) if parts > 1 else found[:, 0]
    return sums[0], sums[1] if moments else None


def l1_backward(gradient: Tensor, moments: Tensor, p: Probabilities, q: Probabilities, out: Tensor) -> None:
    given = _Softmaxes(p, q)
    cuda._kernels.l1_backward(
        **given.queue,
        call=given.call,
        gradient=(gradient.data_ptr(), gradient.stride()),
        moments=(moments.data_ptr(), moments.stride()),
        out=(out.data_ptr(), out.stride(0)),
    )


class _Softmaxes:
    """Both sides, and what their addresses lead to."""

    def __init__(self, p: Probabilities, q: Probabilities) -> None:
        rows, columns = p.chunk.z.shape
        self.problems = rows // p.tokens
        self._kept = [cuda._Call(side.chunk, None) for side in (p, q)]
        self.queue = cuda._queue(p.chunk.z.device)
        p, q = (
            (kept.arguments["student"], kept.of(side.max), kept.of(side.sum), side.tokens)
            for kept, side in zip(self._kept, (p, q))
        )
        self.call = cuda._kernels.L1(p=p, q=q, problems=self.problems, columns=columns)
