"""Layers that derive from none of torch's and compute what `nn.Linear` does become int8; those that do more do not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo import OctavoWarning
from octavo.formats.saving import quantization_config
from octavo.layers import kind_of
from octavo.modules import QuantLinear
from octavo.primitives import dequantize
from tests.tiny_models import build


class Linear(nn.Module):
    """torch_geometric's: it waits for its shape, and keeps its state by itself."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight_initializer: str | None = None
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        if bias:
            self.bias = nn.Parameter(torch.randn(out_channels))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def initialize_parameters(self, module: nn.Module, args: Any) -> None: ...

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class ColumnParallel(Linear):
    """DeepSeek's: it derives from a class that is alike, and its class has settings."""

    scale_fmt: str | None = None
    block = 128

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.part_out_features = n

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias if x.dim() == 0 else super().forward(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Linear(9, 16), ColumnParallel(16, 7), Linear(7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.second(self.first(x).relu()))
        return y


def _dequantized(model: nn.Module, int8: nn.Module) -> nn.Module:
    expected = copy.deepcopy(model)
    for name, layer in int8.named_modules():
        if isinstance(layer, QuantLinear):
            expected.get_submodule(name).weight.data = dequantize(*layer.codes_and_scale())
    return expected


def test_they_become_int8_and_come_back(tmp_path: Path) -> None:
    model, x = build(Block).eval(), torch.randn(3, 4, 9)
    int8 = copy.deepcopy(model)
    report = octavo.quantize(int8, "w8a16")
    assert [type(layer) for layer in int8.children()] == [QuantLinear] * 3
    assert {row.kind for row in report.rows if row.scheme} == {"Linear"}
    y = int8(x)
    torch.testing.assert_close(y, _dequantized(model, int8)(x), rtol=1e-4, atol=1e-4)
    assert int8.first.in_channels == 9  # for who asks
    octavo.save(int8, tmp_path / "int8")
    assert torch.equal(octavo.load(tmp_path / "int8", model=Block().eval())(x), y)
    with torch.device("meta"):
        empty, skeleton = Block(), Block()
    assert torch.equal(octavo.load(tmp_path / "int8", model=empty).eval()(x), y)
    save_file(dict(model.state_dict()), str(tmp_path / "float.safetensors"))
    octavo.quantize_checkpoint(tmp_path / "float.safetensors", tmp_path / "from_file", "w8a16", model=skeleton)
    assert torch.equal(octavo.load(tmp_path / "from_file", model=Block().eval())(x), y)


def test_int8_inputs() -> None:
    model, x = build(Block).eval(), torch.randn(64, 9)
    expected = model(x)
    stats = octavo.calibrate(model, [x])
    for scheme in ("w8a8", "w8a8-static"):
        int8 = copy.deepcopy(model)
        report = octavo.quantize(int8, scheme, stats=stats, repair=False)
        assert {row.scheme for row in report.rows if row.name.endswith("weight")} == {scheme}
        assert octavo.sqnr(expected, int8(x)) > 30


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(11, 6), Linear(6, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.embed(ids))
        return y


def test_a_head_of_such_a_class_is_an_output_head() -> None:
    with pytest.warns(OctavoWarning, match="nothing of the model became int8: opt-in"):
        rows = {row.name: row for row in octavo.quantize(Head(), "w8a16").rows}
    assert rows["lm_head.weight"].reason == "opt-in: include 'OutputHead' to quantize it"
    rows = {row.name: row for row in octavo.quantize(Head(), "w8a16", include=["OutputHead"]).rows}
    assert rows["lm_head.weight"].kind == "OutputHead"
    tied = Head().eval()
    del tied.lm_head.bias  # it does not even say that it has none
    tied.lm_head.weight = tied.embed.weight  # type: ignore[assignment]
    octavo.quantize(tied, "w8a16", include=["Embedding"])
    table, ids = tied.embed(torch.arange(11)), torch.tensor([3, 7])
    torch.testing.assert_close(tied(ids), table[ids] @ table.T)


class Dense(nn.Module):
    """Of another name, by which other readers of a checkpoint do not find it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_other_readers_are_told_of_a_class_that_they_do_not_know(tmp_path: Path) -> None:
    model, x = nn.Sequential(Dense(), nn.Linear(5, 5)), torch.randn(2, 5)
    report = octavo.quantize(model, "w8a16")
    assert {row.name: row.kind for row in report.rows if row.scheme} == {"0.weight": "Dense", "1.weight": "Linear"}
    octavo.save(model, tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Dense", "Linear"]
    loaded = octavo.load(tmp_path / "int8", model=nn.Sequential(Dense(), nn.Linear(5, 5)))
    assert torch.equal(loaded(x), model(x))
    assert octavo.coverage(loaded).rows == report.rows
    with pytest.warns(octavo.OctavoWarning, match="kind Dense are read by octavo only.*class Dense ignored by name"):
        quantization_config({"0": ("Dense", octavo.Scheme())}, [], ecosystem=True)


class Scaled(Linear):
    def __init__(self) -> None:
        super().__init__(5, 5)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class Transposed(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Tied(Dense):
    """Somebody asks it for more than its forward."""

    def backwards(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Counting(Dense):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


class InPlace(Dense):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.zero_()
        return y


class Dropping(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Renamed(Dense):
    """Its files hold something else."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "kernel"] = self.weight.detach()


class WithState(Dense):
    def get_extra_state(self) -> Tensor:
        return torch.ones(1)


class Router(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Called(Dense):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Holding(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()


class Failing(Dense):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("wants something else")


OTHERS: list[Callable[[], nn.Module]] = [
    Scaled, Transposed, Tied, Counting, InPlace, Dropping, Renamed, WithState, Router, Called, Holding, Failing,
]  # fmt: skip


@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_what_does_anything_else_is_no_linear_layer(make: Callable[[], nn.Module]) -> None:
    assert kind_of(make()) is None
    model = nn.Sequential(make(), nn.Linear(5, 5))
    with pytest.warns(octavo.OctavoWarning, match="is not a layer kind that octavo knows"):
        octavo.quantize(model, "w8a16")
    assert type(model[0]).__name__ == make.__name__  # type: ignore[attr-defined]


def test_one_that_has_no_shape_yet() -> None:
    layer = Dense()
    layer.weight = nn.parameter.UninitializedParameter()  # type: ignore[assignment]
    assert kind_of(layer) is None
    with pytest.raises(octavo.QuantizeError, match="lazy layer"):
        octavo.quantize(nn.Sequential(layer), "w8a16")
