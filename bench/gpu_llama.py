"""A language model of Llama-2-7B's shape on a GPU: octavo's int8 next to bf16, gpt-fast's formulas and torchao."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench import gpu_models
from bench.gpu_models import HOW, tables

__all__ = ["HOW", "TITLE", "measure", "tables"]

TITLE = "A model of 7 billion parameters on a GPU"


def measure() -> Iterator[dict[str, Any]]:
    return gpu_models.measure(gpu_models.LLAMA)
