"""One block of experts in int8, next to the same block in bf16."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import octavo
from octavo.tables import Table, human_bytes

TITLE = "Experts: one block"
HOW = """
The expert block of a layer alone, random weights and routing, called with T tokens: bf16 by transformers (its eager
loop and its grouped matrix product), int8 by octavo. The ways take turns, medians of the rounds; each round routes
anew, so that no expert stays in the caches. Bytes are of the weights of the experts that a round's tokens were routed
to. The SQNR is of the output, against fp64 arithmetic on the bf16 weights.
"""
TOKENS = (1, 16, 512)
ROUNDS = {1: 40, 16: 15, 512: 5}


@dataclasses.dataclass(frozen=True)
class Shape:
    """E experts of H -> I -> H, top_k of them for a token."""

    name: str
    make: Any
    experts: int
    hidden: int
    intermediate: int
    top_k: int


SHAPES = (
    Shape("Mixtral 8x7B's", MixtralExperts, 8, 4096, 14336, 2),
    Shape("Qwen3-30B-A3B's", Qwen3MoeExperts, 128, 2048, 768, 8),
)


def measure() -> dict[str, Any]:
    return {shape.name: [_rows(shape, tokens, *_blocks(shape)) for tokens in TOKENS] for shape in SHAPES}


def _blocks(shape: Shape) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The block in bf16, and in int8 under w8a16 and w8a8."""
    config = (transformers.MixtralConfig if shape.make is MixtralExperts else transformers.Qwen3MoeConfig)(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, moe_intermediate_size=shape.intermediate,
        num_local_experts=shape.experts, num_experts=shape.experts, hidden_act="silu",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):
        block = shape.make(config).bfloat16()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    made = []
    for scheme in ("w8a16", "w8a8"):
        holder = nn.Sequential(copy.deepcopy(block))
        octavo.quantize(holder, scheme)
        made.append(holder[0])
    return block, made[0], made[1]


def _rows(shape: Shape, tokens: int, block: Any, w8a16: nn.Module, w8a8: nn.Module) -> dict[str, Any]:
    ways = {"bf16, eager": block, "bf16, grouped": block, "w8a16": w8a16, "w8a8": w8a8}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    touched = 0
    for round_ in range(ROUNDS[tokens] + 1):
        x, index, weights = _input(shape, tokens)
        for name, way in ways.items():
            if way is block:
                block.config._experts_implementation = "eager" if "eager" in name else "grouped_mm"
            start = time.perf_counter()
            with torch.no_grad():
                way(x, index, weights)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
        touched += len(index.unique()) if round_ else 0
    per_expert = 3 * shape.hidden * shape.intermediate
    return {
        "tokens": tokens,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "int8_bytes": round(touched / ROUNDS[tokens] * per_expert),
        "sqnr_db": {name: _sqnr(shape, block, way) for name, way in (("w8a16", w8a16), ("w8a8", w8a8))},
    }


def _input(shape: Shape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.rand(tokens, shape.experts).topk(shape.top_k)
    return torch.randn(tokens, shape.hidden).bfloat16(), chosen.indices, chosen.values.softmax(-1).bfloat16()


def _sqnr(shape: Shape, block: Any, way: nn.Module) -> float:
    """Against fp64 arithmetic on the bf16 weights, for two tokens."""
    x, index, weights = _input(shape, 2)
    expected = torch.zeros(2, shape.hidden, dtype=torch.float64)
    for token in range(2):
        for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            gate, up = (block.gate_up_proj[expert].detach().double() @ x[token].double()).chunk(2)
            h = torch.nn.functional.silu(gate) * up
            expected[token] += weight * (block.down_proj[expert].detach().double() @ h)
    with torch.no_grad():
        return octavo.sqnr(expected, way(x, index, weights).double())


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for name, measured in found.items():
        for one in measured:
            best = min(one["seconds"]["bf16, eager"], one["seconds"]["bf16, grouped"])
            rows.append(
                (
                    name if one["tokens"] == TOKENS[0] else "",
                    str(one["tokens"]),
                    human_bytes(one["int8_bytes"]),
                    *(f"{one['seconds'][way] * 1e3:.1f} ms" for way in ("bf16, eager", "bf16, grouped")),
                    *(
                        f"{one['seconds'][way] * 1e3:.1f} ms ({best / one['seconds'][way]:.2f} x)"
                        for way in ("w8a16", "w8a8")
                    ),
                    *(f"{one['sqnr_db'][way]:.0f} dB" for way in ("w8a16", "w8a8")),
                )
            )
    columns = (
        "block", "tokens", "int8 bytes touched", "bf16, eager", "bf16, grouped", "w8a16", "w8a8", "SQNR", "SQNR, w8a8",
    )  # fmt: skip
    return [Table("In brackets: times as fast as the better bf16", columns, tuple(rows), "lrrrrrrrr")]
