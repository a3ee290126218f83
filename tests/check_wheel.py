"""Checks a wheel and a source distribution; `make wheel` builds both and runs it.

    python tests/check_wheel.py dist/*.whl dist/*.tar.gz --architectures "80;90;100;120"

It runs itself again in environments that hold the wheel:

    python -I tests/check_wheel.py --alone      nothing but the wheel: its kernels called through raw pointers
    python -I tests/check_wheel.py --losses     torch too: a loss and its gradients (`make wheel-compat`)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from array import array
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = f"logitless/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
MOST_BYTES = 20e6
# What every manylinux system has. CUDA's runtime is inside, the driver and OpenMP are looked up when they are needed.
SYSTEM_LIBRARIES = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d|ld-linux-.*"
FOREIGN_LIBRARIES = ("libcuda", "libcudart", "libtorch", "libc10", "libgomp")
NOT_IN_SDIST = {".gitignore", ".ci/run"}


def expect(condition: object, message: str) -> None:
    if not condition:
        sys.exit(f"{Path(__file__).name}: {message}")


def expect_close(found: float, wanted: float, what: str, tolerance: float = 2e-6) -> None:
    expect(abs(found - wanted) <= tolerance * max(1.0, abs(wanted)), f"{what}: {found}, wanted {wanted}")


# ------------------------------------------------------------------------------------------------ what is in the files


def files_of(archive: zipfile.ZipFile) -> set[str]:
    return {name for name in archive.namelist() if not name.endswith("/")}


def check_contents(wheel: Path) -> None:
    """The package's files as they are in the source tree, the extension, and nothing else."""
    wanted = {}
    for package, folder in {"logitless": ROOT / "python/logitless", "logitless/kernels": ROOT / "kernels"}.items():
        files = [*folder.rglob("*.py"), folder / "py.typed", *(folder / "backends").glob("*.json")]
        wanted |= {f"{package}/{file.relative_to(folder).as_posix()}": file for file in files if file.exists()}
    expect("logitless/py.typed" in wanted, "python/logitless/py.typed is missing")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in files_of(archive) if ".dist-info/" not in name}
        difference = sorted(names ^ {*wanted, EXTENSION})
        expect(not difference, f"{wheel.name}: missing, or should not be there: {difference}")
        differing = [name for name, file in wanted.items() if archive.read(name) != file.read_bytes()]
        expect(not differing, f"{wheel.name}: not as in the source tree: {differing}")
    size = wheel.stat().st_size
    expect(size < MOST_BYTES, f"{wheel.name}: {size} bytes")
    print(f"{wheel.name}: {size / 1e6:.2f} MB, {len(wanted)} files and the extension")


def check_tag(wheel: Path) -> None:
    """auditwheel has found nothing that manylinux lacks, and put nothing in (check_contents)."""
    tags = re.findall(r"manylinux_\d+_\d+_\w+?(?=\.|$)", wheel.stem)
    expect(tags, f"{wheel.name}: no manylinux tag")
    print(f"tags: {' '.join(tags)}")


def check_library(library: Path) -> None:
    """It needs the system's libraries only, and shows its entry only."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        elf = ELFFile(file)
        tags = list(elf.get_section_by_name(".dynamic").iter_tags())
        symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    needed = sorted(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED")
    strange = [name for name in needed if not re.fullmatch(SYSTEM_LIBRARIES, name)]
    expect(not strange, f"{library.name} needs {strange}")
    expect(not {"DT_RPATH", "DT_RUNPATH"} & {tag.entry.d_tag for tag in tags}, f"{library.name} has a search path")
    shown = {symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"}
    expect(shown == {"PyInit__C"}, f"{library.name} shows {sorted(shown)}")
    print(f"needs: {' '.join(needed)}; shows: PyInit__C")


def check_architectures(library: Path, architectures: list[str]) -> None:
    """Machine code for each architecture, and PTX for the last."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    tool = shutil.which("cuobjdump") or (packaged[-1] if packaged else None)
    expect(tool, "no cuobjdump: neither on the PATH nor as the package nvidia-cuda-cuobjdump")

    def found(kind: str) -> set[str]:
        listed = subprocess.run([tool, f"--list-{kind}", library], check=True, capture_output=True, text=True).stdout
        return set(re.findall(r"\.sm_(\w+)\.", listed))

    code, ptx = found("elf"), found("ptx")
    expect(code == set(architectures), f"machine code for {sorted(code)}, wanted {architectures}")
    expect(ptx == {architectures[-1]}, f"PTX for {sorted(ptx)}, wanted {architectures[-1]}")
    print(f"machine code: {' '.join(architectures)}; PTX: {architectures[-1]}")


