"""The AMX kernels, on machines without AMX too: built over tiles emulated in C++, against loops in int64 and double."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("amx.cpp", "avx512.cpp", "test/tiles.cpp")
FLAGS = "-std=c++17 -O2 -g1 -Wno-ignored-attributes -Wno-uninitialized -Wno-maybe-uninitialized -DOCTAVO_EMULATED_TILES"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
LACKS_AVX512 = 77


def build(program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    sources = [str(CSRC / name) for name in SOURCES]
    return subprocess.run(
        [*compiler, *FLAGS.split(), *flags, *sources, "-o", str(program)], capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["", SANITIZERS], ids=["plain", "sanitized"])
def test_shapes_tails_and_ends_of_memory(tmp_path: Path, sanitizers: str) -> None:
    program = tmp_path / "tiles"
    built = build(program, *sanitizers.split())
    if built.returncode and sanitizers:
        empty = tmp_path / "empty.cpp"
        empty.write_text("int main() {}")
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if subprocess.run([*compiler, *sanitizers.split(), str(empty), "-o", str(program)], capture_output=True).returncode:
            pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    if ran.returncode == LACKS_AVX512:
        pytest.skip("this processor has no AVX-512, which stands beside the tiles and is not emulated")
    assert ran.returncode == 0, ran.stderr
