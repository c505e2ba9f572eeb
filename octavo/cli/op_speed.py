"""Time an op next to other ways of computing the same result: the stopwatch of `octavo bench --ops`.

The ways take turns, round after round, so that other load on the machine slows all alike, and medians over the rounds
are compared. Each call gets the next of several copies of the weights. Together they fill `ROTATION_BYTES`, more than
any cache holds, so weights come from memory as they do in a model. Each way's result is checked against float64
arithmetic before it is timed.

On a GPU a turn replays a CUDA graph of many calls between two events. It leaves out what Python and the driver need
for a launch, which a compiled model does not pay either.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo import ops
from octavo.errors import OctavoError

__all__ = [
    "AMAX", "BF16", "GROUP", "LOOKUP", "LOOKUP_BF16", "QUANTIZE", "ROTATION_BYTES", "STREAM", "W8A8", "W8A16",
    "W8A16_GROUPS", "Layer", "Way", "Weights", "close_to", "race", "rotation",
]  # fmt: skip

ROTATION_BYTES = 1_100_000_000
SECONDS = 1.5
"""How long a race should take, within `FEWEST` to `MOST` rounds."""
FEWEST, MOST = 3, 60
GROUP = 128
CALLS = 64
"""Calls in one CUDA graph."""

STREAM, BF16 = "torch.sum", "bf16 F.linear"
W8A16, W8A16_GROUPS, W8A8 = "w8a16", f"w8a16, groups of {GROUP}", "w8a8"
AMAX, QUANTIZE = "w.abs().amax(1)", "quantize_weight"
LOOKUP_BF16, LOOKUP = "bf16 F.embedding", "w8a16_embedding"

Weights = Iterator[tuple[Tensor, ...]]
"""Copies of the weights, one after the other, without end."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of computing the result: `call(*weights)` does it, and `is_right` checks what that returns."""

    name: str
    call: Callable[..., Any]
    weights: Weights
    is_right: Callable[[Any], bool]


def race(ways: Sequence[Way], device: str = "cpu") -> dict[str, float]:
    """Time the ways in turns. Returns: name -> median seconds of a call. Raises: OctavoError for a wrong result."""
    with torch.no_grad():
        for way in ways:
            if not way.is_right(way.call(*next(way.weights))):
                raise OctavoError(f"{way.name}: the result differs from float64 arithmetic; its speed means nothing")
        turns = [_turn_on_gpu(way) if device == "cuda" else functools.partial(_seconds, way) for way in ways]
        warm_up = sum(turn() for turn in turns)
        rounds = min(max(round(SECONDS / warm_up), FEWEST), MOST)
        times = [[turn() for turn in turns] for _ in range(rounds)]
    return {way.name: statistics.median(column) for way, column in zip(ways, zip(*times, strict=True), strict=True)}


def _seconds(way: Way) -> float:
    weights = next(way.weights)
    start = time.perf_counter()
    way.call(*weights)
    return time.perf_counter() - start


