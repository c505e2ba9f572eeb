"""SmolLM2-135M-Instruct with int8 activations: a hard case, some layers have inputs 1000 times as large as usual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import octavo
from bench.language import WINDOW, losses
from bench.record import multiplies_bf16
from bench.smoothquant import CALIBRATION, Way, calibration, judge
from octavo.integrations.language_model import load_language_model, token_ids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not multiplies_bf16(), reason="torch has no instructions for bf16 here: a float model takes ten minutes"
    ),
]

TOKENS = 16 * WINDOW


@pytest.fixture(scope="module")
def prepared(smollm2: Path, text: str) -> tuple[Any, ...]:
    model, tokenizer = load_language_model(smollm2)
    ids = token_ids(tokenizer, text, limit=(CALIBRATION + 32) * WINDOW, window=WINDOW)
    stats = octavo.calibrate(model, calibration(ids))
    return model, stats, ids[:TOKENS], losses(model, ids[:TOKENS])


def test_dynamic(prepared: tuple[Any, ...]) -> None:
    model, stats, ids, truth = prepared
    plain = judge(model, stats, Way("", "w8a8"), ids, truth)
    smoothed = judge(model, stats, Way("", "w8a8", smooth=True), ids, truth)
    assert smoothed["layers"] == {"w8a8": 210} and smoothed["pairs"] == 120
    assert plain["ratio"] > 1.015, "the case is hard"
    assert smoothed["ratio"] < 1.010


def test_static(prepared: tuple[Any, ...]) -> None:
    model, stats, ids, truth = prepared
    plain = judge(model, stats, Way("", "w8a8-static", repair=False), ids, truth)
    smoothed = judge(model, stats, Way("", "w8a8-static", smooth=True), ids, truth)
    assert plain["ratio"] > 1.5, "the collapse"
    assert smoothed["layers"]["w8a8-static"] >= 0.9 * 210
    assert smoothed["ratio"] < 1.03
