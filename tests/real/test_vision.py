"""Classifiers of real handwritten digits in int8: the same answers."""

from __future__ import annotations

import collections

import pytest

from bench.vision import compare_predictions

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'octavo[dev]'")


@pytest.mark.parametrize(
    ("name", "accuracy", "kinds"),
    [
        ("convolutions", 0.95, {"Conv2d": 5, "Linear": 1}),
        ("transformer", 0.8, {"Conv2d": 1, "MultiheadAttention": 2, "Linear": 2 * 3 + 1}),
    ],
)
def test_predictions_stay(name: str, accuracy: float, kinds: dict[str, int]) -> None:
    found = compare_predictions(name)
    assert found["images"] == 899
    assert collections.Counter(found["int8_layers"].values()) == kinds
    assert found["accuracy"]["float"] >= accuracy, "a real classifier"
    assert found["agreement"] >= 0.995
    assert found["sqnr_db"] < 100, "two models"
