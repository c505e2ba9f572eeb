"""Models with int8 activations: what quantize makes of static and dynamic schemes, real and fake."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import octavo
from octavo.errors import CalibrateError, QuantizeError
from octavo.modules import DynamicQuantLinear, QuantLinear, StaticQuantLinear
from octavo.recipe import Recipe, Scheme
from tests.nearness import relative_error

SCHEMES = ["w8a8", "w8a8-static", "o1", "o2", "o3"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(24, 40, bias=False), nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) * self.b(x))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_close_to_the_float_model(scheme: str, dtype: torch.dtype) -> None:
    model, x = net(dtype), batch(dtype=dtype)
    before = x.clone()
    truth = model.double()(x.double())
    model = net(dtype)
    stats = octavo.calibrate(model, [x])
    report = octavo.quantize(model, scheme, stats=stats)
    y = model(x)
    assert y.dtype == dtype and relative_error(y, truth) < 0.03
    assert torch.equal(x, before)
    assert [row.scheme for row in report.rows if row.scheme] == [scheme] * 3


@pytest.mark.parametrize("scheme", ["w8a16", *SCHEMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_and_fake_agree_to_rounding(scheme: str, dtype: torch.dtype) -> None:
    x, stats = batch(dtype=dtype), octavo.calibrate(net(dtype), [batch(dtype=dtype)])
    real, fake = net(dtype), net(dtype)
    octavo.quantize(real, scheme, stats=stats)
    octavo.quantize(fake, scheme, stats=stats, fake=True)
    before = x.clone()
    # Layer by layer, on the same input: a code may flip where the layer before it was rounded the other way.
    h = torch.randn(30, 40).to(dtype)
    h[0] *= 8
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    for wanted in (True, False):  # where no gradient is wanted, one call quantizes and multiplies a few rows
        with torch.set_grad_enabled(wanted):
            torch.testing.assert_close(fake.a(x), real.a(x), **tolerance)
            torch.testing.assert_close(fake.b(x), real.b(x), **tolerance)
            for rows in (1, 3, 30):
                torch.testing.assert_close(fake.c(h[:rows]), real.c(h[:rows]), **tolerance)
    assert torch.equal(x, before)
    assert all(module.fake for module in fake.modules() if isinstance(module, QuantLinear))
    assert "fake" in str(fake) and "fake" not in str(real)


def test_modules_say_what_they_are() -> None:
    model, stats = net(), octavo.calibrate(net(), [batch()])
    octavo.quantize(
        model,
        Recipe.of("w8a8-static", overrides={"b": Scheme("w8a8"), "c": Scheme("w8a16")}),
        stats=stats,
        repair=False,
    )
    assert type(model.a) is StaticQuantLinear and type(model.b) is DynamicQuantLinear and type(model.c) is QuantLinear
    assert model.a.input_scale.item() == pytest.approx(batch().abs().max().item() / 127)
    assert "w8a8-static" in str(model.a)


def test_layers_with_one_input_have_one_scale() -> None:
    """On disk too: readers that fuse q, k and v keep one of the three."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    stats = octavo.calibrate(model, [torch.randint(0, 97, (2, 20))])
    for observer in ("absmax", "percentile", "mse"):
        twin = copy.deepcopy(model)
        octavo.quantize(twin, "w8a8-static", stats=stats, observer=observer, repair=False)
        layer = twin.model.layers[0]
        scales = [layer.self_attn.get_submodule(f"{name}_proj").input_scale for name in "qkv"]
        assert scales[0] == scales[1] == scales[2]
        assert layer.mlp.gate_proj.input_scale == layer.mlp.up_proj.input_scale != layer.mlp.down_proj.input_scale


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-static"])
@pytest.mark.parametrize("stats", [{}, 5, "stats.safetensors"], ids=repr)
def test_what_is_no_statistics_is_named_before_anything_changes(scheme: str, stats: Any) -> None:
    model = net()
    with pytest.raises(CalibrateError, match=rf"^stats is a {type(stats).__name__}, expected what octavo.calibrate"):
        octavo.quantize(model, scheme, stats=stats)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_static_without_stats_is_an_error_before_anything_changes() -> None:
    model = net()
    with pytest.raises(CalibrateError, match="w8a8-static has static inputs, and stats is None; pass stats=octavo"):
        octavo.quantize(model, "w8a8-static")
    with pytest.raises(CalibrateError, match="stats are of another model: it has no layer '0'"):
        octavo.quantize(
            model, "w8a8-static", stats=octavo.calibrate(nn.Sequential(nn.Linear(3, 3)), [torch.ones(1, 3)])
        )
    with pytest.raises(CalibrateError, match="observer is 'minmax'"):
        octavo.quantize(model, "w8a8-static", stats=octavo.calibrate(net(), [batch()]), observer="minmax")
    assert type(model.a) is nn.Linear


def massive(x: Tensor) -> Tensor:
    """One token in a corner that is 5000 times the others, as the first token of a Llama is in its down_proj."""
    x = x.clone()
    x[0, 0] *= 5000
    return x


def test_a_catastrophic_static_scale_is_repaired_for_all_that_share_the_input() -> None:
    x = massive(batch())
    stats = octavo.calibrate(net(), [x])
    kept, repaired = net(), net()
    truth = net()(x)
    octavo.quantize(kept, "w8a8-static", stats=stats, repair=False)
    report = octavo.quantize(repaired, "w8a8-static", stats=stats)
    fates = {row.name: (row.scheme, row.reason) for row in report.rows if row.scheme}
    for name in ("a.weight", "b.weight"):
        scheme, reason = fates[name]
        assert scheme == "w8a8" and reason is not None and reason.endswith(": a dynamic one")
    others = torch.ones(6, 5, dtype=torch.bool)
    others[0, 0] = False
    assert relative_error(kept(x)[others], truth[others]) > 0.5  # what the repair is for
    assert relative_error(repaired(x)[others], truth[others]) < 0.03


