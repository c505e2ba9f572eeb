"""Mixtures of experts in int8: every class that the installed transformers has, gpt-fast's, and the user's own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pickle
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo import experts, layers
from octavo.errors import OctavoWarning, QuantizeError
from octavo.experts import routers, spec_of
from octavo.modules import QuantExperts, QuantLinear
from octavo.primitives import dequantize
from octavo.recipe import Scheme, WeightArgs
from tests.nearness import relative_error

E, H, I = 5, 32, 24  # noqa: E741 -- the sizes' names

OUTSIDE = {"Llama4TextExperts": "llama4", "Step3p7Experts": "step3p7"}
"""Classes of transformers that octavo knows although they are not under its interface."""


def _model_files() -> list[str]:
    """The models of the installed transformers whose experts are under its interface, as names of its packages."""
    found = importlib.util.find_spec("transformers")  # does not import it
    if found is None or found.origin is None:
        return []
    files = sorted(Path(found.origin).parent.glob("models/*/modeling_*.py"))
    return [
        f"transformers.models.{file.parent.name}.{file.stem}"
        for file in files
        if "@use_experts_implementation" in file.read_text(encoding="utf-8")
    ]


def under_interface(module: str) -> list[type[nn.Module]]:
    """The classes of a file that the decorator made: their `forward` is its dispatcher."""
    return [
        cls
        for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass)
        if cls.__module__ == module
        and issubclass(cls, nn.Module)
        and cls.forward.__globals__["__name__"] == "transformers.integrations.moe"
    ]


def config(**changes: Any) -> types.SimpleNamespace:
    """Whatever the classes ask of a configuration. A class that asks for more fails, and tells."""
    same = {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), H),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), I),
        **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
        **dict.fromkeys(("rms_norm_eps", "post_norm_eps"), 1e-6),
    }
    more = {"mlp_hidden_act": "relu2", "moe_latent_size": None}
    more |= {"expert_ffn_hidden_size": I, "zero_expert_num": 2}
    more |= {"swiglu_alpha": 1.7, "swiglu_limit": 0.7, "mlp_gate_softcap": 0.9, "mlp_up_softcap": 0.8}
    return types.SimpleNamespace(**{**same, **more, "_experts_implementation": "eager", **changes})


def build(cls: Callable[..., nn.Module], settings: types.SimpleNamespace) -> nn.Module:
    """With random weights such that the gate is neither idle nor saturated, and some clamps bite."""
    torch.manual_seed(0)
    layer = cls(settings).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 1))
    return layer


def int8(layer: nn.Module, scheme: str = "w8a16") -> QuantExperts:
    holder = nn.Sequential(copy.deepcopy(layer))
    octavo.quantize(holder, scheme)
    assert isinstance(holder[0], QuantExperts)
    return holder[0]


def dequantized(layer: nn.Module, codes: QuantExperts) -> nn.Module:
    """The float layer with the weights that the codes stand for."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for name, (code, scale) in codes.codes().items():
            weight = torch.stack([dequantize(c, s) for c, s in zip(code, scale, strict=True)])
            layer.get_parameter(name).copy_(codes.spec.held(name, weight))
    return layer


