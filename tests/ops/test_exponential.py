"""exp and tanh of the native kernels, alone, against those of double."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "test" / "exponential.cpp"
FLAGS = "-std=c++17 -O2 -Wno-ignored-attributes -Wno-uninitialized -Wno-maybe-uninitialized"
LACKS_AVX512 = 77


@pytest.mark.slow
def test_every_number_is_right_to_a_few_units_of_the_last_place(tmp_path: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    program = tmp_path / "exponential"
    built = subprocess.run([*compiler, *FLAGS.split(), str(SOURCE), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    if ran.returncode == LACKS_AVX512:
        pytest.skip("this processor has no AVX-512")
    assert ran.returncode == 0, ran.stderr
