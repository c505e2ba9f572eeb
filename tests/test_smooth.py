"""Smoothing changes no function, takes outliers out of what becomes int8, and takes back what it cannot prove."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import CalibrateError, QuantizeError
from octavo.calibrate import calibrate
from octavo.pairs import Layout, find_pairs
from octavo.quantize import quantize
from octavo.report import SmoothReport
from octavo.smooth import smooth
from tests.outliers import ARCHITECTURES, EVERY_ARCHITECTURE, Architecture, inject, outputs, relative_error
from tests.test_pairs import Experts, Net, Taps, X

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


# -- what is folded ---------------------------------------------------------------------------------------------------


def test_factors_are_the_papers_to_a_power_of_two() -> None:
    model = spiked(Net())
    amax_x = model.norm(X).abs().amax((0, 1))
    amax_w = model.a.weight.abs().amax(0)
    before = model.norm.weight.clone()
    smooth(model, calibrate(model, [X]), 0.7)
    exact = amax_x**0.7 / amax_w**0.3
    s = before / model.norm.weight
    assert torch.equal(s, 2.0 ** s.log2().round())
    assert ((s / exact).log2().abs() <= 0.5 + 1e-3).all()


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


# -- what is not ------------------------------------------------------------------------------------------------------


def test_a_leak_is_left_alone_and_reported() -> None:
    model = Taps("residual")
    before = model.norm.weight.clone()
    report = smooth(model, calibrate(model, [X]))
    assert why(report, "norm") == "also reaches last on another way (a residual?)"
    assert torch.equal(model.norm.weight, before)


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

    monkeypatch.setattr(importlib.import_module("octavo.smooth"), "find_pairs", misled)
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


def test_statistics_of_another_model() -> None:
    with pytest.raises(CalibrateError, match="of another model: it has no layer"):
        smooth(Net(), calibrate(Experts((0, 1)), [X]))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best", None])
def test_alpha_is_a_number_or_auto(alpha: Any) -> None:
    model = Net()
    with pytest.raises(QuantizeError, match=r"expected a number from 0 to 1, or 'auto'"):
        smooth(model, calibrate(model, [X]), alpha)


def test_statistics_without_a_batch() -> None:
    model = Net()
    stats = calibrate(model, [X])
    stats.example = None
    with pytest.raises(CalibrateError, match="pass one as batch="):
        smooth(model, stats)
    assert folded(smooth(model, stats, batch=X)) == {"norm", "a", "last"}
