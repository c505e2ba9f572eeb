"""Who watches a layer by hooks also sees the products that other code makes with its weight: once each, as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo.evaluate import sqnr
from octavo.model_code.products import products_as_calls


class Attention(nn.Module):
    """Its own layer is called, multiplied with, or both."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.bias, self.way = nn.Parameter(torch.randn(96)), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.way == "called":
            qkv = self.qkv(x) + self.bias
        elif self.way == "used_in_products":
            qkv = F.linear(x, self.qkv.weight, self.bias)
        else:
            qkv = self.qkv(x) / 2 + F.linear(input=x, weight=self.qkv.weight, bias=2 * self.bias) / 2
        q, k, v = qkv.chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


def pair(way: str) -> tuple[nn.Module, nn.Module]:
    """An attention that only calls, and one of the same weights that multiplies. Some channels are outliers."""
    torch.manual_seed(0)
    called, other = Attention("called").eval(), Attention(way).eval()
    called.norm.weight.data[:3] *= 80
    other.load_state_dict(called.state_dict())
    return called, other


def watched(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    seen: list[tuple[str, Tensor, Tensor]] = []
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, given, output, name=name: seen.append((name, given[0], output)))
    with products_as_calls(model), torch.no_grad():
        model(x)
    return seen


@pytest.mark.parametrize("scheme", [None, "w8a16", "w8a8"])
@pytest.mark.parametrize("way", ["used_in_products", "both"])
def test_hooks_see_each_product_once(way: str, scheme: str | None) -> None:
    _, model = pair(way)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model.norm(x)
    if scheme:
        octavo.quantize(model, scheme)
    seen = watched(model, x)
    assert [name for name, *_ in seen] == ["norm", *["qkv"] * (2 if way == "both" else 1), "proj"]
    for name, given, output in seen:
        if name == "qkv":
            torch.testing.assert_close(given, expected)
            assert output.shape == (2, 5, 96)
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("way", ["used_in_products", "both"])
def test_an_error_leaves_the_model_as_it_was(way: str) -> None:
    _, model = pair(way)
    before = copy.deepcopy(vars(model.qkv))
    with pytest.raises(RuntimeError), products_as_calls(model):
        model.qkv.weight.data = model.qkv.weight.data[:, 1:]
        model(torch.randn(2, 5, 32))
    assert vars(model.qkv).keys() == before.keys()
    assert not model.qkv._forward_hooks and not model.qkv._forward_pre_hooks


def test_what_is_no_module_is_left_alone() -> None:
    with products_as_calls(lambda x: x):
        assert F.linear(torch.ones(1), torch.ones(2, 1)).shape == (2,)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_a_layer_that_is_multiplied_with_is_smoothed_and_judged_as_one_that_is_called(scheme: str) -> None:
    x = torch.randn(4, 16, 32)
    results: list[Any] = []
    for model in pair("used_in_products"):
        exact = copy.deepcopy(model)
        rough = copy.deepcopy(model)
        stats = octavo.calibrate(model, [x])
        octavo.quantize(rough, scheme, stats=stats if scheme == "w8a8-static" else None)
        report = octavo.smooth(model, stats, alpha=0.5)
        assert torch.equal(model(x), exact(x))
        octavo.quantize(model, scheme, stats=stats if scheme == "w8a8-static" else None)
        judged = octavo.compare(exact, model, [x])
        assert {layer.name for layer in judged.layers} == {"qkv", "proj"} and not judged.not_compared
        assert sqnr(exact(x), model(x)) > sqnr(exact(x), rough(x)) + 3
        results.append((report, [(layer.name, layer.sqnr_db) for layer in judged.layers], model(x)))
    (by_calls, layers, y), (by_products, same_layers, same_y) = results
    assert str(by_calls) == str(by_products)
    torch.testing.assert_close(y, same_y, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in layers] == [name for name, _ in same_layers]
    for (_, one), (_, other) in zip(layers, same_layers, strict=True):
        assert one == pytest.approx(other, abs=1)
