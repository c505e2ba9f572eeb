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
FLAGS = "-std=c++17 -O2 -Wno-ignored-attributes -Wno-uninitialized -Wno-maybe-uninitialized -DOCTAVO_EMULATED_TILES"


@pytest.mark.slow
def test_shapes_tails_and_ends_of_memory(tmp_path: Path) -> None:
    """As they are installed; `make sanitize` does the same under sanitizers."""
    compiler, program = shlex.split(os.environ.get("CXX", "c++")), tmp_path / "tiles"
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    command = [*compiler, *FLAGS.split(), *SOURCES, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if "left out" in ran.stdout:
        pytest.skip(ran.stdout)
    assert ran.stdout.startswith("amx, emulated: every shape right")
