"""`octavo eval PATH`: a language model's perplexity on a text, or its scores on tasks, and what quantizing it cost."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.cli import tasks
from octavo.cli.terminal import Answer, Terminal
from octavo.cli.text import read_text
from octavo.cli.verb import (
    CommandError,
    Verbs,
    a_path,
    add_cache,
    add_device,
    device_of,
    keep_cache,
    new_verb,
    positive,
)
from octavo.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.report import Comparison

__all__ = ["add_parser", "run"]

_WORST_LAYERS = 5
_TOKENS = 8192
_WINDOW = 512
"""Tokens that a model is judged on at once, where nobody says how many and it holds them."""


def add_parser(verbs: Verbs) -> None:
    """`octavo eval`."""
    parser = new_verb(
        verbs, "eval", "measure a language model's perplexity or task scores, and what quantizing it cost",
        "octavo eval smollm2-int8 --baseline HuggingFaceTB/SmolLM2-135M-Instruct", run,
    )  # fmt: skip
    parser.add_argument(
        "path", metavar="PATH", type=a_path, help="checkpoint folder, Hub id or .gguf file; int8 or float"
    )
    parser.add_argument(
        "--baseline", metavar="PATH", type=a_path, help="the original, to compare with on the same tokens"
    )
    parser.add_argument(
        "--text", metavar="FILE", type=a_path, help="text to judge on, UTF-8 (default: Python's own documentation)"
    )
    parser.add_argument(
        "--window",
        metavar="W",
        type=positive,
        help="tokens that a model sees at once (default 512, or all that PATH and the baseline hold)",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=positive, help=f"judge on the text's first N tokens (default {_TOKENS})"
    )
    add_cache(parser)
    add_device(parser)
    tasks.add_options(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Show both models' perplexity over the same windows, and how they compare; or their scores on tasks."""
    tasks.refuse_options(args)
    if args.tasks is not None:
        return tasks.run(args, terminal)
    for option, tokens in (("--window", args.window), ("--tokens", args.tokens)):
        if tokens is not None and tokens < 2:
            raise CommandError(f"{option} is {tokens}, expected at least 2: the first token predicts the next")
    text, text_name = read_text("--text", args.text)
    device = device_of(args)
    with terminal.progress(f"loading {args.path}"):
        from octavo.integrations import language_model

        model, tokenizer = language_model.load_language_model(args.path, device=device)
        cache = keep_cache(model, args.cache)
    models = {args.path: model}
    baseline = comparison = None
    if args.baseline is not None:
        with terminal.progress(f"loading {args.baseline}"):
            models[args.baseline] = baseline = language_model.load_causal(args.baseline, device=device)
    window = _window(args.window, {path: language_model.positions_of(one) for path, one in models.items()})
    ids = language_model.token_ids(tokenizer, text, limit=args.tokens or _TOKENS, window=window)
    if len(ids) < 2:
        raise CommandError(f"{text_name} has {len(ids)} tokens, expected at least 2")
    for one in models.values():
        language_model.refuse_unknown_tokens(one, ids)
    perplexities = [_perplexity(terminal, model, ids, window, args.path)]
    if baseline is not None:
        perplexities.append(_perplexity(terminal, baseline, ids, window, args.baseline))
        comparison = _compare(terminal, baseline, model, ids, window)
    where = f"{len(ids)} tokens of {text_name}, in windows of {window}"
    compared = [] if comparison is None else comparison.tables(_WORST_LAYERS, models=_called(baseline, model))
    return Answer(
        _data(args, cache, window, len(ids), text_name, perplexities, comparison),
        (_table(args, where, perplexities), *compared),
    )


def _window(asked: int | None, positions: Mapping[str, int | None]) -> int:
    """The window length that all models are judged on. positions: path -> that model's context length, if it says."""
    if asked is None:
        return min(_WINDOW, *(held or _WINDOW for held in positions.values()))
    for path, held in positions.items():
        if held is not None and asked > held:
            raise CommandError(f"--window is {asked}, and {path} holds {held} tokens; ask for fewer")
    return asked


def _perplexity(terminal: Terminal, model: Any, ids: Tensor, window: int, name: str) -> float:
    from octavo.evaluate import perplexity

    with terminal.progress(f"perplexity of {name}") as progress:
        return perplexity(model, ids, window=window, progress=progress)


def _compare(terminal: Terminal, baseline: Any, model: Any, ids: Tensor, window: int) -> Comparison:
    from octavo.evaluate import compare

    # A last window of one token predicts nothing: perplexity leaves it out too.
    windows = [ids[start : start + window].unsqueeze(0) for start in range(0, len(ids) - 1, window)]
    with terminal.progress("comparing") as progress:
        return compare(baseline, model, windows, progress=progress)


def _data(
    args: argparse.Namespace,
    cache: str,
    window: int,
    tokens: int,
    text_name: str,
    perplexities: list[float],
    comparison: Comparison | None,
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "path": args.path, "cache": cache, "text": text_name, "tokens": tokens, "window": window,
        "perplexity": perplexities[0],
    }  # fmt: skip
    if comparison is None:
        return data
    return {
        **data,
        "baseline": args.baseline,
        "baseline_perplexity": perplexities[1],
        "ratio": perplexities[0] / perplexities[1],
        "comparison": comparison.to_dict(),
    }


def _table(args: argparse.Namespace, where: str, perplexities: list[float]) -> Table:
    rows = [(args.path, f"{perplexities[0]:.4f}", "")]
    if len(perplexities) > 1:
        change = perplexities[0] / perplexities[1] - 1
        rows = [(args.baseline, f"{perplexities[1]:.4f}", ""), (args.path, f"{perplexities[0]:.4f}", f"{change:+.2%}")]
    return Table(f"Perplexity on {where}", ("model", "perplexity", "change"), tuple(rows), "lrr")


def _called(baseline: Any, model: Any) -> tuple[str, str]:
    """Names for the two models: their kinds, where these differ."""
    from octavo.modules import QuantModule

    kinds = ["int8" if any(isinstance(m, QuantModule) for m in one.modules()) else "float" for one in (baseline, model)]
    return (kinds[0], kinds[1]) if kinds[0] != kinds[1] else ("baseline", "model")