def check_sdist(sdist: Path, wheel: Path) -> None:
    """Everything under version control is in it, and the same wheel comes out of it (for one architecture)."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        (tree,) = Path(folder).iterdir()
        if (ROOT / ".git").exists():
            listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True, text=True)
            lost = {n for n in listed.stdout.split("\0")[:-1] if (ROOT / n).exists() and not (tree / n).exists()}
            expect(lost <= NOT_IN_SDIST, f"{sdist.name}: without {sorted(lost - NOT_IN_SDIST)}; see MANIFEST.in")
        started = time.monotonic()
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, tree]
        environment = os.environ | {"LOGITLESS_CUDA": "1", "LOGITLESS_CUDA_ARCHS": "90"}
        done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        expect(done.returncode == 0, f"{sdist.name} does not build:\n{done.stdout}")
        (rebuilt,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(rebuilt) as other:
            difference = sorted(files_of(one) ^ files_of(other))
            expect(not difference, f"{sdist.name} builds another wheel: {difference}")
            same = [name for name in files_of(one) if name != EXTENSION and not name.endswith(("/RECORD", "/WHEEL"))]
            differing = sorted(name for name in same if one.read(name) != other.read(name))
            expect(not differing, f"{sdist.name} builds another wheel: {differing} differ")
    print(f"{sdist.name}: complete; builds the same wheel ({time.monotonic() - started:.0f} s for one architecture)")


# --------------------------------------------------------------------------------------------------- what the files do


def check_alone(wheel: Path) -> None:
    """A new environment that holds the wheel only, and no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin/python")
        install = [python, "-m", "pip", "--quiet", "install", "--disable-pip-version-check", "--no-index", "--no-deps"]
        subprocess.run([*install, wheel], check=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        expect(subprocess.run([python, "-I", __file__, "--alone"], env=environment).returncode == 0, "--alone failed")


def check_losses(wheel: Path) -> None:
    """Beside the torch of this environment, in place of an installed logitless."""
    if importlib.util.find_spec("torch") is None:
        print("not checked: losses (no torch in this environment)")
        return
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run([sys.executable, __file__, "--losses", "--under", folder], env=environment)
        expect(done.returncode == 0, "--losses failed")


def loaded_libraries() -> set[str]:
    return {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}


def losses(under: str) -> None:
    """A loss and its gradients against torch's, on the C++ kernels."""
    import warnings

    warnings.filterwarnings("error", module="logitless")
    warnings.filterwarnings("error", message="logitless")
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

    import logitless
    from logitless.backends import select

    where = Path(logitless.__file__)
    expect(where.is_relative_to(Path(under).resolve()), f"this is not the wheel: {where}")
    expect(select(torch.device("cpu"), torch.float32).NAME == "cpu", "the C++ kernels do not serve")
    torch.manual_seed(0)
    hidden = torch.randn(50, 32, requires_grad=True)
    weight = torch.randn(1000, 32, requires_grad=True)
    targets = torch.randint(1000, (50,))
    loss = logitless.linear_cross_entropy(hidden, weight, targets)
    found = [loss, *torch.autograd.grad(loss, (hidden, weight))]
    loss = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets)
    wanted = [loss, *torch.autograd.grad(loss, (hidden, weight))]
    for name, x, y in zip(("loss", "hidden.grad", "weight.grad"), found, wanted):
        error = ((x - y).norm() / y.norm()).item()
        expect(error < 1e-6, f"{name}: relative error {error:.1e}")
    print(f"losses and gradients agree with those of torch {torch.__version__} ({where.parent})")


def alone() -> None:
    """The extension loads without torch and without a driver; its kernels take addresses."""
    expect(importlib.util.find_spec("torch") is None, "torch is here: this environment should hold the wheel only")
    (file,) = [file for file in importlib.metadata.files("logitless") if str(file) == EXTENSION]
    spec = importlib.util.spec_from_file_location("logitless._C", file.locate())
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    strange = [name for name in loaded_libraries() if name.startswith(FOREIGN_LIBRARIES)]
    expect(not strange, f"importing the extension loads {strange}")
    for isa in library.isas():
        library.force_isa(isa)
        for columns in (1, 7, 1000):
            check_kernels(library, columns)
    problem = library.cuda.problem(0)
    expect(problem and isinstance(problem, str), f"cuda.problem(0) without a GPU: {problem!r}")
    for name in ("statistics", "generic", "gradient", "fused"):
        try:
            chunk = library.cuda.Chunk(z=0, stride=1, type=0, bias=0, outer=0, inner=None, floor=0)
            getattr(library.cuda, name)(device=0, stream=0, rows=1, columns=1, student=chunk, teacher=chunk)
        except RuntimeError as error:
            expect(problem in str(error), f"cuda.{name} without a GPU: {error}, not {problem}")
        else:
            expect(False, f"cuda.{name} without a GPU: no error")
    print(f"without torch: {' '.join(library.isas())} kernels agree with float64; without a GPU: {problem!r}")


