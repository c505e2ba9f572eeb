"""What the verbs calibrate a model on: text, documents, or statistics from an earlier calibration."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.terminal import Terminal
from octavo.cli.text import read_documents, read_text
from octavo.cli.verb import CommandError, a_path, positive
from octavo.plot import new_figure

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.calibration.stats import Stats

__all__ = [
    "Source",
    "add_calibration",
    "add_plot",
    "add_samples",
    "calibrated",
    "check_outputs",
    "ranges_of",
    "source_of",
    "stats_of",
]

_SAMPLES = 64
_SEQ_LEN = 512


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the option --calibration, and those that say how much of it to use."""
    parser.add_argument(
        "--calibration", metavar="FILE", type=a_path,
        help="text, .jsonl or what `octavo calibrate` wrote (default: Python's own documentation)",
    )  # fmt: skip
    add_samples(parser)


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how much of a text the model is run on."""
    parser.add_argument(
        "--samples",
        metavar="N",
        type=positive,
        help=f"how many samples, spread evenly over the text (default {_SAMPLES})",
    )
    parser.add_argument(
        "--seq-len", metavar="L", type=positive,
        help=f"tokens in a sample (default {_SEQ_LEN}, or what the model holds)",
    )  # fmt: skip


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Add the option --plot."""
    parser.add_argument(
        "--plot", metavar="FILE", type=a_path, help="draw the channels' ranges of the most uneven inputs, as PNG"
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """What to calibrate on: exactly one of text, documents and stats. name: for messages."""

    name: str
    text: str | None = None
    documents: list[Any] | None = None
    stats: Stats | None = None


def source_of(args: argparse.Namespace) -> Source:
    """The source that --text, --jsonl or --calibration names; by default the sample text.

    Raises: CommandError for a file in another format, for --seq-len 1, and for --samples or --seq-len together with
        statistics; CalibrateError for a safetensors file that holds no statistics.
    """
    if args.seq_len == 1:
        raise CommandError("--seq-len is 1, expected at least 2: a token that follows none is not like the others")
    given = [(f"--{name}", getattr(args, name, None)) for name in ("text", "jsonl", "calibration")]
    option, file = next(((option, file) for option, file in given if file is not None), ("--text", None))
    kind = "" if file is None or option == "--text" else ".jsonl" if option == "--jsonl" else Path(file).suffix.lower()
    if file is not None and kind == ".json":
        raise CommandError(
            f"{option} is {file}, expected text, .safetensors of `octavo calibrate`, or .jsonl, a line of which is "
            '{"text": ...} or {"messages": [...]}; a file with such lines needs that name'
        )
    if file is not None and kind == ".safetensors":
        return Source(file, stats=_stored(args, file))
    if file is not None and kind == ".jsonl":
        return Source(file, documents=read_documents(option, file))
    text, name = read_text(option, file)
    return Source(name, text=text)


def _stored(args: argparse.Namespace, file: str) -> Stats:
    for option, value in (("--samples", args.samples), ("--seq-len", args.seq_len)):
        if value is not None:
            raise CommandError(
                f"{option} says how much of a text to run on, and --calibration {file} holds statistics; leave one out"
            )
    from octavo.calibration.stats import Stats

    return Stats.load(file)


def stats_of(args: argparse.Namespace, terminal: Terminal, source: Source, model: Any, tokenizer: Any) -> Stats:
    """The statistics of a float model: the source's own, or new ones from running the model on its text."""
    return source.stats or calibrated(args, terminal, source, model, tokenizer)[0]


def calibrated(
    args: argparse.Namespace,
    terminal: Terminal,
    source: Source,
    model: Any,
    tokenizer: Any,
    *,
    route_all_experts: bool = False,
) -> tuple[Stats, list[Tensor]]:
    """Calibrate the model. Returns: the statistics, and the samples that they are of, int64 [1, T] each."""
    from octavo.calibration.calibrate import calibrate
    from octavo.integrations.calibration import document_batches, text_batches
    from octavo.integrations.language_model import refuse_unknown_tokens

    samples, seq_len = args.samples or _SAMPLES, _seq_len(args, model)
    with terminal.progress(f"calibrating on {source.name}") as progress:
        if source.documents is not None:
            batches = document_batches(tokenizer, source.documents, samples=samples, seq_len=seq_len)
        else:
            assert source.text is not None
            batches = text_batches(tokenizer, source.text, samples=samples, seq_len=seq_len)
        for batch in batches:
            refuse_unknown_tokens(model, batch)
        return calibrate(model, batches, route_all_experts=route_all_experts, progress=progress), batches


def _seq_len(args: argparse.Namespace, model: Any) -> int:
    from octavo.integrations.language_model import positions_of

    positions = positions_of(model)
    if args.seq_len is None:
        return min(_SEQ_LEN, positions or _SEQ_LEN)
    if positions is not None and args.seq_len > positions:
        raise CommandError(f"--seq-len is {args.seq_len}, and the model holds {positions} tokens; ask for fewer")
    return int(args.seq_len)


def check_outputs(args: argparse.Namespace, *files: str | None) -> None:
    """Check before the work starts that `files` and --plot can be written at its end.

    Raises: CommandError for a folder that does not exist or is not writable, for a folder in the place of a file, for
        two outputs with one name, and for a --plot that does not end in .png; MissingExtra for --plot without
        matplotlib.
    """
    outputs = [Path(file) for file in (*files, args.plot) if file is not None]
    for file in outputs:
        if not file.parent.is_dir():
            raise CommandError(f"{file}: there is no folder {file.parent}; make it, or choose another")
        if file.is_dir():
            raise CommandError(f"{file}: is a folder, expected the name of a file")
        if not os.access(file.parent, os.W_OK):
            raise CommandError(f"{file}: the folder {file.parent} cannot be written to; choose another")
    if len(set(map(os.path.realpath, outputs))) < len(outputs):
        raise CommandError(f"{', '.join(map(str, outputs))}: are one file, expected one for each output")
    if args.plot is not None:
        _check_picture(Path(args.plot))
        new_figure()


def _check_picture(file: Path) -> None:
    is_device = file.exists() and not file.is_file()
    if file.suffix.lower() != ".png" and not is_device:
        raise CommandError(
            f"--plot is {file}, expected a name that ends in .png, which it is written as; write "
            f"{file.with_suffix('.png')}"
        )


def ranges_of(stats: Stats) -> dict[str, list[float]]:
    """Layer's name -> amax of each channel [K], the form that `octavo.plot` takes."""
    return {name: seen.amax.tolist() for name, seen in stats.observers.items()}
