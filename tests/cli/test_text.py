"""The sample text is long, English, and the same each time."""

from __future__ import annotations

from octavo.cli.text import sample_text


def test_it_is_english_paragraphs_and_enough_of_them() -> None:
    text = sample_text()
    assert len(text) > 200_000
    words = text.split()
    assert sum(word == "the" for word in words) / len(words) > 0.04
    paragraphs = text.split("\n\n")
    assert min(map(len, paragraphs)) > 80 and "::=" not in text
    assert text == sample_text()
