"""CREPE with its published weights in int8: it hears the same pitches in recorded sounds."""

from __future__ import annotations

import collections

import pytest
import torch

from bench.audio import HOP, compare_pitches
from bench.record import multiplies_bf16

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.995), (torch.bfloat16, 0.99)])
def test_pitches_stay(dtype: torch.dtype, bound: float) -> None:
    """In every fourth frame, `python -m bench.run audio` looks at all. In bf16 the float model's own rounding moves
    some, too."""
    if dtype == torch.bfloat16 and not multiplies_bf16():
        pytest.skip("torch has no instructions for bf16 here: the float model would take it an hour")
    try:
        found = compare_pitches(4 * HOP, dtype)
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    assert found["frames"] > 450
    assert found["voiced"] > 125, "there is something to hear"
    assert collections.Counter(found["int8_layers"].values()) == {"Conv2d": 6, "Linear": 1}
    assert found["agreement"] >= bound
    assert found["sqnr_db"] < 100, "two models"
