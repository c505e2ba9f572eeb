"""What the verbs of the command line have in common.

A verb is a file with two functions:

    add_parser(verbs)          declare its arguments, one-line description and example, with `new_verb`
    run(args, terminal)        do the work and return an Answer; torch is imported here, so that help needs no torch
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from octavo.cli.terminal import Answer, Terminal
from octavo.errors import OctavoError

__all__ = [
    "CommandError", "Run", "Verbs", "a_path", "add_cache", "add_device", "cache_of", "device_of", "keep_cache",
    "new_verb", "not_negative", "positive", "utf_8",
]  # fmt: skip

Verbs = Any
"""What `argparse.ArgumentParser.add_subparsers` returns; its class is private."""


class CommandError(OctavoError, ValueError):
    """The arguments are well-formed, but cannot be carried out here."""


Run = Callable[[argparse.Namespace, Terminal], Answer | None]
"""None: another process has the answer."""


def new_verb(verbs: Verbs, name: str, line: str, example: str, run: Run) -> argparse.ArgumentParser:
    """Add the parser of `octavo NAME`, with the options that every verb has."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=line,
        description=f"{line[0].upper()}{line[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and the warnings and logs of libraries")
    parser.set_defaults(run=run)
    return parser


def _whole_number(least: int, called: str) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on. `called` is for argparse: invalid positive whole number value: '0'."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError(text)
        return value

    number.__name__ = called
    return number


positive = _whole_number(1, "positive whole number")
not_negative = _whole_number(0, "whole number")


def utf_8(text: str) -> str:
    """Parse text that is valid UTF-8, the only kind that tokenizers and safetensors take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; expected UTF-8") from error
    return text


def a_path(text: str) -> str:
    """Parse the name of a file, a folder or a Hub model. Empty is refused: it would mean the current folder."""
    if not text:
        raise ValueError(text)
    return utf_8(text)


a_path.__name__ = "path (not an empty one)"


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add the option --device, for verbs that run a model."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: cuda if there is one)")


def add_cache(parser: argparse._ActionsContainer) -> None:
    """Add the option --cache, for verbs that run a language model."""
    parser.add_argument(
        "--cache", choices=("float", "int8"),
        help="how PATH keeps keys and values of earlier tokens (default: int8 if its attention is in int8, for then "
        "that gives the same; else float)",
    )  # fmt: skip


def cache_of(args: argparse.Namespace) -> str | None:
    """The kind of cache that --cache asks for, or None. Raises: CommandError for int8 together with --compile."""
    if not args.compile:
        return args.cache  # type: ignore[no-any-return]
    if args.cache == "int8":
        raise CommandError("--compile keeps a static float cache, and --cache is int8; leave out one of the two")
    return "float"


def keep_cache(model: Any, asked: str | None) -> str:
    """Make a language model keep its KV cache in "float" or "int8".

    asked: the kind; None means int8 if the model's attention is int8, since that quantizes keys and values to the same
        codes anyway. A float model whose attention is octavo's gets a cache with room to grow. Other float models keep
        transformers' cache.
    Returns: the kind.
    Raises: CommandError for "int8" and a model without a KV cache.
    """
    from octavo.integrations import attention, float_attention
    from octavo.integrations.float_cache import use_float_cache
    from octavo.integrations.int8_cache import use_int8_cache
    from octavo.integrations.language_model import has_key_value_cache

    if asked == "int8" and not has_key_value_cache(model):
        raise CommandError(
            f"--cache is int8, and {type(model).__name__} keeps its state in no key-value cache; leave out --cache"
        )
    kind = asked or attention.attention_of(model)
    try:
        if kind == "int8":
            use_int8_cache(model)
        elif model.config._attn_implementation in (float_attention.NAME, attention.NAME):
            use_float_cache(model)
    except OctavoError:
        if asked == "int8":
            raise
        return "float"  # the model is no plain decoder: an encoder-decoder, for example
    return kind


def device_of(args: argparse.Namespace) -> str:
    """The device that --device asks for, or the best available. Raises: CommandError for one that is not available."""
    import torch

    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise CommandError("--device is cuda, and torch finds no CUDA device here; expected cpu, or a torch with CUDA")
    return str(args.device or ("cuda" if has_cuda else "cpu"))
