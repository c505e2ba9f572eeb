"""`octavo smooth SRC DST`: move activation outliers of a float language model into its weights; it stays float."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any, Literal

from octavo.cli.sources import add_calibration, add_plot, check_outputs, ranges_of, source_of, stats_of
from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import Verbs, a_path, add_device, device_of, new_verb
from octavo.plot import channel_ranges
from octavo.recipe import PRESETS

if TYPE_CHECKING:
    from octavo.calibration.stats import Stats
    from octavo.report import SmoothReport

__all__ = ["Alpha", "add_parser", "alpha", "run"]

Alpha = float | Literal["auto"]


def alpha(text: str) -> Alpha:
    """Parse "auto" or a number from 0 to 1."""
    if text == "auto":
        return "auto"
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


alpha.__name__ = "alpha (auto, or a number from 0 to 1)"  # for argparse's message


def add_parser(verbs: Verbs) -> None:
    """`octavo smooth`."""
    parser = new_verb(
        verbs, "smooth", "move a float model's activation outliers into its weights",
        "octavo smooth HuggingFaceTB/SmolLM2-135M-Instruct smollm2-smooth --scheme w8a8 --plot ranges.png", run,
    )  # fmt: skip
    parser.add_argument("src", metavar="SRC", type=a_path, help="checkpoint folder, Hub id or .gguf file; float")
    parser.add_argument(
        "dst", metavar="DST", type=a_path, help="folder to write, float too; must not exist, or be empty"
    )
    parser.add_argument(
        "--alpha", metavar="A", type=alpha, default="auto",
        help="0 to 1: how much of the outliers moves; auto (default): what is measured best for each pair of layers",
    )  # fmt: skip
    parser.add_argument(
        "--scheme", choices=[name for name, preset in PRESETS.items() if preset.input], default="w8a8",
        help="to make the model ready for, and to measure errors under (default w8a8)",
    )  # fmt: skip
    add_calibration(parser)
    add_plot(parser)
    add_device(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Calibrate, smooth, write."""
    device = device_of(args)
    source = source_of(args)
    check_outputs(args)
    from octavo.formats.outputs import new_folder

    with new_folder(args.dst) as folder:
        with terminal.progress(f"loading {args.src}"):
            from octavo.integrations.calibration import load_float, save_float

            model, tokenizer = load_float(args.src, device=device)
        stats = stats_of(args, terminal, source, model, tokenizer)
        before = ranges_of(stats)
        report = _smoothed(args, terminal, stats, model)
        with terminal.progress(f"writing {args.dst}"):
            save_float(model, tokenizer, folder)
    if args.plot is not None:  # after the model has been written
        channel_ranges(before, ranges_of(stats), args.plot)
    return Answer(
        {"source": args.src, "destination": args.dst, "calibration": source.name, "smoothing": report.to_dict()},
        (report.table(), f"octavo quantize {shlex.quote(args.dst)} INT8 --scheme {args.scheme}"),
    )


def _smoothed(args: argparse.Namespace, terminal: Terminal, stats: Stats, model: Any) -> SmoothReport:
    from octavo.smoothing.smooth import smooth

    with terminal.progress("smoothing") as progress:
        return smooth(model, stats, args.alpha, scheme=args.scheme, progress=progress)
