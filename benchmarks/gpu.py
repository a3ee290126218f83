"""What ``make gpu`` runs where there is an NVIDIA GPU: tests there, then measurements, one result file and one table.

    python -m benchmarks.gpu [--only PART ...] [--quick] [--device cpu]

    tests      the contract and the row kernels on the device
    sizes      vocabularies up to 262144, 32768 tokens
    sanitizer  compute-sanitizer's memcheck and racecheck over a small set, where it is installed
    losses     time and memory of every operation against its bare cuBLAS products
    rows       bandwidth of row kernels against a copy
    tokens     time of policy objectives of a million log-probabilities, by replays of a CUDA graph
    sinkhorn   time of Sinkhorn's kernels, alike
    host       time of the host for a call whose work on the device is next to nothing

It exits with 1 if a test fails or a measurement cannot be made; targets that are not reached are marked in the table.
``--quick --device cpu`` measures nothing and writes nothing: it shows, on a machine without a GPU, that this runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

import logitless as ll
from benchmarks import peers
from benchmarks.cases import (
    DISTILLED,
    FROZEN,
    LOGITS,
    TRAINED,
    Case,
    Inputs,
    Size,
    cross_entropy,
    distillation,
    divergence,
    logprobs,
    step,
)
from benchmarks.environment import ROOT, gpu_environment, result_path
from logitless import backends
from logitless.backends import Chunk, Combination, Normalizers, dispatch, triton
from logitless.divergences import SUMS
from logitless.engine import plan as planning
from logitless.ops.sinkhorn import kernels as sinkhorn_kernels
from logitless.ops.sinkhorn import torch_kernels
from logitless.ops.tokens import kernels as token_kernels

PARTS = ("tests", "sizes", "sanitizer", "losses", "rows", "tokens", "sinkhorn", "host")
FULL, QUICK = Size(8192, 4096, 128256), Size(24, 16, 509)
MIB, GIB = 1 << 20, 1 << 30
SANITIZED = "(test_gradient or test_statistics or test_fused) and 1000 and (triton-split or cuda)"


def logprob_and_entropy(x: Inputs, workspace: int | str) -> Tensor:
    found = ll.logprobs(x.student, x.targets, entropy=True, workspace=workspace)
    return found.logprob + 0.01 * found.entropy


def ce_and_jsd(x: Inputs, workspace: int | str) -> Tensor:
    objective = 0.5 * ll.CrossEntropy() + 0.5 * ll.Divergence("jsd")
    return objective(x.student, targets=x.targets, teacher=x.teacher, workspace=workspace).loss


def logprobs_by(product: str) -> Callable[[Inputs, int | str], Tensor]:
    return lambda x, workspace: ll.logprobs(x.student, x.targets, product=product, workspace=workspace).logprob


def _case(name, products, function, target, workspace=2 * GIB, others=None) -> Case:
    return Case(name, products, function, others or {}, ("products", target), torch.bfloat16, workspace=workspace)


RECOMPUTED = ("logits", "logits", "hidden_grad", "weight_grad")
CASES = (
    _case("cross_entropy", TRAINED, cross_entropy, 1.12, others=peers.cross_entropy()),
    _case("cross_entropy_512MiB", TRAINED, cross_entropy, 1.25, 512 * MIB),
    _case("forward_kl", DISTILLED, divergence("forward_kl"), 1.15),
    _case("reverse_kl", DISTILLED, divergence("reverse_kl"), 1.15),
    _case("jsd", DISTILLED, divergence("jsd"), 1.15, others=peers.jsd()),
    _case("cross_entropy+forward_kl", DISTILLED, distillation, 1.15),
    _case("cross_entropy+jsd", DISTILLED, ce_and_jsd, 1.15),
    _case("logprob+entropy", RECOMPUTED, logprob_and_entropy, 1.12),
    _case("logprobs_frozen_head", FROZEN, logprobs, 1.12),
    _case("logprobs_no_grad", LOGITS, logprobs_by("vendor"), 1.12),
    _case("logprobs_no_grad_fused", LOGITS, logprobs_by("fused"), 1.12),
)


class Clock:
    """Seconds of device work by events on a GPU, by the wall on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


# ---- losses


