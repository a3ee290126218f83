"""Peak memory of one call, in a process of its own: ``python -m benchmarks.memory CASE CONTENDER`` prints JSON.

The kernel's high-water mark of resident memory (VmHWM) is reset just before the call; what it says after the call, less
what was resident before, is everything that the call took: gradients, accumulators, buffers, and what libraries keep.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.cases import BY_NAME, FULL, MEMORY_SLACK, QUICK, Inputs, step
from logitless.engine import plan as planning

ROOT = Path(__file__).parent.parent
CLEAR_REFS = Path("/proc/self/clear_refs")


def measure(case: str, contender: str, *, repeats: int, quick: bool) -> dict | None:
    """The worst of ``repeats`` fresh processes, since addresses decide what the allocator can use again.

    ``samples`` holds every peak, the rest is of the worst, in bytes. ``peak``: beyond what was resident before;
    ``gradients``: their size; ``beyond``: the peak less gradients and (ours only) ``accumulators``; ``workspace`` and
    ``bound`` (ours only): the plan's chunk buffers, and the target of ``beyond``. None where the system does not tell.
    """
    if not CLEAR_REFS.exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", case, contender] + ["--quick"] * quick
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout))
    return {"samples": [one["peak"] for one in found], **max(found, key=lambda one: one["beyond"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=BY_NAME)
    parser.add_argument("contender")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    case = BY_NAME[arguments.case]
    forward = case.forwards()[arguments.contender]
    step(forward, case.inputs(QUICK))  # imports, thread pools
    inputs = case.inputs(QUICK if arguments.quick else FULL)
    gc.collect()
    peak, plans = _observed(lambda: step(forward, inputs))
    print(json.dumps(_summary(peak, inputs, plans)))


def _observed(call: Callable[[], object]) -> tuple[int, list[planning.Plan]]:
    """(peak bytes beyond what was resident before the call, the plans that the engine made in it)."""
    plans = []
    make = planning.plan

    def recording(*arguments) -> planning.Plan:
        plans.append(make(*arguments))
        return plans[-1]

    planning.plan = recording
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before, plans


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def _summary(peak: int, inputs: Inputs, plans: list[planning.Plan]) -> dict[str, int]:
    gradients = sum(gradient.nbytes for gradient in inputs.gradients)
    if not plans:
        return {"peak": peak, "gradients": gradients, "beyond": peak - gradients}
    workspace = max(plan.workspace for plan in plans)
    accumulators = max(plan.accumulators for plan in plans)
    return {
        "peak": peak,
        "gradients": gradients,
        "accumulators": accumulators,
        "beyond": peak - gradients - accumulators,
        "workspace": workspace,
        "bound": workspace + MEMORY_SLACK,
    }


if __name__ == "__main__":
    main()
