"""What setup.py makes of tools that are missing or fail. `make wheel` builds and checks the real thing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("csrc", "kernels", "python", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# Found, of use, and then no source compiles.
NVCC = """#!/bin/sh
case $1 in
    --list-gpu-arch) echo compute_80 ;;
    --dryrun) echo "#$ TOP={home}" ;;
    *) echo "an internal error of the compiler"; exit 2 ;;
esac
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_missing_and_failing_tools(tmp_path):
    for tool in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(tool)
    tree = tmp_path / "a tree"
    tree.mkdir()
    for name in FILES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tree)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(home=tmp_path / "cuda"))
    nvcc.chmod(0o755)
    (tmp_path / "cuda/lib64").mkdir()
    (tmp_path / "cuda/lib64/libcudart_static.a").touch()

    def build(kind: str, **variables: str) -> tuple[str, list[str] | None]:
        """What was said, and the names in the wheel: None where there is none."""
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        command = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LOGITLESS_")}
        environment |= {"CUDA_HOME": str(tmp_path / "cuda"), "CXXFLAGS": "-O0"} | variables
        done = subprocess.run(
            [sys.executable, "-c", command],
            cwd=tree,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            return done.stdout, None
        (wheel,) = out.iterdir()
        with zipfile.ZipFile(wheel) as archive:
            return done.stdout, [wheel.name, *archive.namelist()]

    def in_place() -> list[Path]:
        return list((tree / "python/logitless").glob("_C*"))

    said, names = build("editable")  # nvcc fails midway
    assert "WARNING: logitless: the CUDA kernels were not built" in said and "an internal error" in said
    (extension,) = in_place()
    # elsewhere: a process that has loaded another build of it may be given that one
    look = "import _C; assert _C.isas() and not hasattr(_C, 'cuda')"
    subprocess.run([sys.executable, "-c", look], cwd=extension.parent, check=True)

    said, names = build("editable", LOGITLESS_CUDA="1")  # insisted on
    assert names is None and "LOGITLESS_CUDA=1: a compiler failed" in said
    assert not in_place()  # nor the older one

    (tree / "kernels/removed.py").touch()
    said, names = build("wheel", LOGITLESS_CUDA="0")
    assert any(name.startswith("logitless/_C") for name in names) and "WARNING: logitless" not in said
    assert "logitless/kernels/removed.py" in names
    (tree / "kernels/removed.py").unlink()
    said, names = build("wheel", CXX="false")  # no compiler, where older wheels were built
    assert "WARNING: logitless: the C++ kernels were not built" in said
    assert not any(name.startswith("logitless/_C") or "removed" in name for name in names)
    assert {"logitless/py.typed", "logitless/kernels/statistics.py"} <= set(names)

    said, names = build("wheel", LOGITLESS_NO_EXTENSION="1")
    assert names[0].endswith("-py3-none-any.whl")
