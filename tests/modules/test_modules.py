"""The int8 layers stand where float layers stood: same results, and they live through what models live through."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.errors import OctavoError, QuantizeError
from octavo.modules import (
    QuantConv,
    QuantConvTranspose,
    QuantEmbedding,
    QuantLinear,
    QuantModule,
    QuantMultiheadAttention,
    TiedQuantEmbedding,
    TiedQuantLinear,
)
from octavo.primitives import choose_scale, dequantize, quantize_weight
from octavo.primitives import quantize as codes_of
from octavo.quantization.install import install
from octavo.quantization.plan import plan
from octavo.quantization.quantize import quantize
from octavo.recipe import Recipe

# -- the float model that an int8 model must equal --------------------------------------------------------------------


def rounded(layer: nn.Module) -> None:
    """Replace the weights of one float layer by what their int8 codes stand for (per channel, by hand)."""
    with torch.no_grad():
        for name, weight in layer.named_parameters(recurse=False):
            if not name.endswith("weight"):
                continue
            rows = weight
            if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                # Output channel n of group g is weight[g's channels, n]: one scale for those.
                for group in weight.chunk(layer.groups):
                    for n in range(group.shape[1]):
                        filter_ = group[:, n].reshape(1, -1)
                        scale = choose_scale(filter_, "per_tensor")
                        group[:, n] = dequantize(codes_of(filter_, scale), scale).reshape(group[:, n].shape)
                continue
            codes, scale = quantize_weight(rows)
            weight.copy_(dequantize(codes, scale, weight.dtype))


def quantized(layer: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(the int8 layer, the float layer that computes the same in exact arithmetic)."""
    options = {"include": ["Embedding"]} if isinstance(layer, nn.Embedding) else options
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, "w8a16", **options)
    truth = copy.deepcopy(layer)
    for part in truth.modules():
        rounded(part)
    return model[0], truth


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 5), lambda: torch.randn(3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 5, bias=False), lambda: torch.randn(2, 3, 12)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (2, 3))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), lambda: torch.randn(1, 2, 4, 5, 6)),
    "conv transpose 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 9)),
    "conv transpose 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 5, 4)),
    "conv transpose 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: torch.randn(1, 2, 3, 3, 3)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def made(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    layer, make_input = LAYERS[kind]
    return *quantized(layer()), make_input()


