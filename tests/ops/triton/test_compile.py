"""Every kernel compiles for GPUs of both generations that are common in servers, without a GPU, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.ops import triton as kernels

HERE = Path(__file__).parent
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one program can have (CUDA C++ Programming Guide, table of compute capabilities)."""


@pytest.mark.slow
@pytest.mark.parametrize("op", [*kernels.OPS, "rms_norm", "gated", "rotary"])
def test_every_launch_compiles_ahead_of_time(op: str) -> None:
    compilers = {target: ahead_of_time(op, target) for target in SHARED}  # side by side
    for target, compiler in compilers.items():
        out, error = compiler.communicate()
        assert compiler.returncode == 0, error
        compiled = [json.loads(line) for line in out.splitlines()]
        assert compiled
        for one in compiled:
            assert not one["spilled"], one
            assert one["registers"] <= 255 and one["shared"] <= SHARED[target], one


def ahead_of_time(op: str, target: str) -> subprocess.Popen[str]:
    """In a process of its own: in this one the kernels are interpreted."""
    return subprocess.Popen(
        [sys.executable, HERE / "ahead_of_time.py", target, op],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