def bare_products(case: Case, x: Inputs) -> Callable[[], None]:
    """The products of a case in its own type, into outputs that exist; z stands in for its gradient."""
    h, w, ht, wt = (t.detach() for t in (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight))
    z = h.new_empty(len(h), len(w))
    outputs = {"logits": z, "teacher": z, "hidden_grad": torch.empty_like(h), "weight_grad": torch.empty_like(w)}
    factors = {"logits": (h, w.T), "teacher": (ht, wt.T), "hidden_grad": (z, w), "weight_grad": (z.T, h)}
    torch.mm(h, w.T, out=z)

    def run() -> None:
        for product in case.products:
            if product in ("logits", "teacher"):
                torch.mm(*factors[product], out=outputs[product])
        for product in ("hidden_grad", "weight_grad"):
            if product in case.products:
                torch.mm(*factors[product], out=outputs[product])

    return run


@contextlib.contextmanager
def recorded_plans() -> Iterator[list[planning.Plan]]:
    """The plans that the engine makes meanwhile."""
    plans: list[planning.Plan] = []
    make = planning.plan

    def recording(*arguments) -> planning.Plan:
        plans.append(make(*arguments))
        return plans[-1]

    planning.plan = recording
    try:
        yield plans
    finally:
        planning.plan = make


def measure_loss(case: Case, size: Size, device: torch.device, rounds: int, clock: Clock) -> dict:
    """Every round times the contenders in turn; the first is a warm-up. Memory is that of one further call."""
    x = case.inputs(size, device)
    forwards = case.forwards()
    if case.name == "logprobs_no_grad_fused" and not hasattr(
        backends.select(device, torch.float32), "product_statistics"
    ):
        return {"name": case.name, "error": "no such kernel on this backend"}
    contenders = {name: (lambda forward=forward: step(forward, x)) for name, forward in forwards.items()}
    samples: dict[str, list[float]] = {name: [] for name in [*contenders, "products"]}
    results, errors = {}, {}
    for name in list(contenders):
        try:
            results[name] = contenders[name]().double()
        except Exception as error:  # a peer that cannot run here must not end the run; ours must
            if name == "logitless":
                raise
            errors[name] = f"{type(error).__name__}: {error}"[:200]
            del contenders[name], samples[name]
    for name, result in results.items():
        difference = (result - results["logitless"]).norm() / results["logitless"].norm()
        if not difference <= 0.02:
            errors[name] = f"differs by {difference:.2g}"
    contenders["products"] = bare_products(case, x)
    for round_number in range(rounds + 1):
        for name, contender in contenders.items():
            x.clear()
            seconds = clock(contender)
            if round_number:
                samples[name].append(seconds)
    del contenders["products"]
    x.clear()
    memory = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with recorded_plans() as plans:
            contenders["logitless"]()
        peak = torch.cuda.max_memory_allocated() - before
        gradients = sum(gradient.nbytes for gradient in x.gradients)
        accumulators = max(plan.accumulators for plan in plans)
        memory = {"peak": peak, "gradients": gradients, "accumulators": accumulators}
        memory["beyond"] = peak - gradients - accumulators
        memory["workspace"] = max(plan.workspace for plan in plans)
    return {
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "products": case.products,
        "flops": case.flops(size),
        "target": case.against[1],
        "workspace": case.workspace,
        "samples": samples,
        "errors": errors,
        "memory": memory,
    }


def measure_host(case: Case, device: torch.device, rounds: int) -> dict:
    """Seconds of the host for one call, over 100 calls a round: the device has caught up before each round."""
    x = case.inputs(QUICK, device)
    forward = case.forwards()["logitless"]
    samples = []
    for round_number in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        calls = 100 if round_number else 10
        start = time.perf_counter()
        for _ in range(calls):
            x.clear()
            step(forward, x)
        if round_number:
            samples.append((time.perf_counter() - start) / calls)
    return {"name": case.name, "samples": samples}


# ---- row kernels


@dataclass(frozen=True)
class RowCase:
    """A row kernel on float32 chunks: what it runs, and the bytes of an element that it must move."""

    name: str
    bytes: int
    run: Callable[[object, Rows], object]
    kernel: str | None = None  # what the dispatcher chooses for, by this measurement


@dataclass(frozen=True)
class Rows:
    student: Chunk
    teacher: Chunk
    targets: Tensor
    normalizers: Normalizers
    factor: Tensor
    low: Tensor


def _statistics(b, x: Rows, teacher: Chunk | None, wanted: frozenset[str]):
    return b.statistics(x.student, teacher, targets=x.targets, weights=None, wanted=wanted)