class Attention(nn.Module):
    """One input, for what takes models of one input."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.middle(self.embedding(tokens)))


def tied() -> Tied:
    model = Tied()
    quantize(model, "w8a16", include=["Embedding", "OutputHead"])
    return model


# -- same results ------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_as_the_float_layer(kind: str, dtype: torch.dtype) -> None:
    int8, truth, x = made(kind)
    int8.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    y = int8(x)
    assert y.dtype == dtype
    biases = getattr(int8, "bias", None)
    if isinstance(biases, Tensor):
        truth.bias.data = biases.data.float()  # as rounded by .to(dtype)
    expected = truth.double()(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=2e-6)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """Its scales are numbers of its dtype; biases stay in it."""
    layer, make_input = LAYERS[kind]
    int8, _ = quantized(layer().to(dtype))
    x = make_input()
    assert isinstance(int8, QuantModule)
    assert torch.equal(int8.weight_scale.to(dtype).float(), int8.weight_scale)
    assert int8(x.to(dtype) if x.is_floating_point() else x).dtype == dtype
    assert int8.float_dtype == dtype


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


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding(mode: str, padding: int | str, dims: int) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    for kernel in (3, 4):  # "same" pads an even kernel more on one side
        layer = conv(2, 3, kernel, padding=padding, padding_mode=mode, dilation=1 if mode != "zeros" else 2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*even kernel lengths.*")
            int8, truth = quantized(layer)
            x = torch.randn(2, 2, *[9] * dims)
            torch.testing.assert_close(int8(x), truth(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "conv transpose 1d", "conv transpose 2d"])
def test_one_image_without_a_batch(kind: str) -> None:
    int8, truth, x = made(kind)
    torch.testing.assert_close(int8(x[0]), truth(x[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv transpose 1d", "conv transpose 2d"])
def test_no_images(kind: str) -> None:
    int8, truth, x = made(kind)
    assert int8(x[:0]).shape == truth(x[:0]).shape


@pytest.mark.parametrize("output_size", [(10, 9), (11, 10), (2, 6, 10, 10), None])
def test_output_size_of_a_transposed_convolution(output_size: tuple[int, ...] | None) -> None:
    int8, truth = quantized(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1))
    x = torch.randn(2, 4, 5, 5)
    if output_size == (10, 9):
        size = list(output_size)
        torch.testing.assert_close(int8(x, output_size=size), truth(x, output_size=size), rtol=1e-5, atol=1e-5)
    elif output_size == (11, 10):
        for layer in (int8, truth):
            with pytest.raises(ValueError, match="requested an output size"):
                layer(x, output_size=list(output_size))
    else:
        size = None if output_size is None else list(output_size)
        torch.testing.assert_close(int8(x, output_size=size), truth(x, output_size=size), rtol=1e-5, atol=1e-5)


def test_a_wrong_image_is_refused() -> None:
    int8, _, _ = made("conv2d")
    with pytest.raises(QuantizeError, match=r"input: shape is \[1, 3, 7, 7\], expected \[B, 4, \*D\] or \[4, \*D\]"):
        int8(torch.randn(1, 3, 7, 7))
    with pytest.raises(QuantizeError, match="with 2 dimensions in D"):
        int8(torch.randn(4, 7))


def test_padding_idx_is_kept() -> None:
    int8, truth = quantized(nn.Embedding(11, 6, padding_idx=3))
    assert isinstance(int8, QuantEmbedding)
    assert int8.padding_idx == 3
    assert not int8(torch.tensor([3])).any()
    indices = torch.arange(11)
    assert torch.equal(int8(indices), truth(indices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    for kind in ("linear", "conv2d", "conv transpose 2d"):
        int8, _, x = made(kind)
        outside = int8(x.to(dtype))
        with torch.autocast("cpu", dtype):
            assert torch.equal(int8(x), outside)
    int8, _, x = made("embedding")
    with torch.autocast("cpu", dtype):
        assert int8(x).dtype == torch.float32, "a lookup is not an operation that autocast casts"


# -- attention ---------------------------------------------------------------------------------------------------------

MASKS: dict[str, Callable[[int, int, int, int], dict[str, Any]]] = {
    "no mask": lambda b, h, lq, lk: {},
    "padding": lambda b, h, lq, lk: {"key_padding_mask": torch.arange(lk) >= torch.arange(lk - b + 1, lk + 1)[:, None]},
    "float padding": lambda b, h, lq, lk: {"key_padding_mask": torch.randn(b, lk)},
    "bool": lambda b, h, lq, lk: {"attn_mask": torch.ones(lq, lk, dtype=torch.bool).triu(1)},
    "float": lambda b, h, lq, lk: {"attn_mask": torch.randn(lq, lk)},
    "for each head": lambda b, h, lq, lk: {"attn_mask": torch.randn(b * h, lq, lk)},
    "causal": lambda b, h, lq, lk: {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(lk)[:lq],
        "is_causal": lq == lk,
    },
    "both": lambda b, h, lq, lk: {
        "attn_mask": torch.randn(lq, lk),
        "key_padding_mask": torch.zeros(b, lk).masked_fill(torch.arange(lk) == lk - 1, float("-inf")),
    },
}


def attention(**options: Any) -> tuple[nn.Module, nn.Module]:
    layer = nn.MultiheadAttention(8, 2, **options)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return quantized(layer.eval())


def assert_same_attention(
    int8: nn.Module, truth: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], **options: Any
) -> None:
    for need in (
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
    ):
        ours, our_weights = int8(*inputs, **options, **need)
        theirs, their_weights = truth(*inputs, **options, **need)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (our_weights is None) == (their_weights is None)
        if our_weights is not None:
            torch.testing.assert_close(our_weights, their_weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 6, "vdim": 10},
        {"kdim": 6, "vdim": 10, "add_bias_kv": True, "bias": False},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention(mask: str, options: dict[str, Any], batch_first: bool) -> None:
    int8, truth = attention(batch_first=batch_first, **options)
    b, lq, lk = 3, 4, 5
    query = torch.randn(b, lq, 8)
    key, value = torch.randn(b, lk, options.get("kdim", 8)), torch.randn(b, lk, options.get("vdim", 8))
    inputs = (query, key, value) if batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
    assert_same_attention(int8, truth, inputs, **MASKS[mask](b, 2, lq, lk))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention(mask: str, batch_first: bool) -> None:
    int8, truth = attention(batch_first=batch_first)
    x = torch.randn((3, 5, 8) if batch_first else (5, 3, 8))
    assert_same_attention(int8, truth, (x, x, x), **MASKS[mask](3, 2, 5, 5))
    with torch.no_grad():  # nn.MultiheadAttention takes its fused path here
        assert_same_attention(int8, truth, (x, x, x), **MASKS[mask](3, 2, 5, 5))


@pytest.mark.parametrize("options", [{}, {"attn_mask": torch.randn(4, 5)}, {"attn_mask": torch.randn(2, 4, 5)}])
def test_attention_without_a_batch(options: dict[str, Any]) -> None:
    int8, truth = attention()
    inputs = (torch.randn(4, 8), torch.randn(5, 8), torch.randn(5, 8))
    assert_same_attention(int8, truth, inputs, **options)
    hidden = torch.tensor([False, False, True, False, True])
    assert_same_attention(int8, truth, inputs, key_padding_mask=hidden)


def test_attention_per_group() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=12, vdim=4)
    int8, _ = quantized(layer, group_size=4)
    assert int8.k_proj_weight_scale.shape == (8, 3)
    truth = copy.deepcopy(layer)
    for part in truth.modules():
        for name, weight in part.named_parameters(recurse=False):
            if name.endswith("weight"):
                codes, scale = quantize_weight(weight.detach(), "per_group", group_size=4)
                weight.data = dequantize(codes, scale)
    inputs = (torch.randn(4, 3, 8), torch.randn(5, 3, 12), torch.randn(5, 3, 4))
    assert_same_attention(int8, truth, inputs)


def test_attention_under_autocast() -> None:
    int8, truth = attention(batch_first=True)
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, {"need_weights": False}, {"attn_mask": torch.randn(5, 5), "need_weights": False}):
            ours, theirs = int8(x, x, x, **options)[0], truth(x, x, x, **options)[0]
            assert ours.dtype == theirs.dtype == torch.bfloat16
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_attention_in_16_bits() -> None:
    int8, truth = attention(batch_first=True)
    x = torch.randn(2, 5, 8)
    y = int8.bfloat16()(x.bfloat16(), x.bfloat16(), x.bfloat16())[0]
    torch.testing.assert_close(y, truth(x, x, x)[0].bfloat16(), rtol=0.05, atol=0.05)


def test_scores_that_fp16_holds_once_they_are_scaled() -> None:
    """q and k are 60 everywhere: 64 products of theirs are more than fp16 holds, an eighth of that is not."""
    layer = nn.MultiheadAttention(64, 1, batch_first=True)
    nn.init.zeros_(layer.in_proj_weight)
    nn.init.constant_(layer.in_proj_bias, 60.0)
    model = nn.ModuleList([layer.half()])
    quantize(model, "w8a16")
    x = torch.zeros(1, 4, 64, dtype=torch.float16)
    y, weights = model[0](x, x, x)
    assert bool(y.isfinite().all()) and weights.tolist() == [[[0.25] * 4] * 4]


def test_attention_drops_out_in_training_only() -> None:
    int8, truth = quantized(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True))
    x = torch.randn(2, 50, 8)
    assert int8.training
    assert not torch.equal(int8(x, x, x)[0], int8(x, x, x)[0])
    assert_same_attention(int8.eval(), truth.eval(), (x, x, x))


def test_is_causal_needs_its_mask() -> None:
    int8, _ = attention()
    x = torch.randn(4, 2, 8)
    with pytest.raises(QuantizeError, match="is_causal=True is a hint about attn_mask, which is None"):
        int8(x, x, x, is_causal=True)


ENCODER_PARTS = ["self_attn", "self_attn.out_proj", "linear1", "linear2"]


@pytest.mark.parametrize(
    ("chosen", "nested"), [*((chosen, False) for chosen in range(1, 1 << len(ENCODER_PARTS))), (8, True), (15, True)]
)
def test_transformer_encoder(chosen: int, nested: bool) -> None:
    """torch runs it in one fused kernel on the float weights, where it can: it must not with any of them int8."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    truth = copy.deepcopy(model)
    wanted = [part for bit, part in enumerate(ENCODER_PARTS) if chosen >> bit & 1]
    endings = tuple(f".{part}" for part in wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an out_proj inside of a float attention stays float
        quantize(model, "w8a16", ignore=[lambda name, _: not name.endswith(endings)])
    for name, part in truth.named_modules():
        if isinstance(model.get_submodule(name), QuantModule):
            rounded(part)
    x = torch.randn(3, 5, 8)
    hidden = torch.arange(5) >= torch.tensor([5, 4, 2])[:, None]
    for options in ({}, {"src_key_padding_mask": hidden}, {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}):
        for grad in (torch.no_grad(), torch.enable_grad()):
            with grad, warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*nested tensors.*")
                ours, theirs = model(x, **options), truth(x, **options)
        kept = ~hidden if "src_key_padding_mask" in options else torch.ones(3, 5, dtype=torch.bool)
        torch.testing.assert_close(ours[:, : theirs.shape[1]][kept], theirs[kept], rtol=1e-4, atol=1e-4)


def test_transformer_with_a_decoder() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    truth = copy.deepcopy(model)
    report = quantize(model, "w8a16")
    for part in truth.modules():
        if not isinstance(part, nn.LayerNorm):
            rounded(part)
    assert report.unasked_fraction == 0
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    with torch.no_grad():
        torch.testing.assert_close(
            model(source, target, tgt_mask=causal), truth(source, target, tgt_mask=causal), rtol=1e-4, atol=1e-4
        )


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "embedding"])
def test_gradients_flow_to_the_input_and_the_bias(kind: str) -> None:
    int8, truth, x = made(kind)
    x.requires_grad_()
    ours = torch.autograd.grad(int8(x).square().sum(), [x, *int8.parameters()])
    biases = [bias for name, bias in truth.named_parameters() if name == "bias"]
    theirs = torch.autograd.grad(truth(x).square().sum(), [x, *biases])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "embedding"])
