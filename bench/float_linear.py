"""Linear layers that stay float: alone, and as the output head of an int8 model."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from bench import language
from bench.goals import human_time
from bench.quantize import llama
from bench.record import kernels_of
from bench.speed import LLAMA, SMOLLM2, VOCABULARY
from octavo.cli.op_speed import Way, close_to, race, rotation
from octavo.integrations.language_model import cache_name
from octavo.modules.float_linear import FloatLinear
from octavo.tables import Table

TITLE = "Linear layers that stay float"
HOW = """
Layers: `nn.Linear` and octavo's FloatLinear with the same weights [N, K], which come from memory, not from
a cache, and the same M rows; in turns in one process, medians of the rounds; each result was held to float64 before.
Tokens: a model quantized by `octavo.quantize(model, "w8a16")`, which leaves the output head float, decodes with that
as `nn.Linear` and as `FloatLinear`, in turns: medians of one token (of each of so many sequences) after 128.
"""
SHAPES = ((49152, 2048), (49152, 576), (2048, 8192))
SIZES = (1, 2, 4, 8, 16, 24, 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = ((SMOLLM2, "bf16", 1), (SMOLLM2, "bf16", 8), (SMOLLM2, "fp32", 1), (SMOLLM2, "fp32", 4), (LLAMA, "bf16", 1))
PROMPT, TOKENS, ROUNDS = 128, 6, 10

TORCH, OURS = "nn.Linear", "FloatLinear"


def measure() -> dict[str, Any]:
    smollm2 = language.checkpoint()
    return {
        "kernels": kernels_of("w8a16_linear"),
        "layers": {
            f"{N}x{K}, {kind}": {str(M): _layer(N, K, M, dtype) for M in SIZES}
            for N, K in SHAPES
            for kind, dtype in DTYPES.items()
        },
        "tokens": [
            {"model": name, "dtype": kind, "sequences": count, "seconds": _decode(name, smollm2, DTYPES[kind], count)}
            for name, kind, count in CASES
        ],
    }


def _layer(N: int, K: int, M: int, dtype: torch.dtype) -> dict[str, float]:
    chance = torch.Generator().manual_seed(0)
    weight, x = torch.randn(N, K, generator=chance).to(dtype), torch.randn(M, K, generator=chance).to(dtype)
    right = close_to(F.linear(x.double(), weight.double()))
    ways = []
    for name, cls in ((TORCH, nn.Linear), (OURS, FloatLinear)):
        layer = cls(K, N, bias=False, device="meta")

        def call(weight: Tensor, layer: nn.Linear = layer) -> Tensor:
            layer.weight = nn.Parameter(weight, requires_grad=False)
            return layer(x)  # type: ignore[no-any-return]

        ways.append(Way(name, call, rotation(weight), right))
    return race(ways)


@torch.inference_mode()
def _decode(name: str, smollm2: Any, dtype: torch.dtype, sequences: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype) if name == SMOLLM2 else llama().to(dtype)
    octavo.quantize(model.eval(), "w8a16")
    ours = model.lm_head
    heads = {TORCH: nn.Linear(ours.in_features, ours.out_features, bias=False, device="meta"), OURS: ours}
    heads[TORCH].weight = ours.weight
    ids = torch.randint(VOCABULARY, (sequences, PROMPT), generator=torch.Generator().manual_seed(0))
    argument = cache_name(model)
    cache = getattr(model(ids), argument)
    seconds: dict[str, list[float]] = {head: [] for head in heads}
    for _ in range(ROUNDS):
        for head, layer in heads.items():
            model.lm_head, own = layer, copy.deepcopy(cache)
            for _ in range(TOKENS):
                start = time.perf_counter()
                model(ids[:, :1], **{argument: own})
                seconds[head].append(time.perf_counter() - start)
    return {head: statistics.median(of) for head, of in seconds.items()}


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    layers = [
        (name, *(f"{human_time(of[OURS])} ({of[TORCH] / of[OURS]:.2f}x)" for of in sizes.values()))
        for name, sizes in found["layers"].items()
    ]
    tokens = [
        (
            one["model"],
            one["dtype"],
            str(one["sequences"]),
            *(human_time(one["seconds"][head]) for head in (TORCH, OURS)),
            f"{one['seconds'][TORCH] / one['seconds'][OURS]:.2f}",
        )
        for one in found["tokens"]
    ]
    of_tokens = ("model", "in", "sequences", f"head: {TORCH}", f"head: {OURS}", "times as fast")
    title = f"Layers; in brackets: times as fast as {TORCH}; kernels: {found['kernels']}"
    return [
        Table(title, ("N x K", *(f"M = {M}" for M in SIZES)), tuple(layers), "l" + "r" * len(SIZES)),
        Table("A token of an int8 model whose head stays float", of_tokens, tuple(tokens), "llrrrr"),
    ]
