"""`octavo backends` says what `octavo.backends()` says, and what the machine is."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import octavo


def test_json_is_what_the_library_says(run: Callable[..., Any]) -> None:
    data = run("backends", "--json").data
    assert data["ops"] == [dataclasses.asdict(row) for row in octavo.backends()]
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["octavo"] == octavo.__version__
    assert data["machine"]["cores"] == os.cpu_count()
    assert data["machine"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_the_table_names_every_op_and_the_capability(run: Callable[..., Any]) -> None:
    shown = run("backends")
    for row in octavo.backends():
        assert row.op in shown.out
        assert row.backend in shown.out
    assert torch.backends.cpu.get_cpu_capability() in shown.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("OCTAVO_BACKEND", "expected 'reference' or nothing"), ("OCTAVO_ISA", "expected one of: ")],
)
def test_an_unknown_backend_is_an_error(variable: str, expected: str) -> None:
    """In a process of its own: what serves is settled when the ops are loaded."""
    shown = subprocess.run(
        [sys.executable, "-m", "octavo", "backends"],
        env={**os.environ, variable: "abacus"}, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 1 and "'abacus'" in shown.stderr and shown.stdout == ""
    assert expected in shown.stderr and "Traceback" not in shown.stderr
