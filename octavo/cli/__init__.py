"""The command line: `octavo VERB ...`, also `python -m octavo VERB ...`.

    quantize SRC DST    turn a float checkpoint into an int8 one
    calibrate MODEL     run a float model on text, and save the ranges of its layers' inputs
    smooth SRC DST      move activation outliers into the weights
    inspect PATH        show what is in a checkpoint
    eval PATH           measure perplexity, and what quantizing cost
    generate PATH       let a language model write text
    bench PATH          measure speed and memory next to the original model's; with --ops, those of single ops
    backends            show which kernels serve which op

Each verb is one file. The exceptions: `eval` is evaluate.py, and tasks.py for --tasks; `bench` is bench.py,
bench_ops.py for --ops, and bench_worker.py. A verb returns an `Answer`, and `terminal.py` shows it. Errors are reported
here, as one paragraph with exit code 1 (2 for wrong usage, 130 after an interrupt, 128 + signal after a signal). The
verbs share these files:

    verb.py        what every verb needs, and the options that several have
    sources.py     the data that a model is calibrated on
    text.py        text to read: a file's, or Python's own documentation
    machine.py     the hardware and versions that a measurement was taken on
    memory.py      how much memory the process used, and how fast memory is
    op_speed.py    times several ways of computing one result
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
    """Run the command with `argv` (by default the process's own arguments), and return the exit code."""
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
    except SystemExit as stop:  # argparse has printed its message already
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
        except BrokenPipeError:  # the reader of the output has closed it, as `head` does
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
    """Open stdout and stderr on /dev/null where the shell closed them (`2>&-`).

    Otherwise the next file to be opened, perhaps a checkpoint, would get their number, and what libraries print.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _let_go_of_stdout() -> None:
    """Discard what stdout still buffers, which Python would otherwise try to write at exit, and report as an error."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _unwinding_when_terminated(terminal: Terminal) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as an interrupt does, so that half-written files are removed.

    The exit code is 128 + signal, as in shells. A signal that is ignored stays ignored, which is how `nohup` works.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals: here, the caller does
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
    """The parser of the whole command. The arguments that it returns have `run`, the verb's function."""
    # Imported here because it takes a moment: at the top of the file, an interrupt would show a traceback.
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
