"""Every kernel compiles for GPUs of both generations that are common in servers, without a GPU, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.ops import triton as kernels

HERE = Path(__file__).parent
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one program can have (CUDA C++ Programming Guide, table of compute capabilities)."""


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("op", kernels.OPS)
def test_every_launch_compiles_ahead_of_time(op: str, target: str) -> None:
    compiled = ahead_of_time(op, target)
    assert compiled
    for one in compiled:
        assert not one["spilled"], one
        assert one["registers"] <= 255 and one["shared"] <= SHARED[target], one


def ahead_of_time(op: str, target: str) -> list[dict[str, Any]]:
    """In a process of its own: in this one the kernels are interpreted."""
    found = subprocess.run(
        [sys.executable, HERE / "ahead_of_time.py", target, op],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2])}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]
