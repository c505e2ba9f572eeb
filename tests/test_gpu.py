"""Int8 models on a GPU: what they compute, compiled and recorded as CUDA graphs too, and files that know no device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo.modules import DynamicQuantLinear, QuantExperts, QuantLinear
from tests import tiny_models as tiny

pytestmark = pytest.mark.gpu

MODELS = {"llama": tiny.tied_llama, "gpt2": tiny.gpt2, "mixtral": tiny.mixtral, "qwen3_moe": tiny.qwen3_moe}


def int8(make: Callable[..., Any], scheme: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny.build(make, dtype)
    octavo.quantize(model, scheme, include=["Embedding", "OutputHead"])
    return model


CLOSE_DB = {"w8a16": 60, "w8a8": 35}
"""SQNR that two orders of summing in fp32 leave; with int8 inputs a value between two codes may fall on either."""


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids.to(model.device)).logits
    return found


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_does_on_the_cpu(name: str, scheme: str) -> None:
    model = int8(MODELS[name], scheme)
    ids = tiny.tokens()
    expected = logits(model, ids)
    found = logits(model.cuda(), ids)
    assert found.is_cuda and octavo.sqnr(expected, found.cpu()) > CLOSE_DB[scheme]


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_with_cuda_graphs(name: str, scheme: str) -> None:
    model = int8(MODELS[name], scheme, torch.bfloat16).cuda()
    ids = tiny.tokens().cuda()
    expected = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):  # warmed up, recorded, replayed
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(ids).logits.clone()
            assert octavo.sqnr(expected.float(), found.float()) > 30


def float_layers() -> dict[str, nn.Module]:
    return {"linear": nn.Linear(256, 384), "experts": tiny.build(tiny.mixtral).model.layers[0].mlp.experts}


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize("kind", float_layers())
def test_a_layer_is_recorded_as_a_graph_and_replayed_on_other_inputs(kind: str, scheme: str) -> None:
    """Recording fails if anything waits for the device; a replay is wrong if anything was decided while recording."""
    model = nn.Sequential(copy.deepcopy(float_layers()[kind])).bfloat16().cuda()
    octavo.quantize(model, scheme)
    layer = model[0]
    assert isinstance(layer, QuantLinear | DynamicQuantLinear | QuantExperts)
    inputs = arguments(layer)
    with torch.no_grad():
        layer(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = layer(*inputs)
        for _ in range(3):
            for place, new in zip(inputs, arguments(layer), strict=True):
                place.copy_(new)
            graph.replay()
            torch.testing.assert_close(recorded, layer(*inputs), rtol=0, atol=0)


def arguments(layer: nn.Module) -> tuple[Tensor, ...]:
    if not isinstance(layer, QuantExperts):
        return (torch.randn(3, 256, device="cuda").bfloat16(),)
    experts, hidden = layer.down_proj.shape[:2]
    chosen = torch.rand(5, experts, device="cuda").topk(2)
    return torch.randn(5, hidden, device="cuda").bfloat16(), chosen.indices, chosen.values.bfloat16()


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_files_know_no_device(scheme: str, tmp_path: Path) -> None:
    model = int8(tiny.llama, scheme)
    ids = tiny.tokens()
    expected = logits(model, ids)
    octavo.save(model.cuda(), tmp_path / "from-gpu")
    loaded = octavo.load(tmp_path / "from-gpu")
    assert torch.equal(logits(loaded, ids), expected)
    assert octavo.sqnr(expected, logits(loaded.cuda(), ids).cpu()) > CLOSE_DB[scheme]


def test_quantizing_on_the_gpu_gives_the_codes_that_the_cpu_gives() -> None:
    model = tiny.build(tiny.llama, torch.bfloat16)
    there = copy.deepcopy(model).cuda()
    octavo.quantize(model, "w8a16")
    octavo.quantize(there, "w8a16")
    for (name, here), value in zip(model.state_dict().items(), there.state_dict().values(), strict=True):
        assert value.is_cuda and torch.equal(value.cpu(), here), name


@pytest.mark.parametrize("attention", ["float", "int8"])
def test_an_int8_cache_holds_and_gives_what_it_does_on_the_cpu(attention: str) -> None:
    from octavo.integrations.int8_cache import Int8Cache
    from octavo.integrations.language_model import cache_name

    model, ids = tiny.build(tiny.llama), tiny.tokens(2, 12)
    octavo.quantize(model, "w8a16", attention=attention)

    def decoded(device: str) -> tuple[Tensor, Any]:
        cache = Int8Cache(model.config)
        options = {"use_cache": True, str(cache_name(model)): cache}
        with torch.no_grad():
            pieces = [
                model.to(device)(ids.to(device)[:, piece], **options).logits for piece in (slice(9), slice(9, 12))
            ]
        return torch.cat(pieces, 1).cpu(), cache

    (expected, _), (found, cache) = decoded("cpu"), decoded("cuda")
    assert cache.layers[0].keys.is_cuda and cache.layers[0].keys.dtype == torch.int8
    assert octavo.sqnr(expected, found) > 35
