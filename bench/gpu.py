"""int8 on a GPU: layers and whole models, next to cuBLAS, gpt-fast's formulas and torchao."""

from __future__ import annotations

from typing import Any

import torch

from bench import gpu_layers, gpu_models
from bench.record import Skipped
from octavo.ops import backends
from octavo.tables import Table

TITLE = "On a GPU"
HOW = """
Layers: bf16 x, [N, K] weights, every way in turns; each turn replays a CUDA graph of many calls, over weights of 1.1 GB
in all, so that neither launching nor a cache is in it, and every result was held to float64 before. w8a8 starts from
bf16 x: finding the rows' scales and codes is within its time, for its rival `torch._int_mm` too. Models have random
weights in bf16; each runtime has a process, and they take turns, eagerly first, then compiled whole by `torch.compile`
with a static cache and CUDA graphs, all in the same way. Prefill is the time from the prompt to the first token, decode
greedy, at batch 1. Error: of the logits after the prompt, against the bf16 model's, as a share of their norm.
"""


def measure() -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise Skipped("needs a CUDA device")
    return {
        "kernels": {row.op: f"{row.backend} ({row.why})" for row in backends() if row.device == "cuda"},
        "layers": gpu_layers.measure("cuda"),
        "models": gpu_models.measure("cuda"),
    }


def tables(found: dict[str, Any]) -> list[Table]:
    return [*gpu_models.tables(found["models"]), *gpu_layers.tables(found["layers"])]
