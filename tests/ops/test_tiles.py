"""The AMX kernels, on machines without AMX too: built over tiles emulated in C++, against loops in int64 and double."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [str(CSRC / name) for name in ("amx.cpp", "avx512.cpp", "test/tiles.cpp")]
FLAGS = "-std=c++17 -O2 -g1 -Wno-ignored-attributes -Wno-uninitialized -Wno-maybe-uninitialized -DOCTAVO_EMULATED_TILES"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
LACKS_AVX512 = 77


def compile_to(program: Path, flags: str, sources: list[str]) -> subprocess.CompletedProcess[str]:
    command = [*shlex.split(os.environ.get("CXX", "c++")), *flags.split(), *sources, "-o", str(program)]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler: {command[0]}")
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["", SANITIZERS], ids=["plain", "sanitized"])
def test_shapes_tails_and_ends_of_memory(tmp_path: Path, sanitizers: str) -> None:
    program, empty = tmp_path / "tiles", tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    if compile_to(program, sanitizers, [str(empty)]).returncode:
        pytest.skip(f"the compiler has no {sanitizers}")
    built = compile_to(program, f"{FLAGS} {sanitizers}", SOURCES)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    if ran.returncode == LACKS_AVX512:
        pytest.skip("this processor has no AVX-512, which stands beside the tiles and is not emulated")
    assert ran.returncode == 0, ran.stderr
