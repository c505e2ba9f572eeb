"""The sample text is long, English, and the same each time; what editors put before a text is not read."""

from __future__ import annotations

from pathlib import Path

from octavo.cli.text import read_documents, read_text, sample_text


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
