"""Linear layers with int8 weights, those that a library stores turned around among them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from octavo.modules import (
    QuantLinear,
)
from octavo.primitives import dequantize, quantize_weight
from octavo.quantization.quantize import quantize


def test_the_conv1d_of_gpt2() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(6, 10)
    nn.init.normal_(layer.bias)
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, "w8a16")
    assert isinstance(model[0], QuantLinear)
    assert model[0].weight.shape == (6, 10) and model[0].weight.is_contiguous()
    codes, scale = quantize_weight(layer.weight.T.contiguous())
    assert torch.equal(model[0].weight, codes)
    x = torch.randn(2, 3, 10)
    expected = nn.functional.linear(x, dequantize(codes, scale), layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
