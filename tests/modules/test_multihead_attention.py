"""nn.MultiheadAttention with int8 projections: masks, options and weights as torch has them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.errors import QuantizeError
from octavo.modules import (
    QuantModule,
)
from octavo.primitives import dequantize, quantize_weight
from octavo.quantization.quantize import quantize
from tests.modules.test_modules import quantized, rounded

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


@pytest.mark.parametrize(
    ("given", "products"),
    [("xxx", 1), ("xxy", 2), ("xyy", 2), ("xyx", 3), ("xyz", 3)],
)
@pytest.mark.parametrize("layout", ["batch first", "batch second", "no batch"])
def test_what_is_one_tensor_is_multiplied_once(
    given: str, products: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8, truth = attention(batch_first=layout == "batch first")
    x, y, z = torch.randn(3, *((5, 8) if layout == "no batch" else (3, 5, 8)))
    inputs = tuple({"x": x, "y": y, "z": z}[name] for name in given)
    inner, rows = type(int8)._linear, []

    def counted(self: Any, x: Tensor, weight: Tensor, *rest: Any) -> Any:
        rows.append(len(weight))
        return inner(self, x, weight, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(int8), "_linear", counted)
        int8(*inputs)
    assert len(rows) == products and sum(rows) == 24
    assert_same_attention(int8, truth, inputs)  # type: ignore[arg-type]


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


def _per_token(x: Tensor) -> Tensor:
    """What x is as int8, by scales of its rows, in float64."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return (x.double() / scale).round() * scale


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10, "add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("itself", [False, True])
def test_attention_with_int8_inputs(mask: str, options: dict[str, Any], itself: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    (row, *_) = [row for row in quantize(model, "w8a8", ignore=["re:.*out_proj"]).rows if row.scheme]
    assert row.scheme == "w8a8"
    int8 = model["layer"]
    for name, (codes, scale) in int8.codes().items():  # type: ignore[operator]
        layer.get_parameter(name).data = dequantize(codes, scale)
    layer.double()
    query, key = torch.randn(3, 5, 8), torch.randn(3, 5, options.get("kdim", 8))
    value = torch.randn(3, 5, options.get("vdim", 8))
    if itself and not options.get("kdim"):
        query = key = value
    given = MASKS[mask](3, 2, 5, 5)
    if "add_bias_kv" in options:
        given.pop("is_causal", None)  # by this hint torch hides the bias, which the mask does not
    exact = {name: m.double() if isinstance(m, Tensor) and m.is_floating_point() else m for name, m in given.items()}
    for need in (False, True):
        ours, weights = int8(query, key, value, **given, need_weights=need)
        theirs, their_weights = layer(*map(_per_token, (query, key, value)), **exact, need_weights=need)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
        if need:
            torch.testing.assert_close(weights.double(), their_weights, rtol=1e-5, atol=1e-5)


def test_int8_inputs_pass_gradients_on() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    truth = copy.deepcopy(model)
    quantize(model, "w8a8")
    x, same = (torch.linspace(-1, 1, 96).view(4, 3, 8).requires_grad_() for _ in range(2))
    model[0](x, x, x)[0].square().sum().backward()
    truth[0](same, same, same)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=0.1, atol=0.02)


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
    for need in (True, False):
        assert not torch.equal(int8(x, x, x, need_weights=need)[0], int8(x, x, x, need_weights=need)[0])
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