def test_a_directional_derivative_by_reverse_mode(kind: str) -> None:
    """What the error about forward mode points to."""
    int8, truth, x = made(kind)
    ours, theirs = (torch.autograd.functional.jvp(layer, x, torch.ones_like(x))[1] for layer in (int8, truth))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_functorch_derivatives_are_refused() -> None:
    int8, _, x = made("linear")
    int8.requires_grad_(False)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(lambda x: int8(x).sum())(x)


def test_an_adapter_learns_on_a_frozen_int8_base() -> None:
    base = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    quantize(base, "w8a16")
    base.requires_grad_(False)
    before = copy.deepcopy(base.state_dict())
    adapter = nn.Linear(8, 8)
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (base(adapter(x)) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_asking_for_the_gradient_of_a_weight() -> None:
    int8, _, x = made("linear")
    with pytest.raises(RuntimeError, match="floating point"):
        int8.weight.requires_grad_()  # torch's own words
    int8.weight_scale.requires_grad_()
    with pytest.raises(OctavoError, match=r"a gradient of an int8 weight or of its scale was asked for .* frozen"):
        int8(x)


def test_parameters_are_what_can_be_trained() -> None:
    int8, _, _ = made("linear")
    assert [name for name, _ in int8.named_parameters()] == ["bias"]


# -- what models live through ---------------------------------------------------------------------------------------


def through_pickle(model: nn.Module, tmp_path: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module, tmp_path: Path) -> nn.Module:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


def through_deepcopy(model: nn.Module, tmp_path: Path) -> nn.Module:
    return copy.deepcopy(model)


def through_its_state(model: nn.Module, tmp_path: Path) -> nn.Module:
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        value.zero_()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


def through_to_empty(model: nn.Module, tmp_path: Path) -> nn.Module:
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    return empty


JOURNEYS = [through_pickle, through_a_file, through_deepcopy, through_its_state, through_to_empty]
KINDS = [*LAYERS, "attention", "attention bias_kv", "tied"]


def whole(kind: str) -> tuple[nn.Module, Tensor]:
    if kind == "tied":
        return tied(), torch.randint(0, 20, (2, 3))
    if kind.startswith("attention"):
        model = nn.Sequential(Attention(add_bias_kv="bias_kv" in kind))
        quantize(model, "w8a16")
        return model.eval(), torch.randn(2, 3, 8)
    int8, _, x = made(kind)
    return nn.Sequential(int8), x


@pytest.mark.parametrize("journey", JOURNEYS)
@pytest.mark.parametrize("kind", KINDS)
def test_journeys(kind: str, journey: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    model, x = whole(kind)
    arrived = journey(model, tmp_path)
    assert arrived is not model
    assert torch.equal(arrived(x), model(x))
    assert arrived.state_dict().keys() == model.state_dict().keys()
    assert repr(arrived) == repr(model)
    mine = {value.data_ptr() for value in model.state_dict().values() if value.numel()}
    assert not mine & {value.data_ptr() for value in arrived.state_dict().values()}


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_casts_leave_codes_and_scales(kind: str, cast: str) -> None:
    model, x = whole(kind)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if not name.split(".")[-1].endswith("bias")
    }
    model = CASTS[cast](model)
    after = model.state_dict()
    dtype = {"half": torch.float16, "double": torch.float64, "to device and dtype": torch.float16}.get(
        cast, torch.bfloat16
    )
    for name, value in before.items():
        if name.endswith(("weight", "_scale")):
            assert torch.equal(after[name], value), name
            assert after[name].dtype == (torch.float32 if name.endswith("_scale") else torch.int8)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert model(x.to(dtype) if x.is_floating_point() else x).dtype == dtype


def test_there_and_back_is_the_same() -> None:
    model, x = whole("linear without bias")
    expected = model(x)
    assert torch.equal(model.half().double().bfloat16().float()(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_type_is_refused_and_does_no_harm(kind: str) -> None:
    model, x = whole(kind)
    expected = model(x)
    with pytest.raises(QuantizeError, match=r"weight: int8 codes would be cast to torch.float16.*use \.to\(dtype\)"):
        model.type(torch.float16)
    model.float()  # the bias was cast before the codes were reached
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert isinstance(model[0], QuantModule)
    assert (model[0].weight.dtype, model[0].weight_scale.dtype) == (torch.int8, torch.float32)


def test_channels_last() -> None:
    model, x = whole("conv2d")
    expected = model(x)
    moved = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x.to(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-6)


def test_share_memory() -> None:
    model, x = whole("linear")
    expected = model(x)
    model.share_memory()
    assert model[0].weight.is_shared() and model[0].weight_scale.is_shared()
    assert torch.equal(model(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_to_a_gpu_and_back(kind: str) -> None:
    model, x = whole(kind)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.cpu()(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_on_meta_tensors_the_shape_is_told(kind: str) -> None:
    model, x = whole(kind)
    expected = model(x)
    told = model.to("meta")(x.to("meta"))
    assert told.is_meta and (told.shape, told.dtype) == (expected.shape, expected.dtype)


def test_a_state_of_float_weights_is_refused() -> None:
    layer = nn.Linear(12, 5)
    int8, _ = quantized(layer)
    with pytest.raises(QuantizeError, match=r"0\.weight: the state dict holds torch.float32, expected int8 codes"):
        nn.Sequential(int8).load_state_dict(nn.Sequential(layer).state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_scales_in_the_dtype_of_the_model(assign: bool) -> None:
    """As a checkpoint holds them."""
    layer = nn.Linear(12, 5).bfloat16()
    int8, _ = quantized(layer)
    other, _ = quantized(nn.Linear(12, 5).bfloat16())
    state = {name: value.bfloat16() if name == "weight_scale" else value for name, value in int8.state_dict().items()}
    other.load_state_dict(state, assign=assign)
    assert other.weight_scale.dtype == torch.float32
    assert state["weight_scale"].dtype == torch.bfloat16, "the caller's dict was changed"
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert torch.equal(other(x), int8(x))
    other.half()


def test_a_state_without_scales_is_incomplete() -> None:
    int8, _, _ = made("linear")
    state = {name: value for name, value in int8.state_dict().items() if name != "weight_scale"}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        int8.load_state_dict(state)


def test_wrong_codes_are_refused() -> None:
    int8, _, _ = made("linear")
    assert isinstance(int8, QuantLinear)
    codes, scale = int8.codes()["weight"]
    for wrong in ((codes.float(), scale), (codes, scale.half())):
        with pytest.raises(
            QuantizeError, match=r"weight: codes are torch.* the scale is torch.*, expected int8 and fp32"
        ):
            QuantLinear(nn.Linear(12, 5), {"weight": wrong}, int8.scheme, torch.float32)


# -- one table for two layers -----------------------------------------------------------------------------------------


def assert_one_table(model: Tied) -> None:
    assert isinstance(model.embedding, QuantEmbedding)
    assert isinstance(model.lm_head, TiedQuantLinear)
    assert model.lm_head.weight is model.embedding.weight
    assert model.lm_head.weight_scale is model.embedding.weight_scale
    assert [name for name, _ in model.lm_head.named_buffers()] == []


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


# -- compiled and exported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str) -> None:
    model, x = whole(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_compile_once_for_all_lengths() -> None:
    model, _ = whole("linear")
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (2, 3, 17):
        x = torch.randn(length, 12)
        assert torch.equal(compiled(x), model(x))
    assert graphs == 1


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_compile_for_training_of_an_adapter(kind: str) -> None:
    model, x = whole(kind)
    x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (eager,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_compile_under_autocast() -> None:
    model, x = whole("linear")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str, strict: bool) -> None:
    model, x = whole(kind)
    dynamic = {0: torch.export.Dim("batch", min=2)} if kind != "conv3d" and x.shape[0] > 1 else None
    exported = torch.export.export(model, (x,), dynamic_shapes=(dynamic,) if dynamic else None, strict=strict)
    more = torch.cat([x, x]) if dynamic else x
    torch.testing.assert_close(exported.module()(more), model(more), rtol=1e-5, atol=1e-6)
    ops = {str(node.target) for node in exported.graph.nodes if str(node.target).startswith("octavo.")}
    assert ops, "the graph calls octavo's ops"
    tables = [name for name, value in exported.state_dict.items() if value.dtype == torch.int8]
    assert len(tables) == len([value for value in model.state_dict().values() if value.dtype == torch.int8])


def test_an_exported_program_is_saved_and_loaded() -> None:
    model, x = whole("linear")
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, when inductor is imported
def test_compile_to_machine_code() -> None:
    """Inductor asserts the strides that the fake kernels promise."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(2), nn.Linear(144, 16)
    )
    quantize(model, "w8a16")
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


# -- how they show ----------------------------------------------------------------------------------------------------


def test_repr() -> None:
    model, _ = whole("tied")
    assert "(middle): QuantLinear(in_features=8, out_features=8, bias=True, w8a16)" in repr(model)
    assert "(embedding): QuantEmbedding(20, 8, w8a16)" in repr(model)
    conv, _ = whole("conv2d")
    assert "QuantConv(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0)" in repr(conv)
    assert isinstance(conv[0], QuantConv) and not isinstance(conv[0], QuantConvTranspose)
    attention, _ = whole("attention")
    assert isinstance(attention[0].attention, QuantMultiheadAttention)
    assert "embed_dim=8, num_heads=2, w8a16" in repr(attention)
