"""Classes that write out what a plain layer does become int8 as plain layers; those that do anything else do not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo.modules import QuantConv, QuantEmbedding, QuantLinear, QuantModule
from octavo.primitives import dequantize


class Linear(nn.Linear):
    """OpenAI Whisper's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv1d(nn.Conv1d):
    """OpenAI Whisper's."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        return super()._conv_forward(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Embedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.padding_idx)


def _rows() -> Tensor:
    return torch.randn(2, 6, 9)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], type[QuantModule]]] = {
    "linear": (functools.partial(Linear, 9, 5), _rows, QuantLinear),
    "linear without a bias": (functools.partial(Linear, 9, 5, bias=False), _rows, QuantLinear),
    "convolution": (functools.partial(Conv1d, 6, 4, 3, stride=2, padding=1, dilation=2), _rows, QuantConv),
    "groups": (functools.partial(Conv2d, 6, 4, (3, 1), groups=2), lambda: torch.randn(2, 6, 5, 4), QuantConv),
    "embedding": (
        functools.partial(Embedding, 12, 5, padding_idx=10),
        lambda: torch.randint(12, (2, 3)),
        QuantEmbedding,
    ),
}


def _dequantized(model: nn.Module, int8: nn.Module) -> nn.Module:
    expected = copy.deepcopy(model)
    for name, layer in int8.named_modules():
        if isinstance(layer, QuantModule):
            codes, scale = layer.codes_and_scale()
            weight: Any = expected.get_submodule(name).weight
            weight.data = dequantize(codes.flatten(1), scale).view(weight.shape)
    return expected


@pytest.mark.parametrize("name", CASES)
def test_a_forward_that_is_written_out_is_that_of_a_plain_layer(name: str, tmp_path: Path) -> None:
    make, inputs, int8_class = CASES[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).eval(), inputs()
    int8 = copy.deepcopy(model)
    octavo.quantize(int8, "w8a16", include=["Embedding"] if name == "embedding" else [])
    assert type(int8[0]) is int8_class
    y = int8(x)
    torch.testing.assert_close(y, _dequantized(model, int8)(x), rtol=1e-5, atol=1e-6)
    octavo.save(int8, tmp_path / "out")
    with torch.device("meta"):
        empty = nn.Sequential(make())
    assert torch.equal(octavo.load(tmp_path / "out", model=empty).eval()(x), y)


def test_inputs_of_another_dtype_than_the_weight_keep_theirs() -> None:
    model = nn.Sequential(Linear(9, 5))
    octavo.quantize(model, "w8a16")
    assert model(_rows().half()).dtype == torch.float16


def test_static_scales_are_calibrated_as_for_a_plain_layer() -> None:
    model = nn.Sequential(Linear(9, 5))
    stats = octavo.calibrate(model, [_rows()])
    octavo.quantize(model, "w8a8-static", stats=stats)
    assert str(model[0].scheme) == "w8a8-static"


class TimesTwo(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class ItsNorm(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) / self.weight.norm()


class OfTheWeightsDtype(nn.Linear):
    """What it returns is of another dtype than what a plain int8 layer would."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class NoisyInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + 1 if self.training else y


class Remembers(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return F.linear(x, self.weight, self.bias)


class Changing(nn.Linear):
    """Its weight is another after each call."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.detach().mul_(2)
        return F.linear(x, self.weight, self.bias)


class MoreMethods(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rank(self) -> int:
        return min(self.weight.shape)


class Padded(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (1, 0)), self.weight, self.bias)


@pytest.mark.parametrize("cls", [TimesTwo, ItsNorm, Changing])
@pytest.mark.filterwarnings("ignore:.*stay float:octavo.errors.OctavoWarning")
def test_a_layer_that_does_anything_else_with_its_weight_stays_float(cls: type[nn.Linear]) -> None:
    model = nn.Sequential(cls(9, 5), nn.Linear(5, 5))
    row = octavo.quantize(model, "w8a16").rows[0]
    assert type(model[0]) is cls
    assert "reads its weight directly" in str(row.reason)


@pytest.mark.parametrize("cls", [OfTheWeightsDtype, NoisyInTraining, Remembers, MoreMethods, Padded])
def test_one_that_does_something_around_the_product_goes_on_doing_it(cls: Any) -> None:
    is_linear = issubclass(cls, nn.Linear)
    model = nn.Sequential(cls(9, 5) if is_linear else cls(6, 4, 3))
    int8 = copy.deepcopy(model)
    octavo.quantize(int8, "w8a16")
    assert isinstance(int8[0], QuantModule) and type(int8[0]) is not QuantLinear
    expected = _dequantized(model, int8)
    for mode in (True, False):
        x = _rows()
        torch.testing.assert_close(int8.train(mode)(x), expected.train(mode)(x), rtol=1e-5, atol=1e-6)
    if cls is OfTheWeightsDtype:
        assert int8(_rows().half()).dtype == torch.float32
    if cls is Remembers:
        assert int8[0].seen == (2, 6, 9)
    if cls is MoreMethods:
        assert int8[0].rank() == 5
