"""Smoothing changes no function, takes outliers out of what becomes int8, and takes back what it cannot prove."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import CalibrateError, QuantizeError, register_experts
from octavo.calibration.calibrate import calibrate
from octavo.calibration.stats import Stats
from octavo.errors import OctavoWarning, RecipeError
from octavo.modules import QuantExperts
from octavo.quantization.quantize import quantize
from octavo.report import SmoothReport
from octavo.smoothing.layouts import Layout
from octavo.smoothing.pairs import find_pairs
from octavo.smoothing.smooth import smooth
from tests import tiny_models
from tests.outliers import (
    ARCHITECTURES,
    EVERY_ARCHITECTURE,
    Architecture,
    inject,
    inject_in_experts,
    is_stack,
    outputs,
    relative_error,
)
from tests.smoothing.test_pairs import Codes, Experts, Net, Noisy, Taps, X

pytestmark = pytest.mark.filterwarnings("ignore::octavo.errors.OctavoWarning")  # experts and embeddings stay float


def folded(report: SmoothReport) -> set[str]:
    return {pair.source for pair in report.pairs if pair.reason is None}


def why(report: SmoothReport, source: str) -> str | None:
    (pair,) = (pair for pair in report.pairs if pair.source == source)
    return pair.reason


def spiked(model: Any) -> Any:
    """`model` with an outlier in channel 3 of its first norm's output, of which the layer after it takes little."""
    model.norm.weight.data[3] = 100
    model.a.weight.data[:, 3] /= 100
    return model


