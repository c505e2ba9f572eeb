"""The native kernels, op by op, next to what torch has for the same."""

from __future__ import annotations

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor

from bench import goals
from bench.goals import Goal, human_time
from octavo.cli.op_speed import (
    AMAX,
    BF16,
    LOOKUP,
    LOOKUP_BF16,
    QUANTIZE,
    ROTATION_BYTES,
    STREAM,
    W8A8,
    W8A16,
    W8A16_GROUPS,
    Layer,
    Way,
    close_to,
    race,
)
from octavo.errors import QuantizeError
from octavo.ops import backends, native
from octavo.tables import Table

TITLE = "Kernels: one op at a time"
HOW = """
One linear layer [N, K], M rows of bf16, all ways in turns in one process, medians of the rounds. Each call takes other
weights, of 1.1 GB in all, so that they come from memory and not from a cache; each result is held to float64 before it
is timed. w8a8 starts from bf16 x: finding the rows' scales and codes is within its time. `torch.sum` reads as many
bytes as the int8 weight has, as fp32 numbers: the speed of memory. `torch._weight_int8pack_mm` is torch's own
weight-only op. `torch._int_mm` and `onednn.qlinear_pointwise` (weights packed beforehand) are given int8 x and find no
scales; the first leaves int32 sums, the second multiplies by the weight's scales. oneDNN takes x as int8, or as uint8
with a zero point of 128: it gets what it is quicker with on this processor. The last table is of the kernels that
`OCTAVO_ISA` forces, each in a process of its own, next to bf16 with every instruction that torch finds.
"""
SHAPES = ((4096, 4096), (11008, 4096))
SIZES = (1, 4, 16, 64, 512)
ISAS, ISA_SHAPE, ISA_SIZES = ("scalar", "avx2", "avxvnni", "avx512", "amx"), (4096, 4096), (1, 512)

WEIGHT_ONLY, INT_MM, ONEDNN = "torch._weight_int8pack_mm", "torch._int_mm", "onednn.qlinear_pointwise"

GOALS = {
    1: (
        Goal("W8A16, weight bytes per second", W8A16, (STREAM,), 0.80, 0.95),
        Goal("W8A16", W8A16, (BF16,), 1.8, 2),
        Goal("W8A16 in groups of 128", W8A16_GROUPS, (BF16,)),
        Goal("W8A8", W8A8, (BF16, ONEDNN), 1.0),
    ),
    4: (Goal("W8A16", W8A16, (BF16, WEIGHT_ONLY), 1.5, 2), Goal("W8A16 in groups of 128", W8A16_GROUPS, (BF16,))),
    16: (
        Goal("W8A16", W8A16, (BF16, WEIGHT_ONLY), 1.5, 2),
        Goal("W8A16 in groups of 128", W8A16_GROUPS, (BF16,)),
        Goal("W8A8", W8A8, (BF16, ONEDNN), 1.3),
    ),
    64: (Goal("W8A16", W8A16, (BF16, WEIGHT_ONLY), 1.0, 2), Goal("W8A16 in groups of 128", W8A16_GROUPS, (BF16,))),
    512: (
        Goal("W8A16", W8A16, (BF16,), 1.3, 2),
        Goal("W8A16 in groups of 128", W8A16_GROUPS, (BF16,)),
        Goal("W8A8", W8A8, (ONEDNN,), 1.2, 2),
        Goal("W8A8", W8A8, (BF16,), 2.5, 4),
        Goal("W8A8", W8A8, (INT_MM,)),
    ),
}
WEIGHT_GOALS = (Goal("quantizing a weight, bytes in per second", QUANTIZE, (AMAX,), 0.5, 0.9),)
LOOKUP_GOALS = (Goal("looking up 512 rows", LOOKUP, (LOOKUP_BF16,)),)


def measure() -> dict[str, Any]:
    return {
        "kernels": {row.op: f"{row.backend} ({row.why})" for row in backends() if row.device == "cpu"},
        "layers": {f"{N}x{K}": _layer(N, K) for N, K in SHAPES},
        "isas": {isa: _in_own_process(isa) for isa in ISAS},
    }


def _layer(N: int, K: int) -> dict[str, Any]:
    layer = Layer(N, K, max(SIZES))
    onednn = _OneDnn(layer) if torch.backends.mkldnn.is_available() else None

    def ways(M: int) -> list[Way]:
        return layer.ways(M) + _torch_ways(layer, M) + ([onednn.way(M)] if onednn else [])

    return {
        "linear": {str(M): race(ways(M)) for M in SIZES},
        "weight": race(layer.quantizing()),
        "lookup": race(layer.lookups(max(SIZES))),
    }


