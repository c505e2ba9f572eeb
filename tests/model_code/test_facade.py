"""Int8 layers under the methods of the float layer's own class: each computes what the float class computes with the
weights that the codes stand for, wherever it goes."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.errors import OctavoWarning
from octavo.modules import QuantConv, QuantEmbedding, QuantLinear, QuantModule, QuantMultiheadAttention
from octavo.modules.recurrent import QuantRecurrent, QuantRecurrentCell
from octavo.primitives import dequantize
from tests import tiny_models

# -- classes that do something around the layer that they derive from --------------------------------------------------


class Scaled(nn.Embedding):
    """Gemma's."""

    def __init__(self, *sizes: int, scale: float = 3.0) -> None:
        super().__init__(*sizes)
        self.embed_scale = nn.Buffer(torch.tensor(scale), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class Positions(nn.Embedding):
    """BART's: it is asked by a shape, and keeps its first rows free."""

    offset = 2

    def forward(self, shape: torch.Size, start: int = 0, *, stretch: int = 1) -> Tensor:
        positions = torch.arange(start, start + shape[1], device=self.weight.device) * stretch
        return super().forward(positions + self.offset)


class Normed(nn.Embedding):
    """With a layer of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


class Causal(nn.Conv1d):
    """Voxtral's, with a property, a function of its own, and a cache that is handed the layer."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self._side = "left"

    @functools.cached_property
    def left_pad(self) -> int:
        return (self.kernel_size[0] - 1) * self.dilation[0] + 1 - self.stride[0]

    @staticmethod
    def padded(x: Tensor, left: int) -> Tensor:
        return F.pad(x, (left, 0))

    def forward(self, x: Tensor, cache: Callable[[Tensor, nn.Module], Tensor] | None = None) -> Tensor:
        assert self._side == "left"
        return super().forward(self.padded(x, self.left_pad) if cache is None else cache(x, self))


class Logits(nn.Linear):
    """Dory's: a factor that is learned, and a class between it and the layer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x) * self.factor

    def _forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class CappedLogits(Logits):
    def forward(self, x: Tensor) -> Tensor:
        return 30 * torch.tanh(super().forward(x) / 30)


class Head(nn.Conv1d):
    """Parakeet's: a convolution that takes what a linear layer takes."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


class Transposed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size)[..., :-1]


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Outputs(nn.LSTM):
    """That gives no state, and asks for what of torch's is a switch."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        assert self.bias is True
        return super().forward(x.to(self.weight_ih_l0.dtype))[0]


class Cell(nn.GRUCell):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * self.hidden_size


class Plain(nn.Linear):
    """That computes nothing else, but has a method that others ask."""

    def rank(self) -> int:
        return min(self.weight.shape)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 12, shape or (2, 5))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], type[QuantModule]]] = {
    "scaled": (lambda: Scaled(12, 8), ids, QuantEmbedding),
    "positions": (lambda: Positions(12, 8), lambda: torch.Size([2, 7]), QuantEmbedding),
    "normed": (lambda: Normed(12, 8), ids, QuantEmbedding),
    "causal": (lambda: Causal(8, 6, 3, dilation=2), lambda: torch.randn(2, 8, 9), QuantConv),
    "logits": (lambda: Logits(8, 12), lambda: torch.randn(3, 8), QuantLinear),
    "capped": (lambda: CappedLogits(8, 12), lambda: torch.randn(3, 8), QuantLinear),
    "head": (lambda: Head(8, 12, 1), lambda: torch.randn(2, 5, 8), QuantConv),
    "transposed": (lambda: Transposed(4, 6, 2, groups=2), lambda: torch.randn(2, 4, 7), QuantConv),
    "attention": (lambda: Attention(8, 2), lambda: torch.randn(5, 2, 8), QuantMultiheadAttention),
    "recurrent": (lambda: Outputs(8, 6, 2, bidirectional=True), lambda: torch.randn(5, 2, 8), QuantRecurrent),
    "cell": (lambda: Cell(8, 6), lambda: torch.randn(2, 8), QuantRecurrentCell),
    "plain": (lambda: Plain(8, 12), lambda: torch.randn(3, 8), QuantLinear),
}


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def quantized(make: Callable[[], nn.Module], **options: Any) -> tuple[Around, Around]:
    """A model as int8, and the float model whose weights are what the codes stand for."""
    model = Around(make()).eval()
    include = ["layer"]
    exact = copy.deepcopy(model)
    octavo.quantize(model, "w8a16", include=include, **options)
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            layer = exact.get_submodule(name)
            for param, (codes, scale) in module.codes().items():
                weight = dequantize(codes, scale)
                if isinstance(layer, nn.ConvTranspose1d):
                    weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
                getattr(layer, param).data = weight
    return model, exact


@pytest.mark.parametrize("name", CASES)
def test_computes_what_its_class_computes(name: str) -> None:
    make, inputs, kind = CASES[name]
    model, exact = quantized(make)
    assert isinstance(model.layer, kind) and not isinstance(model.layer, type(exact.layer).__mro__[1])
    x = inputs()
    torch.testing.assert_close(model(x), exact(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_is_the_same_wherever_it_goes(name: str, tmp_path: Path) -> None:
    make, inputs, _ = CASES[name]
    model, _ = quantized(make)
    x = inputs()
    expected = model(x)
    octavo.save(model, tmp_path / "out")
    empty = Around(make()).to_empty(device="cpu") if name == "plain" else Around(make())
    loaded = octavo.load(tmp_path / "out", model=empty.eval())
    pickled = pickle.loads(pickle.dumps(model))
    restored = copy.deepcopy(model)
    for twin in (loaded, pickled, restored):
        assert torch.equal(twin(x), expected)
        assert type(twin.layer) is type(model.layer)
        assert twin.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", CASES)
def test_can_be_compiled_and_exported(name: str) -> None:
    torch.compiler.reset()
    make, inputs, _ = CASES[name]
    model, _ = quantized(make)
    x = inputs()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    if isinstance(x, Tensor):
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("name", ["causal", "attention", "transposed"])
def test_a_few_that_others_could_not_read_are_opt_in(name: str) -> None:
    """A vision tower's patches are not worth that vLLM cannot read the checkpoint."""
    make = CASES[name][0]
    for beside, is_float in ((nn.Linear(32, 32), True), (nn.Linear(2, 2), False), (nn.Conv1d(2, 2, 1), False)):
        model = nn.ModuleDict({"layer": make(), "beside": beside})
        model.config = types.SimpleNamespace(model_type="of transformers")  # type: ignore[assignment]
        report = octavo.quantize(model, "w8a16")
        reasons = {row.reason for row in report.rows if row.name.startswith("layer.") and "out_proj" not in row.name}
        opt_in = "opt-in: include 'layer' to quantize it; only octavo will read the checkpoint then"
        assert (opt_in in reasons) is is_float is not isinstance(model["layer"], QuantModule)
        assert isinstance(model["beside"], QuantModule) and report.unasked_fraction == 0


