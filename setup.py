"""Builds the wheel from python/ (the package) and csrc/ (its one extension, logitless._C).

The extension needs a C++17 compiler of the GCC or Clang family. Without one, or if the build fails, the wheel is pure
Python and the torch backend serves; LOGITLESS_NO_EXTENSION=1 asks for that. CXX, CXXFLAGS and LDFLAGS are honoured.

The CUDA kernels are part of it where nvcc is found (CUDA_HOME, PATH, /usr/local/cuda). LOGITLESS_CUDA=0 leaves them
out, 1 insists on them; LOGITLESS_CUDA_ARCHS="80;90" says for which architectures, the last also as PTX. CUDA's runtime
is linked statically, and nothing of torch is: the module loads beside any torch, and on machines without a driver.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGES = {
    "logitless": "python/logitless",
    "logitless.kernels": "kernels",
}  # a package and its folder; subpackages are found
DATA = {"logitless": ["py.typed"], "logitless.backends": ["*.json"]}

# The slowest first: ninja begins with them.
FOLDERS = ("csrc/cuda/*.cu", "csrc/*.cpp", "csrc/cpu/*.cpp")
SOURCES = [
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted(ROOT.glob(folder), key=lambda path: -path.stat().st_size)
]

# Sources in csrc/cpu are compiled once per instruction set; the best one is chosen at run time.
COPIES = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    COPIES |= {
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma",
    }

# Contraction stays off: s = outer * z must be rounded the same way wherever it is computed.
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra"
NVCCFLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas -v --threads 2"
FAILURES = (OSError, ImportError)  # a tool is missing, or says no
ARCHITECTURES = "80;90;100;120"
RUNTIME = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")  # where a toolkit has its static libraries
# Nothing but the module's entry is seen from outside: another extension may have its own copy of CUDA's static runtime,
# and templates of the standard library are visible whatever -fvisibility says.
EXPORTS = "{ global: PyInit__C; local: *; };"
LDFLAGS = {"darwin": "-bundle -undefined dynamic_lookup -Wl,-x -Wl,-exported_symbol,_PyInit__C"}.get(
    sys.platform, "-shared -s -pthread -ldl -Wl,--version-script=exports.map"
)


class Cuda:
    """nvcc, what to compile for, and the static runtime."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        known = self._output("--list-gpu-arch").replace("compute_", "").split()
        asked = os.environ.get("LOGITLESS_CUDA_ARCHS")
        archs = asked.split(";") if asked else [arch for arch in ARCHITECTURES.split(";") if arch in known]
        if not archs or not set(archs) <= set(known):
            raise FileNotFoundError(f"{nvcc} knows the architectures {known}, not {asked or ARCHITECTURES}")
        targets = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
        self.flags = " ".join([NVCCFLAGS, *(f"-gencode arch=compute_{arch},code={code}" for arch, code in targets)])
        tops = [line[7:] for line in self._output("--dryrun", "-c", "x.cu").splitlines() if line.startswith("#$ TOP=")]
        found = [file for top in tops for place in RUNTIME for file in Path(top).glob(f"{place}/libcudart_static.a")]
        if not found:
            raise FileNotFoundError(f"{nvcc} comes without libcudart_static.a")
        self.runtime = found[0].resolve()

    def _output(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise OSError(f"{self.nvcc} {arguments[0]} fails: {done.stdout.strip()}")
        return done.stdout


def find_cuda() -> "Cuda | None":
    wanted = os.environ.get("LOGITLESS_CUDA")
    if wanted == "0":
        return None
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    places = [os.path.join(home, "bin") for home in homes if home] + [os.environ.get("PATH"), "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    try:
        if nvcc is None:
            raise FileNotFoundError("nvcc is neither in CUDA_HOME nor on the PATH nor in /usr/local/cuda")
        return Cuda(nvcc)
    except OSError as error:
        if wanted == "1":
            raise RuntimeError(f"LOGITLESS_CUDA=1: {error}") from error
        print(f"{'WARNING: ' if nvcc else ''}logitless: without CUDA kernels ({error})", file=sys.stderr)
        return None


def escaped(path: Path) -> str:
    """A path in a build statement of ninja, which then quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def remove_old_extension() -> None:
    """An editable install loads the extension from the source tree, also one that an earlier build left there."""
    (ROOT / "python/logitless" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)


class FreshBuild(build_py):
    """Without what an earlier build left behind: modules since removed, and an extension that now fails to build."""

    def run(self) -> None:
        if self.editable_mode:
            remove_old_extension()
        else:
            shutil.rmtree(Path(self.build_lib) / "logitless", ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """One build.ninja for the extension: parallel, and incremental through the compiler's dependency files."""

    def run(self) -> None:
        if self.inplace:
            remove_old_extension()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = find_cuda()
        if cuda is not None:
            try:
                return self._ninja(ext, target, cuda)
            except FAILURES as error:
                if os.environ.get("LOGITLESS_CUDA") == "1":
                    raise RuntimeError(f"LOGITLESS_CUDA=1: {error}") from error
                print(f"WARNING: logitless: the CUDA kernels were not built ({error})", file=sys.stderr)
        try:
            self._ninja(ext, target, None)
        except FAILURES as error:
            target.unlink(missing_ok=True)  # of an earlier build, which --inplace would copy
            print(
                f"WARNING: logitless: the C++ kernels were not built ({error}); "
                "the package works without them, on its slower torch backend",
                file=sys.stderr,
            )

    def _ninja(self, ext: Extension, target: Path, cuda: Cuda | None) -> None:
        import pybind11

        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
        for tool, found in {"a C++ compiler": compiler, "ninja": ninja}.items():
            if not found:
                raise FileNotFoundError(f"{tool} is not on the PATH")
        includes = [f"-isystem {shlex.quote(path)}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        flags = " ".join([CXXFLAGS, os.environ.get("CXXFLAGS", ""), *includes])
        lines = [
            f"rule compile\n  command = {compiler} {flags} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
            f"rule link\n  command = {compiler} $in -o $out {LDFLAGS} $libraries {os.environ.get('LDFLAGS', '')}",
            "  description = $out",
        ]
        if cuda:  # what ptxas says of registers and spills is kept: a test reads it
            host = f"-ccbin {compiler}" if len(compiler.split()) == 1 else ""  # "ccache g++" is no program
            command = f"{shlex.quote(cuda.nvcc)} {cuda.flags} {host} -MD -MF $out.d -c $in -o $out > $out.report 2>&1"
            lines += [
                f"rule cuda\n  command = {command} || {{ cat $out.report; false; }}",
                "  depfile = $out.d\n  deps = gcc\n  description = $out",
            ]
        objects = []
        for source in ext.sources:
            path = escaped(ROOT.resolve() / source)
            if source.endswith(".cu"):
                if cuda:
                    objects.append(f"cuda-{Path(source).stem}.o")
                    lines.append(f"build {objects[-1]}: cuda {path}")
                continue
            copies = COPIES if source.startswith("csrc/cpu/") else {"": "-DLL_CUDA" if cuda else ""}
            for copy, copy_flags in copies.items():
                objects.append("-".join(filter(None, (Path(source).stem, copy))) + ".o")
                define = f"-DLL_COPY={copy}" if copy else ""
                lines.append(f"build {objects[-1]}: compile {path}\n  flags = {copy_flags} {define}")
        libraries = f"{shlex.quote(str(cuda.runtime))} -lrt" if cuda else ""
        lines.append(f"build {escaped(target)}: link {' '.join(objects)} | exports.map\n  libraries = {libraries}\n")
        # Not self.build_temp: an editable install makes a new one each time, and nothing would be incremental.
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "exports.map").write_text(EXPORTS)
        (folder / "build.ninja").write_text("\n".join(lines))
        if subprocess.run([ninja, "-C", str(folder)]).returncode:
            raise OSError("a compiler failed; what it says is above")


setup(
    packages=[
        package
        for name, folder in PACKAGES.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ],
    package_dir=PACKAGES,
    package_data=DATA,
    ext_modules=(
        [] if os.environ.get("LOGITLESS_NO_EXTENSION") == "1" else [Extension("logitless._C", SOURCES, optional=True)]
    ),
    cmdclass={"build_py": FreshBuild, "build_ext": NinjaBuild},
)
