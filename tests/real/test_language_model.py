"""SmolLM2-135M-Instruct in int8: as good as in bf16, at half the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.language import DTYPES, WINDOW, judge, sizes
from bench.record import multiplies_bf16
from octavo.integrations.language_model import load_causal, load_language_model, token_ids

pytestmark = pytest.mark.slow

WINDOWS = 24  # of text
ACTIVATIONS = ["bf16", "fp32"] if multiplies_bf16() else ["fp32"]  # a float model in bf16 would take torch six minutes


@pytest.fixture(scope="module")
def judged(smollm2: Path, text: str) -> dict[str, Any]:
    """What is found with each type of activations."""
    found = {}
    for name in ACTIVATIONS:
        model, tokenizer = load_language_model(smollm2)
        ids = token_ids(tokenizer, text, limit=WINDOWS * WINDOW, window=WINDOW)
        assert len(ids) == WINDOWS * WINDOW
        found[name] = judge(model, load_causal(smollm2), ids, compared=0, dtypes={name: DTYPES[name]})
    return found


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_every_linear_layer_of_the_decoder_is_int8(judged: dict[str, Any], activations: str) -> None:
    assert judged[activations]["int8_layers"] == 30 * 7


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_perplexity_is_within_a_thousandth(judged: dict[str, Any], activations: str) -> None:
    found = judged[activations]["perplexity"][activations]
    assert 2 < found["float"] < 100, "a model that has understood the text"
    assert found["int8"] != found["float"], "two models"
    assert -0.002 < found["int8"] / found["float"] - 1 < 0.001, "no worse by more than 0.1%; better is chance"


def test_the_checkpoint_is_half_as_large(smollm2: Path) -> None:
    found = sizes(smollm2)
    assert found["int8"] <= 0.61 * found["bf16"]
    assert found["int8_with_embedding"] <= 0.51 * found["bf16"]