@pytest.mark.parametrize("name", ["causal", "attention", "transposed"])
def test_what_others_cannot_read_anyway_is_int8(name: str) -> None:
    """They read neither a model that is not transformers' nor one with a plain convolution: WanVAE was float to 96%."""
    alone, beside = Around(CASES[name][0]()), Around(CASES[name][0]())
    beside.config = types.SimpleNamespace(model_type="of transformers")  # type: ignore[assignment]
    beside.patches = nn.Conv2d(3, 4, 2)
    for model in (alone, beside):
        octavo.quantize(model, "w8a16")
        assert isinstance(model.layer, QuantModule)


def test_what_its_class_has_is_there() -> None:
    model, _ = quantized(CASES["causal"][0])
    layer: Any = model.layer
    assert layer.left_pad == 4 and layer.padded(torch.ones(1), 2).tolist() == [0, 0, 1]
    seen = []

    def cache(x: Tensor, conv: Any) -> Tensor:
        seen.append((conv.left_pad, conv.in_channels, conv.weight.dtype))
        return F.pad(x, (conv.left_pad, 0))

    x = torch.randn(2, 8, 9)
    assert torch.equal(layer(x, cache), layer(x)) and seen == [(4, 8, torch.float32)]
    positions: Any = quantized(CASES["positions"][0])[0].layer
    table = dequantize(*positions.codes_and_scale())
    assert torch.equal(positions(torch.Size([1, 3]), 1, stretch=2), table[[4, 6, 8]])
    assert quantized(CASES["plain"][0])[0].layer.rank() == 8  # type: ignore[operator]
    assert "QuantPlain(in_features=8, out_features=12, bias=True, w8a16)" in repr(quantized(CASES["plain"][0])[0])


