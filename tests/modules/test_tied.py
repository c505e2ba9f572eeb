"""Layers that share a table hold one, wherever the model goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.modules import (
    QuantEmbedding,
    TiedQuantEmbedding,
    TiedQuantLinear,
)
from octavo.quantization.install import install
from octavo.quantization.plan import plan
from octavo.quantization.quantize import quantize
from octavo.recipe import Recipe
from tests.modules.test_modules import JOURNEYS, Tied, rounded, tied


def assert_one_table(model: Tied) -> None:
    assert isinstance(model.embedding, QuantEmbedding)
    assert isinstance(model.lm_head, TiedQuantLinear)
    assert model.lm_head.weight is model.embedding.weight
    assert model.lm_head.weight_scale is model.embedding.weight_scale
    assert [name for name, _ in model.lm_head.named_buffers()] == []
    assert (model.lm_head.out_features, model.lm_head.in_features) == (20, 8)


def half(model: nn.Module, tmp_path: Path) -> nn.Module:
    return model.half()


def on_meta(model: nn.Module, tmp_path: Path) -> nn.Module:
    return model.to("meta")


@pytest.mark.parametrize("journey", [*JOURNEYS, half, on_meta])
def test_tied_layers_stay_one(journey: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    arrived = journey(tied(), tmp_path)
    assert isinstance(arrived, Tied)
    assert_one_table(arrived)


def test_tied_layers_compute_as_the_float_ones() -> None:
    model = Tied()
    truth = copy.deepcopy(model)
    quantize(model, "w8a16", include=["Embedding"])  # the head shares the table, so it follows
    assert_one_table(model)
    rounded(truth.embedding)
    rounded(truth.middle)
    tokens = torch.randint(0, 20, (2, 3))
    torch.testing.assert_close(model(tokens), truth(tokens), rtol=1e-5, atol=1e-5)
    held = {name for name in model.state_dict() if not name.startswith("middle")}
    assert held == {"embedding.weight", "embedding.weight_scale", "lm_head.bias"}


def test_all_of_an_embedding_is_where_its_table_is() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(20, 8), nn.Embedding(20, 8))
        model[1].weight = model[0].weight
    install(model, plan(model, Recipe.of("w8a16", include=["Embedding"])))
    assert [type(layer) for layer in model] == [QuantEmbedding, TiedQuantEmbedding]
    assert {buffer.device.type for layer in model for buffer in layer._buffers.values()} == {"meta"}


def test_tied_embeddings_share_a_table() -> None:
    first, second = nn.Embedding(20, 8), nn.Embedding(20, 8)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    quantize(model, "w8a16", include=["Embedding"])
    assert isinstance(model[1], TiedQuantEmbedding)
    tokens = torch.randint(0, 20, (2, 3))
    assert torch.equal(model[0](tokens), model[1](tokens))
    assert model.half()[1](tokens).dtype == torch.float16
