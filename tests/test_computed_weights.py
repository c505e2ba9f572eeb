"""Convolutions that compute their weight in their forward become int8 as that weight; those that do more do not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo.computed_weights import computed_weight, same_upper
from octavo.modules import QuantConv
from octavo.primitives import dequantize


class Standardized(nn.Conv2d):
    """BiT's."""

    def __init__(self, *args: Any, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(*args, **options)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """NFNets', which has a gain of its own, and may pad as TensorFlow does."""

    def __init__(self, *args: Any, same: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.same = same
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            h, w = x.shape[-2:]
            (k, n), (s, t), (d, e) = self.kernel_size, self.stride, self.dilation
            high = max(((h + s - 1) // s - 1) * s + (k - 1) * d + 1 - h, 0)
            wide = max(((w + t - 1) // t - 1) * t + (n - 1) * e + 1 - w, 0)
            x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = self.gain * self.scale * weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Signed(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


CASES: dict[str, Callable[[], nn.Module]] = {
    "standardized": functools.partial(Standardized, 6, 8, 3, padding=1, bias=False),
    "strided, in groups": functools.partial(Standardized, 6, 8, (3, 2), stride=2, groups=2, dilation=(1, 2)),
    "with a gain": functools.partial(Scaled, 6, 8, 3, padding=1),
    "padded as by TensorFlow": functools.partial(Scaled, 6, 8, (5, 2), stride=(2, 3), same=True),
    "padded as by TensorFlow, dilated": functools.partial(Scaled, 6, 8, 3, dilation=2, same=True, bias=False),
    "one dimension": functools.partial(Signed, 6, 8, 3, padding="same"),
}


def _model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(CASES[name]()).eval()


def _inputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    dims = 1 if isinstance(model[0], nn.Conv1d) else 2  # type: ignore[index]
    return [torch.randn(2, 6, *sizes[:dims]).to(dtype) for sizes in ((9, 9), (10, 13), (11, 8), (12, 12))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_is_quantized_as_the_weight_that_is_computed(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _model(name).to(dtype)
    int8, layer, seen = copy.deepcopy(model), copy.deepcopy(model[0]), []
    report = octavo.quantize(int8, "w8a16")
    assert type(int8[0]) is QuantConv
    assert {row.name: row.kind for row in report.rows if row.scheme} == {"0.weight": type(layer).__mro__[1].__name__}
    assert report.unasked_fraction == 0 and {name for name, _ in int8.named_parameters()} <= {"0.bias"}

    def with_codes(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """The convolution that the float class calls, with what the codes stand for in place of its weight."""
        codes, scale = int8[0].codes_and_scale()  # type: ignore[union-attr, operator]
        seen.append((weight, dequantize(codes.flatten(1), scale).view(codes.shape)))
        bias, *others = args
        return convolve(x.float(), seen[-1][1], None if bias is None else bias.float(), *others)

    convolve = F.conv1d if "one" in name else F.conv2d
    for x in _inputs(model, dtype):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, convolve.__name__, with_codes)
            expected = layer(x)
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(int8(x).float(), expected, **tolerance)  # type: ignore[arg-type]
    weight, codes = (each.float().flatten(1) for each in seen[-1])
    assert ((weight - codes).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.51).all()
    assert torch.equal(copy.deepcopy(int8)(x), int8(x))


@pytest.mark.parametrize("name", CASES)
def test_it_comes_back_from_files_and_is_quantized_there(name: str, tmp_path: Path) -> None:
    model = _model(name)
    inputs = _inputs(model)
    save_file(dict(model.state_dict()), str(tmp_path / "float.safetensors"))
    with torch.device("meta"):
        empty, skeleton = _model(name), _model(name)
    report = octavo.quantize_checkpoint(tmp_path / "float.safetensors", tmp_path / "file", "w8a16", model=skeleton)
    assert {row.name for row in report.rows if row.scheme} == {"0.weight"} and report.unasked_fraction == 0
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    tensors, of_file = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "file"))
    assert tensors.keys() == of_file.keys() and all(torch.equal(of_file[key], tensors[key]) for key in tensors)
    for folder, fresh in (("out", _model(name)), ("file", empty)):
        loaded = octavo.load(tmp_path / folder, model=fresh).eval()
        assert all(torch.equal(loaded(x), model(x)) for x in inputs)
        assert loaded.state_dict().keys() == model.state_dict().keys()


def test_one_that_is_ignored_stays_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(CASES["with a gain"](), Standardized(8, 4, 3)).eval()
    x = torch.randn(2, 6, 9, 9)
    before, report = model[0](x), octavo.quantize(model, "w8a16", ignore=["0"])
    assert torch.equal(model[0](x), before) and type(model[0]) is Scaled
    assert {row.name: row.reason for row in report.rows if not row.scheme} == {
        "0.weight": "ignored by '0'",
        "0.bias": "1-D: biases and norms stay float",
        "0.gain": "1-D: biases and norms stay float",
        "1.bias": "1-D: biases and norms stay float",
    }
    octavo.save(model, tmp_path / "out")
    fresh = nn.Sequential(CASES["with a gain"](), Standardized(8, 4, 3)).eval()
    assert torch.equal(octavo.load(tmp_path / "out", model=fresh)(x), model(x))


def test_a_file_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    model = _model("with a gain")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "0.gain"}
    save_file(state, str(tmp_path / "float.safetensors"))
    with pytest.raises(octavo.CheckpointError, match=r"1 parameters of Sequential are missing, such as '0\.gain'"):
        octavo.quantize_checkpoint(tmp_path / "float.safetensors", tmp_path / "out", "w8a16", model=model)


def test_it_can_be_compiled_and_exported() -> None:
    torch.compiler.reset()
    model = _model("padded as by TensorFlow")
    x = _inputs(model)[0]
    octavo.quantize(model, "w8a16")
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


class OfTheInput(Standardized):
    """Its weight is another for each x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean().sigmoid(), self.bias, self.stride, self.padding)


class Activated(Standardized):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Twice(Standardized):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


class Mirrored(Standardized):
    """It pads with what is there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="reflect"))


class OneSided(Standardized):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class InTraining(Standardized):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (0.5 if self.training else 2.0)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class OfBias(Standardized):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight * 2, self.bias * 2, self.stride, self.padding)


class OfDilation(Standardized):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 2, self.bias, self.stride, self.padding, 2)


class Drawn(Standardized):
    """Its weight is another each time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * torch.rand(1), self.bias, self.stride, self.padding)


class InPlace(Standardized):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.mul_(2).clone(), self.bias, self.stride, self.padding)


class InFp32(Standardized):
    """It returns fp32 whatever the dtype of the model is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.float(), self.weight.float() * 2, self.bias, self.stride, self.padding)


class OtherStride(Standardized):
    """Its settings are not those of torch's class."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stride = 2  # type: ignore[assignment]


class Asked(Standardized):
    """Somebody may call it for more than its forward."""

    def standardized(self) -> Tensor:
        return self.weight / self.weight.std()


OTHERS = [
    OfTheInput, Activated, Twice, Mirrored, OneSided, InTraining, OfBias, OfDilation, Drawn, InPlace, InFp32,
    OtherStride, Asked,
]  # fmt: skip


@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_what_does_anything_else_stays_float(make: type[Standardized]) -> None:
    layer = make(6, 8, 3)
    assert computed_weight(layer) is None
    model = nn.Sequential(layer, nn.Conv2d(8, 4, 3))
    with pytest.warns(octavo.OctavoWarning, match="stay float"):
        octavo.quantize(model, "w8a16")
    assert type(model[0]) is make


@pytest.mark.parametrize(("size", "k", "step", "apart"), [(9, 3, 2, 1), (10, 5, 3, 2), (7, 2, 1, 1), (8, 1, 2, 1)])
def test_same_upper_gives_as_many_outputs_as_tensorflow(size: int, k: int, step: int, apart: int) -> None:
    before, after = same_upper([size], [k], [step], [apart])
    y = F.conv1d(torch.zeros(1, 1, size + before + after), torch.zeros(1, 1, k), stride=step, dilation=apart)
    assert y.shape[-1] == -(-size // step) and after - before in (0, 1)
