"""Linear layers on a GPU, octavo's kernels next to cuBLAS and to what Inductor makes of other formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import goals
from bench.goals import Goal
from bench.gpu import need_gpu
from octavo import ops
from octavo.cli.op_speed import (
    AMAX,
    BF16,
    LOOKUP,
    LOOKUP_BF16,
    QUANTIZE,
    STREAM,
    W8A8,
    W8A16,
    Layer,
    Way,
    Weights,
    close_to,
    race,
)
from octavo.ops import reference
from octavo.tables import Table

__all__ = ["HOW", "TITLE", "measure", "tables"]

TITLE = "Linear layers on a GPU"
HOW = """
bf16 x, [N, K] weights, every way in turns; each turn replays a CUDA graph of many calls, over weights of 1.1 GB in all,
so that neither launching nor a cache is in it, and every result was held to float64 before. w8a8 starts from bf16 x:
finding the rows' scales and codes is within its time, for its rival `torch._int_mm` too.
"""
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
SIZES = (1, 4, 16, 64, 512, 2048, 8192)
INT_MM = "torch._int_mm and scales, compiled"
GPT_FAST = "gpt-fast's formula, compiled"
BF16_THREE, APART, SIDE_BY_SIDE = "three bf16 layers", "three w8a16 layers", "three w8a16 layers side by side"
MOST_FOR_GPT_FAST, LEAST_FOR_INT_MM = 16, 512
"""Rows of x: decoding is what the one is for, and prefill the other."""

GOALS = {
    1: (
        Goal("W8A16, weight bytes per second", W8A16, (STREAM,)),
        Goal("W8A16", W8A16, (BF16,)),
        Goal("W8A16", W8A16, (GPT_FAST,)),
        Goal("W8A8", W8A8, (BF16,)),
    ),
    **{M: (Goal("W8A16", W8A16, (BF16,)), Goal("W8A8", W8A8, (BF16,))) for M in (4, 16, 64)},
    **{
        M: (
            Goal("W8A8", W8A8, (BF16,), 1.4, 1.8),
            Goal("W8A8", W8A8, (INT_MM,), 1.0, 1.8),
            Goal("W8A16", W8A16, (BF16,)),
        )
        for M in (512, 2048, 8192)
    },
}
WEIGHT_GOALS = (Goal("quantizing a weight, bytes in per second", QUANTIZE, (AMAX,)),)
THREE_GOALS = tuple(Goal("three layers of one row", SIDE_BY_SIDE, (rival,)) for rival in (BF16_THREE, APART))
LOOKUP_GOALS = (Goal("looking up 8192 rows", LOOKUP, (LOOKUP_BF16,)),)


def measure() -> Iterator[dict[str, Any]]:
    need_gpu()
    found: dict[str, Any] = {}
    for N, K in SHAPES:
        found[f"{N}x{K}"] = _layer(N, K, "cuda")
        yield found


def _layer(N: int, K: int, device: str) -> dict[str, Any]:
    layer = Layer(N, K, max(SIZES), device)
    return {
        "linear": {str(M): race(layer.ways(M) + _rivals(layer, M), device) for M in SIZES},
        "three": race(_three(layer), device),
        "weight": race(layer.quantizing(), device),
        "lookup": race(layer.lookups(max(SIZES)), device),
    }


def _rivals(layer: Layer, M: int) -> list[Way]:
    x = layer.x[:M]
    torch.compiler.reset()  # or the ninth shape of a function would not be compiled any more

    @torch.compile(dynamic=False)
    def gpt_fast(codes: Tensor, scale: Tensor, _: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, codes.to(x.dtype)) * scale.flatten().to(x.dtype)

    @torch.compile(dynamic=False)
    def int_mm(codes: Tensor, scale: Tensor, _: Tensor) -> Tensor:
        x_codes, x_scale = reference.quantize_per_token(x)
        return (torch._int_mm(x_codes, codes.t()) * (x_scale * scale.t())).to(x.dtype)

    ways = []
    if M <= MOST_FOR_GPT_FAST:
        dequantized = layer.codes.double() * layer.scale.double()
        ways.append(Way(GPT_FAST, gpt_fast, layer.int8, lambda y: _near(y, x.double() @ dequantized.T)))
    if M >= LEAST_FOR_INT_MM:
        expected = layer.sums[:M] * layer.x_scale[:M].double() * layer.scale.double().T
        ways.append(Way(INT_MM, int_mm, layer.int8, lambda y: _near(y, expected)))
    return ways


def _three(layer: Layer) -> list[Way]:
    """One row through three layers, as q/k/v are: one after the other, and in one launch, as in a compiled model."""
    x = layer.x[:1]

    def bf16(*weights: Tensor) -> list[Tensor]:
        return [torch.nn.functional.linear(x, weight) for weight in weights]

    def apart(*operands: Tensor) -> list[Tensor]:
        return [ops.w8a16_linear(x, *one) for one in zip(operands[::3], operands[1::3], strict=True)]

    def side_by_side(*operands: Tensor) -> Tensor:
        return torch.ops.octavo.w8a16_linears(x, operands[::3], operands[1::3], [None] * 3)

    exact = (x.double() @ layer.weight.double().T).repeat(1, 3)
    right = close_to((x.double() @ (layer.codes.double() * layer.scale.double()).T).repeat(1, 3))
    return [
        Way(BF16_THREE, bf16, _threes(layer.floats), lambda y: _near(torch.cat(y, 1), exact)),
        Way(APART, apart, _threes(layer.int8), lambda y: right(torch.cat(y, 1))),
        Way(SIDE_BY_SIDE, side_by_side, _threes(layer.int8), right),
    ]


def _threes(weights: Weights) -> Weights:
    while True:
        yield tuple(tensor for _ in range(3) for tensor in next(weights))


def _near(y: Tensor, expected: Tensor) -> bool:
    """gpt-fast rounds the sum to bf16 before it is scaled, and the scale too: three roundings. Inductor multiplies by
    1 / 127 where it should divide by 127, so that some codes differ by one."""
    return float((y.double() - expected).norm() / expected.norm()) < 2**-7


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for name, one in found.items():
        raced = [(GOALS[M], f", M = {M}", one["linear"][str(M)]) for M in SIZES]
        raced += [(THREE_GOALS, "", one["three"]), (WEIGHT_GOALS, "", one["weight"]), (LOOKUP_GOALS, "", one["lookup"])]
        for several, size, seconds in raced:
            rows += [(f"{name}{size}", *goals.row(goal, seconds, _time)) for goal in several]
    return [
        Table("Layers: what must be reached", ("N x K", *goals.COLUMNS), tuple(rows), "llllrrrrl"),
        *(_times(name, one["linear"]) for name, one in found.items()),
    ]


def _times(name: str, linear: dict[str, dict[str, float]]) -> Table:
    ways = list(dict.fromkeys(way for M in SIZES for way in linear[str(M)]))
    rows = tuple((way, *(_time(linear[str(M)][way]) if way in linear[str(M)] else "-" for M in SIZES)) for way in ways)
    return Table(f"Medians, {name}", ("M =", *map(str, SIZES)), rows, "l" + "r" * len(SIZES))


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