def test_a_recurrent_layer_holds_no_float_weights_beside_its_codes() -> None:
    model, _ = quantized(CASES["recurrent"][0])
    held = [each for value in vars(model.layer).values() if isinstance(value, list) for each in value]
    assert not any(isinstance(each, (Tensor, weakref.ref)) for each in held)
    assert {name for name, _ in model.layer.named_parameters()} == {
        f"bias_{part}_l{layer}{end}" for part in ("ih", "hh") for layer in (0, 1) for end in ("", "_reverse")
    }


def test_parameters_and_layers_of_its_own_stay() -> None:
    model, _ = quantized(CASES["logits"][0])
    assert {name for name, _ in model.named_parameters()} == {"layer.bias", "layer.factor"}
    model(torch.randn(3, 8)).sum().backward()
    assert model.layer.factor.grad is not None
    normed, _ = quantized(CASES["normed"][0])
    assert isinstance(normed.layer.norm, nn.LayerNorm)
    rows = {row.name: row.scheme for row in octavo.coverage(normed).rows}
    assert rows == {"layer.weight": "w8a16", "layer.norm.weight": None, "layer.norm.bias": None}


def test_a_parameter_that_was_put_on_a_plain_layer_stays_too() -> None:
    model = Around(nn.Linear(8, 8))
    model.layer.register_parameter("extra", nn.Parameter(torch.ones(3)))
    octavo.quantize(model, "w8a16")
    assert isinstance(model.layer, QuantLinear) and model.layer.extra.tolist() == [1, 1, 1]


def test_a_cast_is_followed() -> None:
    model, _ = quantized(CASES["scaled"][0])
    tokens = ids()
    full = model(tokens)
    half = model.to(torch.bfloat16)
    assert half.layer.weight.dtype == half(tokens).dtype == torch.bfloat16
    torch.testing.assert_close(half(tokens), full.bfloat16(), rtol=0.02, atol=0)
    skeleton = half.to("meta")
    assert skeleton.layer.weight.is_meta and skeleton.layer.weight.shape == (12, 8)
    assert skeleton.to_empty(device="cpu").layer.weight.isnan().all()


def test_an_empty_model_that_is_loaded_says_where_it_is(tmp_path: Path) -> None:
    for name in ("positions", "logits"):
        make, inputs, _ = CASES[name]
        model, _ = quantized(make)
        octavo.save(model, tmp_path / name)
        with torch.device("meta"):
            empty = Around(make()).eval()
        loaded = octavo.load(tmp_path / name, model=empty)
        assert loaded.layer.weight.device.type == "cpu" and loaded.layer.weight.isnan().all()
        x = inputs()
        assert torch.equal(loaded(x), model(x))


def test_int8_inputs_are_those_that_the_layer_is_given_in_the_end() -> None:
    """A static scale would be that of what its forward is given, which is all that calibration sees."""

    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(100 * x)

    model = nn.Sequential(Loud(64, 32), nn.Linear(32, 8)).eval()
    x = torch.randn(16, 64)
    expected = model(x)
    report = octavo.quantize(model, "w8a8-static", stats=octavo.calibrate(model, [x]))
    notes = {row.name: (row.scheme, row.reason) for row in report.rows}
    assert notes["0.weight"] == ("w8a8", "the inputs of Loud have dynamic scales")
    assert notes["1.weight"] == ("w8a8-static", None)
    error = (model(x) - expected).norm() / expected.norm()
    assert error < 0.03


# -- weights that are shared, and weights whose dtype is asked for -------------------------------------------------


def test_a_shared_table_keeps_the_methods_of_each_that_looks_it_up() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.lm_head = Scaled(12, 8), Scaled(12, 8, scale=2.0), nn.Linear(8, 12, False)
            self.decoder.weight = self.lm_head.weight = self.encoder.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(self.encoder(tokens) + self.decoder(tokens))  # type: ignore[no-any-return]

    model = Both()
    tokens, table = ids(), model.encoder.weight
    octavo.quantize(model, "w8a16", include=["Embedding", "OutputHead"])
    rounded = dequantize(*model.encoder.codes_and_scale())  # type: ignore[operator]
    assert not torch.equal(rounded, table)
    torch.testing.assert_close(model(tokens), 5 * rounded[tokens] @ rounded.T)
    model.decoder.weight = model.lm_head.weight = model.encoder.weight  # as transformers' tie_weights does
    with pytest.raises(octavo.QuantizeError, match="shares the table of another layer"):
        model.decoder.weight = torch.zeros(12, 8)
    assert model.decoder.weight.isnan().all() and model.lm_head.weight.dtype == torch.int8


