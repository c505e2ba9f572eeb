import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.tables import Table, human_bytes, human_percent, in_general, jsonable, markdown, render, to_json

TABLE = Table("Coverage", ("name", "shape", "bytes"), (("a", "[64, 32]", "2 kB"), ("layers.0", "[n]", "512 kB")), "llr")


def test_render_aligns_and_leaves_brackets_alone():
    assert render(TABLE) == (
        "Coverage\n"
        "name       shape       bytes\n"
        "----------------------------\n"
        "a          [64, 32]     2 kB\n"
        "layers.0   [n]        512 kB"
    )
    assert str(TABLE) == render(TABLE)


def test_render_cuts_nothing_and_colours_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "model." * 100
    text = render(Table("", ("name", "why"), ((long, "x" * 300),)))
    assert long in text and "x" * 300 in text
    assert "\x1b" not in text
    assert len(text.splitlines()) == 3


def test_render_is_ascii_for_ascii_cells():
    assert render(TABLE).isascii()


def test_render_of_no_rows_shows_the_columns():
    assert render(Table("t", ("name", "why"), ())).splitlines()[:2] == ["t", "name   why"]


def test_doctest_of_the_module():
    import doctest

    import octavo.tables

    assert doctest.testmod(octavo.tables).failed == 0
    assert doctest.testmod(octavo.tables).attempted == 1


def test_a_row_or_align_of_another_length_is_our_bug():
    with pytest.raises(AssertionError):
        Table("t", ("a", "b"), (("1",),))
    with pytest.raises(AssertionError):
        Table("t", ("a", "b"), (), align="lrr")


def test_markdown_escapes_what_markdown_reads():
    table = Table("of *two*", ("name", "bytes"), (("re:a|b__c", "1"), ("two\nlines", "<2>")), "lr")
    assert markdown(table) == (
        "**of \\*two\\***\n\n| name | bytes |\n| --- | ---: |\n| re:a\\|b\\_\\_c | 1 |\n| two lines | \\<2> |"
    )


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_markdown_has_one_line_a_row_and_three_bars(rows):
    lines = markdown(Table("", ("a", "b"), tuple(rows))).split("\n")
    assert len(lines) == 2 + len(rows)
    for line in lines:
        assert line.replace("\\\\", "").replace("\\|", "").count("|") == 3


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (2048, "2.05 kB"),
        (9994, "9.99 kB"),
        (9996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (269_060_552, "269 MB"),
        (1_070_000_000, "1.07 GB"),
        (5 * 10**18, "5000 PB"),
        (-1_500, "-1.50 kB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@given(st.integers(min_value=1000, max_value=10**17))
def test_human_bytes_is_right_to_three_digits(count):
    number, unit = human_bytes(count).split()
    power = {"kB": 3, "MB": 6, "GB": 9, "TB": 12, "PB": 15}[unit]
    assert abs(float(number) * 10**power - count) <= 0.005001 * count
    assert len(number.replace(".", "")) == 3


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0, "0.0%"),
        (1e-9, "<0.1%"),
        (0.001, "0.1%"),
        (0.5, "50.0%"),
        (0.998, "99.8%"),
        (0.9994, "99.9%"),
        (0.99999, ">99.9%"),
        (1, "100.0%"),
        (math.nan, "nan%"),
    ],
)
def test_human_percent(fraction, text):
    assert human_percent(fraction) == text


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    value: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    rows: tuple[Row, ...]
    names: dict[str, int]
    ok: bool = True


def test_to_json_is_strict_and_reads_back():
    result = Result((Row("a", math.inf), Row("b", 0.1), Row("c", None), Row("d", math.nan)), {"x": 1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(to_json(result), parse_constant=refuse) == {
        "rows": [
            {"name": "a", "value": None},
            {"name": "b", "value": 0.1},
            {"name": "c", "value": None},
            {"name": "d", "value": None},
        ],
        "names": {"x": 1},
        "ok": True,
    }


def test_jsonable_refuses_what_json_cannot_hold():
    with pytest.raises(TypeError, match="object"):
        jsonable({"a": object()})
    with pytest.raises(TypeError, match="key is 1"):
        jsonable({1: "a"})
    with pytest.raises(TypeError, match="type"):
        jsonable(Result)


def test_importing_tables_does_not_load_rich():
    code = "import sys, octavo.tables; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "general"), [("layers.0.up", "layers.*.up"), ("h.10.w1.2", "h.*.w1.*"), ("lm_head", "lm_head")]
)
def test_in_general_leaves_whole_numbers_open(name, general):
    assert in_general(name) == general
