"""`octavo quantize SRC DST`: a float checkpoint becomes an int8 one, file to file."""

from __future__ import annotations

import argparse
import shlex
import time
from typing import TYPE_CHECKING

from octavo.cli.terminal import Terminal
from octavo.cli.verb import Answer, CommandError, Verbs, new_verb, positive
from octavo.recipe import OPT_IN_TARGETS, PRESETS, Recipe
from octavo.tables import Table, human_bytes, human_percent

if TYPE_CHECKING:
    from octavo.coverage import Coverage

__all__ = ["add_parser", "run"]

_DEFAULT_SCHEME = "w8a16"


def add_parser(verbs: Verbs) -> None:
    """`octavo quantize`."""
    parser = new_verb(
        verbs,
        "quantize",
        "turn a float checkpoint into an int8 one",
        "octavo quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-int8 --ignore 're:.*down_proj'",
        run,
    )
    parser.add_argument("src", metavar="SRC", help="folder with safetensors, Hub id or .gguf file")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist")
    schemes = "; ".join(f"{name}: {line}" for name, line in PRESETS.items())
    parser.add_argument("--scheme", choices=sorted(PRESETS), help=f"default {_DEFAULT_SCHEME}. {schemes}")
    parser.add_argument(
        "--ignore",
        metavar="P",
        nargs="+",
        action="extend",
        default=[],
        help="leave float: names of modules, 're:' patterns, or kinds of layers such as Conv2d",
    )
    parser.add_argument(
        "--include",
        metavar="P",
        nargs="+",
        action="extend",
        default=[],
        help=f"quantize what is not by default: {', '.join(OPT_IN_TARGETS)}, or modules by name or 're:' pattern",
    )
    parser.add_argument("--recipe", metavar="FILE", help=".json or .yaml file that says scheme, targets and the rest")
    parser.add_argument("--group-size", metavar="G", type=positive, help="one scale for G columns, not for a whole row")
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a file of weights (default 5GB)")


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Quantize the checkpoint; the answer is its coverage."""
    recipe = _recipe(args)
    start = time.perf_counter()
    with terminal.progress(f"quantizing {args.src}") as progress:
        from octavo.integrations.hub import quantize_checkpoint

        report = quantize_checkpoint(args.src, args.dst, recipe, max_shard_size=args.max_shard_size, progress=progress)
    seconds = time.perf_counter() - start
    return Answer(
        {
            "source": args.src,
            "destination": args.dst,
            "scheme": str(recipe.scheme),
            "seconds": seconds,
            "coverage": report.to_dict(),
        },
        (report.table(), _summary(args, report, seconds), _next_steps(args)),
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.recipe is None:
        return Recipe.of(
            args.scheme or _DEFAULT_SCHEME, ignore=args.ignore, include=args.include, group_size=args.group_size
        )
    for option in ("scheme", "group_size"):
        if getattr(args, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise CommandError(f"{name} and --recipe are both given; expected one: say the scheme in {args.recipe}")
    return Recipe.of(Recipe.from_file(args.recipe), ignore=args.ignore, include=args.include)


def _summary(args: argparse.Namespace, report: Coverage, seconds: float) -> Table:
    share = report.bytes_after / report.bytes_before if report.bytes_before else 1.0
    rows = (
        ("before", human_bytes(report.bytes_before)),
        ("after", f"{human_bytes(report.bytes_after)}, {human_percent(share)} of it"),
        ("time", f"{seconds:.1f} s"),
    )
    return Table(f"{args.src} -> {args.dst}", ("weights", ""), rows)


def _next_steps(args: argparse.Namespace) -> str:
    src, dst = shlex.quote(args.src), shlex.quote(args.dst)
    return (
        f"What did it cost?   octavo eval {dst} --baseline {src}\n"
        f"Let it write:       octavo generate {dst} --prompt 'Why is the sky blue?'"
    )
