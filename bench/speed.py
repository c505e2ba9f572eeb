"""How fast a model runs in float and in int8: `octavo bench`, on two models."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import octavo
from bench.quantize import llama
from bench.record import Skipped
from examples.models import cache_folder, smollm2_checkpoint
from octavo.tables import Table, human_bytes

TITLE = "Running: prefill and decode"
HOW = """
`octavo bench` with the bf16 model as baseline: each model in a process of its own, in turns, batch 1; medians of the
rounds. Peak memory is of the whole process, loading included. The last column says which kernels served: "reference" is
plain torch, written to be right on every device and not to be fast; with it int8 runs slower than bf16.
"""
PROMPT, NEW, REPEATS = 512, 32, 3


def measure() -> dict[str, Any]:
    try:
        smollm2 = smollm2_checkpoint(cache_folder())
    except FileNotFoundError as reason:
        raise Skipped(str(reason)) from reason
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder, "llama")
        llama().save_pretrained(large)
        return {
            "SmolLM2-135M-Instruct": _bench(smollm2, Path(folder, "smollm2-int8")),
            "Llama shape, 1.07 B, random": _bench(large, Path(folder, "llama-int8")),
        }


def _bench(source: Path, quantized: Path) -> dict[str, Any]:
    octavo.quantize_checkpoint(source, quantized, "w8a16")
    command = [
        sys.executable, "-m", "octavo", "bench", str(quantized), "--baseline", str(source), "--json",
        "--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW), "--repeats", str(REPEATS),
        "--threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    int8, baseline = json.loads(done.stdout)["models"]
    for model, name in ((int8, "w8a16"), (baseline, "bf16")):
        model["path"] = name
    return {"w8a16": int8, "bf16": baseline}


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for model, pair in found.items():
        for name in ("bf16", "w8a16"):
            one = pair[name]
            rows.append(
                (
                    model if name == "bf16" else "",
                    name,
                    human_bytes(one["weight_bytes"]),
                    human_bytes(one["peak_bytes"]),
                    *(_next_to(one, pair["bf16"], key) for key in ("prefill_tokens_per_s", "decode_tokens_per_s")),
                    f"{human_bytes(int(one['weight_bytes_per_s']))}/s",
                    ", ".join(one["served_by"]) or "torch",
                )
            )
    columns = (
        "model", "weights", "in memory", "peak memory", "prefill, tokens/s", "decode, tokens/s", 
        "weights read in decode", "served by",
    )  # fmt: skip
    title = f"{PROMPT} tokens in, {NEW} out; medians of {REPEATS} rounds"
    return [Table(title, columns, tuple(rows), "llrrrrrl")]


def _next_to(one: dict[str, Any], baseline: dict[str, Any], key: str) -> str:
    ratio = one[key] / baseline[key]
    return f"{one[key]:.1f}" if one is baseline else f"{one[key]:.1f} ({ratio:.2f}x)"
