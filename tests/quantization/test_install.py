"""Int8 layers take the places of float ones, with all that hung on those."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import octavo
from octavo import OctavoWarning
from octavo.fused.norms import FusedRMSNorm
from octavo.modules import QuantLinear, QuantModule, QuantMultiheadAttention
from octavo.modules.recurrent import QuantRecurrent
from tests.nearness import relative_error
from tests.tiny_models import build, llama, mlp, older_weight_norm, tokens


def test_one_module_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    octavo.quantize(model, "w8a16")
    assert isinstance(model["a"], QuantLinear) and model["b"]["c"] is model["a"]


def test_hooks_stay_registered() -> None:
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model[0].register_forward_pre_hook(lambda module, args: None)
    octavo.quantize(model, "w8a16")
    model(torch.randn(2, 24))
    assert seen == [QuantLinear]


def test_mode_and_bias_parameters_are_kept() -> None:
    model = mlp().eval()
    bias = model[0].bias
    bias.requires_grad_(False)
    octavo.quantize(model, "w8a16")
    assert model[0].bias is bias and not model[0].training


class HeldTwice(nn.Module):
    """Registered, and called from a plain list, tuple and dict, as MaskFormer's blocks call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), LlamaRMSNorm(8)
        self.in_list, self.in_tuple, self.in_dict = [self.a, nn.ReLU()], (nn.ReLU(), self.b), {"c": self.c}
        self.norms = [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.in_list, *self.in_tuple, *self.norms, self.in_dict["c"]):
            x = layer(x)
        return x


def test_layers_held_in_plain_containers_too_are_swapped_there(tmp_path: Path) -> None:
    model, x = HeldTwice(), torch.randn(4, 8)
    octavo.quantize(model, "w8a16")
    assert isinstance(model.a, QuantLinear) and isinstance(model.norm, FusedRMSNorm)
    assert model.in_list[0] is model.a and model.in_tuple[1] is model.b and model.in_dict["c"] is model.c
    assert model.norms[0] is model.norm
    octavo.save(model, tmp_path / "int8")
    with torch.device("meta"):
        skeleton = HeldTwice()
    assert torch.equal(octavo.load(tmp_path / "int8", model=skeleton)(x), model(x))


class Pair(NamedTuple):
    first: Any
    second: Any


class Table:
    """A plain object; what it holds is found, but not what its own objects hold."""

    def __init__(self, *layers: Any) -> None:
        self.layers = layers


def deep(layer: nn.Module) -> Any:
    return {"a": [(), (1, [{"b": (0, layer)}])]}


def cyclic(layer: nn.Module) -> Any:
    held: list[Any] = [layer]
    held.append({"self": (held, layer)})
    return held


def unregistered(layer: nn.Module) -> Any:
    return [nn.Sequential(layer)]


PLACES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], list[Any]]]] = {
    "deep": (deep, lambda held: [held["a"][1][1][0]["b"][1]]),
    "cyclic": (cyclic, lambda held: [held[0], held[1]["self"][1], held[1]["self"][0][0]]),
    "twice": (lambda layer: ((layer, [layer]), layer), lambda held: [held[0][0], held[0][1][0], held[1]]),
    "named tuple": (lambda layer: [Pair(1, layer)], lambda held: [held[0].second]),
    "ordered": (lambda layer: OrderedDict(a=[layer]), lambda held: [held["a"][0]]),
    "object": (lambda layer: [Table(layer, [layer])], lambda held: [held[0].layers[0], held[0].layers[1][0]]),
    "method": (lambda layer: [layer.forward], lambda held: [held[0].__self__]),
    "unregistered": (unregistered, lambda held: [held[0][0]]),
}


@pytest.mark.parametrize("how", PLACES)
def test_a_layer_is_swapped_wherever_a_module_holds_it(how: str) -> None:
    hold, layers = PLACES[how]
    model = nn.ModuleDict({"layer": nn.Linear(8, 8), "user": nn.Identity()})
    model["user"].held = hold(model["layer"])
    model["layer"].own = [model["layer"].forward]
    octavo.quantize(model, "w8a16")
    assert isinstance(model["layer"], QuantLinear)
    assert all(each is model["layer"] for each in layers(model["user"].held))
    assert model["layer"].own[0].__self__ is model["layer"]
    assert isinstance(model["user"].held, type(hold(nn.ReLU())))