def routing(tokens: int, top_k: int, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], experts [T, A], each once for a token and never the last where it can be helped, weights [T, A]."""
    among = min(experts, max(top_k, experts - 1))
    index = torch.rand(tokens, among).argsort(-1)[:, :top_k]
    return torch.randn(tokens, H), index, torch.rand(tokens, top_k)


# -- every class -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", _model_files())
def test_every_class_under_the_interface_of_transformers(module: str) -> None:
    """A new release shows here at once: a class that is not covered, or computes what we do not, fails by its name."""
    classes = under_interface(module)
    assert classes, f"{module} names the decorator and has no class of it"
    for cls in classes:
        layer = build(cls, config())
        assert spec_of(layer) is not None, cls.__name__
        check(layer, cls.__name__)


@pytest.mark.parametrize("name", OUTSIDE)
def test_known_classes_outside_the_interface(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{OUTSIDE[name]}.modeling_{OUTSIDE[name]}")
    layer = build(getattr(module, name), config())
    if name == "Llama4TextExperts":
        check_sorted(layer)
    else:
        check(layer, name)


@torch.no_grad()
def check(layer: nn.Module, name: str) -> None:
    weights, activations = int8(layer, "w8a16"), int8(layer, "w8a8")
    truth = dequantized(layer, weights)
    for tokens, top_k in ((0, 2), (1, 1), (7, 2), (3, E)):
        inputs = routing(tokens, top_k)
        y, expected = weights(*inputs), truth(*inputs)
        assert y.shape == expected.shape and y.dtype == expected.dtype, name
        assert y.isfinite().all(), name
        assert relative_error(y, expected) < 1e-5, (name, tokens, top_k, relative_error(y, expected))
        assert relative_error(activations(*inputs), layer(*inputs)) < 0.03, (name, tokens, top_k)


@torch.no_grad()
def check_sorted(layer: nn.Module) -> None:
    weights, activations = int8(layer, "w8a16"), int8(layer, "w8a8")
    for per_expert in (1, 4):
        x = torch.randn(E * per_expert, H)
        assert relative_error(weights(x), dequantized(layer, weights)(x)) < 1e-5
        assert relative_error(activations(x), layer(x)) < 0.03
    assert weights(torch.randn(0, H)).shape == (0, H)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_experts_that_return_what_they_are_given(scheme: str) -> None:
    """LongCat's "zero experts": indices behind those of the experts with weights."""
    module = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    layer = build(module.LongcatFlashExperts, config())
    model = int8(layer, scheme)
    truth = dequantized(layer, model) if scheme == "w8a16" else layer
    x, index, weights = routing(9, 2)
    index[:3, 0], index[2:5, 1] = E, E + 1
    assert relative_error(model(x, index, weights), truth(x, index, weights)) < (1e-5 if scheme == "w8a16" else 0.03)
    index[:] = E
    torch.testing.assert_close(model(x, index, weights), x * weights.sum(1, True))


@torch.no_grad()
def test_a_linear_layer_for_each_expert() -> None:
    """JetMoe's, which is given how many rows each has."""
    module = pytest.importorskip("transformers.models.jetmoe.modeling_jetmoe")
    layer = build(lambda _: module.JetMoeParallelExperts(E, H, I), config())
    weights, activations = int8(layer, "w8a16"), int8(layer, "w8a8")
    truth = dequantized(layer, weights)
    for sizes in ([3, 0, 1, 0, 4], [0, 0, 0, 0, 1], [0] * E, [2] * E):
        x = torch.randn(sum(sizes), H)
        y = weights(x, sizes)
        assert y.shape == (len(x), I)
        assert relative_error(y, truth(x, sizes)) < 1e-5
        assert torch.equal(weights(x, expert_size=torch.tensor(sizes)), y)
        assert relative_error(activations(x, sizes), layer(x, sizes)) < 0.03
    for wrong in ([2] * (E - 1), [3] * E):
        with pytest.raises(QuantizeError, match="JetMoeParallelExperts was called with 10 rows, and "):
            weights(torch.randn(10, H), wrong)


@torch.no_grad()
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_weights_of_two_dimensions_that_a_child_holds(act: str) -> None:
    """DBRX's, which takes sequences only, and multiplies by its last weight turned around."""
    module = pytest.importorskip("transformers.models.dbrx.modeling_dbrx")
    layer = build(module.DbrxExperts, config(ffn_hidden_size=I, ffn_act_fn={"name": act}))
    weights, activations = int8(layer), int8(layer, "w8a8")
    assert {name: list(codes.shape) for name, (codes, _) in weights.codes().items()} == {
        "mlp.w1": [E, I, H], "mlp.v1": [E, I, H], "mlp.w2": [E, H, I],
    }  # fmt: skip
    truth = dequantized(layer, weights).double()
    for tokens, top_k in ((1, 1), (8, 2), (3, E)):
        x, index, share = routing(tokens, top_k)
        by_one = x.view(1, tokens, H)
        y = weights(by_one, index, share)
        assert y.shape == by_one.shape
        assert relative_error(y, truth(by_one.double(), index, share.double())) < 1e-5
        assert relative_error(activations(by_one, index, share), layer(by_one, index, share)) < 0.03
        compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(by_one, index, share), y)
        for other in (pickle.loads(pickle.dumps(weights)), copy.deepcopy(weights)):
            assert torch.equal(other(by_one, index, share), y)
        torch._dynamo.reset()
    names = {name for param in layer.state_dict() for name in (param, f"{param}_scale")}
    assert weights.state_dict().keys() == names
    half = copy.deepcopy(weights).half()
    assert all(codes.dtype == torch.int8 and scale.dtype == torch.float32 for codes, scale in half.codes().values())
    half.load_state_dict(weights.state_dict())
    assert torch.equal(half.codes_and_scale("mlp.w2")[1], weights.codes_and_scale("mlp.w2")[1])


# -- gpt-fast's class and the user's own ------------------------------------------------------------------------------


