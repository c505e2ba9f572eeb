"""`octavo calibrate MODEL`: run a language model on text, and save statistics of its layers' inputs.

Under torchrun every process runs its share of the samples, and the first one writes the file and prints the answer:

    torchrun --nproc-per-node 4 -m octavo calibrate MODEL -o stats.safetensors
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from octavo.cli.sources import add_plot, add_samples, calibrated, check_outputs, ranges_of, source_of
from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import CommandError, Verbs, a_path, add_device, device_of, new_verb
from octavo.plot import channel_ranges, outlier_ratio
from octavo.tables import Table, in_general

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.calibration.stats import Stats

__all__ = ["add_parser", "run"]

T = TypeVar("T")


def add_parser(verbs: Verbs) -> None:
    """`octavo calibrate`."""
    parser = new_verb(
        verbs, "calibrate", "run a float language model on text, and keep its layers' input ranges",
        "octavo calibrate HuggingFaceTB/SmolLM2-135M-Instruct --samples 128 -o stats.safetensors", run,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", type=a_path, help="checkpoint folder, Hub id or .gguf file; float")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text", metavar="FILE", type=a_path, help="text to run on, UTF-8 (default: Python's own documentation)"
    )
    text.add_argument(
        "--jsonl", metavar="FILE", type=a_path, help='texts to run on: a line is {"text": ...} or {"messages": [...]}'
    )
    add_samples(parser)
    parser.add_argument(
        "--route-all-experts", action="store_true",
        help="keep statistics of every token in every expert, not only in those that the router chose",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", type=a_path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--act-scales", metavar="FILE", type=a_path, help="write SmoothQuant's own act_scales .pt file too"
    )
    add_plot(parser)
    add_device(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> Answer | None:
    """Calibrate; under torchrun only the first process writes and answers."""
    source = source_of(args)
    check_outputs(args, args.output, args.act_scales)
    _check_suffix(args.output)
    with _processes(device_of(args)) as (rank, device):
        if rank:
            terminal = Terminal(json=True, debug=args.debug)  # a progress bar of the first process is enough
        with terminal.progress(f"loading {args.model}"):
            from octavo.integrations.calibration import load_float

            model, tokenizer = load_float(args.model, device=device)
        stats, samples = calibrated(args, terminal, source, model, tokenizer, route_all_experts=args.route_all_experts)
        if rank:
            return None
        return _written(args, stats, source.name, samples)


def _check_suffix(output: str) -> None:
    """Refuse another suffix: --calibration recognizes files of statistics by it."""
    if Path(output).suffix.lower() != ".safetensors":
        raise CommandError(
            f"-o is {output}, expected a name that ends in .safetensors: --calibration reads other files as text; "
            f"write {Path(output).with_suffix('.safetensors')}"
        )


@contextlib.contextmanager
def _processes(device: str) -> Iterator[tuple[int, str]]:
    """This process's rank among those that torchrun started, and its device; without torchrun, 0 and `device`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, device
        return
    import torch

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield torch.distributed.get_rank(), device
    finally:
        torch.distributed.destroy_process_group()


def _written(args: argparse.Namespace, stats: Stats, text_name: str, samples: list[Tensor]) -> Answer:
    stats.save(args.output)
    if args.act_scales is not None:
        stats.save_act_scales(args.act_scales)
    if args.plot is not None:
        channel_ranges(ranges_of(stats), None, args.plot)
    rows = [_Row(name, seen.tokens, seen.amax.tolist()) for name, seen in stats.observers.items()]
    experts = [
        _ExpertsRow(name, seen.tokens.tolist(), seen.amax.amax(1).tolist(), list(seen.unrouted))
        for name, seen in stats.experts.items()
    ]
    tokens = sum(batch.numel() for batch in samples)
    shown: list[Table | str] = [_table(rows, f"{tokens} tokens of {text_name}, in {len(samples)} samples")]
    if experts:
        shown.append(_table_of_experts(experts))
    if stats.unrouted:
        shown.append(_table_of_unrouted(stats.unrouted))
    if stats.unreached:
        shown.append(_table_of_unreached(stats.unreached))
    model, output = shlex.quote(args.model), shlex.quote(args.output)
    shown.append(f"octavo quantize {model} DST --scheme w8a8-static --smooth auto --calibration {output}")
    return Answer(
        {
            "model": args.model,
            "text": text_name,
            "samples": len(samples),
            "tokens": tokens,
            "output": args.output,
            "layers": [row.to_dict() for row in rows],
            "experts": [dataclasses.asdict(row) for row in experts],
            "unreached": list(stats.unreached),
        },
        tuple(shown),
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """A layer's input. channels: the amax of each channel, [K]."""

    name: str
    tokens: int
    channels: list[float]

    def to_dict(self) -> dict[str, Any]:
        """For --json; `ratio` is null where more than half of the channels are dead."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "amax": max(self.channels),
            "median_channel_amax": statistics.median(self.channels),
            "ratio": outlier_ratio(self.channels),
        }


def _table(rows: list[_Row], where: str) -> Table:
    """One line for each family of layers."""
    keys = ("tokens", "amax", "median_channel_amax", "ratio")
    families = _families([row.to_dict() for row in rows], lambda row: str(row["name"]))
    lines = tuple((called, *(_span([row[key] for row in members]) for key in keys)) for called, members in families)
    columns = ("input of", "tokens", "amax", "median channel's amax", "ratio")
    return Table(f"Inputs on {where}", columns, lines, "lrrrr")


@dataclasses.dataclass(frozen=True)
class _ExpertsRow:
    """The inputs of a stack of down projections. tokens, amax: per expert. unrouted: the experts that got no tokens."""

    name: str
    tokens: list[int]
    amax: list[float]
    unrouted: list[int]


def _table_of_experts(rows: list[_ExpertsRow]) -> Table:
    """One line for each family of stacks."""
    lines = tuple(
        (
            called,
            _span([len(row.tokens) for row in members]),
            _span([tokens for row in members for tokens in row.tokens]),
            _span([amax for row in members for amax in row.amax]),
            str(sum(len(row.unrouted) for row in members)),
        )
        for called, members in _families(rows, lambda row: row.name)
    )
    columns = ("inputs of", "experts", "tokens of one", "amax of one", "without tokens")
    return Table("Experts' down projections", columns, lines, "lrrrr")


def _table_of_unrouted(unrouted: dict[str, tuple[int, ...]]) -> Table:
    lines = tuple((name, ", ".join(map(str, experts))) for name, experts in unrouted.items())
    count = sum(map(len, unrouted.values()))
    return Table(
        f"Experts that no token was routed to, {count}; they will not be smoothed", ("stack", "experts"), lines
    )


def _table_of_unreached(names: tuple[str, ...]) -> Table:
    lines = tuple((called,) for called, _ in _families(names, lambda name: name))
    title = f"Layers that no sample reached, {len(names)}; of these, what becomes int8 will have dynamic scales"
    return Table(title, ("layer",), lines)


def _families(items: Iterable[T], name_of: Callable[[T], str]) -> Iterator[tuple[str, list[T]]]:
    """Group the rows whose names differ in numbers only, each group under a common name."""
    families: dict[str, list[T]] = {}
    for item in items:
        families.setdefault(in_general(name_of(item)), []).append(item)
    for family, members in families.items():
        yield name_of(members[0]) if len(members) == 1 else f"{family}  x{len(members)}", members


def _span(values: list[float]) -> str:
    low, high = (str(value) if isinstance(value, int) else f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