def _gradient(b, x: Rows, names: tuple[str, ...], out: Tensor, teacher: Chunk | None = None, generic=()) -> None:
    combination = Combination({name: x.factor for name in names}, x.targets, generic=generic)
    b.gradient(x.student, teacher, x.normalizers, combination, out)


def _fused(b, x: Rows, names: tuple[str, ...], teacher: Chunk | None = None, wanted=frozenset(), generic=()) -> None:
    combination = Combination({name: x.factor for name in names}, x.targets, generic=generic)
    b.fused(
        x.student, teacher, targets=x.targets, weights=None, wanted=wanted, combination=combination, out=x.low
    )  # fmt: skip


def _jsd(x: Rows):
    return ((SUMS["jsd"], (torch.full_like(x.factor, 0.5),), x.factor),)


MOMENTS = frozenset({"moments"})
_kernel = dispatch.kernel_name
# fmt: off
ROW_CASES = (
    RowCase("statistics", 4, lambda b, x: _statistics(b, x, None, frozenset()), _kernel("statistics", False)),
    RowCase("statistics+entropy", 4, lambda b, x: _statistics(b, x, None, frozenset({"entropy"}))),
    RowCase("pair statistics", 8, lambda b, x: _statistics(b, x, x.teacher, MOMENTS), _kernel("statistics", True)),
    RowCase("generic jsd", 8, lambda b, x: b.generic(x.student, x.teacher, x.normalizers, *_jsd(x)[0][:2]),
            _kernel("generic", True)),
    RowCase("gradient ce, in place", 8, lambda b, x: _gradient(b, x, ("one_hot", "q"), x.student.z)),
    RowCase("gradient ce, bf16", 6, lambda b, x: _gradient(b, x, ("one_hot", "q"), x.low), _kernel("gradient", False)),
    RowCase("gradient forward_kl, bf16", 10, lambda b, x: _gradient(b, x, ("q", "p"), x.low, x.teacher),
            _kernel("gradient", True)),
    RowCase("gradient jsd, bf16", 10, lambda b, x: _gradient(b, x, ("q",), x.low, x.teacher, _jsd(x)),
            _kernel("gradient", True, True)),
    RowCase("fused ce, bf16", 10, lambda b, x: _fused(b, x, ("one_hot",)), _kernel("fused", False)),
    RowCase("fused reverse_kl, bf16", 18, lambda b, x: _fused(b, x, ("q_log_ratio",), x.teacher, MOMENTS),
            _kernel("fused", True)),
    RowCase("fused jsd, bf16", 26, lambda b, x: _fused(b, x, (), x.teacher, frozenset(), _jsd(x)),
            _kernel("fused", True, True)),
)
# fmt: on


def measure_rows(
    case: RowCase, backend, rows: int, columns: int, device: torch.device, rounds: int, clock: Clock
) -> dict:
    """Seconds of a call, and of a copy of as many bytes (read and written ones counted) in the same round."""

    def chunk() -> Chunk:
        return Chunk(torch.randn(rows, columns, device=device), None, None, torch.ones(rows, device=device))

    student, teacher = chunk(), chunk()
    found = backends.available()["torch"].statistics(student, teacher, targets=None, weights=None, wanted=frozenset())
    numbers = (found["max"], found["sum"].log(), found["teacher_max"], found["teacher_sum"].log())
    x = Rows(
        student,
        teacher,
        torch.randint(columns, (rows,), device=device),
        Normalizers(*(n.float() for n in numbers)),
        torch.ones(rows, device=device) / rows,
        torch.empty(rows, columns, dtype=torch.bfloat16, device=device),
    )
    moved = case.bytes * rows * columns
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples: dict[str, list[float]] = {"kernel": [], "copy": []}
    for round_number in range(rounds + 1):
        times = {"kernel": clock(lambda: case.run(backend, x)), "copy": clock(lambda: target.copy_(source))}
        for name, seconds in times.items():
            if round_number:
                samples[name].append(seconds)
    described = {"name": case.name, "kernel": case.kernel, "backend": backend.NAME, "rows": rows, "columns": columns}
    return described | {"bytes": moved, "samples": samples}


def keep_for_dispatch(result: dict) -> None:
    """What the dispatcher reads: seconds of each backend by kernel and columns, for this compute capability."""
    seconds: dispatch.Seconds = {}
    for one in result["rows"]:
        if one["kernel"] is not None:
            sizes = seconds.setdefault(one["kernel"], {}).setdefault(str(one["columns"]), {})
            sizes[one["backend"]] = median(one["samples"]["kernel"])
    kept = {"device": result["device"], "date": result["date"], "commit": result["commit"], "seconds": seconds}
    capabilities = dict(dispatch.measured()) | {result["capability"]: kept}
    dispatch.MEASURED.write_text(json.dumps(capabilities, indent=1) + "\n")


