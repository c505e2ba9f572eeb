"""`octavo generate PATH --prompt TEXT`: let a language model write, and show the text as it is written."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import (
    Verbs,
    a_path,
    add_cache,
    add_device,
    cache_of,
    device_of,
    keep_cache,
    new_verb,
    positive,
    utf_8,
)
from octavo.tables import human_bytes, human_percent

if TYPE_CHECKING:
    from octavo.integrations.generation import Generated

__all__ = ["add_parser", "run"]


def add_parser(verbs: Verbs) -> None:
    """`octavo generate`."""
    parser = new_verb(
        verbs, "generate", "let a language model answer a prompt",
        "octavo generate smollm2-int8 --prompt 'Why is the sky blue?' --max-new-tokens 64\n"
        "  octavo generate smollm2-int8 --prompt 'Why is the sky blue?' --compile", run,
    )  # fmt: skip
    parser.add_argument(
        "path", metavar="PATH", type=a_path, help="checkpoint folder, Hub id or .gguf file; int8 or float"
    )
    parser.add_argument("--prompt", metavar="TEXT", type=_some_text, required=True, help="what to answer or to go on")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=positive, help="stop there at the latest (default 128, if there is room)"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=_temperature, default=0.0, help="0 (default): the likeliest token each time"
    )
    parser.add_argument("--seed", metavar="N", type=_seed, default=0, help="for a temperature above 0 (default 0)")
    parser.add_argument("--raw", action="store_true", help="go on with the text itself, without the chat template")
    parser.add_argument(
        "--compile", action="store_true", help="compile the model first (torch.compile), which takes a minute or more"
    )
    add_cache(parser)
    add_device(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Stream the text to stdout; with --json, put it into the answer instead."""
    cache, device = cache_of(args), device_of(args)
    with terminal.progress(f"loading {args.path}"):
        from octavo.integrations.generation import generate
        from octavo.integrations.language_model import load_language_model

        model, tokenizer = load_language_model(args.path, device=device)
        cache = keep_cache(model, cache)
    written = generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        raw=args.raw,
        on_text=(lambda piece: None) if args.json else terminal.write,
        compiling=terminal.progress(f"compiling {args.path}") if args.compile else None,
    )
    if not args.json:
        terminal.write("\n")
    terminal.remark(_statistics(written))
    if not args.compile:
        return Answer(_data(args, cache, written), ())
    with terminal.progress("measuring the speed of memory"):
        use = _memory_use(model, written, device)
    terminal.remark(_memory_line(use))
    return Answer({**_data(args, cache, written), **use}, ())


def _data(args: argparse.Namespace, cache: str, written: Generated) -> dict[str, Any]:
    return {
        "path": args.path,
        "prompt": args.prompt,
        "cache": cache,
        **dataclasses.asdict(written),
        "tokens_per_s": written.tokens_per_s,
    }


def _statistics(written: Generated) -> str:
    speed = "" if written.tokens_per_s is None else f", then {written.tokens_per_s:.1f} tokens/s"
    compiled = "" if written.compile_s is None else f"compiled in {written.compile_s:.1f} s; "
    return (
        f"[{compiled}{written.new_tokens} tokens after a prompt of {written.prompt_tokens}; the first in "
        f"{written.first_token_s:.2f} s{speed}]"
    )


def _memory_use(model: Any, written: Generated, device: str) -> dict[str, float | None]:
    """What gpt-fast reports too: peak memory, and the speed at which weights were read, next to memory bandwidth."""
    from octavo.cli.bench_worker import bytes_per_token_of
    from octavo.cli.memory import MemoryStream, peak_memory

    peak = peak_memory(device)  # measured before the MemoryStream below takes its own GiB
    stream = MemoryStream(device)
    speed = statistics.median(stream.bytes_per_s() for _ in range(5))
    read = bytes_per_token_of(model)
    rate = None if read is None or written.tokens_per_s is None else read * written.tokens_per_s
    return {
        "peak_bytes": peak,
        "memory_bytes_per_s": speed,
        "weight_bytes_per_s": rate,
        "of_memory_speed": None if rate is None else rate / speed,
    }


def _memory_line(use: dict[str, Any]) -> str:
    peak, speed = human_bytes(use["peak_bytes"]), human_bytes(int(use["memory_bytes_per_s"]))
    rate = use["weight_bytes_per_s"]
    if rate is None:
        return f"[peak memory {peak}]"
    share = human_percent(use["of_memory_speed"])
    return f"[peak memory {peak}; weights read at {human_bytes(int(rate))}/s, {share} of the memory's {speed}/s]"


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return utf_8(text)


_some_text.__name__ = "text"


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise ValueError(text)
    return value


_seed.__name__ = "seed (0 to 2^64 - 1)"


def _temperature(text: str) -> float:
    value = float(text)
    if not (value == 0 or 1e-6 <= value < float("inf")):
        raise ValueError(text)
    return value


_temperature.__name__ = "temperature (0, or 1e-6 and more)"