class Gained(nn.Linear):
    """Computes what a linear layer does, and holds what others ask it for."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.gain = 2.0
        self.register_buffer("kept", torch.full((8,), 3.0))
        self.register_buffer("passing", torch.full((8,), 4.0), persistent=False)


def test_what_a_subclass_holds_besides_is_carried_over() -> None:
    model = nn.Sequential(Gained())
    octavo.quantize(model, "w8a16")
    layer = model[0]
    assert isinstance(layer, QuantLinear) and layer.gain == 2.0
    assert torch.equal(layer.kept, torch.full((8,), 3.0)) and torch.equal(layer.passing, torch.full((8,), 4.0))
    assert {"0.kept"} <= model.state_dict().keys() and "0.passing" not in model.state_dict()


def test_what_was_put_on_a_plain_layer_is_carried_over() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    layer = model[0]
    layer._private, layer.inner, layer.pos_bias = {"a": 1}, nn.ReLU(), nn.Parameter(torch.ones(2))
    held = layer._private, layer.inner, layer.pos_bias
    octavo.quantize(model, "w8a16")
    assert isinstance(model[0], QuantLinear)
    assert all(a is b for a, b in zip((model[0]._private, model[0].inner, model[0].pos_bias), held, strict=True))
    assert dict(model.named_parameters()).keys() == {"0.bias", "0.pos_bias"}


class Last(nn.GRU):
    def last(self, x: Tensor) -> Tensor:
        y: Tensor = self(x)[0][:, -1]
        return y


@pytest.mark.parametrize("cls", [nn.GRU, Last])
def test_no_float_weight_of_a_recurrent_layer_stays_in_memory(cls: type[nn.GRU]) -> None:
    """torch's class keeps a list of them besides."""
    model = nn.Sequential(cls(8, 8))
    weights = [weakref.ref(weight) for name, weight in model[0].named_parameters() if "weight" in name]
    octavo.quantize(model, "w8a16", include=["0"])
    gc.collect()
    assert isinstance(model[0], QuantRecurrent) and [weight() for weight in weights] == [None, None]
    assert model[0].bias is True  # as torch's class has it


class TestAttention:
    def test_all_of_it_or_none_of_it(self) -> None:
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
        octavo.quantize(model, "w8a16", ignore=["b"])
        assert isinstance(model["a"], QuantMultiheadAttention) and isinstance(model["a"].out_proj, QuantLinear)
        assert type(model["b"]) is nn.MultiheadAttention and not isinstance(model["b"].out_proj, QuantLinear)

    @pytest.mark.parametrize(
        "ignore", [[], ["re:.*self_attn"], ["re:.*linear1"], ["MultiheadAttention", "re:.*linear2"]]
    )
    def test_the_fused_encoder_path_is_off_where_a_layer_is_int8(self, ignore: list[str]) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        x, padding = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
        with torch.no_grad():
            expected = model(x, src_key_padding_mask=padding)
            octavo.quantize(model, "w8a16", ignore=ignore)
            actual = model(x, src_key_padding_mask=padding)
        assert 0 < relative_error(actual[~padding], expected[~padding]) < 0.03


def norms(model: nn.Module) -> dict[str, str]:
    """Name of each RMS norm of a tiny Llama -> its class."""
    return {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("norm")}


