"""How long quantizing takes, and how much memory, next to torchao and optimum-quanto."""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo
from octavo.tables import Table, human_bytes

TITLE = "Quantizing a model of 1.07 billion parameters"
HOW = """
A Llama of 16 layers (hidden 2048, feed-forward 8192, 32 heads, 8 of them for keys and values, vocabulary 49152, tied)
with random weights in bf16. Each library quantizes the 112 linear layers of the decoder to int8, one scale per output
channel, in place: `octavo.quantize(model, "w8a16")`, torchao's `quantize_(model, Int8WeightOnlyConfig())`, quanto's
`quantize(model, weights=qint8)` and `freeze`. They take turns in one process, each time on a fresh copy of the model;
the first round warms up and is not counted. The peak is of the memory of the process (resident) above what it was
before. The SQNR of the logits shows that what was timed also works.
"""
ROUNDS = 5
Quantizer = Callable[[nn.Module], object]


def measure() -> dict[str, Any]:
    source = llama()
    float_bytes = sum(parameter.nbytes for parameter in source.parameters())
    ids = torch.arange(16).unsqueeze(0) * 3001
    with torch.no_grad():
        expected = source(ids).logits
    quantizers: dict[str, Quantizer] = {"octavo": octavo_w8a16}
    missing = {}
    for name, find in (("torchao", _torchao), ("optimum-quanto", _quanto)):
        try:
            quantizers[name] = find()
        except ImportError as reason:
            missing[name] = f"not measured: {reason}"
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in quantizers}
    sqnr = {}
    for _ in range(ROUNDS + 1):
        for name, quantizer in quantizers.items():
            model = copy.deepcopy(source)
            rounds[name].append(time_once(model, quantizer))
            if name not in sqnr:
                with torch.no_grad():
                    sqnr[name] = octavo.sqnr(expected, model(ids).logits)
            del model
    return {
        "parameters": sum(parameter.numel() for parameter in source.parameters()),
        "bytes": float_bytes,
        "missing": missing,
        "libraries": {
            name: {
                "seconds": statistics.median(one["seconds"] for one in kept[1:]),
                "peak_rise": _median_peak(kept[1:]),
                "sqnr_db": sqnr[name],
                "rounds": kept,
            }
            for name, kept in rounds.items()
        },
    }


def llama() -> Any:
    """The model of `HOW`, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    # transformers' own initialization takes a minute and a model in fp32.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
        else:
            assert name.endswith("norm.weight"), name
            parameter.data.fill_(1)
    # `to_empty` left it without values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def octavo_w8a16(model: nn.Module) -> object:
    return octavo.quantize(model, "w8a16")


def time_once(model: nn.Module, quantizer: Quantizer) -> dict[str, Any]:
    """Seconds that `quantizer` takes, and by how many bytes it raised the process's memory at most (None: unknown)."""
    _give_back_free_memory()
    before = _memory("VmRSS") if _reset_peak() else None
    start = time.perf_counter()
    quantizer(model)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_rise": None if before is None else max(0, _memory("VmHWM") - before)}


def tables(found: dict[str, Any]) -> list[Table]:
    fastest = found["libraries"]["octavo"]["seconds"]
    rows = [
        (
            name,
            f"{one['seconds']:.2f} s",
            f"{one['seconds'] / fastest:.1f}x",
            "-" if one["peak_rise"] is None else human_bytes(one["peak_rise"]),
            "-" if one["peak_rise"] is None else f"{one['peak_rise'] / found['bytes']:.1%}",
            f"{one['sqnr_db']:.1f} dB",
        )
        for name, one in found["libraries"].items()
    ]
    rows += [(name, reason, "-", "-", "-", "-") for name, reason in found["missing"].items()]
    title = (
        f"{found['parameters'] / 1e9:.2f} billion parameters, {human_bytes(found['bytes'])}; medians of {ROUNDS} rounds"
    )
    columns = ("library", "time", "of octavo's", "memory, peak rise", "of the model", "SQNR of the logits")
    return [Table(title, columns, tuple(rows), "lrrrrr")]


def _torchao() -> Quantizer:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_decoder_linear(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    return lambda model: quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_decoder_linear)


def _quanto() -> Quantizer:
    from optimum.quanto import freeze, qint8, quantize

    def run(model: nn.Module) -> None:
        quantize(model, weights=qint8, exclude="lm_head")
        freeze(model)

    return run


def _give_back_free_memory() -> None:
    """Return freed memory to the system: the allocator keeps it, and a peak within it would go unnoticed."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def _reset_peak() -> bool:
    """Reset the process's peak memory. Linux only: proc(5), clear_refs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def _median_peak(rounds: list[dict[str, Any]]) -> float | None:
    peaks = [one["peak_rise"] for one in rounds]
    return None if None in peaks else statistics.median(peaks)
