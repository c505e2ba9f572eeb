"""Builds the native kernels along with the package; everything else is said in pyproject.toml.

OCTAVO_NO_NATIVE=1 leaves them out: every op then runs on the reference, in plain torch. CXX names the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = sorted(Path("csrc").glob("*.cpp"))
HEADERS = sorted([*Path("csrc").glob("*.h"), *Path("csrc/bind").glob("*.h")])

# No -march and no -fopenmp: instruction sets are switched on inside the files that use them, threads are torch's. -O2
# and not more, for at -O3 GCC keeps the accumulators of the register tiles in memory. The warnings are false ones, of
# GCC's own AVX-512 headers.
FLAGS = "-std=c++17 -O2 -fPIC -fvisibility=hidden -Wno-ignored-attributes -Wno-uninitialized -Wno-maybe-uninitialized"
TORCH_API = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10's stable ABI: one build serves that and later ones

LEAST_GCC = 11  # the first that knows AVX-VNNI
WITHOUT = "set OCTAVO_NO_NATIVE=1 to install without native kernels (every op then runs on the slower reference)"


def torch_folder() -> Path:
    """Where torch is, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        sys.exit(
            "octavo's native kernels are built against torch's headers, and torch is not installed here: "
            f"pip install torch, or leave out --no-build-isolation, and pip builds next to one; or {WITHOUT}"
        )
    return Path(found.origin).parent


def check_compiler(compiler: list[str]) -> None:
    """That it knows the instruction sets, and lets a file switch them on by pragma: clang does not."""
    lines = _run([*compiler, "-dM", "-E", "-x", "c++", os.devnull]).splitlines()
    macros = {name: value for _, name, value in (line.split(" ", 2) for line in lines if line.count(" ") > 1)}
    clang, gcc = macros.get("__clang_major__"), macros.get("__GNUC__", "0")
    if "__x86_64__" in macros and (clang or int(gcc) < LEAST_GCC):
        sys.exit(
            f"octavo's native kernels need GCC {LEAST_GCC} or later, and {shlex.join(compiler)!r} is "
            f"{f'clang {clang}' if clang else f'GCC {gcc}'}: install g++ and set CXX=g++; {WITHOUT}"
        )


def compile_kernels(target: Path, folder: Path) -> None:
    """csrc/*.cpp -> target; objects go to `folder`."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    check_compiler(compiler)
    torch = torch_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.stem}.o")
        only_torch = [TORCH_API, f"-isystem{torch / 'include'}"] if source.stem == "bind" else []
        _run([*compiler, *FLAGS.split(), *only_torch, "-c", str(source), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    unfinished = target.with_suffix(".part")
    _run([*compiler, "-shared", "-o", str(unfinished), *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"])
    unfinished.replace(target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(
            f"octavo's native kernels need a C++17 compiler, and {command[0]!r} is not one: install g++; {WITHOUT}"
        )
    if done.returncode:
        sys.exit(f"{done.stderr}\noctavo's native kernels did not compile (above: {shlex.join(command)}); {WITHOUT}")
    return done.stdout


class BuildKernels(build_ext):
    """The library is no Python module: torch loads it, so one build serves every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [Path(__file__), *SOURCES, *HEADERS]
        newest = max(path.stat().st_mtime for path in inputs)
        if self.force or not target.is_file() or target.stat().st_mtime < newest:
            compile_kernels(target, Path(self.build_temp) / "octavo")


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if os.environ.get("OCTAVO_NO_NATIVE", "0") not in ("", "0"):
    setup()
else:
    kernels = Extension("octavo.ops.liboctavo", [str(path) for path in SOURCES])
    setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel})
