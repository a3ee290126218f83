"""What a result must say of where it was measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

import logitless
from logitless import backends
from logitless.backends import cpu

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict:
    """Device, versions, commit and threads of this process."""
    return {
        "device": cpu_model(),
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "versions": {
            "logitless": logitless.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **_versions("pot", "geomloss"),
        },
        "backend": backends.select(torch.device("cpu"), torch.float32).NAME,
        "instruction_set": None if cpu.PROBLEM else cpu._C.isa(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # runnable tasks of the last minute, ours included
    }


def gpu_environment(device: torch.device) -> dict:
    """The same of a GPU (or, for a dry run, of none): device, driver and software."""
    found = {
        "device": cpu_model(),
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "versions": {
            "logitless": logitless.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
        found["versions"] |= {"cuda": torch.version.cuda, "cublas": torch.backends.cuda.preferred_blas_library().name}
    if importlib.util.find_spec("triton"):
        found["versions"]["triton"] = importlib.metadata.version("triton")
    return found


def cpu_model() -> str:
    """The processor's name, with family and model numbers where Linux tells: virtual ones often have no other name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} ({fields.get('cpu family', '?')}/{fields.get('model', '?')})"


def result_path(environment: dict) -> Path:
    """results/<device>-<date>.json, numbered where that exists."""
    device = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", environment["device"].lower())).strip("-")
    path = RESULTS / f"{device}-{environment['date']}.json"
    again = 2
    while path.exists():
        path = RESULTS / f"{device}-{environment['date']}-{again}.json"
        again += 1
    return path


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
