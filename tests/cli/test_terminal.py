"""Tables fold into a terminal and are whole in a pipe; progress is for terminals and for work that takes a while."""

from __future__ import annotations

import io
import sys
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from octavo.cli import terminal as room
from octavo.cli.terminal import Answer, Terminal
from octavo.report import SmoothedPair, SmoothReport
from octavo.tables import Table

WIDE = Table(
    "Wide",
    ("parameter", "shape", "note"),
    (
        (
            "model.layers.*.post_attention_layernorm.weight  x30",
            "49152 x 576",
            "opt-in: include 'Embedding'" + ", or not" * 6,
        ),
    )
    * 2,
)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(table: Table, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, columns: int = 100) -> list[str]:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    Terminal().show(Answer({}, (table,)))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_terminal_gets_lines_that_fit(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(WIDE, monkeypatch, Screen(), columns)
    assert max(map(len, lines)) <= columns
    together = "".join("".join(lines).split())
    assert "post" in together and "x30" in together


def test_a_table_that_fits_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(WIDE, monkeypatch, Screen(), 200) == str(WIDE).splitlines()


def test_a_pipe_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(WIDE, monkeypatch, io.StringIO(), 40) == str(WIDE).splitlines()


def test_a_character_that_stdout_has_no_word_for_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(memory, encoding="latin-1"))
    Terminal().write("n\u00e4her \u2014 \U0001f600\n")
    assert memory.getvalue() == b"n\xe4her \\u2014 \\U0001f600\n"


@hypothesis.given(st.text(st.sampled_from("ab ._/-*x1")), st.integers(1, 12))
def test_folding_loses_no_character_but_blanks_at_line_ends(cell: str, width: int) -> None:
    lines = room._fold(cell, width).split("\n")
    assert all(len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(cell.split())


def test_json_is_all_that_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(json=True)
    terminal.remark("not for programs")
    terminal.show(Answer({"ratio": float("inf"), "rows": (1, 2)}, ("text",)))
    captured = capsys.readouterr()
    assert "".join(captured.out.split()) == '{"ratio":null,"rows":[1,2]}' and captured.err == ""


def progress_of(seconds: float, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(room, "_PATIENCE", 0.05)
    with terminal.progress("folding") as progress:
        time.sleep(seconds)
        progress(1, 2)
        time.sleep(seconds)
    return stream.getvalue()


def test_progress_is_shown_when_it_takes_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "folding" in progress_of(0.2, Terminal(), monkeypatch, Screen())


def test_no_progress_for_quick_work_a_pipe_or_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_of(0.0, Terminal(), monkeypatch, Screen()) == ""
    assert progress_of(0.2, Terminal(), monkeypatch, io.StringIO()) == ""
    assert progress_of(0.2, Terminal(json=True), monkeypatch, Screen()) == ""


def test_the_widest_table_fits_a_terminal_of_80(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.{}.mlp.{}".format
    pairs = [
        SmoothedPair(name(i, "up_proj"), (name(i, "down_proj"),), 0.1 + i / 100, 3e3 + i, 0.02 + i, 1e-4 * i, 1e-5 * i)
        for i in range(1, 30)
    ]
    left = SmoothedPair("model.norm", ("lm_head",), reason="model.embed_tokens.weight is also lm_head.weight")
    assert max(map(len, shown(SmoothReport((*pairs, left)).table(), monkeypatch, Screen(), 80))) <= 80


def test_an_error_folds_in_a_terminal_and_is_one_line_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    message = "a long message " * 10
    for stream, lines in ((Screen(), 5), (io.StringIO(), 1)):
        monkeypatch.setattr(sys, "stderr", stream)
        Terminal().complain("error", message)
        assert stream.getvalue().count("\n") == lines
        assert stream.getvalue().split() == ["error:", *message.split()]
