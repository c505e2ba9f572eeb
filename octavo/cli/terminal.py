"""Where output goes: answers to stdout; progress, remarks and errors to stderr.

A terminal gets progress bars, and tables folded to its width. A pipe gets unfolded lines and no bars. With --json,
stdout gets one JSON object. Logs, warnings and progress bars of other libraries are suppressed, except with --debug.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import shutil
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from octavo.errors import OctavoError, OctavoWarning
from octavo.tables import Table, render, to_json

__all__ = ["Answer", "OutputError", "Terminal"]

_PATIENCE = 1.0
"""Seconds that work may take before a progress bar appears."""

_GAP = 3
"""Blanks between two columns of a rendered table."""

_NARROWEST = 7
"""Characters that a column keeps, however narrow the terminal. The eight columns of a SmoothReport fit 80 so."""


class OutputError(OctavoError, OSError):
    """The answer could not be written to stdout."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a verb found.

    data: for programs, printed with --json. shown: for people, printed in this order without it.
    """

    data: Mapping[str, Any]
    shown: tuple[Table | str, ...]


class Terminal:
    """Output of one run of the command.

    json: answer in JSON, without progress bars. debug: let libraries log and warn as they like.
    """

    def __init__(self, *, json: bool = False, debug: bool = False) -> None:
        self.json = json
        self.debug = debug

    def show(self, answer: Answer) -> None:
        """Print the answer on stdout."""
        if self.json:
            self.write(f"{to_json(answer.data)}\n")
        elif answer.shown:
            self.write("\n\n".join(map(self._text, answer.shown)) + "\n")

    def _text(self, part: Table | str) -> str:
        if isinstance(part, str):
            return part
        return render(_folded(part, shutil.get_terminal_size().columns) if sys.stdout.isatty() else part)

    def write(self, text: str) -> None:
        """Write text to stdout and flush it; characters that its encoding lacks are escaped.

        Raises: OutputError if it cannot be written; BrokenPipeError if the reader has closed the pipe.
        """
        encoding = sys.stdout.encoding or "utf-8"
        try:
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"stdout cannot be written: {error.strerror}; make room there, or send it elsewhere"
            ) from error

    def remark(self, line: str) -> None:
        """Print a line for people on stderr, beside the answer; nothing with --json."""
        if not self.json:
            print(line, file=sys.stderr)

    def complain(self, kind: str, message: str) -> None:
        """Print a paragraph on stderr: "error: ..." or "warning: ..."."""
        paragraph = f"{kind}: {' '.join(message.split())}"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            paragraph = textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
        print(paragraph, file=sys.stderr)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Show a progress bar while open, if that takes a while. Yields a function to be called with (done, total).

        Before its first call, the bar shows only that work goes on.
        """
        if self.json or not sys.stderr.isatty():
            yield lambda done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        # The bar and its numbers need about 50 characters beside the label.
        label = textwrap.shorten(label, max(20, shutil.get_terminal_size().columns - 50), placeholder="...")
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        task = bar.add_task(label, total=None)
        patience = threading.Timer(_PATIENCE, bar.start)
        patience.daemon = True
        patience.start()
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total or None)
        finally:
            patience.cancel()
            patience.join()
            if bar.live.is_started:
                bar.stop()

    @contextlib.contextmanager
    def without_bars(self) -> Iterator[None]:
        """While open, discard what libraries write to stderr. An open bar of `progress` continues."""
        with contextlib.nullcontext() if self.debug else contextlib.redirect_stderr(io.StringIO()):
            yield

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """While open, show octavo's warnings in one line each, and discard other libraries' warnings and logs."""
        if self.debug:
            yield
            return
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", OctavoWarning)
                warnings.showwarning = lambda message, *_args, **_kwargs: self.complain("warning", str(message))
                yield
        finally:
            logging.disable(disabled)


def _folded(table: Table, width: int) -> Table:
    """The table, with its widest columns folded as far as needed to fit into `width`."""
    rows = (table.columns, *table.rows)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    room = width - _GAP * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    columns, *folded = [tuple(_fold(cell, size) for cell, size in zip(row, widths, strict=True)) for row in rows]
    return dataclasses.replace(table, columns=columns, rows=tuple(folded))


def _fold(cell: str, width: int) -> str:
    """The cell in lines of at most `width` characters, broken after a space or punctuation if possible."""
    lines = [""]
    for piece in re.findall(r"[^ ._/-]*[ ._/-]|[^ ._/-]+", cell):
        if len((lines[-1] + piece).rstrip()) > width and lines[-1]:
            lines.append("")
        while len(piece.rstrip()) > width:
            lines[-1], piece = piece[:width], piece[width:]
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
