"""The page of what was measured is what is made of the figures."""

from __future__ import annotations

from bench.record import FOLDER, page
from bench.run import BENCHMARKS


def test_the_page_is_made_of_the_results() -> None:
    """After a change of words it is not: `python -m bench.run --page`."""
    assert (FOLDER / "RESULTS.md").read_text(encoding="utf-8") == page(BENCHMARKS)
