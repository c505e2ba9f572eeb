"""A small Mixtral that was trained on real text, in int8: it predicts as well, and it routes as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from bench.mixtral import TOP_K, WAYS, Trained, judge, prepare, quantized, usage
from examples.small_mixtral import SHAPE, WINDOW
from octavo.integrations.generation import load_language_model
from octavo.modules import QuantExperts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(text: str) -> Trained:
    return prepare(text)


@pytest.fixture(scope="module")
def judged(trained: Trained) -> dict[str, dict[str, Any]]:
    return {way.name: judge(trained, way) for way in WAYS}


def test_it_has_learnt_to_predict_from_context(trained: Trained) -> None:
    assert trained.perplexity < trained.unigram / 5


def test_it_uses_its_experts(trained: Trained) -> None:
    # All alike would be TOP_K / E. An expert that no token reaches would be neither wrong nor right in int8.
    assert usage(trained.routing).min() > 0.1 * TOP_K / SHAPE["num_local_experts"]


@pytest.mark.parametrize(("way", "bound"), [("w8a16", 0.002), ("w8a8, smoothed", 0.01)])
def test_perplexity(judged: dict[str, dict[str, Any]], way: str, bound: float) -> None:
    assert judged[way]["quantized_fraction"] > 0.9
    assert 0 < abs(judged[way]["ratio"] - 1) < bound, "another model, and as good a one"


@pytest.mark.parametrize(("way", "bound"), [("w8a16", 0.99), ("w8a8", 0.95), ("w8a8, smoothed", 0.95)])
def test_routing(judged: dict[str, dict[str, Any]], way: str, bound: float) -> None:
    """Routers are float, but what they are fed is not what it was: by 40 dB less under w8a8, by 1%. That moves the
    router's probabilities by about as much, and turns the choices that were closer than that: a few in a hundred. No
    choice that was clear may turn."""
    assert bound < judged[way]["same_experts"] < 1
    assert judged[way]["same_experts_when_clear"] > 0.9999


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_saved_and_loaded_it_computes_the_same_bits(trained: Trained, tmp_path: Path, way: Any) -> None:
    model, _ = quantized(trained, way)
    loaded, tokenizer = load_language_model(octavo.save(model, tmp_path / "int8"))
    assert sum(isinstance(module, QuantExperts) for module in loaded.modules()) == SHAPE["num_hidden_layers"]
    window = trained.ids[:WINDOW].unsqueeze(0)
    assert torch.equal(loaded(window).logits, model(window).logits)
    assert len(tokenizer) == model.config.vocab_size
