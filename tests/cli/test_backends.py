"""`octavo backends` says what `octavo.backends()` says, and what the machine is."""

from __future__ import annotations

import dataclasses
import os
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


def test_an_unknown_backend_is_an_error(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_BACKEND", "abacus")
    shown = run("backends")
    assert shown.code == 1 and "'abacus'" in shown.err and shown.out == ""
