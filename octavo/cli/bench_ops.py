"""`octavo bench --ops`: what int8 gains for single layers on this machine, next to bf16 and to the memory bandwidth.

w8a16       int8 weights, with one scale per output channel or per 128 columns
w8a8        int8 weights and inputs; the time includes quantizing the bf16 x, row by row
read        bytes of weights per second, and their share of what `torch.sum` reads per second: few rows of x are bound
            by memory
computed    multiplications and additions per second: many rows of x are bound by arithmetic
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from octavo.cli.machine import describe_machine, machine_line
from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import device_of
from octavo.tables import Table, human_bytes, human_percent

if TYPE_CHECKING:
    from octavo.cli.op_speed import Layer

__all__ = ["SHAPES", "SIZES", "Timed", "measure", "run"]

SHAPES = ((4096, 4096), (11008, 4096))
SIZES = (1, 4, 16, 64, 512)
FEW_ROWS = 16
"""Up to which a layer waits for its weights."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """The time of an op on a layer [N, K] and M rows, next to that of its rival, another op timed in the same rounds.

    The rival's own entry has itself as its rival.
    M: None for an op on the weight alone. weight_bytes: how many the op reads. of_stream: fraction of the speed of a
    streaming read. operations: multiplications and additions.
    """

    op: str
    N: int
    K: int
    M: int | None
    seconds: float
    rival: str
    rival_seconds: float
    weight_bytes: int
    of_stream: float | None = None
    operations: int | None = None

    @property
    def ratio(self) -> float:
        """How many times as fast as the rival."""
        return self.rival_seconds / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Of weights."""
        return self.weight_bytes / self.seconds

    @property
    def operations_per_s(self) -> float | None:
        """Multiplications and additions."""
        return None if self.operations is None else self.operations / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the properties computed from them."""
        more = {"ratio": self.ratio, "bytes_per_s": self.bytes_per_s, "operations_per_s": self.operations_per_s}
        return {**dataclasses.asdict(self), **more}


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Time the ops of the layers and numbers of rows that were asked for."""
    import torch

    from octavo.cli.op_speed import GROUP
    from octavo.ops import backends

    device = device_of(args)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        with terminal.progress("timing") as progress:
            timed = list(measure(args.shapes, args.rows, device, progress))
        machine = describe_machine()
    finally:
        torch.set_num_threads(threads)
    served = {row.op: row.backend for row in backends() if row.device == device}
    served_by = f"{_served(served)}, on {device}"
    notes = [f"octavo ops served by: {served_by}; every result was held to float64 before it was timed."]
    odd = [f"{N}x{K}" for N, K in args.shapes if K % GROUP]
    if odd:
        notes.append(f"Without groups of {GROUP}, which do not divide K: {', '.join(odd)}.")
    data = {"machine": machine, "device": device, "served_by": served, "ops": [one.to_dict() for one in timed]}
    return Answer(data, (_linear_table(timed), _other_table(timed), "\n".join([*notes, machine_line(machine)])))


def measure(
    shapes: list[tuple[int, int]], sizes: list[int], device: str, progress: Callable[[int, int], None]
) -> Iterator[Timed]:
    """Time each op on each layer and each number of rows. `progress` is called with (races done, all races)."""
    from octavo.cli.op_speed import AMAX, LOOKUP, LOOKUP_BF16, QUANTIZE, Layer, race

    done, total = 0, len(shapes) * (len(sizes) + 2)

    def finished() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for N, K in shapes:
        layer = Layer(N, K, max(sizes), device)
        for M in sizes:
            yield from linear_rows(layer, M, race(layer.ways(M), device))
            finished()
        seconds = race(layer.quantizing(), device)
        yield Timed(QUANTIZE, N, K, None, seconds[QUANTIZE], AMAX, seconds[AMAX], 2 * N * K)
        finished()
        seconds = race(layer.lookups(max(sizes)), device)
        yield Timed(LOOKUP, N, K, max(sizes), seconds[LOOKUP], LOOKUP_BF16, seconds[LOOKUP_BF16], max(sizes) * K)
        finished()


def linear_rows(layer: Layer, M: int, seconds: dict[str, float]) -> Iterator[Timed]:
    """The results of a race between `Layer.ways`."""
    from octavo.cli.op_speed import BF16, STREAM

    elements = layer.N * layer.K
    stream = elements / seconds[STREAM]
    for op, time in seconds.items():
        if op != STREAM:
            weights = elements * (2 if op == BF16 else 1)
            share = weights / time / stream
            operations = 2 * M * elements
            yield Timed(op, layer.N, layer.K, M, time, BF16, seconds[BF16], weights, share, operations)


def _linear_table(timed: list[Timed]) -> Table:
    rows = []
    last = None
    for one in timed:
        if one.operations_per_s is None or one.M is None or one.of_stream is None:
            continue
        few = one.M <= FEW_ROWS
        rows.append(
            (
                *(("", "") if last == (one.N, one.K, one.M) else (f"{one.N}x{one.K}", str(one.M))),
                one.op,
                _microseconds(one.seconds),
                f"{one.ratio:.2f}x",
                f"{human_bytes(int(one.bytes_per_s))}/s" if few else "-",
                human_percent(one.of_stream) if few else "-",
                "-" if few else f"{one.operations_per_s / 1e12:.2f} T/s",
            )
        )
        last = (one.N, one.K, one.M)
    columns = ("N x K", "M", "linear layer", "time", "of bf16's speed", "read", "of torch.sum's", "computed")
    return Table("Linear layers, weights from memory; medians", columns, tuple(rows), "lrlrrrrr")


def _other_table(timed: list[Timed]) -> Table:
    rows = tuple(
        (
            f"{one.N}x{one.K}",
            "-" if one.M is None else str(one.M),
            one.op,
            _microseconds(one.seconds),
            f"{human_bytes(int(one.bytes_per_s))}/s",
            one.rival,
            f"{one.ratio:.2f}x",
        )
        for one in timed
        if one.operations is None
    )
    columns = ("N x K", "M", "op", "time", "read", "next to", "of its speed")
    return Table("Quantizing a weight, looking up M rows", columns, rows, "lrlrrlr")


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


def _served(backend_of: dict[str, str]) -> str:
    used = ("w8a16_linear", "w8a8_linear", "quantize_per_token", "quantize_weight", "w8a16_embedding")
    return ", ".join(sorted({backend_of[op] for op in used}))