def _torch_ways(layer: Layer, M: int) -> list[Way]:
    """What torch itself has for int8, on the same codes."""
    x, codes, scale = layer.x[:M], layer.x_codes[:M], layer.scale.flatten().bfloat16()
    expected = x.double() @ layer.codes.double().T * scale.double()

    def weight_only(weight: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, weight, scale)

    def int_mm(weight: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return torch._int_mm(codes, weight.t())

    return [
        Way(WEIGHT_ONLY, weight_only, layer.int8, close_to(expected)),
        Way(INT_MM, int_mm, layer.int8, close_to(layer.sums[:M])),
    ]


class _OneDnn:
    """oneDNN's int8 layer: weights packed beforehand, x as int8, or as uint8 where it is quicker with that."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.scale = layer, layer.scale.flatten()
        self.zeros = torch.zeros(layer.N, dtype=torch.int64)
        count = ROTATION_BYTES // layer.codes.nbytes + 1
        packed = [torch.ops.onednn.qlinear_prepack(layer.codes, [max(SIZES), layer.K]) for _ in range(count)]
        self.weights = itertools.cycle([(weight,) for weight in packed])
        alone = {signed: race([self._way(1, signed)])[ONEDNN] for signed in (True, False)}
        self.signed = alone[True] < alone[False]

    def way(self, M: int) -> Way:
        return self._way(M, self.signed)

    def _way(self, M: int, signed: bool) -> Way:
        codes = self.layer.x_codes[:M]
        x, zero = (codes, 0) if signed else ((codes.int() + 128).to(torch.uint8), 128)

        def call(weight: Tensor) -> Tensor:
            return torch.ops.onednn.qlinear_pointwise(
                x, 1.0, zero, weight, self.scale, self.zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

        return Way(ONEDNN, call, self.weights, close_to(self.layer.sums[:M] * self.scale.double()))


def _in_own_process(isa: str) -> dict[str, Any]:
    """Seconds under the kernels of one instruction set; or why there are none."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return {"linear": pool.submit(_forced, isa, torch.get_num_threads()).result()}
        except QuantizeError as error:
            return {"missing": str(error)}
        except BrokenProcessPool:
            return {"missing": "the process that ran these kernels broke down"}


def _forced(isa: str, threads: int) -> dict[str, dict[str, float]]:
    native.select(isa)  # what OCTAVO_ISA does
    torch.set_num_threads(threads)
    layer = Layer(*ISA_SHAPE, max(ISA_SIZES))
    return {str(M): race([way for way in layer.ways(M) if way.name in (BF16, W8A16, W8A8)]) for M in ISA_SIZES}


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for name, one in found["layers"].items():
        raced = [(GOALS[M], f", M = {M}", one["linear"][str(M)]) for M in SIZES]
        raced += [(WEIGHT_GOALS, "", one["weight"]), (LOOKUP_GOALS, "", one["lookup"])]
        for several, size, seconds in raced:
            rows += [(f"{name}{size}", *goals.row(goal, seconds, human_time)) for goal in several]
    served = found["kernels"]["w8a16_linear"]
    return [
        Table(f"What must be reached; kernels: {served}", ("N x K", *goals.COLUMNS), tuple(rows), "llllrrrrl"),
        *(_times(name, one["linear"]) for name, one in found["layers"].items()),
        _isas(found["isas"]),
    ]


def _times(name: str, linear: dict[str, dict[str, float]]) -> Table:
    ways = list(linear[str(SIZES[0])])
    rows = tuple((way, *(human_time(linear[str(M)][way]) for M in SIZES)) for way in ways)
    return Table(f"Medians, {name}", ("M =", *map(str, SIZES)), rows, "l" + "r" * len(SIZES))


def _isas(isas: dict[str, Any]) -> Table:
    rows = []
    for isa, one in isas.items():
        if "missing" in one:
            rows.append((isa, one["missing"], *("-" for _ in ISA_SIZES)))
            continue
        for way in (W8A16, W8A8):
            raced = (one["linear"][str(M)] for M in ISA_SIZES)
            rows.append((isa, way, *(f"{human_time(times[way])} ({times[BF16] / times[way]:.2f}x)" for times in raced)))
    columns = ("kernels", "layer", *(f"M = {M}" for M in ISA_SIZES))
    title = f"Kernels by instruction set, {'x'.join(map(str, ISA_SHAPE))}; in brackets: times as fast as bf16 F.linear"
    return Table(title, columns, tuple(rows), "llrr")
