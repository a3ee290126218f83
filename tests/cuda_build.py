"""Builds the CUDA kernels for the CPU (tests/cuda_host), once per state of their sources, and finds CUDA's headers."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from logitless.backends import cuda

ROOT = Path(__file__).parent.parent
HOST = ROOT / "tests" / "cuda_host"
SOURCES = (*(ROOT / "csrc/cuda").glob("*.cu"), HOST / "module.cpp")
FLAGS = "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off"
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-maybe-uninitialized"  # "unroll"; pybind11 under sanitizers


def headers() -> Path | None:
    """The folder of cuda_runtime.h."""
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"):
        if home and (Path(home) / "include/cuda_runtime.h").exists():
            return Path(home) / "include"
    return None


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def missing() -> str | None:
    if headers() is None:
        return "no CUDA headers: neither CUDA_HOME nor nvcc nor /usr/local/cuda leads to cuda_runtime.h"
    if compiler() is None or os.uname().machine not in ("x86_64", "aarch64"):
        return "no C++ compiler"
    return None if importlib.util.find_spec("pybind11") else "no pybind11"


def build(extra: str = "") -> Path:
    """The module cuda_host, in a folder named for its sources and flags."""
    import pybind11

    files = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cu*"), *HOST.iterdir()]
    digest = hashlib.sha256(f"{compiler()} {FLAGS} {extra}".encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / f"cuda_host-{digest.hexdigest()[:16]}"
    target = folder / "cuda_host.so"
    if target.exists():
        return target
    for old in folder.parent.glob("cuda_host-*"):
        if not extra:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{HOST}", *(f"-isystem{p}" for p in (sysconfig.get_path("include"), pybind11.get_include()))]
    common = [compiler(), *FLAGS.split(), *WARNINGS.split(), *extra.split(), *includes, f"-isystem{headers()}"]
    started = [
        subprocess.Popen(
            [*common, "-x", "c++", "-include", "cuda_host.h", "-c", source, "-o", folder / f"{source.stem}.o"]
        )
        for source in SOURCES
    ]
    if any([process.wait() for process in started]):
        raise RuntimeError("the CUDA kernels do not compile for the CPU")
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    fresh = folder / "cuda_host.new"
    subprocess.run([compiler(), "-shared", *extra.split(), *objects, "-o", fresh], check=True)
    return fresh.replace(target)


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(monkeypatch: pytest.MonkeyPatch, host: ModuleType, number: int = 0, **properties: int) -> None:
    """The cuda backend calls these kernels, which believe to be on device `number` of such properties."""
    shared = {"shared_per_block": 227 << 10, "shared_per_processor": 228 << 10, "most_cluster": 8}
    properties = shared | properties
    host.device(clusters=properties["most_cluster"] > 0, **properties)
    monkeypatch.setattr(cuda, "_kernels", host)
    monkeypatch.setattr(cuda, "_queue", lambda _: {"device": number, "stream": 0})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