# ---- policy objectives

OBJECTIVES = {
    "ppo, beta": ll.policy.ppo(beta=0.04),
    "grpo, beta": ll.policy.grpo(beta=0.04),
    "gspo": ll.policy.gspo(),
    "cispo": ll.policy.cispo(),
}
REPLAYS = 20  # of which a sample is the mean


def measure_tokens(name: str, tokens: int, length: int, device: torch.device, rounds: int, clock: Clock) -> dict:
    """Seconds on the device of value, metrics and gradient, of sequences of one length with a mask."""
    objective = OBJECTIVES[name]
    given = {input: -torch.rand(tokens, device=device) for input in objective.reads}
    cu_seqlens = torch.arange(0, tokens + 1, length, device=device)
    prepared = objective.prepare(
        given, like=given["logprob"], mask=torch.rand(tokens, device=device) < 0.9, cu_seqlens=cu_seqlens
    )
    recipe, inputs, denominator = objective.recipe(prepared, None)
    offsets = prepared.segments.offsets if recipe.needs_offsets else None
    kernels, upstream = token_kernels.select(device, torch.float32), torch.ones((), device=device)
    call = token_kernels.Call(recipe, tuple(inputs), prepared.given_mask, offsets, denominator)

    def run() -> None:
        _, state = kernels.forward(call, True)
        kernels.backward(recipe, state, upstream)

    moved = tokens * (4 * len(inputs) + 1 + 4)
    return {
        "name": name,
        "backend": kernels.__name__.rpartition(".")[2],
        "tokens": tokens,
        "bytes": moved,
        "samples": replayed(run, device, rounds, clock),
    }


def replayed(run: Callable[[], object], device: torch.device, rounds: int, clock: Clock) -> list[float]:
    """Seconds on the device of one replay of the graph that it makes."""
    replay, replays = run, 1
    if device.type == "cuda":
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay, replays = graph.replay, REPLAYS
    return [clock(lambda: [replay() for _ in range(replays)]) / replays for _ in range(rounds + 1)][1:]


# ---- Sinkhorn


