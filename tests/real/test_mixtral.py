"""A small Mixtral that was trained on real text, in int8: it predicts as well, and it routes as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from bench.language import losses
from bench.mixtral import TOP_K, WAYS, Trained, judge, prepare, put_outliers_in, quantized, usage
from examples.small_mixtral import SHAPE, WINDOW
from octavo.integrations.language_model import load_language_model
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


@torch.no_grad()
def test_it_uses_its_experts(trained: Trained) -> None:
    # All alike would be TOP_K / E. An expert that no token reaches would be neither wrong nor right in int8.
    assert usage(trained.routing).min() > 0.1 * TOP_K / SHAPE["num_local_experts"]
    misled = copy.deepcopy(trained.model)
    for layer in misled.model.layers:
        for weight in layer.mlp.experts.parameters():
            weight.copy_(weight.roll(1, 0))
    assert losses(misled, trained.ids, WINDOW).mean().exp() > 3 * trained.perplexity, "each knows what others do not"


@pytest.mark.parametrize(("way", "bound"), [("w8a16", 0.002), ("w8a8, smoothed", 0.01)])
def test_perplexity(judged: dict[str, dict[str, Any]], way: str, bound: float) -> None:
    assert judged[way]["quantized_fraction"] > 0.9
    assert 0 < abs(judged[way]["ratio"] - 1) < bound, "another model, and as good a one"


@torch.no_grad()
def test_outliers_are_smoothed_away(trained: Trained, judged: dict[str, dict[str, Any]]) -> None:
    same = copy.deepcopy(trained.model)
    put_outliers_in(same)
    window = trained.ids[:WINDOW].unsqueeze(0)
    assert torch.equal(same(window).logits, trained.model(window).logits)
    assert judged["w8a8, outliers put in"]["ratio"] > 1.03, "the case is hard"
    assert abs(judged["w8a8, outliers put in, smoothed"]["ratio"] - 1) < 0.01


@pytest.mark.parametrize(
    ("way", "bound", "bound_when_clear"),
    [("w8a16", 0.992, 0.9999), ("w8a8", 0.97, 0.999), ("w8a8, smoothed", 0.97, 0.999)],
)
def test_routing(judged: dict[str, dict[str, Any]], way: str, bound: float, bound_when_clear: float) -> None:
    """Routers are float, but what they are fed has an error of some 1% under w8a8 and less under w8a16, and so have
    their probabilities. Choices that were as close as that turn, one or two in a hundred; clear ones do not."""
    assert bound < judged[way]["same_experts"] < 1
    assert judged[way]["same_experts_when_clear"] > bound_when_clear


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_saved_and_loaded_it_computes_the_same_bits(trained: Trained, tmp_path: Path, way: Any) -> None:
    model, _ = quantized(trained, way)
    loaded, tokenizer = load_language_model(octavo.save(model, tmp_path / "int8"))
    assert sum(isinstance(module, QuantExperts) for module in loaded.modules()) == SHAPE["num_hidden_layers"]
    window = trained.ids[:WINDOW].unsqueeze(0)
    assert torch.equal(loaded(window).logits, model(window).logits)
    assert len(tokenizer) == model.config.vocab_size
