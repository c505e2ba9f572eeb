"""The int8 layers stand where float layers stood: same results, and they live through what models live through."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from octavo.errors import OctavoError, QuantizeError
from octavo.modules import (
    QuantConv,
    QuantConvTranspose,
    QuantLinear,
    QuantModule,
    QuantMultiheadAttention,
)
from octavo.primitives import choose_scale, dequantize, quantize_weight
from octavo.primitives import quantize as codes_of
from octavo.quantization.quantize import quantize

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


@pytest.mark.parametrize("value", [torch.zeros(5, 12), nn.Parameter(torch.zeros(5, 12)), None])
def test_codes_are_not_replaced_by_what_is_none(value: Any) -> None:
    int8, _ = quantized(nn.Linear(12, 5))
    before = copy.deepcopy(int8.state_dict())
    with pytest.raises(QuantizeError, match=r"QuantLinear\.weight: holds int8 codes.* before quantizing"):
        int8.weight = value
    assert all(torch.equal(tensor, before[name]) for name, tensor in int8.state_dict().items())
    int8.bias = nn.Parameter(torch.ones(5))  # which is a parameter as any other


def test_codes_are_not_replaced_by_those_of_another_scale() -> None:
    """As a model does that ties its head to its embedding anew."""
    (int8, _), (other, _) = quantized(nn.Linear(12, 5)), quantized(nn.Linear(12, 5))
    with pytest.raises(QuantizeError, match=r"QuantLinear\.weight: holds int8 codes.* before quantizing"):
        int8.weight = other.weight
    int8.weight = int8.weight
    for assign in (False, True):
        int8.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(int8.weight, other.weight)


def test_a_fusion_with_a_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    quantize(model, "w8a16")
    with pytest.raises(QuantizeError, match=r"QuantConv\.weight: holds int8 codes.* tie, fuse or assign"):
        fuse_conv_bn_eval(model[0], model[1])


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


@every_layer
def test_a_layer_that_is_made_of_codes_by_hand(kind: str) -> None:
    layer, x = (make() for make in LAYERS[kind])
    int8, _ = quantized(layer)
    assert isinstance(int8, QuantModule)
    assert torch.equal(type(int8)(layer, int8.codes(), int8.scheme, torch.float32)(x), int8(x))


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