# -- architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_outliers_cost_little_and_the_function_is_the_same(architecture: Architecture) -> None:
    model = architecture.build()
    batch, other = architecture.batch(9), architecture.batch(12)
    untouched = outputs(model, other)
    inject(architecture, model)
    wanted = outputs(model, other)
    torch.testing.assert_close(wanted, untouched, rtol=1e-3, atol=1e-4)
    plain = copy.deepcopy(model)
    report = smooth(model, calibrate(model, [batch, architecture.batch(15)]))
    assert folded(report) == architecture.expected().keys()
    if architecture.one_plus:
        assert (outputs(model, other) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    else:
        assert torch.equal(outputs(model, other), wanted)
    quantize(plain, "w8a8")
    quantize(model, "w8a8")
    assert relative_error(plain, other, wanted) >= 3 * relative_error(model, other, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "whisper"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_alpha_is_tuned(name: str, scheme: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch, other = architecture.build(), architecture.batch(9), architecture.batch(12)
    inject(architecture, model)
    wanted = outputs(model, other)
    plain = copy.deepcopy(model)
    stats = calibrate(model, [batch])
    quantize(plain, scheme, stats=stats, repair=False)
    smooth(model, stats, "auto", scheme=scheme)
    quantize(model, scheme, stats=stats, repair=False)
    assert relative_error(plain, other, wanted) >= 3 * relative_error(model, other, wanted)


def test_padding_changes_nothing() -> None:
    architecture = ARCHITECTURES["llama"]
    model = architecture.build()
    batch = architecture.batch(9)
    padded = {name: F.pad(tensor, (5, 0)) for name, tensor in batch.items()}
    padded["attention_mask"] = F.pad(torch.ones_like(batch["input_ids"]), (5, 0))
    wanted = outputs(model, batch)
    report = smooth(model, calibrate(model, [padded]))
    assert folded(report) == architecture.expected().keys()
    assert torch.equal(outputs(model, batch), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_that_has_copies_of_the_weights(dtype: torch.dtype) -> None:
    model = spiked(Net())
    with torch.autocast("cpu", dtype):
        model(X)  # keeps a copy of each weight for as long as autocast is on
        stats = calibrate(model, [X])
        wanted = model(X)
        assert folded(smooth(model, stats)) == {"norm", "a", "last"}
        assert torch.equal(model(X), wanted)
    with torch.autocast("cpu", dtype):
        assert torch.equal(model(X), wanted)


def test_a_model_that_draws_random_numbers() -> None:
    model = Noisy()
    torch.manual_seed(1)
    wanted = model(X)
    assert folded(smooth(model, calibrate(model, [X]))) == {"norm", "a", "last"}
    torch.manual_seed(1)
    assert torch.equal(model(X), wanted)


class MasksWithInfinity(nn.Module):
    """A token of the padding on the left attends to nothing: its softmax is NaN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qk, self.v = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        (q, k), v = self.qk(self.norm(x)).chunk(2, -1), self.v(self.norm(x))
        seen = attention_mask.bool().unsqueeze(1) & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return x + self.out((q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_that_is_not_a_number(dtype: torch.dtype) -> None:
    model = MasksWithInfinity().to(dtype)
    batch = {"x": torch.randn(2, 5, 16, dtype=dtype), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}
    wanted = model(**batch)
    assert bool(wanted[0, :2].isnan().all())
    assert folded(smooth(model, calibrate(model, [batch]))) == {"norm", "v"}
    torch.testing.assert_close(model(**batch), wanted, rtol=0, atol=0, equal_nan=True)


# -- what is folded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 0.7, 1])
def test_factors_are_the_papers_to_a_power_of_two(alpha: float) -> None:
    model = spiked(Net())
    amax_x = model.norm(X).abs().amax((0, 1))
    amax_w = model.a.weight.abs().amax(0)
    before = model.norm.weight.clone()
    smooth(model, calibrate(model, [X]), alpha)
    exact = amax_x**alpha / amax_w ** (1 - alpha)
    s = before / model.norm.weight
    assert torch.equal(s, 2.0 ** s.log2().round())
    assert ((s / exact).log2().abs() <= 0.5 + 1e-3).all()


class OwnGate(Net):
    """A block that multiplies what its norm gives by a weight of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(self.last(self.b(torch.relu(self.a(y))) * F.linear(y, self.gate)))


def test_what_enters_a_block_says_nothing_of_what_its_weight_is_multiplied_by() -> None:
    model, x = OwnGate(), X * 1000
    report = smooth(model, calibrate(model, [x]))
    (pair,) = (pair for pair in report.smoothed if pair.source == "norm")
    assert pair.sinks == ("a", "") and pair.amax_before == OwnGate().norm(x).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_every_dtype_bit_for_bit(dtype: torch.dtype) -> None:
    model, x = Net().to(dtype), X.to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # with all the digits that the dtype has
    wanted = model(x)
    report = smooth(model, calibrate(model, [x]))
    assert folded(report) == {"norm", "a", "last"}
    assert torch.equal(model(x), wanted)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_smallest_numbers_of_fp16_are_in_nobodys_way() -> None:
    model, x = spiked(Net()).half(), X.half()
    with torch.no_grad():
        model.a.weight[:8] *= 1e-4
        model.norm.weight[5] = 6e-8
    wanted = model(x)
    report = smooth(model, calibrate(model, [x]))
    assert folded(report) == {"norm", "a", "last"}
    torch.testing.assert_close(model(x), wanted, rtol=1e-3, atol=1e-3)


def test_what_a_dtype_cannot_hold_is_left_out() -> None:
    model, x = Net().half(), X.half()
    model.a.weight.data[:, 3] = 100
    before = copy.deepcopy(model.state_dict())
    stats = calibrate(model, [x])
    stats.observers["a"].amax[3] = 1e7
    report = smooth(model, stats, 1.0)
    assert why(report, "norm") == "torch.float16 cannot hold its weights times the factors; smooth the model in fp32"
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert torch.equal(model.norm.bias, before["norm.bias"])


class OnePlus(nn.LayerNorm):
    """As Nemotron's: with a bias beside 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


def test_one_plus_weight_with_a_bias() -> None:
    model = Net()
    model.norm = OnePlus(16)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    wanted = model(X)
    assert "norm" in folded(smooth(model, calibrate(model, [X])))
    torch.testing.assert_close(model(X), wanted)


class WithConditionNorm(nn.LayerNorm):
    """It cannot be called with x alone."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * condition


class Conditional(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = WithConditionNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(x + self.b(torch.relu(self.a(self.norm(x, x[..., :1]))))))


def test_a_norm_of_several_arguments() -> None:
    model = Conditional()
    wanted = model(X)
    assert "norm" in folded(smooth(model, calibrate(model, [X])))
    assert torch.equal(model(X), wanted)


def test_a_channel_that_was_dead_in_calibration_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
    model[0].weight.data[5] = 0
    before = model[1].weight.clone()
    assert folded(smooth(model, calibrate(model, [X]))) == {"0"}
    assert torch.equal(model[1].weight[:, 5], before[:, 5])
    assert not torch.equal(model[1].weight, before)


def test_a_channel_that_no_weight_reads_is_left_as_it_is() -> None:
    model = spiked(Net())
    with torch.no_grad():
        model.a.weight[:, 5] = 0
    before = model.norm.weight.clone()
    smooth(model, calibrate(model, [X]))
    assert model.norm.weight[5] == before[5] and model.norm.weight[3] < before[3]


def test_an_expert_that_was_not_routed_to_still_fits() -> None:
    model = Experts((0, 2, 3))
    nn.init.normal_(model.norm.weight, std=20)
    stats = calibrate(model, [X])
    model.routed = (1, 2)
    wanted = model(X)
    model.routed = (0, 2, 3)
    report = smooth(model, stats)
    assert "norm" in folded(report)
    model.routed = (1, 2)
    assert torch.equal(model(X), wanted)


def test_the_report_tells_what_was_done() -> None:
    model = spiked(Net())
    stats = calibrate(model, [X])
    before = {name: observer.amax.clone() for name, observer in stats.observers.items()}
    report = smooth(model, stats)
    norm = report.pairs[0]
    assert (norm.source, norm.sinks, norm.alpha, norm.reason) == ("norm", ("a",), 0.5, None)
    assert norm.amax_before == before["a"].max()
    assert norm.amax_after == stats.observers["a"].amax.max()
    assert norm.error_before is not None and norm.error_after is not None
    assert norm.error_after < norm.error_before / 3


@pytest.mark.parametrize("repair", [True, False])
def test_alpha_is_tuned_for_the_inputs_that_a_layer_will_get(repair: bool) -> None:
    """One token that is huge ruins every static scale: `octavo.quantize` will give such a layer dynamic inputs."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[3] *= 100
        model[2].weight[:, 3] /= 100
    x = torch.randn(64, 16)
    x[0] *= 5000
    dynamic, static = copy.deepcopy(model), copy.deepcopy(model)
    smooth(dynamic, calibrate(dynamic, [x]), "auto", scheme="w8a8")
    smooth(static, calibrate(static, [x]), "auto", scheme="w8a8-static", repair=repair)
    assert not torch.equal(dynamic[2].weight, model[2].weight)
    assert torch.equal(static[2].weight, dynamic[2].weight) == repair


# -- inside a stack of experts -----------------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.experts.down_proj"
UP = "model.layers.0.mlp.experts.gate_up_proj"
MIXTURES = [
    name for name, architecture in ARCHITECTURES.items() if any(is_stack(source) for source in architecture.pairs)
]


def calls(model: nn.Module, batch: Any) -> list[tuple[str, tuple[Any, ...], Tensor]]:
    """Name, arguments and output of each stack of experts that ran."""
    seen: list[tuple[str, tuple[Any, ...], Tensor]] = []
    stacks = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, args, output)))
        for name, module in stacks.items()
    ]
    outputs(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def block_errors(model: nn.Module, of: list[tuple[str, tuple[Any, ...], Tensor]]) -> list[float]:
    """|y' - y|^2 / |y|^2 of each stack of `model`, called with what `of` was."""
    with torch.no_grad():
        results = [(model.get_submodule(name)(*args), wanted) for name, args, wanted in of]
    return [float((y - wanted).square().sum() / wanted.square().sum()) for y, wanted in results]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_outliers_of_one_expert_cost_little(name: str, alpha: Any) -> None:
    architecture = ARCHITECTURES[name]
    model, batch, other = architecture.build(), architecture.batch(20), architecture.batch(30)
    for source in architecture.expected():
        if is_stack(source):
            inject_in_experts(model, source, 300.0, slice(1, 2))
    wanted = outputs(model, other)
    plain = copy.deepcopy(model)
    before = calls(model, other)
    report = smooth(model, calibrate(model, [batch]), alpha)
    assert folded(report) == architecture.expected().keys()
    assert torch.equal(outputs(model, other), wanted)
    after = calls(model, other)
    assert all(torch.equal(b[2], a[2]) for b, a in zip(before, after, strict=True))
    quantize(plain, "w8a8")
    quantize(model, "w8a8")
    assert isinstance(model.get_submodule(before[0][0]), QuantExperts)
    for rough, smoothed in zip(block_errors(plain, before), block_errors(model, after), strict=True):
        assert rough >= 3 * smoothed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_half_the_bits(dtype: torch.dtype) -> None:
    architecture = ARCHITECTURES["qwen3-moe"]
    model, batch, other = architecture.build().to(dtype), architecture.batch(9), architecture.batch(12)
    wanted = outputs(model, other)
    assert folded(smooth(model, calibrate(model, [batch]))) == architecture.expected().keys()
    if dtype == torch.bfloat16:
        assert torch.equal(outputs(model, other), wanted)
    else:  # its smallest numbers have fewer digits
        torch.testing.assert_close(outputs(model, other), wanted, rtol=1e-2, atol=1e-2)


def test_experts_of_a_model_within_one_of_ones_own() -> None:
    """They run one after the other while products are watched, whoever's config says how they run."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_models.build(tiny_models.mixtral, intermediate_size=48)

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    model, ids = Around(), tiny_models.tokens()
    model.inner.set_experts_implementation("grouped_mm")
    before = model(ids)
    report = smooth(model, calibrate(model, [ids]), alpha=0.5)
    reasons = {pair.source: pair.reason for pair in report.pairs}
    assert reasons["inner.model.layers.0.mlp.experts.gate_up_proj"] is None
    assert model.inner.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(model(ids), before)
    down, fresh = (each.inner.model.layers[0].mlp.experts.down_proj for each in (model, Around()))
    assert not torch.equal(down, fresh)


@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (4, 4), (5, 1)])
def test_any_number_of_experts(count: int, top_k: int) -> None:
    architecture = dataclasses.replace(
        ARCHITECTURES["qwen3-moe"],
        make=lambda: tiny_models.qwen3_moe(num_experts=count, num_experts_per_tok=top_k, tie_word_embeddings=False),
    )
    model, batch, other = architecture.build(), architecture.batch(9), architecture.batch(12)
    wanted = outputs(model, other)
    assert {DOWN.replace("down", "gate_up"), "model.layers.0.post_attention_layernorm"} <= folded(
        smooth(model, calibrate(model, [batch]))
    )
    assert torch.equal(outputs(model, other), wanted)


@pytest.mark.parametrize(
    ("make", "source", "none"),
    [
        (tiny_models.longcat, "model.layers.0.mlp.experts.gate_up_proj", None),
        (tiny_models.jetmoe, "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.input_linear.weight"),
        (tiny_models.dbrx, "transformer.blocks.0.ffn.experts.mlp.v1", None),
        (tiny_models.dbrx, "transformer.blocks.0.norm_attn_norm.norm_2", None),
    ],
)
@torch.no_grad()
def test_experts_that_are_known_by_what_they_do(make: Callable[..., Any], source: str, none: str | None) -> None:
    """LongCat's have more up projections than down ones; within JetMoe's linear layers there is nothing to smooth."""
    model, ids = tiny_models.build(make), tiny_models.tokens(2, 20)
    before = model(ids).logits
    report = smooth(model, calibrate(model, [ids], route_all_experts=True), 0.5)
    reasons = {pair.source: pair.reason for pair in report.pairs}
    assert reasons[source] is None and none not in reasons
    assert torch.equal(model(ids).logits, before)


def test_every_expert_has_factors_of_its_own() -> None:
    architecture = ARCHITECTURES["mixtral"]
    model = architecture.build()
    stats = calibrate(model, [architecture.batch(40)])
    experts = model.model.layers[0].mlp.experts
    amax_x, before = stats.experts[DOWN].amax.double(), experts.down_proj.detach().clone()
    gate_up = experts.gate_up_proj.detach().clone()
    report = smooth(model, stats, 0.7)
    s = experts.down_proj.detach() / before  # [E, H, I]
    assert torch.equal(s, s[:, :1].expand_as(s)), "a factor for each column of each expert"
    s = s[:, 0].double()
    assert torch.equal(s, 2.0 ** s.log2().round()) and not torch.equal(s[0], s[1])
    exact = amax_x**0.7 / before.double().abs().amax(1) ** 0.3
    assert ((s / exact).log2().abs() <= 0.5 + 1e-3).all()
    columns = experts.gate_up_proj.detach() / gate_up  # the norm's factors, and 1 / s in the rows of up
    assert torch.equal(columns[:, 48:] / columns[:1, :1], (1 / s.float()).unsqueeze(2).expand_as(columns[:, 48:]))
    assert torch.equal(columns[:, :48], columns[:1, :1].expand_as(columns[:, :48])), "not in those of the gate"
    torch.testing.assert_close(stats.experts[DOWN].amax.double() * s, amax_x)
    (row,) = (row for row in report.pairs if row.source == UP)
    assert (row.sinks, row.alpha) == ((DOWN,), 0.7)
    assert row.amax_before == float(amax_x.max()) and row.amax_after == float(stats.experts[DOWN].amax.max())


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_an_expert_that_was_never_routed_to_is_left_as_it_is(alpha: Any) -> None:
    architecture = ARCHITECTURES["mixtral"]
    model, other = architecture.build(), architecture.batch(40)
    wanted = outputs(model, other)
    experts, gate = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate
    before = experts.down_proj.detach().clone()
    away = gate.register_forward_hook(lambda module, args, output: (*output[:2], output[2] % 3))
    stats = calibrate(model, [architecture.batch(40)])
    assert stats.unrouted == {DOWN: (3,)}
    report = smooth(model, stats, alpha)
    away.remove()
    assert folded(report) == architecture.expected().keys()
    assert torch.equal(outputs(model, other), wanted), "where it is routed to, too"
    assert torch.equal(experts.down_proj[3], before[3])
    assert not any(torch.equal(experts.down_proj[e], before[e]) for e in range(3))


@pytest.mark.parametrize("name", ["gpt-oss", "clamped"])
def test_what_a_gate_does_not_pass_on_channel_by_channel_is_no_way_through(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = ARCHITECTURES["mixtral" if name == "clamped" else name]
    model, batch = architecture.build(), architecture.batch(9)
    experts = model.model.layers[0].mlp.experts
    if name == "clamped":  # at what no example reaches

        def clamped(layer: Any, h: Tensor) -> Tensor:
            gate, up = h.chunk(2, -1)
            return F.silu(gate) * up.clamp(-100, 100)

        monkeypatch.setattr(type(experts), "_apply_gate", clamped)
    before = experts.down_proj.detach().clone()
    report = smooth(model, calibrate(model, [batch]))
    assert why(report, UP) == "its gate passes no part of it on channel by channel"
    assert torch.equal(experts.down_proj, before)
    assert "model.layers.0.post_attention_layernorm" in folded(report)


class ConditionalFeedForward(nn.Module):
    """gpt-fast's: two up projections, and weights that are gathered, so that no product with them is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(4, 24, 16) / 4) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(4, 16, 24) / 5)

    def forward(self, x: Tensor, expert_indices: Tensor) -> Tensor:
        x1 = F.silu(torch.einsum("ti,taoi -> tao", x, self.w1[expert_indices]))
        x3 = torch.einsum("ti, taoi -> tao", x, self.w3[expert_indices])
        return torch.einsum("tao, taio -> tai", x1 * x3, self.w2[expert_indices])


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(16, 4), ConditionalFeedForward()

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).topk(2)
        return (weights.unsqueeze(-1) * self.experts(x, index)).sum(1)


def test_an_up_projection_in_two_parts() -> None:
    model, x = nn.Sequential(Routed()), torch.randn(30, 16)
    with torch.no_grad():
        model[0].experts.w3[1, 5] *= 300
        model[0].experts.w2[1, :, 5] /= 300
    wanted, w1 = model(x), model[0].experts.w1.detach().clone()
    report = smooth(model, calibrate(model, [x]))
    (pair,) = (pair for pair in report.pairs if pair.reason is None)
    assert (pair.source, pair.sinks) == ("0.experts.w3", ("0.experts.w2",))
    assert torch.equal(model(x), wanted) and torch.equal(model[0].experts.w1, w1)
    assert pair.error_before is not None and pair.error_after is not None
    assert pair.error_before > 3 * pair.error_after


class Relu(nn.Module):
    """A user's: no gate projection, weights transposed, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.inner_bias = nn.Parameter(torch.randn(4, 16, 24) / 4), nn.Parameter(torch.randn(4, 24))
        self.outer, self.outer_bias = nn.Parameter(torch.randn(4, 24, 16) / 5), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(4):
            token, place = (index == e).nonzero(as_tuple=True)
            h = torch.relu(x[token] @ self.inner[e] + self.inner_bias[e])
            y[token] += weights[token, place, None] * (h @ self.outer[e] + self.outer_bias[e])
        return y


class RoutedToRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(16, 4), Relu()

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).topk(2)
        return self.experts(x, index, weights=weights)


def test_experts_with_biases_and_no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("octavo.experts"), "_REGISTERED", {})
    register_experts(
        Relu, up="inner", down="outer", gate=lambda layer, h: h.relu(), transposed=True, up_bias="inner_bias",
        down_bias="outer_bias",
    )  # fmt: skip
    model, x = nn.Sequential(RoutedToRelu()), torch.randn(30, 16)
    with torch.no_grad():
        model[0].experts.inner[1, :, 5] *= 300
        model[0].experts.inner_bias[1, 5] *= 300
        model[0].experts.outer[1, 5] /= 300
    wanted, bias = model(x), model[0].experts.inner_bias.detach().clone()
    stats = calibrate(model, [x])
    report = smooth(model, stats)
    (pair,) = (pair for pair in report.pairs if pair.reason is None)
    assert (pair.source, pair.sinks) == ("0.experts.inner", ("0.experts.outer",))
    assert torch.equal(model(x), wanted) and not torch.equal(model[0].experts.inner_bias, bias)
    with torch.no_grad():  # what the statistics say that they are, they are
        h = torch.stack([(x @ w + b).relu() for w, b in zip(*list(model[0].experts.parameters())[:2], strict=True)])
    index = model[0].gate(x).topk(2).indices
    for e in range(4):
        chosen = h[e][(index == e).any(1)]
        torch.testing.assert_close(stats.experts["0.experts.outer"].amax[e], chosen.amax(0), rtol=1e-4, atol=1e-6)
    assert pair.error_before is not None and pair.error_after is not None
    assert pair.error_before > 3 * pair.error_after


def test_a_gate_that_cannot_be_run_on_its_own_is_no_way_through(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES["mixtral"]
    model, batch = architecture.build().bfloat16(), architecture.batch(9)
    norm = nn.LayerNorm(48).bfloat16()
    monkeypatch.setattr(
        type(model.model.layers[0].mlp.experts),
        "_apply_gate",
        lambda layer, h: norm(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    )
    report = smooth(model, calibrate(model, [batch]))
    assert (why(report, UP) or "").startswith("its gate cannot be run on its own in fp32: ")


@pytest.mark.parametrize("wrong", [torch.arange(47, -1, -1), torch.arange(48).roll(1)])
def test_a_fold_inside_experts_that_changes_the_function_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, wrong: Tensor
) -> None:
    def misled(model: nn.Module, example: Any) -> Any:
        pairs = find_pairs(model, example)
        for pair in pairs:
            if pair.source == UP:
                assert pair.layout is not None
                pair.layout = Layout("wrong", pair.layout.rows[wrong], pair.layout.channels)
        return pairs

    monkeypatch.setattr(importlib.import_module("octavo.smoothing.smooth"), "find_pairs", misled)
    architecture = ARCHITECTURES["mixtral"]
    model, batch = architecture.build(), architecture.batch(9)
    before, wanted = model.get_parameter(DOWN).detach().clone(), outputs(model, batch)
    stats = calibrate(model, [batch])
    amax = stats.experts[DOWN].amax.clone()
    report = smooth(model, stats)
    assert (why(report, UP) or "").startswith("folding it changes the model: ")
    assert folded(report) == architecture.expected().keys() - {UP}
    assert torch.equal(outputs(model, batch), wanted)
    assert torch.equal(model.get_parameter(DOWN), before) and torch.equal(stats.experts[DOWN].amax, amax)


def test_statistics_without_experts_leave_them_alone() -> None:
    architecture = ARCHITECTURES["mixtral"]
    model, batch = architecture.build(), architecture.batch(9)
    stats = calibrate(model, [batch])
    stats.experts.clear()
    report = smooth(model, stats)
    assert why(report, UP) == "the statistics have nothing of the inputs of its experts' down projections"
    stats.experts["nowhere.down_proj"] = calibrate(model, [batch]).experts[DOWN]
    with pytest.raises(CalibrateError, match=r"of another model: it has no layer 'nowhere\.down_proj'"):
        smooth(model, stats)


def test_statistics_of_experts_follow() -> None:
    architecture = ARCHITECTURES["qwen2-moe"]
    model, batch = architecture.build(), architecture.batch(9)
    stats = calibrate(model, [batch])
    smooth(model, stats)
    for name, seen in calibrate(model, [batch]).experts.items():
        assert torch.equal(stats.experts[name].amax, seen.amax)
        assert torch.equal(stats.experts[name].rows, seen.rows)


# -- what is not ------------------------------------------------------------------------------------------------------


def test_a_leak_is_left_alone_and_reported() -> None:
    model = Taps("residual")
    before = model.norm.weight.clone()
    report = smooth(model, calibrate(model, [X]))
    assert why(report, "norm") == "also reaches last on another way (a residual?)"
    assert torch.equal(model.norm.weight, before)


def test_a_sparse_weight_takes_no_factors() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
    nn.init.constant_(model[0].weight[3:4], 40.0)
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse_coo())
    before = model(X)
    report = smooth(model, calibrate(model, [X]))
    assert torch.equal(model(X), before) and not folded(report)


def test_a_norm_without_weight_is_reported() -> None:
    model = nn.Sequential(nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 4))
    assert why(smooth(model, calibrate(model, [X])), "0") == "has no weight to fold into"


@pytest.mark.parametrize("wrong", ["a", "norm"])
def test_a_fold_that_changes_the_function_is_taken_back_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def misled(model: nn.Module, example: Any) -> Any:
        pairs = find_pairs(model, example)
        for pair in pairs:
            if pair.source == wrong:
                assert pair.layout is not None
                pair.layout = Layout("reversed", pair.layout.rows, pair.layout.channels.flip(0))
        return pairs

    monkeypatch.setattr(importlib.import_module("octavo.smoothing.smooth"), "find_pairs", misled)
    model = spiked(Net())
    before, wanted = copy.deepcopy(model.state_dict()), model(X)
    stats = calibrate(model, [X])
    amax = {name: observer.amax.clone() for name, observer in stats.observers.items()}
    report = smooth(model, stats)
    sink = {"a": "b", "norm": "a"}[wrong]
    assert (why(report, wrong) or "").startswith("folding it changes the model: ")
    assert folded(report) == {"norm", "a", "last"} - {wrong}
    assert torch.equal(model(X), wanted)
    assert torch.equal(stats.observers[sink].amax, amax[sink])
    if wrong == "norm":
        assert torch.equal(model.norm.weight, before["norm.weight"])
    else:
        assert torch.equal(model.b.weight, before["b.weight"])


class Odd(nn.LayerNorm):
    """Linear in its output for discovery, but its weight is no factor of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_norm_whose_weight_is_no_factor_is_taken_back() -> None:
    model = Net()
    model.norm = Odd(16)
    nn.init.normal_(model.norm.weight)
    wanted = model(X)
    report = smooth(model, calibrate(model, [X]))
    assert (why(report, "norm") or "").startswith("folding it changes the model: ")
    assert folded(report) == {"a", "last"}
    assert torch.equal(model(X), wanted)


# -- again, and wrongly -----------------------------------------------------------------------------------------------


def test_a_second_time_finds_little_to_do() -> None:
    model = spiked(Net())
    wanted = model(X)
    stats = calibrate(model, [X])
    smooth(model, stats)
    once = model.norm.weight.clone()
    smooth(model, stats)
    assert torch.equal(model(X), wanted)
    assert ((model.norm.weight / once).log2().abs() <= 1).all()


def test_statistics_follow() -> None:
    model = spiked(Net())
    stats = calibrate(model, [X])
    smooth(model, stats)
    anew = calibrate(model, [X])
    for name, observer in anew.observers.items():
        assert torch.equal(stats.observers[name].amax, observer.amax)
        assert torch.equal(stats.observers[name].rows, observer.rows)


def test_the_caller_keeps_the_batch_and_the_mode() -> None:
    model, x = Net().train(), X.clone()
    smooth(model, calibrate(model, [x]), batch=x)
    assert model.training
    assert torch.equal(x, X)


def test_an_int8_model_cannot_be_smoothed() -> None:
    model = Net()
    stats = calibrate(model, [X])
    quantize(model, "w8a8")
    with pytest.raises(QuantizeError, match="smooth it first, then quantize"):
        smooth(model, stats)


class Branches(nn.Module):
    """One norm, and heads of which a call takes one, as models for text and images have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.text, self.image = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 24)
        nn.init.constant_(self.norm.weight[3:4], 40.0)

    def forward(self, x: Tensor, image: bool = False) -> Tensor:
        h = self.norm(x)
        return self.image(h) if image else self.text(h)


@pytest.mark.parametrize("stored", [False, True])
def test_a_branch_that_the_first_batch_does_not_take_is_preserved(stored: bool, tmp_path: Path) -> None:
    model = Branches().eval()
    x = torch.randn(64, 16)
    before = [model(x), model(x, True)]
    stats = calibrate(model, [{"x": x}, {"x": x}, {"x": x, "image": True}])
    assert len(stats.further) == 1
    if stored:
        stats = Stats.load(stats.save(tmp_path / "stats.safetensors"))
    report = smooth(model, stats)
    assert torch.equal(model(x), before[0]) and torch.equal(model(x, True), before[1])
    assert why(report, "norm") == "folding it changes the model: the input of image is another"


class Flagged(nn.Module):
    """A flag, or what else it is given, makes it return the normed value, too; no other layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a = nn.LayerNorm(16), nn.Linear(16, 16)
        nn.init.constant_(self.norm.weight[3:4], 40.0)

    def forward(self, x: Tensor, flags: Any = None) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.a(h)
        taps = flags.dtype == torch.bool if isinstance(flags, Tensor) else flags in (True, ["tap"])
        return y + h if taps or x.dim() == 3 else y


OTHERS = {"flag": (X[:, 0], True), "dtype": (X[:, 0], torch.ones(1).bool()), "list": (X[:, 0], ["tap"]), "dims": X}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("how", OTHERS)
def test_arguments_of_another_structure_are_another_way(how: str, stored: bool, tmp_path: Path) -> None:
    other = OTHERS[how]
    model = Flagged().eval()
    batches = [(X[:, 0], False), (X[:1, 0], False), other]
    before = [model(*batch) if isinstance(batch, tuple) else model(batch) for batch in batches]
    stats = calibrate(model, batches)
    assert len(stats.further) == 1
    if stored:
        stats = Stats.load(stats.save(tmp_path / "stats.safetensors"))
    report = smooth(model, stats)
    after = [model(*batch) if isinstance(batch, tuple) else model(batch) for batch in batches]
    assert all(map(torch.equal, before, after))
    assert why(report, "norm") == "folding it changes the model: its output is another"


def test_ways_through_are_bounded() -> None:
    """Numbers may be others in each batch."""
    model = Flagged().eval()
    stats = calibrate(model, [(X[:, 0], step) for step in range(100, 200)])
    assert [flags for _, flags in stats.further] == list(range(101, 116))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fold_that_changes_whole_numbers_is_taken_back(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would not be looked for in the first place, the pair is forced upon it."""
    model = Codes(lambda y: y.argmax(-1)).to(dtype).eval()
    nn.init.constant_(model.norm.weight[3:4], 40.0)
    x = X.to(dtype)
    norm = next(pair for pair in find_pairs(Net().to(dtype), x) if pair.source == "norm")
    before = model(x)[1]["codes"]
    monkeypatch.setattr(importlib.import_module("octavo.smoothing.smooth"), "find_pairs", lambda *_: [norm])
    report = smooth(model, calibrate(model, [x]))
    assert why(report, "norm") == "folding it changes the model: its output is another"
    assert torch.equal(model(x)[1]["codes"], before)


def test_the_output_projection_of_attention_was_reached() -> None:
    """Its weight is multiplied by, though it is not called."""
    model = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, norm_first=True, batch_first=True).eval()
    nn.init.constant_(model.norm2.weight[3:4], 40.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = smooth(model, calibrate(model, [torch.randn(2, 3, 16)]))
    assert {"norm1", "norm2"} <= folded(report)


def test_a_branch_that_no_batch_took_is_warned_of() -> None:
    model = Branches().eval()
    x = torch.randn(64, 16)
    with pytest.warns(OctavoWarning, match=r"no batch of the calibration reached image \(1 such\)"):
        smooth(model, calibrate(model, [x]))


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = Net()
    stats = calibrate(model, [X])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smooth(model, stats, progress=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert smooth(model, stats).smoothed


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = Branches().eval()
    stats = calibrate(model, [torch.randn(64, 16)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OctavoWarning, match="no batch of the calibration reached image"):
            smooth(model, stats)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert smooth(model, stats).smoothed


def test_hooks_see_whole_runs_of_the_model() -> None:
    """What a norm is asked besides is no run."""
    model, calls = Net(), {"norm": 0, "head": 0}
    for name in calls:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    smooth(model, calibrate(model, [X]))
    assert calls["norm"] == calls["head"]


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(QuantizeError, match=r"model is a dict, expected an nn\.Module"):
        smooth({}, calibrate(Net(), [X]))  # type: ignore[arg-type]


def test_weights_that_fp16_cannot_hold_scaled_are_left_as_they_are() -> None:
    """The norm's smallest weight is lost when it is divided, and multiplying does not bring it back."""
    model = nn.Sequential(nn.LayerNorm(8, bias=False), nn.Linear(8, 8, bias=False)).half()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].weight[0] = 3e-5
        model[1].weight[:, 0] = 6e4
    stats = calibrate(model, [torch.randn(16, 8).half()])
    stats.observers["1"].amax[0] = 1e9
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "cannot hold its weights" in (why(smooth(model, stats, 0.9), "0") or "")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_the_model_before_or_after_it_was_smoothed(
    tmp_path: Path, dtype: torch.dtype, stored: bool
) -> None:
    def kept(stats: Stats) -> Stats:
        return Stats.load(stats.save(tmp_path / "stats")) if stored else copy.deepcopy(stats)

    plain = ARCHITECTURES["llama"].build()
    inject(ARCHITECTURES["llama"], plain)
    smoothed = copy.deepcopy(plain)
    before = calibrate(smoothed, [ARCHITECTURES["llama"].batch(9)])
    stats = kept(before)
    smooth(smoothed, stats)
    for model in (plain, smoothed):
        model.to(dtype)
    message = "the columns of .* differ from theirs by powers of two, so that one of the two was smoothed"
    for model, wrong in ((plain, kept(stats)), (smoothed, kept(before))):
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(CalibrateError, match=message):
            quantize(model, "w8a8-static", stats=wrong)
        with pytest.raises(CalibrateError, match=message):
            smooth(model, wrong)
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    quantize(plain, "w8a8-static", stats=kept(before))
    quantize(smoothed, "w8a8-static", stats=kept(stats))


def test_statistics_of_another_model() -> None:
    with pytest.raises(CalibrateError, match="of another model: it has no layer"):
        smooth(Net(), calibrate(Experts((0, 1)), [X]))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best", None])
def test_alpha_is_a_number_or_auto(alpha: Any) -> None:
    model = Net()
    with pytest.raises(QuantizeError, match=r"expected a number from 0 to 1, or 'auto'"):
        smooth(model, calibrate(model, [X]), alpha)


@pytest.mark.parametrize("stats", [None, {}], ids=repr)
def test_what_is_no_statistics_is_named(stats: Any) -> None:
    with pytest.raises(CalibrateError, match=rf"^stats is a {type(stats).__name__}, expected what octavo.calibrate"):
        smooth(nn.Sequential(nn.Linear(4, 4)), stats)


def test_what_is_no_scheme_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RecipeError, match=r"^scheme is 5, expected a preset's name or a Scheme$"):
        smooth(model, calibrate(model, [torch.ones(1, 4)]), scheme=5)  # type: ignore[arg-type]


def test_statistics_without_a_batch() -> None:
    model = Net()
    stats = calibrate(model, [X])
    stats.example = None
    with pytest.raises(CalibrateError, match="pass one as batch="):
        smooth(model, stats)
    assert folded(smooth(model, stats, batch=X)) == {"norm", "a", "last"}


def test_a_scheme_with_float_inputs_has_nothing_to_smooth_for() -> None:
    model = Net()
    with pytest.raises(QuantizeError, match="scheme is w8a16, whose inputs stay float"):
        smooth(model, calibrate(model, [X]), scheme="w8a16")


class InTwoDimensions(nn.Module):
    """Experts whose weights a child holds, one expert's rows after another's: the last with its output channels first,
    or its input channels."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned, self.held = turned, nn.Module()
        self.held.up = nn.Parameter(torch.randn(4 * 24, 16) / 4)
        self.held.down = nn.Parameter(torch.randn(4 * 24, 16) / 5 if turned else torch.randn(4 * 16, 24) / 5)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        up, down = self.held.up.view(4, 24, 16), self.held.down.view(4, -1, self.held.down.shape[1])
        for e in range(4):
            token, place = torch.where(index == e)
            h = (x[token] @ up[e].T).relu()
            y.index_add_(0, token, weights[token, place, None] * (h @ (down[e] if self.turned else down[e].T)))
        return y


class RoutedInTwoDimensions(RoutedToRelu):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(16), InTwoDimensions(turned)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights, index = self.gate(x).topk(2)
        return self.experts(x, index, weights)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_two_dimensions(turned: bool, tmp_path: Path) -> None:
    model, x = nn.Sequential(RoutedInTwoDimensions(turned)), torch.randn(30, 16)
    up, down = (getattr(model[0].experts.held, name) for name in ("up", "down"))
    columns = down.view(4, 24, 16) if turned else down.view(4, 16, 24).mT  # [E, I, H]
    up.view(4, 24, 16)[1, 5] *= 300
    columns[1, 5] /= 300
    wanted, before = model(x), columns.clone()
    stats = calibrate(model, [x])
    amax = stats.experts["0.experts.held.down"].amax.clone()
    report = smooth(model, stats, 0.5)
    folded = {pair.source: pair.sinks for pair in report.pairs if pair.reason is None}
    assert folded == {"0.norm": ("0.gate", "0.experts"), "0.experts.held.up": ("0.experts.held.down",)}
    columns = down.view(4, 24, 16) if turned else down.view(4, 16, 24).mT
    s = columns / before
    assert torch.equal(model(x), wanted) and torch.equal(s, s[..., :1].expand_as(s)) and s.unique().numel() > 2
    torch.testing.assert_close(stats.experts["0.experts.held.down"].amax * s[..., 0], amax)
    stats.save(tmp_path / "stats.safetensors")
    quantize(model, "w8a8", stats=Stats.load(tmp_path / "stats.safetensors"))
    assert isinstance(model[0].experts, QuantExperts)
    assert float((model(x) - wanted).norm() / wanted.norm()) < 0.03
