"""`octavo quantize SRC DST`: a float checkpoint becomes an int8 one.

Where the weights alone decide, files are converted to files without building a model. Static inputs and smoothing need
a model that runs: then a language model is loaded, calibrated, smoothed, quantized and saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.smooth import alpha
from octavo.cli.sources import Source, add_calibration, source_of, stats_of
from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import CommandError, Verbs, a_path, add_device, device_of, new_verb, positive
from octavo.recipe import ATTENTION, OPT_IN_TARGETS, PRESETS, Recipe
from octavo.tables import Table, human_bytes, human_percent

if TYPE_CHECKING:
    from octavo.calibration.observers import ObserverKind
    from octavo.integrations.calibration import LinearInputs
    from octavo.quantization.coverage import Coverage
    from octavo.report import SmoothReport

__all__ = ["add_parser", "run"]

_DEFAULT_SCHEME = "w8a16"


def add_parser(verbs: Verbs) -> None:
    """`octavo quantize`."""
    parser = new_verb(
        verbs,
        "quantize",
        "turn a float checkpoint into an int8 one",
        "octavo quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-int8 --scheme w8a8-static --smooth auto",
        run,
    )
    parser.add_argument("src", metavar="SRC", type=a_path, help="folder with safetensors, Hub id or .gguf file")
    parser.add_argument("dst", metavar="DST", type=a_path, help="folder to write; must not exist, or be empty")
    schemes = "; ".join(f"{name}: {preset.line}" for name, preset in PRESETS.items())
    parser.add_argument("--scheme", choices=sorted(PRESETS), help=f"default {_DEFAULT_SCHEME}. {schemes}")
    parser.add_argument(
        "--ignore",
        metavar="P",
        action="append",
        default=[],
        help="leave float: a module by name or 're:' pattern, or a kind of layers such as Conv2d; repeat it for more",
    )
    parser.add_argument(
        "--include",
        metavar="P",
        action="append",
        default=[],
        help=f"quantize what is not by default: {', '.join(OPT_IN_TARGETS)}, or a module by name or 're:' pattern; "
        "repeat it for more",
    )
    parser.add_argument(
        "--recipe", metavar="FILE", type=a_path, help=".json or .yaml file that says scheme, targets and the rest"
    )
    parser.add_argument(
        "--group-size", metavar="G", type=positive, help="one scale for each G columns, not for a whole row"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="most that a file of weights holds (default 5GB)"
    )
    parser.add_argument(
        "--attention", choices=ATTENTION, help="how the products of attention are computed (default float)"
    )
    parser.add_argument(
        "--smooth", metavar="A", type=alpha, help="move activation outliers into the weights first: auto, or 0 to 1"
    )
    add_calibration(parser)
    parser.add_argument(
        "--observer", metavar="O", help="how static scales are found: absmax (default), percentile or mse"
    )
    parser.add_argument(
        "--no-repair", action="store_true", help="keep static inputs even where their error is catastrophic"
    )
    add_device(parser)


@dataclasses.dataclass(frozen=True)
class _Quantized:
    """What was done. inputs: None if no static inputs were asked for."""

    coverage: Coverage
    smoothing: SmoothReport | None = None
    inputs: LinearInputs | None = None


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Quantize the checkpoint. The answer is its coverage and, with smoothing, the smoothing report."""
    recipe = _recipe(args)
    _check(args, recipe)
    start = time.perf_counter()
    done = (_run_model if _needs_model(args, recipe) else _run_files)(args, terminal, recipe)
    seconds = time.perf_counter() - start
    data: dict[str, Any] = {
        "source": args.src,
        "destination": args.dst,
        "scheme": str(recipe.scheme),
        "seconds": seconds,
        "coverage": done.coverage.to_dict(),
    }
    smoothing = []
    if done.smoothing is not None:
        data["smoothing"] = done.smoothing.to_dict()
        smoothing.append(done.smoothing.table())
    if done.inputs is not None:
        data["linear_inputs"] = dataclasses.asdict(done.inputs)
    return Answer(data, (done.coverage.table(), *smoothing, _summary(args, done, seconds), _next_steps(args)))


def _is_static(recipe: Recipe) -> bool:
    return any(scheme.is_static for scheme in recipe.schemes)


def _needs_model(args: argparse.Namespace, recipe: Recipe) -> bool:
    return args.smooth is not None or _is_static(recipe)


def _check(args: argparse.Namespace, recipe: Recipe) -> None:
    """Raise CommandError for options that would have no effect."""
    calibrating = {"calibration": None, "samples": None, "seq_len": None, "device": None}
    static = {"observer": None, "no_repair": False}
    if not _needs_model(args, recipe):
        _refuse(args, calibrating, "only calibration uses it", "--scheme w8a8-static or --smooth")
    if not _is_static(recipe):
        _refuse(args, static, f"scheme {recipe.scheme} has no static inputs", "--scheme w8a8-static")
    if args.smooth is not None and not any(scheme.input for scheme in recipe.schemes):
        raise CommandError(f"--smooth is for int8 inputs, and scheme {recipe.scheme} has none; add --scheme w8a8")


