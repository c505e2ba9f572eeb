"""A weight that is handed to torch's functions: each gives what it gives for the float weight that codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo.modules import QuantConv, QuantModule
from octavo.modules.int8_weight import Int8Weight
from octavo.primitives import dequantize


def weight_of(layer: nn.Module) -> tuple[Any, Tensor]:
    """An int8 layer's weight, and the float one that it stands for, in float64."""
    model = nn.Sequential(layer)
    octavo.quantize(model, "w8a16", include=["0"])
    (int8,) = model
    assert isinstance(int8, QuantModule)
    shown = torch.full((), torch.nan).expand(layer.weight.shape)  # type: ignore[arg-type]
    return Int8Weight(int8, shown), dequantize(*int8.codes_and_scale()).double()


@pytest.mark.parametrize("layer", [nn.Linear(24, 10), nn.Embedding(10, 24)], ids=["linear", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(layer: nn.Module, dtype: torch.dtype) -> None:
    weight, exact = weight_of(layer)
    x, bias = torch.randn(2, 3, 24).to(dtype), torch.randn(10).to(dtype)
    for given_bias in (None, bias):
        expected = F.linear(x.double(), exact, None if given_bias is None else given_bias.double())
        for y in (F.linear(x, weight, given_bias), F.linear(input=x, weight=weight, bias=given_bias)):
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


CONVOLUTIONS: list[tuple[Any, Any]] = [(nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("cls", "function"), CONVOLUTIONS, ids=["1d", "2d", "3d"])
@given(data=st.data())
def test_convolutions(cls: Any, function: Any, data: st.DataObject) -> None:
    """Whatever the geometry of the call is, and in whatever form: it is not the layer's."""
    dims = CONVOLUTIONS.index((cls, function)) + 1
    groups = data.draw(st.sampled_from([1, 2]))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    layer = cls(4, 6, kernel, stride=3, padding=1, groups=groups)
    weight, exact = weight_of(layer)
    each = st.integers(1, 2) | st.tuples(st.integers(1, 2)) | st.tuples(*[st.integers(1, 2)] * dims)
    options = {"dilation": data.draw(each), "groups": groups}
    options["padding"] = data.draw(st.sampled_from(["same", "valid"]) | each)
    options["stride"] = 1 if options["padding"] == "same" else data.draw(each)
    x = torch.randn([4, *[9] * dims] if data.draw(st.booleans()) else [2, 4, *[9] * dims])
    bias = torch.randn(6) if data.draw(st.booleans()) else None
    expected = function(x.double(), exact, None if bias is None else bias.double(), **options)
    torch.testing.assert_close(function(x, weight, bias, **options).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cls", "function"), CONVOLUTIONS, ids=["1d", "2d", "3d"])
def test_what_a_call_leaves_out_is_not_the_layers_either(cls: Any, function: Any) -> None:
    weight, exact = weight_of(cls(4, 6, 2, stride=3, padding=1, dilation=2))
    x = torch.randn(2, 4, *[9] * (exact.dim() - 2))
    torch.testing.assert_close(function(x, weight).double(), function(x.double(), exact), rtol=1e-5, atol=1e-5)


def test_the_padding_of_a_layer_is_its_own() -> None:
    """Also where it is a word, or what is around the input is not zeros."""
    for options in ({"padding": "same", "dilation": 2}, {"padding": (1, 2), "padding_mode": "reflect"}):
        layer = nn.Conv2d(4, 6, (2, 3), **options)  # type: ignore[arg-type]
        weight, exact = weight_of(layer)
        x = torch.randn(2, 4, 9, 8)
        layer.double().weight.data = exact
        assert isinstance(weight.layer, QuantConv)
        torch.testing.assert_close(weight.layer(x).double(), layer(x.double()), rtol=1e-5, atol=1e-5)


def test_to_anything_else_it_is_a_tensor_without_values() -> None:
    weight, _ = weight_of(nn.Linear(24, 10))
    assert weight.shape == (10, 24) and weight.dtype == torch.float32 and weight.size(1) == 24
    assert torch.isnan(torch.add(weight, 1)).all() and torch.isnan(F.linear(weight, torch.ones(2, 24))).all()
    assert torch.isnan(torch.mul(input=torch.ones(24), other=weight)).all()