def _turn_on_gpu(way: Way) -> Callable[[], float]:
    """Record a graph of the way's calls. Returns: a function that replays it and returns the seconds of one call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            way.call(*next(way.weights))

    def turn() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / CALLS

    return turn


def rotation(*tensors: Tensor) -> Weights:
    """Yield copies of the tensors in turn, enough of them to fill `ROTATION_BYTES`."""
    count = ROTATION_BYTES // sum(tensor.nbytes for tensor in tensors) + 1
    copies = [tensor.expand(count, *tensor.shape).contiguous() for tensor in tensors]
    for place in itertools.cycle(range(count)):
        yield tuple(tensor[place] for tensor in copies)


def close_to(expected: Tensor) -> Callable[[Tensor], bool]:
    """A check that each value is that of `expected` (float64), up to a sum in fp32 and rounding to bf16."""
    allowed = 2**-8 * expected.abs() + 2e-3 * expected.square().mean().sqrt()
    return lambda result: bool(((result.double() - expected).abs() <= allowed).all())


class Layer:
    """A linear layer with random weights [N, K] in bf16 and in int8, and the ways to run it on up to M rows of input.

    The group scales are the channel scales times random factors: timing needs only some positive scales, and the same
    codes serve both.
    """

    def __init__(self, N: int, K: int, M: int, device: str = "cpu") -> None:
        chance = torch.Generator(device).manual_seed(0)
        self.N, self.K, self.device = N, K, device
        self.weight = (torch.randn(N, K, generator=chance, device=device) * 0.02).bfloat16()
        self.codes, self.scale = ops.quantize_weight(self.weight)
        groups = K // GROUP if K % GROUP == 0 else 1
        self.group_scale = self.scale * (0.5 + torch.rand(N, groups, generator=chance, device=device))
        self.x = torch.randn(M, K, generator=chance, device=device).bfloat16()
        # In fp64: on CUDA, dividing a tensor by a number does not round to nearest. Dividing by a tensor, as below,
        # does.
        self.x_scale = (self.x.double().abs().amax(1, keepdim=True) / 127).float()
        self.x_codes = (self.x.float() / self.x_scale).round().to(torch.int8)
        self.floats = rotation(self.weight)
        self.int8 = rotation(self.codes, self.scale, self.group_scale)

    def ways(self, M: int) -> list[Way]:
        """The layer on M rows of bf16, and a streaming read of as many bytes as its int8 weight has."""
        x = self.x[:M]

        def w8a16(codes: Tensor, scale: Tensor, _: Tensor) -> Tensor:
            return ops.w8a16_linear(x, codes, scale)

        def w8a16_groups(codes: Tensor, _: Tensor, group_scale: Tensor) -> Tensor:
            return ops.w8a16_linear(x, codes, group_scale)

        def w8a8(codes: Tensor, scale: Tensor, _: Tensor) -> Tensor:
            return ops.w8a8_linear(*ops.quantize_per_token(x), codes, scale, None, x.dtype)

        ways = [
            Way(STREAM, torch.sum, self._streams(), lambda _: True),
            Way(BF16, functools.partial(F.linear, x), self.floats, close_to(self._float[:M])),
            Way(W8A16, w8a16, self.int8, close_to(self._w8a16[:M])),
            Way(W8A8, w8a8, self.int8, close_to(self.sums[:M] * self.x_scale[:M].double() * self.scale.double().T)),
        ]
        if self.K % GROUP == 0:
            ways.insert(3, Way(W8A16_GROUPS, w8a16_groups, self.int8, close_to(self._grouped[:M])))
        return ways

    def quantizing(self) -> list[Way]:
        """Quantizing the weight, and the amax alone, which is the part of it that finds the scales."""
        amax = self.weight.double().abs().amax(1)

        def is_quantized(result: tuple[Tensor, Tensor]) -> bool:
            codes, scale = result[0].double(), result[1].double()
            fits = (scale[:, 0] * 127 / amax - 1).abs() <= 2**-7  # the scale is rounded to bf16
            nearest = (self.weight.double() - codes * scale).abs() <= scale * (0.5 + 1e-5)
            return bool(fits.all() and nearest.all())

        return [
            Way(AMAX, lambda weight: weight.abs().amax(1), self.floats, lambda found: bool((found == amax).all())),
            Way(QUANTIZE, torch.ops.octavo.quantize_weight.default, self.floats, is_quantized),
        ]

    def lookups(self, M: int) -> list[Way]:
        """Looking up M rows of the weight, used as an embedding table."""
        rows = torch.randint(self.N, (M,), generator=torch.Generator().manual_seed(0)).to(self.device)

        def int8(codes: Tensor, scale: Tensor, _: Tensor) -> Tensor:
            return ops.w8a16_embedding(rows, codes, scale, torch.bfloat16)

        found, dequantized = self.weight[rows].double(), self.codes[rows].double() * self.scale[rows].double()
        return [
            Way(LOOKUP_BF16, functools.partial(F.embedding, rows), self.floats, close_to(found)),
            Way(LOOKUP, int8, self.int8, close_to(dequantized)),
        ]

    def _streams(self) -> Weights:
        """Parts of the bf16 weights, each with as many bytes as the int8 weight, viewed as fp32."""
        count = self.N * self.K // 4
        return ((weight.flatten()[: 2 * count].view(torch.float32),) for (weight,) in self.floats)

    # The expected results in float64 for all rows of x: [M, N].

    @functools.cached_property
    def sums(self) -> Tensor:
        """The sums of products of codes, without scales."""
        return self.x_codes.double() @ self.codes.double().T

    @functools.cached_property
    def _float(self) -> Tensor:
        return self.x.double() @ self.weight.double().T

    @functools.cached_property
    def _w8a16(self) -> Tensor:
        return self.x.double() @ self.codes.double().T * self.scale.double().T

    @functools.cached_property
    def _grouped(self) -> Tensor:
        groups = self.group_scale.double().repeat_interleave(GROUP, dim=1)
        return self.x.double() @ (self.codes.double() * groups).T
