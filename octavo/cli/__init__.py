"""The command line: `octavo VERB ...`, also `python -m octavo VERB ...`.

    quantize SRC DST    a float checkpoint becomes an int8 one
    calibrate MODEL     run a float model on text, and keep its layers' input ranges
    smooth SRC DST      activation outliers move into the weights
    inspect PATH        what is in a checkpoint
    eval PATH           perplexity, and what quantizing cost
    generate PATH       let a language model write
    bench PATH          speed and memory, next to the original's; --ops: of the ops
    backends            which kernels serve

One file a verb (`eval` is evaluate.py, with --tasks tasks.py; bench_ops.py and bench_worker.py are `bench`'s). A verb
returns an `Answer`; how it is shown is `terminal.py`'s matter, and errors are told here: one paragraph and exit code 1
(2 for usage, 130 when interrupted, 128 + signal when terminated). What verbs share:

    verb.py        what every verb has, and options of several
    sources.py     what a model is calibrated on
    text.py        text to read, of a file or Python's own documentation
    machine.py     what a measurement was taken on
    memory.py      how much memory the process took, and how fast that is
    op_speed.py    times ways to one result in turns
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from octavo import __version__
from octavo.cli.terminal import OutputError, Terminal
from octavo.errors import OctavoError

__all__ = ["main"]

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (by default the process's own arguments); returns the exit code."""
    try:
        _open_what_is_closed()
        return _run(argv)
    except KeyboardInterrupt:
        Terminal().complain("error", "interrupted")
        return _INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    parser = new_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said all that there is to say
        return int(stop.code or 0)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    terminal = Terminal(json=args.json, debug=args.debug)
    with terminal.quiet(), _unwinding_when_terminated(terminal):
        try:
            answer = args.run(args, terminal)
            if answer is not None:
                terminal.show(answer)
        except BrokenPipeError:  # whoever read the output has had enough of it
            _let_go_of_stdout()
            return 1
        except Exception as error:
            if isinstance(error, OutputError):
                _let_go_of_stdout()
            if args.debug:
                traceback.print_exception(error)
            else:
                terminal.complain("error", _in_words(error))
            return 1
    return 0


def _open_what_is_closed() -> None:
    """Of stdout and stderr, to nowhere (`2>&-`): libraries would write to the next file, maybe a checkpoint."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _let_go_of_stdout() -> None:
    """What it still holds goes nowhere: Python would write it at its end, and complain."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _unwinding_when_terminated(terminal: Terminal) -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as an interrupt does: what is half written is removed. Exit code 128 + signal,
    as shells have it. What is ignored stays so: `nohup` is for who logs out."""
    if threading.current_thread() is not threading.main_thread():
        yield  # who calls this from a thread minds the signals
        return

    def end(number: int, _: Any) -> None:
        terminal.complain("error", f"ended by {signal.Signals(number).name}")
        raise SystemExit(128 + number)

    minded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in minded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def new_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; what it parses has `run`, the function of the verb."""
    # Here, and not above, where an interrupt would show a traceback: it takes a moment.
    from octavo.cli import backends, bench, calibrate, evaluate, generate, inspect, quantize, smooth

    parser = argparse.ArgumentParser(
        prog="octavo",
        description="Folds models to eight bits: half the memory of bf16, with the accuracy measured and shown.",
        epilog="`octavo VERB --help` tells more of each, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in (quantize, calibrate, smooth, inspect, evaluate, generate, bench, backends):
        verb.add_parser(verbs)
    return parser


def _in_words(error: Exception) -> str:
    if isinstance(error, OctavoError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is needed for this: pip install 'octavo[hf]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{text} (octavo did not expect this; --debug shows where it happened)"
