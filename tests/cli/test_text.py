"""The sample text is long, English, and the same each time; what editors put before a text is not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.cli.text import read_documents, read_text, sample_text
from octavo.cli.verb import CommandError


def test_it_is_english_paragraphs_and_enough_of_them() -> None:
    text = sample_text()
    assert len(text) > 200_000
    words = text.split()
    assert sum(word == "the" for word in words) / len(words) > 0.04
    paragraphs = text.split("\n\n")
    assert min(map(len, paragraphs)) > 80 and "::=" not in text
    assert text == sample_text()


def test_the_mark_at_the_beginning_of_a_file_is_not_read(tmp_path: Path) -> None:
    """Of three bytes, as Windows' editors write it; anywhere else it is a character."""
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbfa word \xef\xbb\xbf.")
    assert read_text("--text", str(file)) == ("a word \ufeff.", str(file))
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}')
    assert read_documents("--jsonl", str(file)) == ["one", "two"]


def test_what_cannot_be_read_is_named_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "wide").write_text("a word", encoding="utf-16")
    for name, why in (
        ("", "is a folder, expected a file; give one that is in it"),
        ("nowhere", "No such file or directory; expected a file of text"),
        ("wide", "is not UTF-8 text (invalid start byte at byte 0); save it as UTF-8"),
    ):
        with pytest.raises(CommandError) as raised:
            read_text("--calibration", str(tmp_path / name))
        assert str(raised.value) == f"--calibration {tmp_path / name}: {why}"