class ConditionalFeedForward(nn.Module):
    """gpt-fast's, from its published formula (mixtral-moe/model.py)."""

    def __init__(self, config: types.SimpleNamespace) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(E, config.intermediate_size, config.hidden_size))
        self.w2 = nn.Parameter(torch.empty(E, config.hidden_size, config.intermediate_size))
        self.w3 = nn.Parameter(torch.empty(E, config.intermediate_size, config.hidden_size))

    def forward(self, x: Tensor, expert_indices: Tensor) -> Tensor:
        x1 = F.silu(torch.einsum("ti,taoi -> tao", x, self.w1[expert_indices]))
        x3 = torch.einsum("ti, taoi -> tao", x, self.w3[expert_indices])
        return torch.einsum("tao, taio -> tai", x1 * x3, self.w2[expert_indices])


@torch.no_grad()
def test_gpt_fast_conditional_feed_forward() -> None:
    layer = build(ConditionalFeedForward, config())
    weights, activations = int8(layer), int8(layer, "w8a8")
    for tokens, top_k in ((0, 2), (1, 2), (6, 1), (3, E)):
        x, index, _ = routing(tokens, top_k)
        y = weights(x, index)
        assert y.shape == (tokens, top_k, H)
        assert relative_error(y, dequantized(layer, weights)(x, index)) < 1e-5
        assert relative_error(activations(x, expert_indices=index), layer(x, index)) < 0.03


class Relu(nn.Module):
    """A user's: transposed weights, biases, a setting and a buffer that its gate asks for, no gate projection."""

    inner: nn.Parameter
    outer: nn.Parameter
    floor: Tensor

    def __init__(self, config: types.SimpleNamespace) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(E, config.hidden_size, config.intermediate_size))
        self.inner_bias = nn.Parameter(torch.empty(E, config.intermediate_size))
        self.outer = nn.Parameter(torch.empty(E, config.intermediate_size, config.hidden_size))
        self.power = 2
        self.register_buffer("floor", torch.tensor(0.1), persistent=False)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for t in range(len(x)):
            for e, weight in zip(index[t].tolist(), weights[t], strict=True):
                h = (x[t] @ self.inner[e] + self.inner_bias[e]).maximum(self.floor) ** self.power
                y[t] += weight * (h @ self.outer[e])
        return y


class Child(Relu):
    """Adds nothing to `forward`: what is known of Relu holds."""


class Stranger(Relu):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return -super().forward(x, index, weights)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_REGISTERED", {})


register_relu = functools.partial(
    octavo.register_experts,
    up="inner",
    down="outer",
    up_bias="inner_bias",
    transposed=True,
    gate=lambda layer, h: h.maximum(layer.floor) ** layer.power,
)


@torch.no_grad()
@pytest.mark.usefixtures("registry")
def test_a_class_of_the_users_own() -> None:
    assert spec_of(build(Relu, config())) is None
    register_relu(Relu)
    check(build(Relu, config()), "Relu")
    check(build(Child, config()), "Child")
    assert spec_of(build(Stranger, config())) is None, "its forward is another"


class Methodical(Relu):
    """Its gate is a method, which uses what its class has: a constant, a property, another method."""

    limit = 0.7

    @property
    def base(self) -> float:
        return self.limit / 2

    @staticmethod
    def square(h: Tensor) -> Tensor:
        return h * h

    def gate(self, h: Tensor) -> Tensor:
        return self.square(h.clamp(self.base, self.limit))

    def spoiled(self, h: Tensor) -> Tensor:
        return h * self.outer.mean()

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        h = self.gate(torch.einsum("th,tahi->tai", x, self.inner[index]) + self.inner_bias[index])
        return torch.einsum("tai,taih,ta->th", h, self.outer[index], weights)


@torch.no_grad()
@pytest.mark.usefixtures("registry")
def test_a_gate_that_is_a_method_of_the_class() -> None:
    register_relu(Methodical, gate=lambda layer, h: layer.gate(h))
    layer = build(Methodical, config())
    check(layer, "Methodical")
    model, inputs = int8(layer), routing(4, 2)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs), model(*inputs))
    assert torch.equal(pickle.loads(pickle.dumps(model))(*inputs), model(*inputs))
    assert torch.equal(copy.deepcopy(model)(*inputs), model(*inputs))
    with pytest.raises(AttributeError, match="has no attribute 'squared'"):
        model.squared(inputs[0])
    register_relu(Methodical, gate=lambda layer, h: layer.spoiled(h))
    with pytest.raises(AttributeError, match="has no attribute 'spoiled'"):
        int8(layer)(*inputs)


