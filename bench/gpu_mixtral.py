"""A mixture of experts of Mixtral's shape on a GPU: octavo's int8 next to bf16 and gpt-fast's formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench import gpu_models
from bench.gpu_models import HOW, tables

__all__ = ["HOW", "TITLE", "measure", "tables"]

TITLE = "A mixture of experts on a GPU"


def measure() -> Iterator[dict[str, Any]]:
    return gpu_models.measure(gpu_models.MIXTRAL)