def check_kernels(library, columns: int) -> None:
    """statistics, generic and gradient of a few rows, on arrays of Python, against float64."""
    rows, outer, beta, c = 3, 0.75, 0.25, 0.5
    random.seed(columns)

    def vector(length: int, kind: str = "f", value: float | None = None) -> array:
        return array(kind, [random.gauss(0, 2) if value is None else value for _ in range(length)])

    def address(values: array) -> int:
        return values.buffer_info()[0]

    z, t, bias = vector(rows * columns), vector(rows * columns), vector(columns)
    scale, cs, minus, betas = (
        vector(rows, value=outer),
        vector(rows, value=c),
        vector(rows, value=-c),
        vector(rows, value=beta),
    )
    targets = array("q", [random.randrange(columns) for _ in range(rows)])
    student = library.Chunk(z=address(z), stride=columns, bias=address(bias), outer=address(scale), inner=None, floor=0)
    teacher = library.Chunk(z=address(t), stride=columns, bias=0, outer=address(scale), inner=None, floor=0)
    names = ("max", "sum", "target", "first", "teacher_max", "teacher_sum")
    sums = {name: vector(rows, "d", 0) for name in names}
    library.statistics(
        rows,
        columns,
        student,
        teacher,
        targets=address(targets),
        weights=0,
        accumulators={name: address(values) for name, values in sums.items()},
        threads=2,
    )
    normalizers = {
        "max": array("f", sums["max"]),
        "log_sum": array("f", map(math.log, sums["sum"])),
        "teacher_max": array("f", sums["teacher_max"]),
        "teacher_log_sum": array("f", map(math.log, sums["teacher_sum"])),
    }
    normalizers_at = {name: address(values) for name, values in normalizers.items()}
    value, slope, out = vector(rows, "d", 0), vector(rows, "d", 0), vector(rows * columns, value=0)
    library.generic(
        rows,
        columns,
        student,
        teacher,
        normalizers=normalizers_at,
        divergence="jsd",
        parameters=[address(betas)],
        value=address(value),
        slope=address(slope),
        threads=2,
    )
    library.gradient(
        rows,
        columns,
        student,
        None,
        normalizers=normalizers_at,
        coefficients={"one_hot": address(minus), "q": address(cs)},
        divergences=[],
        targets=address(targets),
        weights=0,
        rows_gradient=(0, 0),
        live=0,
        out=(address(out), columns),
        threads=2,
    )
    for i in range(rows):
        row = slice(i * columns, (i + 1) * columns)
        s = [outer * (x + b) for x, b in zip(z[row], bias)]
        most, teacher_most = max(s), max(t[row]) * outer
        weights = [math.exp(x - most) for x in s]
        teacher_weights = [math.exp(outer * x - teacher_most) for x in t[row]]
        total, teacher_total = math.fsum(weights), math.fsum(teacher_weights)
        q, p = [w / total for w in weights], [w / teacher_total for w in teacher_weights]
        mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q)]
        forward = math.fsum(a * math.log(a / m) for a, m in zip(p, mixed))
        backward = math.fsum(b * math.log(b / m) for b, m in zip(q, mixed))
        wanted = {
            "max": most,
            "sum": total,
            "target": s[targets[i]],
            "first": math.fsum(w * (x - most) for w, x in zip(weights, s)),
            "teacher_max": teacher_most,
            "teacher_sum": teacher_total,
        }
        for name in names:
            expect_close(sums[name][i], wanted[name], f"{library.isa()}, {columns} columns, {name}")
        expect_close(value[i], beta * forward + (1 - beta) * backward, f"{library.isa()}, {columns} columns, jsd")
        expect_close(slope[i], (1 - beta) * backward, f"{library.isa()}, {columns} columns, jsd's slope")
        for j, found in enumerate(out[row]):
            exact = outer * c * (q[j] - (j == targets[i]))
            expect_close(found, exact, f"{library.isa()}, {columns} columns, gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path)
    parser.add_argument("sdist", nargs="?", type=Path)
    parser.add_argument("--architectures", default="80;90;100;120")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--under", default=sys.prefix, help="where --losses must find logitless")
    given = parser.parse_args()
    if given.alone:
        return alone()
    if given.losses:
        return losses(given.under)
    if given.wheel is None or given.sdist is None:
        parser.error("a wheel and a source distribution are needed")
    check_contents(given.wheel)
    check_tag(given.wheel)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(given.wheel) as archive:
        library = Path(archive.extract(EXTENSION, folder))
        check_library(library)
        check_architectures(library, given.architectures.split(";"))
    check_alone(given.wheel)
    check_losses(given.wheel)
    check_sdist(given.sdist, given.wheel)


if __name__ == "__main__":
    main()
