"""Builds the wheel from python/ (the package) and csrc/ (its one extension, logitless._C).

The extension needs a C++17 compiler of the GCC or Clang family. Without one, or if the build fails, the wheel is pure
Python and the torch backend serves; LOGITLESS_NO_EXTENSION=1 asks for that. CXX, CXXFLAGS and LDFLAGS are honoured.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGES = {"logitless": "python/logitless", "logitless.kernels": "kernels"}  # a package and its folder; subpackages are found

# csrc/cpu/rows.cpp is compiled once per instruction set; the best one is chosen at run time.
COPIES = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    COPIES |= {
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma",
    }

# Contraction stays off: s = outer * z must be rounded the same way wherever it is computed.
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra"
LDFLAGS = {"darwin": "-bundle -undefined dynamic_lookup -Wl,-x"}.get(sys.platform, "-shared -s -pthread -ldl")


class NinjaBuild(build_ext):
    """One build.ninja for the extension: parallel, and incremental through the compiler's dependency files."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._ninja(ext, Path(self.get_ext_fullpath(ext.name)).resolve())
        except (OSError, subprocess.CalledProcessError) as error:
            (ROOT / "python" / self.get_ext_filename(ext.name)).unlink(missing_ok=True)  # an older one would be loaded
            print(
                f"WARNING: logitless: the C++ kernels were not built ({error}); "
                "the package works without them, on its slower torch backend",
                file=sys.stderr,
            )

    def _ninja(self, ext: Extension, target: Path) -> None:
        import pybind11

        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
        for tool, found in {"a C++ compiler": compiler, "ninja": ninja}.items():
            if not found:
                raise FileNotFoundError(f"{tool} is not on the PATH")
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        flags = " ".join([CXXFLAGS, os.environ.get("CXXFLAGS", ""), *(f"-isystem {path}" for path in includes)])
        lines = [
            f"rule compile\n  command = {compiler} {flags} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
            f"rule link\n  command = {compiler} $in -o $out {LDFLAGS} {os.environ.get('LDFLAGS', '')}",
            "  description = $out",
        ]
        objects = []
        for source in ext.sources:
            copies = COPIES if source == "csrc/cpu/rows.cpp" else {"": ""}
            for copy, copy_flags in copies.items():
                objects.append("-".join(filter(None, (Path(source).stem, copy))) + ".o")
                define = f"-DLL_COPY={copy}" if copy else ""
                lines.append(f"build {objects[-1]}: compile {ROOT.resolve() / source}\n  flags = {copy_flags} {define}")
        lines.append(f"build {target}: link {' '.join(objects)}\n")
        # Not self.build_temp: an editable install makes a new one each time, and nothing would be incremental.
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([ninja, "-C", str(folder)], check=True)


setup(
    packages=[
        package
        for name, folder in PACKAGES.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ],
    package_dir=PACKAGES,
    ext_modules=(
        []
        if os.environ.get("LOGITLESS_NO_EXTENSION") == "1"
        else [Extension("logitless._C", ["csrc/bindings.cpp", "csrc/cpu/rows.cpp"], optional=True)]
    ),
    cmdclass={"build_ext": NinjaBuild},
)
