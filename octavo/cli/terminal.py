"""Where output goes: answers to stdout; progress, remarks and errors to stderr.

A terminal gets tables that fold into its width, and progress bars; a pipe gets whole lines and no bars; --json gets one
object on stdout. Libraries that log, warn or draw bars of their own are kept quiet, except under --debug.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from octavo.cli.verb import Answer
from octavo.errors import OctavoWarning
from octavo.tables import Table, render, to_json

if TYPE_CHECKING:
    from rich.table import Table as Grid

__all__ = ["Terminal"]

_PATIENCE = 1.0
"""Seconds that work may take before a progress bar appears."""


class Terminal:
    """The screen of one run of the command.

    json: answer in JSON, without progress bars. debug: leave libraries as noisy as they are.
    """

    def __init__(self, *, json: bool = False, debug: bool = False) -> None:
        self.json = json
        self.debug = debug

    def show(self, answer: Answer) -> None:
        """Print the answer on stdout."""
        if self.json:
            print(to_json(answer.data))
            return
        for index, part in enumerate(answer.shown):
            if index:
                print()
            self._show_part(part)

    def _show_part(self, part: Table | str) -> None:
        if isinstance(part, str):
            print(part)
        elif sys.stdout.isatty():
            from rich.console import Console

            Console().print(_folding(part))
        else:
            print(render(part))

    def remark(self, line: str) -> None:
        """A line for people beside the answer, on stderr; none with --json."""
        if not self.json:
            print(line, file=sys.stderr)

    def complain(self, kind: str, message: str) -> None:
        """A paragraph on stderr: "error: ..." or "warning: ..."."""
        paragraph = f"{kind}: {' '.join(message.split())}"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            paragraph = textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
        print(paragraph, file=sys.stderr)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar, if what runs inside takes a while; yields what to call with (done, total).

        Until it is called, the bar only says that work goes on.
        """
        if self.json or not sys.stderr.isatty():
            yield lambda done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
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
    def quiet(self) -> Iterator[None]:
        """While open, octavo's warnings are one line each, and those of other libraries, and their logs, are none."""
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


def _folding(table: Table) -> Grid:
    """The table for a terminal: cells that do not fit are folded."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for name, side in zip(table.columns, table.align or "l" * len(table.columns), strict=True):
        # A Text is shown as it is; a str would be read as rich's markup, which eats a shape such as [n].
        grid.add_column(Text(name), justify="right" if side == "r" else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid
