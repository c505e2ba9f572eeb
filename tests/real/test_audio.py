"""CREPE with its published weights in int8: it hears the same pitches in recorded sounds."""

from __future__ import annotations

import collections

import pytest

from bench.audio import HOP, compare_pitches

pytestmark = pytest.mark.slow


def test_pitches_stay() -> None:
    try:
        found = compare_pitches(HOP)
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    assert found["frames"] > 1800
    assert found["voiced"] > 500, "there is something to hear"
    assert collections.Counter(found["int8_layers"].values()) == {"Conv2d": 6, "Linear": 1}
    assert found["agreement"] >= 0.995
    assert found["sqnr_db"] < 100, "two models"
