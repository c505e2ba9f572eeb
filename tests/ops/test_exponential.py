"""exp and tanh of the native kernels, alone, against those of double."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ops.native.kernels import ISAS

SOURCE = Path(__file__).parents[2] / "csrc" / "test" / "exponential.cpp"
FLAGS = "-std=c++17 -O2 -Wno-ignored-attributes -Wno-uninitialized -Wno-maybe-uninitialized"
INSTRUCTIONS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512bf16",
}


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTIONS)
def test_every_number_is_right_to_a_few_units_of_the_last_place(isa: str, tmp_path: Path) -> None:
    if isa not in ISAS:
        pytest.skip(f"this processor has no {isa}")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    program = tmp_path / "exponential"
    flags = [*FLAGS.split(), *INSTRUCTIONS[isa].split(), f'-DOCTAVO_VECTORS="../{isa}.h"']
    built = subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