class TestNorms:
    """Those that octavo.fused recognizes are swapped for modules that compute the same."""

    @pytest.mark.parametrize("options", [{}, {"fake": True}], ids=str)
    @pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_not_a_bit_changes_by_torch_s_ops(self, dtype: torch.dtype, scheme: str, options: dict[str, bool]) -> None:
        """They compute a norm where a gradient may be wanted; elsewhere kernels do, whose sums have another order."""
        model, plain, ids = build(llama, dtype), build(llama, dtype), tokens()
        octavo.quantize(model, scheme, **options)
        octavo.quantize(plain, scheme, ignore=["re:.*norm"], **options)
        assert len(norms(model)) == 5 and set(norms(model).values()) == {"FusedRMSNorm"}
        assert set(norms(plain).values()) == {"LlamaRMSNorm"}
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert model.state_dict().keys() == plain.state_dict().keys()

    @pytest.mark.parametrize(
        "pattern",
        [
            "model.layers.1",
            "re:model\\.layers\\.1\\.",
            lambda name, module: "layers.1" in name and "Norm" in type(module).__name__,
        ],
        ids=["container", "expression", "predicate"],
    )
    def test_what_is_ignored_stays(self, pattern: Any) -> None:
        model = build(llama)
        octavo.quantize(model, "w8a16", ignore=[pattern])
        assert norms(model) == {
            "model.layers.0.input_layernorm": "FusedRMSNorm",
            "model.layers.0.post_attention_layernorm": "FusedRMSNorm",
            "model.layers.1.input_layernorm": "LlamaRMSNorm",
            "model.layers.1.post_attention_layernorm": "LlamaRMSNorm",
            "model.norm": "FusedRMSNorm",
        }

    def test_a_kind_is_no_name_of_a_norm(self) -> None:
        model = build(llama)
        octavo.quantize(model, "w8a16", ignore=["Linear"])
        assert set(norms(model).values()) == {"FusedRMSNorm"}

    def test_a_norm_in_two_places_stays_one(self) -> None:
        model = build(llama)
        model.model.layers[1].input_layernorm = norm = model.model.layers[0].input_layernorm
        optimizer = torch.optim.SGD([norm.weight], lr=1.0)
        octavo.quantize(model, "w8a16")
        first, second = (layer.input_layernorm for layer in model.model.layers)
        assert isinstance(first, FusedRMSNorm) and first is second
        assert first.weight is optimizer.param_groups[0]["params"][0]

    def test_the_report_has_their_rows(self) -> None:
        model = build(llama)
        report = octavo.quantize(model, "w8a16")
        rows = {row.name: row for row in report.rows if row.kind == "FusedRMSNorm"}
        assert rows.keys() == {f"{name}.weight" for name in norms(model)}
        assert {(row.scheme, row.reason, row.asked) for row in rows.values()} == {
            (None, "1-D: biases and norms stay float", True)
        }

    def test_a_lone_norm_is_no_model_to_change(self) -> None:
        norm = build(llama).model.norm
        with pytest.warns(OctavoWarning, match="nothing of the model became int8"):
            octavo.quantize(norm, "w8a16")
        assert type(norm).__name__ == "LlamaRMSNorm"


def normed(norm: Callable[..., nn.Module]) -> nn.Sequential:
    """Convolutions under weight_norm, whose weights are not as long as when they were drawn, nor, under the older one,
    as when they were computed."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose1d(8, 6, 4, stride=2), dim=1))
    for name, parameter in model.named_parameters():
        if name.endswith(("original0", "weight_g")):
            parameter.data *= 1.5 + torch.rand(parameter.shape)
    return model.eval()


WEIGHT_NORMS = pytest.mark.parametrize("norm", [weight_norm, older_weight_norm])


@WEIGHT_NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_under_weight_norm_is_quantized_as_the_weight_that_is_computed(
    norm: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    model, plain, x = normed(norm).to(dtype), normed(norm).to(dtype), torch.randn(2, 4, 9, dtype=dtype)
    for layer in (plain[0], plain[2]):
        remove_parametrizations(layer, "weight") if norm is weight_norm else nn.utils.remove_weight_norm(layer)
    report = octavo.quantize(model, "w8a16")
    octavo.quantize(plain, "w8a16")
    assert torch.equal(model(x), plain(x))
    assert {row.name for row in report.rows if row.scheme} == {"0.weight", "2.weight"}
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "2.bias"}
    assert torch.equal(copy.deepcopy(model)(x), plain(x))


@WEIGHT_NORMS
def test_one_that_is_ignored_stays_under_weight_norm(norm: Callable[..., nn.Module]) -> None:
    model, x = normed(norm), torch.randn(2, 4, 9)
    before, report = model[0](x), octavo.quantize(model, "w8a16", ignore=["0"])
    assert torch.equal(model[0](x), before) and isinstance(model[2], QuantModule)
    rows = [row for row in report.rows if row.name.startswith(("0.parametrizations", "0.weight_"))]
    assert {row.reason for row in rows} == {"ignored by '0'"} and len(rows) == 2


def test_progress_counts_to_the_end() -> None:
    steps: list[tuple[int, int]] = []
    octavo.quantize(mlp(), "w8a16", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