class Patches(nn.Module):
    """As CLIP's: its input is cast to the dtype of a weight, here also of one that it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.proj = nn.Linear(8, 6)
        self.last = nn.Linear(6, 6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels.to(dtype=self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        return self.last(self.proj(self.cast(x, self.proj)))  # type: ignore[no-any-return]

    def cast(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return x.to(layer.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_asks_for_the_dtype_of_a_weight_is_told_the_models(dtype: torch.dtype) -> None:
    model = Patches().eval()
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixels)
    report = octavo.quantize(model, "w8a16", include=["patch"])
    assert report.unasked_fraction == 0
    model = model.to(dtype)
    assert type(model.patch).__name__ == "QuantConv" and model.patch.weight.dtype == dtype
    assert model.last.weight.dtype == torch.int8  # nobody asks for it
    with torch.no_grad():
        actual = model(pixels)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


class Scaling(nn.Module):
    """By a size of the weight, whose codes are laid out otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.turned = nn.ConvTranspose1d(6, 4, 3), Conv1D(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.transpose(1, 2)).transpose(1, 2) * self.up.weight.size(0)
        return self.turned(F.pad(y, (0, 4))) * self.turned.weight.shape[0]


def test_who_asks_for_the_shape_of_a_weight_is_told_that_of_the_float_one() -> None:
    model = Scaling().eval()
    x = torch.randn(2, 7, 6)
    expected = model(x)
    assert octavo.quantize(model, "w8a16", include=["up", "turned"]).unasked_fraction == 0
    assert isinstance(model.up, QuantModule) and isinstance(model.turned, QuantModule)
    assert 0 < (model(x) - expected).norm() / expected.norm() < 0.03
    assert model.up.weight.shape == (6, 4, 3) and model.turned.weight.shape == (8, 5)


# -- weights that are handed to products ------------------------------------------------------------------------------


class SeparateBiases(nn.Module):
    """BEiT's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 48, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return F.linear(x, weight=self.qkv.weight, bias=bias)


def attend(x: Tensor, qkv: Tensor, proj: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = F.linear(x, qkv).chunk(3, -1)
    return F.linear(F.scaled_dot_product_attention(q, k, v), proj, bias)


class ByAFunction(nn.Module):
    """Torchvision's Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 48, bias=False), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.qkv.weight, self.proj.weight, bias=self.proj.bias)


class ByTorchsFunction(nn.Module):
    """WavLM's attention, and fairseq's."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        biases = torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias))
        none = torch.empty([0])
        return F.multi_head_attention_forward(
            x, x, x, 64, 4, none, biases, None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias, False,
            need_weights=False, use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )[0]  # fmt: skip


class SamePadding(nn.Conv2d):
    """TensorFlow's, as timm and efficientnet_pytorch have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class HeadByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(40, 64), nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.embed(ids))), self.embed.weight)


MULTIPLIED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "bias": (SeparateBiases, lambda: torch.randn(2, 5, 64)),
    "function": (ByAFunction, lambda: torch.randn(2, 5, 64)),
    "attention": (ByTorchsFunction, lambda: torch.randn(5, 2, 64)),
    "convolution": (
        lambda: nn.Sequential(SamePadding(6, 8, 3, stride=2, groups=2), nn.Conv2d(8, 4, 1)),
        lambda: torch.randn(2, 6, 9, 7),
    ),
    "head": (HeadByHand, lambda: ids(2, 5)),
}


def _exact(model: nn.Module, int8: nn.Module) -> nn.Module:
    """The float model with the weights that the codes stand for."""
    exact = copy.deepcopy(model)
    for name, module in int8.named_modules():
        if isinstance(module, QuantModule):
            exact.get_submodule(name).weight.data = dequantize(*module.codes_and_scale())  # type: ignore[union-attr]
    return exact