@torch.no_grad()
@pytest.mark.usefixtures("registry")
def test_a_setting_of_a_layer_goes_before_that_of_its_class() -> None:
    register_relu(Methodical, gate=lambda layer, h: layer.gate(h))
    layer = build(Methodical, config())
    layer.limit = 0.3  # type: ignore[assignment]
    check(layer, "Methodical")


@pytest.mark.usefixtures("registry")
def test_files_hold_what_they_held_and_scales() -> None:
    register_relu(Relu)
    layer = build(Relu, config())
    model = int8(layer)
    assert torch.equal(model.floor, layer.floor) and "floor" not in layer.state_dict()
    assert model.state_dict().keys() == {*layer.state_dict(), "inner_scale", "outer_scale"}


@torch.no_grad()
@pytest.mark.usefixtures("registry")
def test_a_registered_class_is_pickled_and_asks_to_be_registered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gate here is a lambda, which no pickle holds."""
    register_relu(Relu)
    model, inputs = int8(build(Relu, config())), routing(4, 2)
    stored = pickle.dumps(model)
    assert torch.equal(pickle.loads(stored)(*inputs), model(*inputs))
    assert torch.equal(copy.deepcopy(model)(*inputs), model(*inputs))
    monkeypatch.setattr(experts, "_REGISTERED", {})
    with pytest.raises(QuantizeError, match=r"Relu is not registered here, .* call octavo.register_experts for it"):
        pickle.loads(stored)


@torch.no_grad()
@pytest.mark.usefixtures("registry")
def test_the_documented_example() -> None:
    """The docstring of `register_experts`, for a class of another name."""

    class Mine(ConditionalFeedForward):
        def forward(self, x: Tensor, expert_indices: Tensor) -> Tensor:
            return super().forward(x, expert_indices)

    text = inspect.getdoc(octavo.register_experts)
    assert text
    example = inspect.cleandoc(text[text.index("register_experts(\n") :])
    exec(example, {"register_experts": octavo.register_experts, "ConditionalFeedForward": Mine, "F": F})
    layer = build(Mine, config())
    x, index, _ = routing(4, 2)
    assert relative_error(int8(layer)(x, index), layer(x, index)) < 0.02


@pytest.mark.usefixtures("registry")
def test_wrong_registrations_are_errors() -> None:
    with pytest.raises(QuantizeError, match="cls is 'Relu', expected a class"):
        register_relu("Relu")
    with pytest.raises(QuantizeError, match="routing is 'weigthed', expected one of 'weighted', 'each', 'sorted'"):
        register_relu(Relu, routing="weigthed")
    with pytest.raises(QuantizeError, match="gate is 'silu', expected a function"):
        register_relu(Relu, gate="silu")


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"up": "inward"}, "was registered with 'inward', which is no 3-D parameter of it"),
        ({"up": "inner_bias"}, "was registered with 'inner_bias', which is no 3-D parameter of it"),
        ({"down_bias": "outer_bias"}, "is said to have 'outer_bias', and has none"),
    ],
)
def test_a_registration_that_does_not_fit_is_told(wrong: dict[str, str], reason: str) -> None:
    register_relu(Relu, **wrong)
    model = nn.Sequential(build(Relu, config()))
    with pytest.warns(OctavoWarning, match="stay float although"):
        report = octavo.quantize(model, "w8a16")
    assert any(row.reason and reason in row.reason and not row.asked for row in report.rows)
    assert isinstance(model[0], Relu)


@pytest.mark.usefixtures("registry")
def test_arguments_in_another_order_are_an_error() -> None:
    register_relu(Relu)
    x, index, weights = routing(3, 2)
    with pytest.raises(QuantizeError, match=r"second argument of Relu is torch.float32, expected the indices"):
        int8(build(Relu, config()))(x, weights, index)


@torch.no_grad()
@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_tokens_of_several_sizes_and_one_expert_a_token(scheme: str) -> None:
    register_relu(Relu)
    model = int8(build(Relu, config()), scheme)
    x, index, weights = routing(6, 2)
    y, first = model(x, index, weights), model(x, index[:, :1], weights[:, :1])
    by_two, pairs = x.view(2, 3, H), (index.view(2, 3, 2), weights.view(2, 3, 2))
    assert torch.equal(model(by_two, *pairs), y.view(2, 3, H))
    assert torch.equal(model(by_two, index, weights), y.view(2, 3, H))
    assert torch.equal(model(x, index[:, 0], weights[:, 0]), first)
    assert torch.equal(model(by_two, pairs[0][..., 0], pairs[1][..., 0]), first.view(2, 3, H))
    assert torch.equal(model(x, index[:, :0], weights[:, :0]), torch.zeros(6, H))
    model.spec = dataclasses.replace(model.spec, routing="each")
    assert torch.equal(model(by_two, pairs[0]), model(x, index).view(2, 3, 2, H))
    assert torch.equal(model(by_two, pairs[0][..., 0]), model(x, index[:, :1]).view(2, 3, H))


@torch.no_grad()
@pytest.mark.usefixtures("registry")
def test_tokens_that_were_dropped_belong_to_no_expert() -> None:
    """Classes that go through the experts one by one mark them by -1, and give zeros."""
    register_relu(Relu)
    x, index, weights = routing(6, 2)
    index[0], index[1, 1] = -1, -1
    here = index >= 0
    for scheme in ("w8a16", "w8a8"):
        model = int8(build(Relu, config()), scheme)
        y = model(x, index, weights)
        assert not y[0].any()
        torch.testing.assert_close(y, model(x, index.clamp(min=0), weights * here))


@pytest.mark.usefixtures("registry")
def test_a_routing_that_is_none_is_an_error() -> None:
    register_relu(Relu)
    model = int8(build(Relu, config()))
    x, index, weights = routing(6, 2)
    fits = r"expected \[6, A\], for its routing is 'weighted'"
    with pytest.raises(QuantizeError, match=r"Relu was called with a routing of \[6, 2\], \[6, 1\] .*" + fits):
        model(x, index, weights[:, :1])
    with pytest.raises(QuantizeError, match=r"a routing of \[3, 2\], \[3, 2\] for x \[6, 32\], " + fits):
        model(x, index[:3], weights[:3])
    with pytest.raises(QuantizeError, match="Relu was called with 2 arguments, expected 3"):
        model(x, index)
    with pytest.raises(QuantizeError, match=r"second argument of Relu is torch.bool, expected the indices"):
        model(x, index > 2, weights)
    model.spec = dataclasses.replace(model.spec, routing="sorted")
    with pytest.raises(QuantizeError, match="Relu was called with 6 rows, expected as many for each of its 5 experts"):
        model(x)


# -- left alone, and said so ------------------------------------------------------------------------------------------


class Bank(nn.Module):
    """A 3-D parameter that is no expert."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(4, 16, 16))
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.einsum("bk,enk->bn", x, self.filters))