def _refuse(args: argparse.Namespace, unused: dict[str, Any], why: str, fix: str) -> None:
    for name, default in unused.items():
        if getattr(args, name) != default:
            raise CommandError(f"--{name.replace('_', '-')} has no effect: {why}; leave it out, or add {fix}")


def _run_files(args: argparse.Namespace, terminal: Terminal, recipe: Recipe) -> _Quantized:
    with terminal.progress(f"quantizing {args.src}") as progress:
        from octavo.integrations.hub import quantize_checkpoint

        return _Quantized(
            quantize_checkpoint(args.src, args.dst, recipe, max_shard_size=args.max_shard_size, progress=progress)
        )


def _run_model(args: argparse.Namespace, terminal: Terminal, recipe: Recipe) -> _Quantized:
    from octavo.calibration.observers import check_observer
    from octavo.formats.checkpoint import check_shard_size
    from octavo.formats.outputs import new_folder

    device = device_of(args)
    source = source_of(args)
    if args.observer is not None:
        check_observer(args.observer)
    check_shard_size(args.max_shard_size)
    with new_folder(args.dst) as folder:  # refuses an existing destination before the work
        with terminal.progress(f"loading {args.src}"):
            from octavo.integrations.calibration import linear_inputs, load_float
            from octavo.integrations.hub import save

            model, tokenizer = load_float(args.src, device=device)
        coverage, smoothing = _fold(args, terminal, recipe, source, model, tokenizer)
        with terminal.progress(f"writing {args.dst}") as progress:
            save(model, folder, tokenizer=tokenizer, max_shard_size=args.max_shard_size, progress=progress)
    return _Quantized(coverage, smoothing, linear_inputs(model) if _is_static(recipe) else None)


def _fold(
    args: argparse.Namespace, terminal: Terminal, recipe: Recipe, source: Source, model: Any, tokenizer: Any
) -> tuple[Coverage, SmoothReport | None]:
    """Calibrate, smooth if asked to, and quantize, in place."""
    from octavo.integrations.hub import quantize
    from octavo.smoothing.smooth import smooth

    stats = stats_of(args, terminal, source, model, tokenizer)
    repair = not args.no_repair
    smoothing = None
    if args.smooth is not None:
        with terminal.progress("smoothing") as progress:
            scheme = next(one for one in recipe.schemes if one.input is not None)
            smoothing = smooth(model, stats, args.smooth, scheme=scheme, repair=repair, progress=progress)
    observer: ObserverKind = args.observer or "absmax"
    with terminal.progress("quantizing") as progress:
        report = quantize(model, recipe, stats=stats, observer=observer, repair=repair, progress=progress)
    return report, smoothing


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.recipe is None:
        return Recipe.of(
            args.scheme or _DEFAULT_SCHEME,
            ignore=args.ignore,
            include=args.include,
            group_size=args.group_size,
            attention=args.attention,
        )
    for option in ("scheme", "group_size"):
        if getattr(args, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise CommandError(f"{name} and --recipe are both given; expected one: say the scheme in {args.recipe}")
    return Recipe.of(Recipe.from_file(args.recipe), ignore=args.ignore, include=args.include, attention=args.attention)


def _summary(args: argparse.Namespace, done: _Quantized, seconds: float) -> Table:
    report = done.coverage
    share = report.bytes_after / report.bytes_before if report.bytes_before else 1.0
    rows = [
        ("before", human_bytes(report.bytes_before)),
        ("after", f"{human_bytes(report.bytes_after)}, {human_percent(share)} of it"),
        ("time", f"{seconds:.1f} s"),
    ]
    if done.inputs is not None:
        inputs = done.inputs
        kinds = f"{inputs.static} static, {inputs.dynamic} dynamic, {inputs.float} float"
        rows.append(("inputs of int8 linear layers", kinds))
    return Table(f"{args.src} -> {args.dst}", ("weights", ""), tuple(rows))


def _next_steps(args: argparse.Namespace) -> str:
    from octavo.integrations.language_model import other_kind

    src, dst = shlex.quote(args.src), shlex.quote(args.dst)
    if other_kind(Path(args.dst)):  # eval and generate are for causal language models
        return f"What is in it?      octavo inspect {dst}\nWhat did it cost?   octavo.compare tells, in Python"
    return (
        f"What did it cost?   octavo eval {dst} --baseline {src}\n"
        f"Let it write:       octavo generate {dst} --prompt 'Why is the sky blue?'"
    )