@pytest.mark.parametrize("name", MULTIPLIED)
def test_products_are_made_with_codes(name: str, tmp_path: Path) -> None:
    make, inputs = MULTIPLIED[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    int8 = copy.deepcopy(model)
    report = octavo.quantize(int8, "w8a16", include=["Embedding"] if name == "head" else [])
    assert {row.scheme for row in report.rows if len(row.shape) > 1} == {"w8a16"}
    y = int8(x)
    torch.testing.assert_close(y, _exact(model, int8)(x), rtol=1e-5, atol=1e-5)
    octavo.save(int8, tmp_path / "out")
    for twin in (octavo.load(tmp_path / "out", model=make()).eval(), pickle.loads(pickle.dumps(int8))):
        assert torch.equal(twin(x), y)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(int8, fullgraph=True, backend="aot_eager")(x), y)
    torch.testing.assert_close(torch.export.export(int8, (x,)).module()(x), y)


@pytest.mark.parametrize("name", ["bias", "function", "attention"])
def test_inputs_of_such_products_are_int8_too(name: str) -> None:
    make, inputs = MULTIPLIED[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    stats = octavo.calibrate(model, [x])
    for scheme in ("w8a8", "w8a8-static"):
        int8, fake = copy.deepcopy(model), copy.deepcopy(model)
        report = octavo.quantize(int8, scheme, stats=stats if scheme == "w8a8-static" else None)
        octavo.quantize(fake, scheme, stats=stats if scheme == "w8a8-static" else None, fake=True)
        assert {row.scheme for row in report.rows if len(row.shape) > 1} == {scheme}
        y = int8(x)
        torch.testing.assert_close(fake(x), y, rtol=1e-3, atol=1e-3)
        weights_only = _exact(model, int8)(x)
        assert 0 < (y - weights_only).norm() / weights_only.norm() < 0.02
        judged = octavo.compare(model, int8, [x])
        assert not judged.not_compared and {layer.name for layer in judged.layers} == stats.observers.keys()


def test_such_products_pass_gradients_on() -> None:
    model = SeparateBiases().eval()
    octavo.quantize(int8 := copy.deepcopy(model), "w8a16")
    gradients = []
    for each in (int8, _exact(model, int8)):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        each(x).square().sum().backward()
        gradients.append((x.grad, each.q_bias.grad))  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


# -- classes whose methods cannot stand on top of an int8 layer --------------------------------------------------------


class Reading(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class ReadingInAnotherMethod(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.penalty()

    def penalty(self) -> Tensor:
        return self.weight.square().sum()


class Replacing(nn.Embedding):
    """As FSMT's: it makes itself a longer table."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.weight.size(0):
            self.weight = nn.Parameter(torch.zeros(x.shape[1], self.embedding_dim))
        return super().forward(x)


class ByName(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x) * 2


class OldSuper(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super(OldSuper, self).forward(x) * 2  # noqa: UP008


def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(self: Any, x: Tensor) -> Tensor:
        return function(self, x) * 2

    return call


class Decorated(nn.Linear):
    @twice
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Standardized(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.std(), bias)


class OwnPadding(nn.ConvTranspose1d):
    def _output_padding(self, *args: Any, **kwargs: Any) -> list[int]:
        return [0]


class MadeOtherwise(nn.Linear):
    """How it is made and described is no matter of the int8 layer's."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def extra_repr(self) -> str:
        return "made otherwise"


def test_how_a_layer_was_made_is_no_obstacle() -> None:
    model = Around(MadeOtherwise(8, 8, bias=False))
    assert octavo.quantize(model, "w8a16").quantized_fraction == 1


class Taken(nn.Linear):
    def codes(self) -> int:
        return 1


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().__call__(x) * 5


class CalledWithin(nn.Linear):
    def _call_impl(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super()._call_impl(x) * 5  # type: ignore[no-any-return]


class Answering(nn.Linear):
    """As many models do; who asks it for a name that it makes up would be told that there is none."""

    def __getattr__(self, name: str) -> Any:
        return 3.0 if name == "factor" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


PAST = "calls what it derives from otherwise than by a plain super"
REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Reading(8, 8), r"Reading\.forward reads its weight directly"),
    (lambda: ReadingInAnotherMethod(8, 8), r"ReadingInAnotherMethod\.penalty reads its weight directly"),
    (lambda: Replacing(8, 8), r"Replacing\.forward reads its weight directly"),
    (lambda: ByName(8, 8), rf"ByName\.forward {PAST}"),
    (lambda: OldSuper(8, 8), rf"OldSuper\.forward {PAST}"),
    (lambda: Decorated(8, 8), rf"Decorated\.forward {PAST}"),
    (lambda: Standardized(8, 8, 1), "Standardized has a _conv_forward of its own, which a plain Conv1d would not do"),
    (lambda: OwnPadding(8, 8, 1), "OwnPadding has a _output_padding of its own, which a plain ConvTranspose1d would "),
    (lambda: Called(8, 8), "Called has a __call__ of its own, which a plain Linear would not do"),
    (lambda: CalledWithin(8, 8), "CalledWithin has a _call_impl of its own, which a plain Linear would not do"),
    (lambda: Answering(8, 8), "Answering has a __getattr__ of its own, which a plain Linear would not do"),
    (lambda: Taken(8, 8), "Taken has a codes, which is something else of an int8 layer"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason.split()[0] for _, reason in REFUSED])
def test_what_cannot_stand_on_an_int8_layer_stays_float(make: Callable[[], nn.Module], reason: str) -> None:
    model = Around(make())
    x = ids(2, 5) % 8 if isinstance(model.layer, nn.Embedding) else torch.randn(3, 8, 8)
    before = model(x)
    with pytest.warns(OctavoWarning, match=reason):
        octavo.quantize(model, "w8a16", include=["layer"])
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:the source of Typed cannot be read")
def test_a_class_typed_at_a_prompt_stays_float() -> None:
    namespace: dict[str, Any] = {"nn": nn}
    source = "class Typed(nn.Linear):\n    def forward(self, x):\n        return super().forward(x) * 2\n"
    exec(compile(source, "<stdin>", "exec"), namespace)
    with pytest.warns(OctavoWarning, match="Typed has a forward of its own.* its source cannot be read"):
        assert octavo.quantize(Around(namespace["Typed"](8, 8)), "w8a16").quantized_fraction == 0


# -- real classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_models.gemma3, tiny_models.bart])
def test_language_models_whose_table_scales_itself(make: Callable[[], Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from octavo.integrations.transformers import OctavoConfig

    tiny_models.build(make).save_pretrained(tmp_path / "float")
    auto = AutoModelForSeq2SeqLM if make is tiny_models.bart else AutoModelForCausalLM
    include = ["Embedding", "OutputHead"]
    model = auto.from_pretrained(tmp_path / "float").eval()
    tokens = tiny_models.tokens()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        report = octavo.quantize(model, "w8a16", include=include)
        assert report.unasked_fraction == 0
        actual = model(input_ids=tokens).logits
        assert 0 < (actual - expected).norm() / expected.norm() < 0.03
        with pytest.warns(OctavoWarning, match="Embedding are read by octavo only"):
            octavo.save(model, tmp_path / "saved")
            octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "streamed", "w8a16", include=include)
        while_loading = auto.from_pretrained(
            tmp_path / "float", quantization_config=OctavoConfig("w8a16", include=include)
        )
        others = {
            "saved": octavo.load(tmp_path / "saved"),
            "streamed": octavo.load(tmp_path / "streamed"),
            "while loading": while_loading,
            "by transformers": auto.from_pretrained(tmp_path / "saved"),
        }
        for how, other in others.items():
            assert torch.equal(other.eval()(input_ids=tokens).logits, actual), how
            assert other.get_input_embeddings().weight.isnan().all(), how
        model.tie_weights()
        assert torch.equal(model(input_ids=tokens).logits, actual)
        longer = model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert torch.equal(others["saved"].generate(tokens, max_new_tokens=4, do_sample=False), longer)


def test_a_clip_vision_tower_is_int8_to_its_patches() -> None:
    model = tiny_models.build(tiny_models.clip_vision)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        octavo.quantize(model, "w8a16", include=["re:.*patch_embedding"])
        actual = model(pixels).last_hidden_state
        assert isinstance(model.get_submodule("embeddings.patch_embedding"), QuantConv)
        assert 0 < (actual - expected).norm() / expected.norm() < 0.03
        half = model.to(torch.bfloat16)(pixels)
    assert half.last_hidden_state.dtype == torch.bfloat16