def test_where_dynamic_inputs_do_not_help_they_stay_float() -> None:
    """One channel that is huge in every token: no scale per token can help, only smoothing or float inputs."""
    model = nn.Sequential(nn.Linear(64, 8))
    x = torch.randn(200, 64)
    x[:, 0] *= 3e4
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    stats = octavo.calibrate(model, [x])
    truth = model(x)
    report = octavo.quantize(model, "w8a8-static", stats=stats)
    (row,) = (row for row in report.rows if row.scheme)
    assert row.scheme == "w8a16" and row.reason is not None and row.reason.endswith(": float inputs")
    assert relative_error(model(x), truth) < 0.01


def test_where_it_is_the_weight_that_costs_inputs_stay_int8() -> None:
    """One weight that is huge, under a scale for all: float inputs would gain next to nothing."""
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(200, 64)
    with torch.no_grad():
        model[0].weight[0, 0] = 10
    x[:, 0] *= 1e-3
    report = octavo.quantize(model, "o3", stats=octavo.calibrate(model, [x]))
    (row,) = (row for row in report.rows if row.scheme)
    assert row.scheme == "w8a8 weight per_tensor" and row.reason is not None
    assert re.fullmatch(r"a static scale leaves \d\.\d dB, float inputs \d\.\d: a dynamic one", row.reason)


def test_kinds_without_int8_inputs_keep_float_ones_and_say_so() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    report = octavo.quantize(model, "w8a8")
    rows = {row.name: (row.scheme, row.reason) for row in report.rows if row.scheme}
    assert rows == {"0.weight": ("w8a16", "the inputs of a Conv1d stay float"), "3.weight": ("w8a8", None)}
    assert model(torch.randn(2, 4, 8)).shape == (2, 5)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "o2"])
def test_compiled_whole(scheme: str) -> None:
    model, x = net(), batch()
    octavo.quantize(model, scheme, stats=octavo.calibrate(net(), [x]))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fake", [False, True])
def test_gradients_reach_the_input_and_the_bias(fake: bool) -> None:
    """Of the dequantized layer: rounding is passed straight through."""
    model, x = net(), batch().requires_grad_()
    octavo.quantize(model, "w8a8", fake=fake)
    weight = (model.a.weight * model.a.weight_scale).detach()
    y = model.a(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.a.bias.grad, weights.sum((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_on_meta_tensors_the_shape_is_told(scheme: str) -> None:
    model = net()
    octavo.quantize(model, scheme, stats=octavo.calibrate(model, [batch()]))
    expected = copy.deepcopy(model)(batch())
    told = model.to("meta")(batch().to("meta"))  # which was not run before
    assert told.is_meta and (told.shape, told.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("rows", [1, 400])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_an_input_of_another_size_is_called_what_it_is(scheme: str, rows: int) -> None:
    model = nn.Sequential(nn.Linear(64, 16))
    octavo.quantize(model, scheme, stats=octavo.calibrate(model, [torch.randn(4, 64)]))
    with pytest.raises(octavo.QuantizeError, match=rf"^x: shape is \[{rows}, 63\], expected \[\.\.\., 64\]"):
        model(torch.randn(rows, 63))


def test_scales_stay_fp32_when_the_model_is_cast() -> None:
    model, x = net(), batch()
    octavo.quantize(model, "w8a8-static", stats=octavo.calibrate(net(), [x]))
    scale = model.a.input_scale.clone()
    model.half()
    assert model.a.input_scale.dtype == torch.float32 and torch.equal(model.a.input_scale, scale)
    assert model(x.half()).dtype == torch.float16


def test_a_state_dict_brings_its_static_scale() -> None:
    x = batch()
    one, other = net(), net()
    octavo.quantize(one, "w8a8-static", stats=octavo.calibrate(net(), [x]))
    octavo.quantize(other, "w8a8-static", stats=octavo.calibrate(net(), [x * 3]))
    other(x)  # it has seen its old scale
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))


def test_copies_and_autocast() -> None:
    model, x = net(), batch()
    octavo.quantize(model, "w8a8")
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_modes_of_use_agree() -> None:
    model, x = net(), batch()
    octavo.quantize(model, "w8a8")
    with torch.no_grad():
        expected: Any = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x).detach(), expected)


def test_repairing_siblings_leaves_each_its_weight_scheme() -> None:
    """They are fed one tensor and share one scale; how their weights are rounded is their own."""
    torch.manual_seed(0)

    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    model, x = Siblings(), torch.randn(64, 16)
    x[0] *= 3000
    stats = octavo.calibrate(model, [x])
    octavo.quantize(model, octavo.Recipe.of("o3", overrides={"k": Scheme.of("w8a8-static")}), stats=stats)
    granularities = {name: model.get_submodule(name).scheme.weight.granularity for name in ("q", "k")}
    assert granularities == {"q": "per_tensor", "k": "per_channel"}
    assert not model.q.scheme.is_static and not model.k.scheme.is_static


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(value: float) -> None:
    model = net()
    octavo.quantize(model, "w8a8-static", stats=octavo.calibrate(model, [batch()]))
    static = next(module for module in model.modules() if isinstance(module, StaticQuantLinear))
    with pytest.raises(QuantizeError, match="expected a positive, finite number"):
        static.set_input_scale(torch.tensor([value]))
