"""The whole way on a real model: quantize, inspect, eval, generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_smollm2(run: Callable[..., Any], smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    data = run("quantize", smollm2, out, "--json").data
    assert sum(row["scheme"] == "w8a16" for row in data["coverage"]["rows"]) == 210
    assert data["coverage"]["bytes_after"] / data["coverage"]["bytes_before"] < 0.61

    data = run("inspect", out, "--json").data
    assert data["kind"] == "int8" and not any(scale["zero"] or scale["subnormal"] for scale in data["scales"])

    data = run("eval", out, "--baseline", smollm2, "--tokens", 1024, "--json").data
    assert 0.99 < data["ratio"] < 1.01 and data["comparison"]["top1"] > 0.95
    assert data["baseline_perplexity"] < 30

    answer = run("generate", out, "--prompt", "What is the capital of France?", "--max-new-tokens", 16, "--json").data
    assert "Paris" in answer["text"]
