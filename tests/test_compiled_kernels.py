"""Shipped Triton kernels compile for every target, spill nothing and fit its shared memory: without any GPU.

Compiling and interpreting exclude each other in one process, so tests/compile_kernels.py does it in another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from logitless.backends import triton

pytestmark = pytest.mark.skipif(triton.PROBLEM is not None, reason=str(triton.PROBLEM))

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
OF_TOKENS = 16
KERNELS = (
    36 + 2 * len(triton._kernels.divergences.NUMBERS) + OF_TOKENS if triton.PROBLEM is None else 0
)  # variants of which each target gets one tile


def compiled(*arguments: str) -> list[dict]:
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arguments", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=["default", "all"])
def test_kernels_compile_for_every_target(arguments):
    found = compiled(*arguments)
    assert len(found) >= KERNELS * len(SHARED)
    assert {one["target"] for one in found} == set(SHARED)
    assert not [one for one in found if one["spills"] > 0]
    assert not [one for one in found if one["shared"] > SHARED[one["target"]]]