def test_a_3d_parameter_that_is_no_expert_is_left_alone_and_listed() -> None:
    model = Bank()
    before = model.filters.clone()
    with pytest.warns(OctavoWarning, match="3-D parameter of Bank"):
        report = octavo.quantize(model, "w8a16")
    row = next(row for row in report.rows if row.name == "filters")
    assert row.scheme is None and not row.asked
    assert row.reason == "3-D parameter of Bank, which is not a layer kind that octavo knows"
    assert torch.equal(model.filters, before) and isinstance(model.linear, QuantLinear)


NOT_COVERED = {
    "inkling": ("InklingSharedExperts", lambda module: module.InklingSharedExperts(config(n_shared_experts=2))),
}
"""Experts of other structures: all experts at once."""


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_is_said_aloud(name: str) -> None:
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    cls, make = NOT_COVERED[name]
    with pytest.warns(OctavoWarning, match=cls):
        report = octavo.quantize(nn.Sequential(make(module)), "w8a16")
    assert report.quantized_fraction == 0
    assert all(row.reason and cls in row.reason and not row.asked for row in report.rows)


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")

    class Doubled(mixtral.MixtralExperts):  # type: ignore[misc, name-defined]
        def forward(self, *inputs: Tensor) -> Any:
            return 2 * super().forward(*inputs)

    with pytest.warns(OctavoWarning, match="3-D parameter of Doubled"):
        octavo.quantize(nn.Sequential(build(Doubled, config())), "w8a16")


