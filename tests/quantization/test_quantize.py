"""Models quantized in memory: what they compute, that nothing changes when the plan is refused, and memory."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import octavo
from octavo import OctavoError, OctavoWarning, QuantizeError, RecipeError, Scheme
from octavo.modules import QuantConv, QuantLinear, QuantMultiheadAttention
from octavo.primitives import dequantize
from octavo.quantization.plan import output_heads
from tests.nearness import relative_error
from tests.tiny_models import Net, bert, build, falcon, gpt2, llama, mlp, t5, tied_llama, tokens, vit, whisper


def with_dequantized_weights(model: nn.Module, int8: nn.Module) -> nn.Module:
    """A copy of the float `model` whose weights are what the codes of `int8` stand for, by the definition."""
    twin = copy.deepcopy(model)
    for name, module in int8.named_modules():
        if isinstance(module, QuantLinear):
            layer = twin.get_submodule(name)
            weight = dequantize(module.weight, module.weight_scale)
            layer.weight.data = (weight if isinstance(layer, nn.Linear) else weight.T).to(layer.weight.dtype)
    return twin


def test_in_place_with_the_values_of_the_definition() -> None:
    model = mlp()
    original = copy.deepcopy(model)
    first = model[0]
    report = octavo.quantize(model, "w8a16")
    assert isinstance(model[0], QuantLinear) and isinstance(model[2], QuantLinear) and model[0] is not first
    assert report.quantized_fraction == pytest.approx((24 * 32 + 32 * 8) / (24 * 32 + 32 * 8 + 32))
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), with_dequantized_weights(original, model)(x))


@pytest.mark.filterwarnings("ignore::octavo.OctavoWarning")  # in so small a ViT, position embeddings are over 5%
@pytest.mark.parametrize("make", [llama, tied_llama, gpt2, falcon, bert, t5, vit, whisper])
def test_real_architectures_stay_close_to_the_float_model(make: Any) -> None:
    model = build(make)
    inputs = {
        vit: {"pixel_values": torch.randn(2, 3, 16, 16)},
        whisper: {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": tokens(1, 5)},
        t5: {"input_ids": tokens(), "decoder_input_ids": tokens()},
    }.get(make, {"input_ids": tokens()})
    with torch.no_grad():
        expected = model(**inputs)[0]
        octavo.quantize(model, "w8a16")
        actual = model(**inputs)[0]
    assert 0 < relative_error(actual, expected) < 0.03
    floats = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert set(floats) <= output_heads(model)


def test_gpt2_layers_are_transposed_to_rows_of_output_channels() -> None:
    model = build(gpt2)
    float_weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    octavo.quantize(model, "w8a16")
    layer = model.transformer.h[0].attn.c_attn
    assert float_weight.shape == (32, 96) and layer.weight.shape == (96, 32) and layer.weight_scale.shape == (96, 1)
    error = (dequantize(layer.weight, layer.weight_scale) - float_weight.T).abs()
    assert bool((error <= layer.weight_scale * 0.5001).all())


def test_every_kind_at_once() -> None:
    model = Net().eval()
    x = torch.randint(0, 50, (2, 9))
    expected = model(x)
    octavo.quantize(model, "w8a16", include=["lm_head"])
    assert isinstance(model.conv, QuantConv) and isinstance(model.encoder.self_attn, QuantMultiheadAttention)
    assert relative_error(model(x), expected) < 0.03


def test_a_layer_in_two_places_computes_in_both() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    x = torch.randn(2, 8)
    twin = copy.deepcopy(model)
    octavo.quantize(model, "w8a16")
    assert model[2][0] is model[0]
    torch.testing.assert_close(model(x), with_dequantized_weights(twin, model)(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.LayerNorm(8)), "1-D: biases and norms stay float"),
        (nn.Sequential(nn.Embedding(8, 4)), "opt-in: include 'Embedding' to quantize it"),
        (nn.Sequential(nn.ReLU()), "it has no float parameters"),
    ],
)
def test_where_nothing_becomes_int8_it_is_said(model: nn.Module, reason: str) -> None:
    with pytest.warns(OctavoWarning, match=f"nothing of the model became int8: {reason}"):
        octavo.quantize(model, "w8a16")


class WithCompiledParts(nn.Module):
    """A layer of its own, then parts that torch.jit scripted and traced."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(8, 6)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
        self.traced = torch.jit.trace(nn.Linear(6, 4), torch.ones(1, 6))

    def forward(self, x: torch.Tensor) -> Any:
        return self.traced(self.scripted(self.own(x)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_parts_that_torch_jit_compiled_stay_float(tmp_path: Path) -> None:
    model, x = WithCompiledParts(), torch.randn(3, 8)
    twin, y = copy.deepcopy(model), model(x)
    stats = octavo.calibrate(model, [x])
    octavo.smooth(model, stats)
    assert torch.equal(model(x), y)
    with pytest.warns(OctavoWarning, match=r"compiled by torch\.jit, .* quantize before scripting or tracing"):
        report = octavo.quantize(model, "w8a8-static", stats=stats, repair=False)
    assert {row.name for row in report.rows if row.scheme} == {"own.weight"}
    assert 0 < relative_error(model(x), y) < 0.03
    assert octavo.compare(twin, model, [x]).sqnr_db > 30
    octavo.save(model, tmp_path / "out")
    assert torch.equal(octavo.load(tmp_path / "out", model=WithCompiledParts())(x), model(x))


def test_of_a_flat_parameter_it_is_said_what_comes_first() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        strategy = ShardingStrategy.NO_SHARD
        model = FullyShardedDataParallel(mlp(), sharding_strategy=strategy, device_id=torch.device("cpu"))
        with pytest.warns(
            OctavoWarning, match="FSDP keeps its weights in one flat parameter; quantize before wrapping"
        ):
            octavo.quantize(model, "w8a16")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w8a8-static"])
def test_gradients_pass_what_was_quantized_in_inference_mode(scheme: str) -> None:
    model, x = mlp(), torch.randn(5, 24, requires_grad=True)
    with torch.inference_mode():
        stats = octavo.calibrate(model, [x]) if scheme == "w8a8-static" else None
        octavo.quantize(model, scheme, stats=stats, repair=False)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


class TestRefusals:
    """A refused plan leaves the model as it was."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scheme": "w4a16"}, "unknown scheme 'w4a16'; valid: w8a16"),
            ({"ignore": ["modle.layers.0"]}, r"matches no layer of this model; did you mean .*model\.layers\.0"),
            ({"ignore": ["re:nothing"]}, "matches no layer"),
            ({"group_size": 5}, r"group_size=5 does not divide K=32"),
            ({"overrides": {"nowhere": Scheme()}}, "overrides: 'nowhere' matches no layer"),
        ],
    )
    def test_recipes_that_do_not_fit(self, options: dict[str, Any], message: str) -> None:
        model = build(llama)
        before = {name: (type(module), id(module)) for name, module in model.named_modules()}
        with pytest.raises(RecipeError, match=message):
            octavo.quantize(model, **{"scheme": "w8a16", **options})
        assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before

    def test_twice(self) -> None:
        model = mlp()
        octavo.quantize(model, "w8a16")
        with pytest.raises(QuantizeError, match="already holds int8"):
            octavo.quantize(model, "w8a16")

    def test_on_meta(self) -> None:
        with torch.device("meta"):
            model = mlp()
        with pytest.raises(QuantizeError, match=r"0\.weight is on the meta device.*quantize_checkpoint"):
            octavo.quantize(model, "w8a16")

    def test_a_lone_layer(self) -> None:
        with pytest.raises(QuantizeError, match=r"wrap it in nn\.Sequential"):
            octavo.quantize(nn.Linear(4, 4), "w8a16")

    def test_a_lazy_layer(self) -> None:
        with pytest.raises(QuantizeError, match=r"0\.weight belongs to a lazy layer .* run the model once"):
            octavo.quantize(nn.Sequential(nn.LazyLinear(4)), "w8a16")

    def test_without_a_suggestion_the_sentence_ends(self) -> None:
        with pytest.raises(RecipeError, match=r"'zzz' matches no layer of this model\. Expected .*\(Linear\)"):
            octavo.quantize(mlp(), "w8a16", ignore=["zzz"])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("at", [0, 2])
    def test_values_that_int8_cannot_hold_are_named_and_nothing_is_changed(self, value: float, at: int) -> None:
        model = mlp()
        with torch.no_grad():
            model[at].weight[3, 5] = value
        before = dict(model.named_modules())
        with pytest.raises(QuantizeError, match=rf"{at}\.weight: holds (NaN|inf)"):
            octavo.quantize(model, "w8a16")
        assert dict(model.named_modules()) == before
        octavo.quantize(model, "w8a16", ignore=[str(at)])

    def test_computed_weights_that_int8_cannot_hold_are_named_too(self) -> None:
        model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))
        with torch.no_grad():
            model[1].parametrizations.weight.original1[2] = 0.0  # 0 / 0
        with pytest.raises(QuantizeError, match=r"1\.weight: holds NaN"):
            octavo.quantize(model, "w8a16")
        assert type(model[0]) is nn.Conv1d


@pytest.mark.parametrize("model", [{"weight": torch.ones(2, 2)}, object(), None])
def test_what_is_no_module_is_told_so(model: Any) -> None:
    with pytest.raises(QuantizeError, match=f"model is a {type(model).__name__}, expected an nn.Module"):
        octavo.quantize(model, "w8a16")
    with pytest.raises(QuantizeError, match=f"model is a {type(model).__name__}, expected an nn.Module"):
        octavo.calibrate(model, [])


def test_a_class_is_no_module() -> None:
    for call in (lambda: octavo.quantize(Net, "w8a16"), lambda: octavo.coverage(Net)):  # type: ignore[arg-type]
        with pytest.raises(QuantizeError, match=r"model is the class Net, expected a module: call it, Net\(\.\.\.\)"):
            call()


def test_what_cannot_be_told_of_progress_is_refused_before_anything_changes() -> None:
    model, wrong = mlp(), True
    with pytest.raises(OctavoError, match=r"progress is True, expected a function .*\(steps done, steps in all\)"):
        octavo.quantize(model, "w8a16", progress=wrong)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear and type(model[2]) is nn.Linear


@pytest.mark.slow
def test_two_copies_of_a_model_never_exist() -> None:
    program = """
        import resource, torch, octavo
        from torch import nn
        layers = [nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(32)]
        model = nn.Sequential(*layers)
        del layers
        octavo.quantize(nn.Sequential(nn.Linear(8, 8)), "w8a16")
        size = sum(p.nbytes for p in model.parameters())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        octavo.quantize(model, "w8a16")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(size, after - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    size, rise = map(int, done.stdout.split())
    assert size > 1e9 and rise < 0.1 * size