def sinkhorn_runs(device: torch.device, quick: bool) -> dict[str, tuple[Callable[[], object], int, float | None]]:
    """By name: what is run, the bytes it must move, and the microseconds that are the target."""
    matrices, columns, problems, side = (3, 100, 2, 40) if quick else (32768, 32000, 1024, 16384)
    iterations = 2 if quick else 20
    kernels = sinkhorn_kernels.select(device, torch.float32)
    logits = torch.randn(matrices, 4, 4, device=device)
    student, teacher = (torch.randn(16, columns, device=device) for _ in range(2))
    student.requires_grad_()
    cost, stored, c = (torch.rand(shape, device=device) for shape in ((problems, 64, 64), (1, side, side), (1, side)))

    def sinkd() -> tuple[Tensor, ...]:
        loss = ll.transport.sinkd(*map(ll.DenseLogits, (student, teacher)), iterations=iterations)
        return torch.autograd.grad(loss, student)

    def half(of: Tensor) -> Callable[[], Tensor]:
        return lambda: kernels.half_iteration(sinkhorn_kernels.Dense(of), c, 0.1)

    def whole() -> tuple[Tensor, ...]:
        of = sinkhorn_kernels.Dense(stored)
        if kernels.iterates(of):
            return kernels.iteration(of, c, c, 1.0, 0.1)
        return kernels.half_iteration(of, c, 0.1), kernels.half_iteration(of.mT, c, 0.1)

    def between(depth: int) -> dict[str, tuple[Callable[[], object], int, float | None]]:
        """Both ways of reading costs between points, to know from which depth on blocks are faster."""
        name = f"half-iteration of {side} x {side} points, d = {depth}"
        x, y = (torch.randn(1, side, depth, device=device) for _ in range(2))
        points = sinkhorn_kernels.Points(x, y, "sqeuclidean")
        of_stored, moved = kernels.half_iteration, 2 * 4 * side * depth
        ways = {f"{name}, blocks": lambda: torch_kernels.half_iteration_in_blocks(of_stored, points, c, 10.0)}
        if triton.PROBLEM is None and triton.supports(device, torch.float32):
            from logitless.ops.sinkhorn import triton_kernels

            ways[f"{name}, formed where read"] = lambda: triton_kernels.formed(points, c, 10.0)
        return {name: (way, moved, None) for name, way in ways.items()}

    many, both, one = f"{matrices} of 4 x 4, {iterations} iterations", 2 * 4 * 16 * columns, 4 * side**2
    return {
        f"doubly_stochastic, {many}": (
            lambda: kernels.doubly_stochastic(logits, iterations, "exact"),
            2 * 4 * logits.numel(),
            5.0,
        ),
        f"its backward, {many}": (
            lambda: kernels.doubly_stochastic_backward(logits, logits, iterations, "exact"),
            3 * 4 * logits.numel(),
            8.0,
        ),
        f"sinkd, n = 16, V = {columns}, forward and backward": (sinkd, 3 * both + both // 2, 30.0),
        f"{problems} runs of 64 x 64, {iterations} iterations": (
            lambda: ll.sinkhorn(cost, epsilon=0.1, iterations=iterations).f,
            4 * cost.numel(),
            60.0,
        ),
        f"half-iteration over rows, {side} x {side}": (half(stored), one, None),
        f"half-iteration over columns, {side} x {side}": (half(stored.mT), one, None),
        f"iteration, {side} x {side}": (whole, one, 428.0),  # 75% of 3.35 TB/s
        **{name: way for depth in (3, 16, 64, 256) for name, way in between(depth).items()},
    }


def measure_sinkhorn(device: torch.device, quick: bool, rounds: int, clock: Clock) -> Iterator[dict]:
    for name, (run, moved, target) in sinkhorn_runs(device, quick).items():
        samples = replayed(run, device, rounds, clock)
        yield {"name": name, "bytes": moved, "target": target, "samples": samples}


# ---- tests


def run_tests(part: str, device: str, quick: bool) -> int:
    """The exit status of pytest, or of compute-sanitizer around it."""
    pytest = [sys.executable, "-m", "pytest", "-q", f"--device={device}"]
    if part == "tests":
        files = [
            "tests/test_contract.py",
            "tests/test_logprobs.py",
            "tests/test_row_kernels.py",
            "tests/test_cuda_kernels.py",
            "tests/test_topk_teacher.py",
            "tests/test_policy_from_logits.py",
            "tests/test_sinkhorn_kernels.py",
            *(
                f"tests/test_token_kernels.py::test_{of}"
                for of in ("objective", "sizes", "beyond_the_largest_exponent")
            ),
        ]
        commands = [[*pytest, *(file for file in files if (ROOT / file.split("::")[0]).exists())]]
        if quick:
            commands = [[*pytest, "tests/test_logprobs.py", "-k", "triton", "-x"]]
    elif part == "sizes":
        commands = [[*pytest, "tests/test_sizes.py"]]
    else:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            print("compute-sanitizer is not installed: left out")
            return 0
        tests = [*pytest, "tests/test_row_kernels.py", "-x", "-k", SANITIZED]
        commands = [[tool, "--tool", kind, "--error-exitcode", "9", *tests] for kind in ("memcheck", "racecheck")]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if part == "sanitizer" else None
    return max(subprocess.run(command, cwd=ROOT, env=environment).returncode for command in commands)


# ---- the report


def table(result: dict) -> str:
    head = f"{result['device']}, {result['versions']}, commit {result['commit'][:12]}{' (dirty)' * result['dirty']}"
    lines = [head, ""]
    if result["losses"]:
        size = result["size"]
        lines += [
            f"bf16, N={size['tokens']} H={size['hidden']} V={size['vocab']}; ratios: medians over rounds",
            "",
            "| case | products | ms | TFLOP/s | / products | target | reached | beyond, MiB | workspace, MiB | peers |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for one in result["losses"]:
        if "error" in one:
            lines.append(f"| {one['name']} | {one['error']} |")
            continue
        ours, products = one["samples"]["logitless"], one["samples"]["products"]
        ratio = median(a / b for a, b in zip(ours, products, strict=True))
        others = {name: median(values) / median(products) for name, values in one["samples"].items()}
        listed = ", ".join(f"{name} {others[name]:.2f}" for name in others if name not in ("logitless", "products"))
        listed += "".join(f" [{name}: {error}]" for name, error in one["errors"].items())
        memory = one["memory"] or {"beyond": 0, "workspace": 0}
        lines.append(
            f"| {one['name']} | {len(one['products'])}G | {1e3 * median(ours):.2f} "
            f"| {one['flops'] / median(ours) / 1e12:.0f} | {ratio:.3f} | {one['target']} "
            f"| {'yes' if ratio <= one['target'] else 'no'} | {memory['beyond'] / MIB:.0f} "
            f"| {memory['workspace'] / MIB:.0f} | {listed} |"
        )
    if result["rows"]:
        lines += [
            "",
            "| row kernel | backend | rows x columns | us | GB/s | of a copy's bandwidth |",
            "|---|---|---|---|---|---|",
        ]
    for one in result["rows"]:
        kernel, copy = median(one["samples"]["kernel"]), median(one["samples"]["copy"])
        lines.append(
            f"| {one['name']} | {one['backend']} | {one['rows']} x {one['columns']} | {1e6 * kernel:.0f} "
            f"| {one['bytes'] / kernel / 1e9:.0f} | {copy / kernel:.0%} |"
        )
    if result["tokens"]:
        lines += ["", "| objective | backend | tokens | us | GB/s of inputs and gradient |", "|---|---|---|---|---|"]
    for one in result["tokens"]:
        seconds = median(one["samples"])
        lines.append(
            f"| {one['name']} | {one['backend']} | {one['tokens']} | {1e6 * seconds:.1f} "
            f"| {one['bytes'] / seconds / 1e9:.0f} |"
        )
    if result["sinkhorn"]:
        lines += ["", "| Sinkhorn | us | target | GB/s |", "|---|---|---|---|"]
    for one in result["sinkhorn"]:
        seconds = median(one["samples"])
        target = "" if one["target"] is None else f"{one['target']:.0f}"
        lines.append(f"| {one['name']} | {1e6 * seconds:.1f} | {target} | {one['bytes'] / seconds / 1e9:.0f} |")
    if result["host"]:
        lines += ["", "| call | host, us |", "|---|---|"]
    lines += [f"| {one['name']} | {1e6 * median(one['samples']):.0f} |" for one in result["host"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small shapes: measures nothing, writes nothing")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; --quick --device cpu runs the same without one")
        return 1
    failed = []
    for part in ("tests", "sizes", "sanitizer"):
        if part in arguments.only and run_tests(part, arguments.device, arguments.quick):
            failed.append(part)
    size, rounds = (QUICK, 2) if arguments.quick else (FULL, arguments.rounds)
    clock = Clock(device)
    result = {**gpu_environment(device), "size": asdict(size), "failed": failed, "losses": [], "rows": []}
    result |= {"tokens": [], "sinkhorn": [], "host": []}
    if "losses" in arguments.only:
        for case in CASES:
            result["losses"].append(measure_loss(case, size, device, rounds, clock))
    if "rows" in arguments.only:
        for columns in (FULL.vocab, 262144) if not arguments.quick else (size.vocab,):
            for backend in _row_backends(device):
                for case in ROW_CASES:
                    if case.name.startswith("fused") and not hasattr(backend, "fused"):
                        continue
                    many = 8 if arguments.quick else 2**28 // columns
                    result["rows"].append(measure_rows(case, backend, many, columns, device, rounds, clock))
    if "tokens" in arguments.only:
        tokens, length = (300, 150) if arguments.quick else (1 << 20, 1024)
        for name in OBJECTIVES:
            result["tokens"].append(measure_tokens(name, tokens, length, device, rounds, clock))
    if "sinkhorn" in arguments.only:
        result["sinkhorn"] += measure_sinkhorn(device, arguments.quick, rounds, clock)
    if "host" in arguments.only:
        for case in CASES:
            if case.name in ("cross_entropy", "jsd", "logprobs_no_grad"):
                result["host"].append(measure_host(case, device, 1 if arguments.quick else rounds))
    print(table(result))
    if not arguments.quick and any(result[part] for part in ("losses", "rows", "tokens", "sinkhorn", "host")):
        path = result_path(result)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path.relative_to(ROOT)}")
    if not arguments.quick and len({one["backend"] for one in result["rows"]}) > 1:
        keep_for_dispatch(result)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _row_backends(device: torch.device) -> list:
    found = [b for b in backends.available().values() if not isinstance(b, str) and b.LOW_PRECISION]
    return [b for b in found if b.NAME != "torch" and b.supports(device, torch.float32)]


if __name__ == "__main__":
    sys.exit(main())