def test_what_cannot_be_swapped_has_its_reason(tmp_path: Path) -> None:
    layer = mixtral_experts()
    kind = layers.kind_of(layer)
    assert kind is not None and layers.why_not(layer, kind) is None
    layer.forward = layer.forward
    assert "replaced on the instance" in str(layers.why_not(layer, kind))
    layer = mixtral_experts()
    layer.down_proj = nn.Parameter(layer.down_proj[:3])
    assert "different numbers of experts ({'gate_up_proj': 5, 'down_proj': 3})" in str(layers.why_not(layer, kind))
    layer = mixtral_experts()
    layer.down_proj = nn.Parameter(layer.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert "already a low-precision type" in str(layers.why_not(layer, kind))


def test_weights_spread_over_devices_are_refused(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = mixtral_experts()
        mesh = init_device_mesh("cpu", (1,))
        layer.gate_up_proj = nn.Parameter(distribute_tensor(layer.gate_up_proj.data, mesh, [Shard(1)]))
        kind = layers.kind_of(layer)
        assert kind is not None
        assert layers.why_not(layer, kind) == (
            "its gate_up_proj is spread over devices (a DTensor); quantize before parallelizing"
        )
    finally:
        distributed.destroy_process_group()


# -- running ----------------------------------------------------------------------------------------------------------


def mixtral_experts(**changes: Any) -> Any:
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    return build(module.MixtralExperts, config(**changes))


def gpt_oss_experts() -> Any:
    return build(pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").GptOssExperts, config())


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_experts_of_another_process_give_zeros(scheme: str) -> None:
    """Expert parallelism marks them by an index of E or more; biases must not leak in either."""
    for layer in (mixtral_experts(), gpt_oss_experts()):
        layer._is_expert_parallel = True
        quantized = int8(layer, scheme)
        x, index, weights = routing(6, 2)
        index[1] = E
        index[2, 0], index[3, 1] = E, E + 3
        y = quantized(x, index, weights)
        assert not y[1].any()
        here = index < E
        expected = quantized(x, index.clamp(max=E - 1), weights * here)
        torch.testing.assert_close(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_one_expert_and_one_that_no_token_reaches(scheme: str) -> None:
    single = mixtral_experts(num_local_experts=1)
    x, _, weights = routing(4, 1)
    index = torch.zeros(4, 1, dtype=torch.long)
    assert relative_error(int8(single, scheme)(x, index, weights), single(x, index, weights)) < 0.03
    layer = mixtral_experts()
    quantized = int8(layer, scheme)
    quantized.down_proj_scale[E - 1] = torch.nan  # it would show
    x, index, weights = routing(9, 2, E - 1)
    assert quantized(x, index, weights).isfinite().all()


@torch.no_grad()
def test_a_token_does_not_depend_on_the_others_and_runs_repeat() -> None:
    quantized = int8(mixtral_experts())
    x, index, weights = routing(9, 2)
    y = quantized(x, index, weights)
    assert torch.equal(quantized(x, index, weights), y)
    torch.testing.assert_close(quantized(x[4:5], index[4:5], weights[4:5]), y[4:5])
    torch.testing.assert_close(quantized(x, index.flip(1), weights.flip(1)), y)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_compiled_equals_eager(scheme: str) -> None:
    for layer in (mixtral_experts(), gpt_oss_experts()):
        quantized = int8(layer, scheme)
        torch._dynamo.reset()
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        for tokens in (4, 7, 1):
            inputs = routing(tokens, 2)
            torch.testing.assert_close(compiled(*inputs), quantized(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtypes_of_models(dtype: torch.dtype) -> None:
    """The sums over a token's experts are fp32: as good as the float model in that dtype, against fp32."""
    layer = mixtral_experts().to(dtype)
    quantized = int8(layer)
    x, index, weights = routing(16, 3)
    truth = dequantized(layer.float(), quantized)(x.to(dtype).float(), index, weights.to(dtype).float())
    y = quantized(x.to(dtype), index, weights.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, truth) < 2 * torch.finfo(dtype).eps


@torch.no_grad()
def test_weighted_outputs_are_not_rounded_before_their_sum() -> None:
    """3 y - 2 y is y, although 3 y has no fp16."""
    quantized = int8(mixtral_experts()).half()
    index, one = torch.tensor([[1, 1]]), torch.tensor([[1.0, 0.0]], dtype=torch.float16)
    x = torch.randn(1, H).half()
    y = quantized(x, index, one)
    quantized.down_proj_scale.mul_(30000 / y.abs().max())
    torch.testing.assert_close(quantized(x, index, one * 3 - 2 * one.flip(1)), quantized(x, index, one))


@torch.no_grad()
def test_half_moves_everything_but_codes_and_scales() -> None:
    quantized = int8(gpt_oss_experts()).half()
    assert quantized.gate_up_proj.dtype == torch.int8 and quantized.gate_up_proj_scale.dtype == torch.float32
    assert quantized.gate_up_proj_bias.dtype == torch.float16
    x, index, weights = routing(3, 2)
    assert quantized(x.half(), index, weights.half()).dtype == torch.float16


@torch.no_grad()
def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    quantized = int8(gpt_oss_experts())
    again = copy.deepcopy(quantized)
    inputs = routing(3, 2)
    y = quantized(*inputs)
    again.down_proj_scale.zero_()
    assert torch.equal(quantized(*inputs), y)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_gradients_reach_inputs_routing_weights_and_biases(scheme: str) -> None:
    layer = gpt_oss_experts()
    quantized = int8(layer, scheme)
    truth = dequantized(layer, quantized)
    x, index, weights = routing(5, 2)

    def gradients(module: nn.Module) -> tuple[Tensor, ...]:
        leaves = (x.clone().requires_grad_(), weights.clone().requires_grad_())
        wanted = (*leaves, module.get_parameter("gate_up_proj_bias"), module.get_parameter("down_proj_bias"))
        return torch.autograd.grad(module(leaves[0], index, leaves[1]).square().sum(), wanted)

    for got, expected in zip(gradients(quantized), gradients(truth), strict=True):
        assert relative_error(got, expected) < (1e-5 if scheme == "w8a16" else 0.05)


# -- quantizing -------------------------------------------------------------------------------------------------------


def test_one_expert_is_quantized_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one matrix is widened to fp32 at once, and a float stack is gone before the next layer's turn."""
    import weakref

    seen: list[tuple[int, ...]] = []
    model = nn.Sequential(mixtral_experts(), mixtral_experts())
    alive = [weakref.ref(model[i].gate_up_proj) for i in range(2)]
    left: list[int] = []

    def watched(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(weight.shape))
        left.append(sum(ref() is not None for ref in alive))
        return quantize_weight(weight, *args, **kwargs)

    quantize_weight = layers.quantize_weight
    monkeypatch.setattr(layers, "quantize_weight", watched)
    octavo.quantize(model, "w8a16")
    assert seen == 2 * (E * [(2 * I, H)] + E * [(H, I)])
    assert left == 2 * E * [2] + 2 * E * [1]


def test_nan_in_one_expert_names_it() -> None:
    layer = mixtral_experts()
    with torch.no_grad():
        layer.down_proj[3, 0, 0] = torch.nan
    with pytest.raises(QuantizeError, match=r"0\.down_proj\[3\]"):
        octavo.quantize(nn.Sequential(layer), "w8a16")


def test_static_inputs_become_dynamic_and_it_is_said() -> None:
    model = nn.Sequential(mixtral_experts())
    report = octavo.quantize(model, "w8a8-static")
    assert {row.scheme for row in report.rows} == {"w8a8"}
    assert {row.reason for row in report.rows} == {"the inputs of Experts have dynamic scales"}


def test_a_scale_a_channel_instead_of_what_was_asked_for_is_said() -> None:
    """Experts are most of a model: nobody should take its coverage for that of a model in groups."""
    for options, asked in (({"group_size": 8}, "per_group"), ({}, "per_tensor")):
        scheme = "w8a16" if options else Scheme("w8a16", WeightArgs("per_tensor"))
        report = octavo.quantize(nn.Sequential(mixtral_experts(), nn.Linear(8, 8)), scheme, **options)
        reasons = {row.kind: row.reason for row in report.rows if row.scheme}
        assert reasons == {"Experts": f"the weights of Experts have a scale a channel, not {asked}", "Linear": None}


def test_coverage_shows_the_float_shapes_and_what_became_of_them() -> None:
    model = nn.Sequential(gpt_oss_experts())
    float_shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    report = octavo.quantize(model, "w8a16")
    assert {row.name: row.shape for row in report.rows} == float_shapes
    reasons = {row.name: (row.scheme, row.reason, row.asked) for row in report.rows}
    assert reasons["0.gate_up_proj_bias"] == (None, "the biases of experts stay float", True)
    assert reasons["0.down_proj"][0] == "w8a16"


def test_experts_can_be_ignored() -> None:
    report = octavo.quantize(nn.Sequential(mixtral_experts(), nn.Linear(4, 4)), "w8a16", ignore=["Experts"])
    assert {row.name: row.reason for row in report.rows if not row.scheme}["0.down_proj"] == "ignored by 'Experts'"
    assert report.unasked_fraction == 0


# -- routers ----------------------------------------------------------------------------------------------------------


class OldBlock(nn.Module):
    """Experts as modules, as in older and custom models."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, 4, bias=False)
        self.shared_expert_gate = nn.Linear(H, 1, bias=False)
        self.gate_proj = nn.Linear(H, H)  # no router, though called a gate
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(4))


def test_routers_next_to_modules_stay_float_and_the_experts_are_linear_layers() -> None:
    model = nn.Sequential(OldBlock())
    assert routers(model) == {"0.gate", "0.shared_expert_gate"}
    report = octavo.quantize(model, "w8a16")
    rows = {row.name: row for row in report.rows}
    assert rows["0.gate.weight"].scheme is None and rows["0.gate.weight"].asked
    assert rows["0.gate.weight"].reason == rows["0.shared_expert_gate.weight"].reason == "a router stays float"
    assert rows["0.gate_proj.weight"].scheme and rows["0.experts.3.weight"].scheme


class ParallelExperts(nn.Module):
    """A stack of a class that nothing is known of but its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, H, H))


def test_routers_next_to_experts_of_an_unknown_class_stay_float() -> None:
    block = nn.ModuleDict({"router": nn.Sequential(nn.Linear(H, 4)), "up": ParallelExperts(), "out": nn.Linear(H, H)})
    with pytest.warns(OctavoWarning, match="3-D parameter of ParallelExperts"):
        rows = {row.name: row for row in octavo.quantize(block, "w8a16").rows}
    assert rows["router.0.weight"].reason == "a router stays float" and rows["out.weight"].scheme == "w8a16"


def test_a_router_becomes_int8_when_it_is_named() -> None:
    model = nn.Sequential(OldBlock())
    report = octavo.quantize(model, "w8a16", include=["0.gate"])
    schemes = {row.name: row.scheme for row in report.rows}
    assert schemes["0.gate.weight"] == "w8a16" and schemes["0.shared_expert_gate.weight"] is None


def test_a_gate_without_experts_beside_it_is_an_ordinary_layer() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(8, 8), "up": nn.Linear(8, 8)})
    assert routers(model) == set()
    assert octavo.quantize(model, "w8a16").unasked_fraction == 0
    assert isinstance(model["gate"], QuantLinear)


# -- whole models -----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_COUNTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_GROUPED = {
    "moe_intermediate_size": 96,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": _LOCAL,
    "Qwen2Moe": {**_COUNTED, "shared_expert_intermediate_size": 96},
    "Qwen3Moe": {**_COUNTED, "head_dim": 16},
    "Qwen3Next": {**_COUNTED, **_LINEAR_ATTENTION, "head_dim": 16, "shared_expert_intermediate_size": 96},
    "DeepseekV2": {**_GROUPED, **_LATENT},
    "DeepseekV3": {**_GROUPED, **_LATENT},
    "Glm4Moe": {**_GROUPED, "head_dim": 16},
    "Olmoe": _COUNTED,
    "GptOss": {**_LOCAL, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "Llama4": {**_LOCAL, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 96},
    "GraniteMoe": _LOCAL,
    "Jamba": {
        **_COUNTED,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "Phimoe": _LOCAL,
}


def model_of(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config_class(**{**SMALL, **MODELS[family]})).eval()


def decoder_rows(report: octavo.Coverage) -> Iterator[Any]:
    return (row for row in report.rows if "embed_tokens" not in row.name and "lm_head" not in row.name)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize("family", MODELS)
def test_whole_models(family: str, scheme: str) -> None:
    model = model_of(family)
    tokens = torch.randint(3, 94, (2, 9))
    before = model(tokens).logits
    report = octavo.quantize(model, scheme)
    rows = list(decoder_rows(report))
    share = sum(row.bytes_before for row in rows if row.scheme) / sum(row.bytes_before for row in rows)
    assert share >= 0.95, report.float_reasons()
    of_experts = [row for row in rows if ".experts." in row.name and len(row.shape) == 3]
    assert of_experts and all(row.scheme == scheme for row in of_experts)
    deciding = [row for row in rows if row.reason == "a router stays float"]
    assert deciding and all(row.asked and row.scheme is None for row in deciding)
    assert {".".join(row.name.split(".")[:-1]) for row in deciding} <= routers(model)
    if "shared_expert_intermediate_size" in MODELS[family]:
        assert any("shared_expert_gate" in row.name for row in deciding)
        assert any(".shared_expert.up_proj" in row.name and row.scheme for row in rows)
    assert relative_error(model(tokens).logits, before) < (0.03 if scheme == "w8a16" else 0.06)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
def test_generation_with_a_cache(family: str) -> None:
    """Token by token, each step of one row, gives what one pass over all tokens does."""
    model = model_of(family)
    octavo.quantize(model, "w8a16")
    prompt = torch.randint(3, 94, (1, 5))
    out = model.generate(
        prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    at_once = model(out.sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), at_once, rtol=1e-4, atol=1e-5)
