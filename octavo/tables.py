"""How octavo shows a result: a text table for people, a markdown table for documents, JSON for programs.

    >>> print(Table("Coverage", ("name", "shape", "bytes"), (("lm_head", "[64, 32]", human_bytes(2048)),), align="llr"))
    Coverage
    name      shape        bytes
    ----------------------------
    lm_head   [64, 32]   2.05 kB

Cells are strings, already formatted. This file imports only the standard library (the first `render` loads rich), so
that any other module may use it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Table", "human_bytes", "human_percent", "in_general", "jsonable", "markdown", "render", "to_json"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of formatted cells under named columns.

    align: one letter per column, "l" or "r"; empty means all left.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.title}: rows differ from the columns"
        assert re.fullmatch("[lr]*", self.align) and len(self.align) in (0, len(self.columns)), f"align {self.align!r}"

    def __str__(self) -> str:
        return render(self)


# A console cuts what is wider than itself; text for a log or a pipe has no such limit.
_UNLIMITED_WIDTH = 100_000


def render(table: Table) -> str:
    """The table as ASCII text, as wide as its cells need, without trailing blanks or a final newline."""
    from rich import box, console, text
    from rich import table as rich_table

    frame = box.Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)
    grid = rich_table.Table(box=frame, show_edge=False, pad_edge=False)
    # A Text is shown as it is; a str would be read as rich's markup, which eats a shape such as [n].
    for name, side in zip(table.columns, _sides(table), strict=True):
        grid.add_column(text.Text(name), justify="right" if side == "r" else "left", no_wrap=True)
    for row in table.rows:
        grid.add_row(*(text.Text(cell) for cell in row))
    out = io.StringIO()
    console.Console(file=out, width=_UNLIMITED_WIDTH, color_system=None, force_terminal=False).print(grid)
    lines = [line.rstrip() for line in out.getvalue().rstrip("\n").split("\n")]
    return "\n".join([table.title, *lines] if table.title else lines)


def markdown(table: Table) -> str:
    """The table in GitHub's markdown, with its title in bold above it. Markdown's special characters are escaped."""
    rules = ("---:" if side == "r" else "---" for side in _sides(table))
    lines = [_markdown_row(map(_escape, table.columns)), _markdown_row(rules)]
    lines += [_markdown_row(map(_escape, row)) for row in table.rows]
    heading = [f"**{_escape(table.title)}**", ""] if table.title else []
    return "\n".join([*heading, *lines])


def human_bytes(count: int) -> str:
    """A number of bytes with three significant digits, in powers of 1000: 999 B, 2.05 kB, 269 MB."""
    if abs(count) < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB", "TB", "PB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {units[0]}"


def human_percent(fraction: float) -> str:
    """A fraction in [0, 1] in percent with one decimal: 99.8%. 0.0% and 100.0% mean exactly 0 and 1."""
    if 0 < fraction < 0.0005:
        return "<0.1%"
    if 0.9995 <= fraction < 1:
        return ">99.9%"
    return f"{fraction:.1%}"


def in_general(name: str) -> str:
    """A module's name with its numbers replaced by a placeholder: the common name of a family of layers."""
    return re.sub(r"\b\d+\b", "*", name)


def to_json(value: Any) -> str:
    """Strict JSON of a dataclass, or of what `jsonable` takes, indented by two; equal values give equal text."""
    return json.dumps(jsonable(value), indent=2, allow_nan=False)


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: dataclasses and mappings become dicts, tuples lists, NaN and infinities None.

    JSON has neither NaN nor infinity; the docstring of a field that may hold one says what null means there.
    Raises: TypeError for a type that JSON cannot hold, and for a key that is not a string.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key is {key!r}, expected a string: JSON has no others")
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"cannot write {type(value).__name__} as JSON; expected a dataclass, dict, list, str or number")


def _sides(table: Table) -> str:
    return table.align or "l" * len(table.columns)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(cell: str) -> str:
    return re.sub(r"([\\|*_`<])", r"\\\1", cell).replace("\n", " ")
