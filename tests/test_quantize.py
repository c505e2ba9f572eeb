"""plan, install and quantize: which layers become int8, that nothing changes when the plan is refused, and memory."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import octavo
from octavo import OctavoWarning, QuantizeError, Recipe, RecipeError, Scheme
from octavo.modules import (
    QuantConv,
    QuantEmbedding,
    QuantLinear,
    QuantModule,
    QuantMultiheadAttention,
    TiedQuantLinear,
)
from octavo.norms import FusedRMSNorm
from octavo.primitives import dequantize
from octavo.quantize import output_heads, plan
from tests.tiny_models import TEXT, VISION, Net, bert, build, falcon, gpt2, llama, t5, tied_llama, tokens, vit, whisper


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))


def with_dequantized_weights(model: nn.Module, int8: nn.Module) -> nn.Module:
    """A copy of the float `model` whose weights are what the codes of `int8` stand for, by the definition."""
    twin = copy.deepcopy(model)
    for name, module in int8.named_modules():
        if isinstance(module, QuantLinear):
            layer = twin.get_submodule(name)
            weight = dequantize(module.weight, module.weight_scale)
            layer.weight.data = (weight if isinstance(layer, nn.Linear) else weight.T).to(layer.weight.dtype)
    return twin


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected.detach()).norm() / expected.detach().norm())


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


class TestWhatIsQuantized:
    def test_head_and_embedding_are_opt_in(self) -> None:
        model = build(llama)
        octavo.quantize(model, "w8a16")
        assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
        model = build(llama)
        octavo.quantize(model, "w8a16", include=["lm_head", "Embedding"])
        assert isinstance(model.lm_head, QuantLinear) and isinstance(model.model.embed_tokens, QuantEmbedding)
        assert octavo.coverage(model).quantized_fraction > 0.98

    @pytest.mark.parametrize("named", [["lm_head"], ["OutputHead"], ["Embedding"], ["model.embed_tokens"]])
    def test_a_tied_head_shares_one_table(self, named: list[str]) -> None:
        model = build(tied_llama)
        octavo.quantize(model, "w8a16", include=named)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not any("lm_head" in key for key in model.state_dict())

    def test_a_tied_table_cannot_be_ignored_by_halves(self) -> None:
        model = build(tied_llama)
        with pytest.raises(RecipeError, match="ignore both or neither"):
            octavo.quantize(model, "w8a16", include=["lm_head"], ignore=["model.embed_tokens"])

    def test_ignore_by_name_container_expression_kind_and_predicate(self) -> None:
        for ignore, stays in (
            (["model.layers.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj"}),
            (["model.layers.1"], {f"model.layers.1.{part}" for part in _PARTS}),
            (["re:.*down_proj"], {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
            ([lambda name, module: name.endswith("0.mlp.up_proj")], {"model.layers.0.mlp.up_proj"}),
        ):
            model = build(llama)
            report = octavo.quantize(model, "w8a16", ignore=ignore)
            floats = {name for name, module in model.named_modules() if type(module) is nn.Linear} - {"lm_head"}
            assert floats == stays
            assert all(row.asked for row in report.rows if row.name.removesuffix(".weight") in stays)
        model = build(whisper)
        octavo.quantize(model, "w8a16", ignore=["Conv1d"])
        assert type(model.model.encoder.conv1) is nn.Conv1d and isinstance(
            model.model.encoder.layers[0].fc1, QuantLinear
        )

    def test_overrides_give_a_layer_its_own_scheme(self) -> None:
        model = build(llama)
        octavo.quantize(model, "w8a16", overrides={"re:.*q_proj": Scheme.of("w8a16", group_size=8)})
        attention = model.model.layers[0].self_attn
        assert attention.q_proj.weight_scale.shape == (32, 4) and attention.k_proj.weight_scale.shape == (16, 1)

    def test_one_module_in_two_places_is_replaced_in_both(self) -> None:
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
        octavo.quantize(model, "w8a16")
        assert isinstance(model["a"], QuantLinear) and model["b"]["c"] is model["a"]

    def test_hooks_stay_registered(self) -> None:
        model, seen = mlp(), []
        model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
        model[0].register_forward_pre_hook(lambda module, args: None)
        octavo.quantize(model, "w8a16")
        model(torch.randn(2, 24))
        assert seen == [QuantLinear]

    def test_mode_and_bias_parameters_are_kept(self) -> None:
        model = mlp().eval()
        bias = model[0].bias
        bias.requires_grad_(False)
        octavo.quantize(model, "w8a16")
        assert model[0].bias is bias and not model[0].training


_PARTS = [
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
]


class TestWhatStaysFloat:
    def reason(self, model: nn.Module, name: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OctavoWarning)
            report = octavo.quantize(model, "w8a16", include=["Embedding"] if hasattr(model, "embedding") else [])
        (row,) = [row for row in report.rows if row.name == name]
        assert row.scheme is None and row.reason is not None
        return row.reason

    def test_a_subclass_with_its_own_forward(self) -> None:
        class Doubled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        class Renamed(nn.Linear):
            pass

        model = nn.ModuleDict({"a": Doubled(8, 8), "b": Renamed(8, 8)})
        assert "forward" in self.reason(model, "a.weight")
        assert isinstance(model["b"], QuantLinear)

    def test_a_parametrized_weight(self) -> None:
        model = nn.ModuleDict({"a": weight_norm(nn.Linear(8, 8)), "b": nn.Linear(8, 8)})
        with pytest.warns(OctavoWarning):
            octavo.quantize(model, "w8a16")
        assert not isinstance(model["a"], QuantModule) and isinstance(model["b"], QuantModule)

    def test_an_embedding_with_max_norm(self) -> None:
        model = nn.ModuleDict({"embedding": nn.Embedding(9, 8, max_norm=1.0), "b": nn.Linear(8, 8)})
        model.embedding = model["embedding"]
        assert "max_norm" in self.reason(model, "embedding.weight")

    def test_recurrent_and_bare_weights_are_listed_and_warned_of(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(8, 8)
                self.experts = nn.Parameter(torch.randn(4, 8, 8))
                self.out = nn.Linear(8, 8)

        model = Model()
        with pytest.warns(OctavoWarning, match="stay float although the recipe did not ask"):
            report = octavo.quantize(model, "w8a16")
        reasons = {row.name: row.reason or "" for row in report.rows if not row.scheme}
        assert "LSTM" in reasons["lstm.weight_ih_l0"] and "3-D" in reasons["experts"]
        assert type(model.lstm) is nn.LSTM

    def test_a_layer_whose_weight_is_read_behind_its_back(self) -> None:
        class Casts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(8, 8)
                self.out = nn.Linear(8, 80)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(self.proj(x.to(self.proj.weight.dtype)))

        model = nn.Sequential(Casts())
        with pytest.warns(OctavoWarning, match=r"Casts\.forward"):
            octavo.quantize(model, "w8a16")
        assert type(model[0].proj) is nn.Linear and isinstance(model[0].out, QuantLinear)

    def test_no_warning_for_what_was_asked(self) -> None:
        octavo.quantize(build(llama), "w8a16", ignore=["model.layers.0"])  # warnings are errors


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
    def test_values_that_int8_cannot_hold_are_named(self, value: float) -> None:
        model = mlp()
        with torch.no_grad():
            model[2].weight[3, 5] = value
        with pytest.raises(QuantizeError, match=r"2\.weight: holds (NaN|inf)"):
            octavo.quantize(model, "w8a16")


def test_the_plan_of_a_skeleton_is_that_of_the_model() -> None:
    model = build(tied_llama)
    with torch.device("meta"):
        skeleton = tied_llama()
    skeleton.tie_weights()
    recipe = Recipe.of("w8a16", include=["lm_head"], ignore=["re:.*q_proj"])
    assert plan(skeleton, recipe) == plan(model, recipe)


def test_progress_counts_to_the_end() -> None:
    steps: list[tuple[int, int]] = []
    octavo.quantize(mlp(), "w8a16", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]


def test_every_kind_at_once() -> None:
    model = Net().eval()
    x = torch.randint(0, 50, (2, 9))
    expected = model(x)
    octavo.quantize(model, "w8a16", include=["lm_head"])
    assert isinstance(model.conv, QuantConv) and isinstance(model.encoder.self_attn, QuantMultiheadAttention)
    assert relative_error(model(x), expected) < 0.03


class TestLayersThatHangTogether:
    def test_a_shared_weight_is_one_table_in_attention_too(self) -> None:
        first, second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
        second.out_proj.weight = first.out_proj.weight
        model = nn.ModuleList([first, second])
        octavo.quantize(model, "w8a16")
        assert isinstance(model[1].out_proj, TiedQuantLinear)
        assert model[1].out_proj.weight is model[0].out_proj.weight

    def test_attention_that_stays_float_keeps_the_layer_whose_weight_it_reads(self) -> None:
        class Attention(nn.MultiheadAttention):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        model = nn.ModuleDict({"a": Attention(8, 2)})
        with pytest.warns(OctavoWarning, match="a forward of its own"):
            report = octavo.quantize(model, "w8a16")
        (row,) = [row for row in report.rows if row.name == "a.out_proj.weight"]
        assert row.reason == "a, which reads its weight directly, stays float"

    @pytest.mark.filterwarnings("ignore::octavo.OctavoWarning")
    @pytest.mark.parametrize("ignored", ["first", "second"])
    def test_ignored_attention_is_left_alone_by_what_it_shares_with(self, ignored: str) -> None:
        """The layer of its that is shared is not ignored itself, but read by what is."""
        model = nn.ModuleDict({"first": nn.MultiheadAttention(8, 2), "second": nn.MultiheadAttention(8, 2)}).eval()
        model["second"].out_proj.weight = model["first"].out_proj.weight
        x = torch.randn(3, 2, 8)
        expected = model[ignored](x, x, x)[0]
        octavo.quantize(model, "w8a16", ignore=[lambda name, _: name == ignored])
        torch.testing.assert_close(model[ignored](x, x, x)[0], expected)

    def test_a_weight_shared_with_something_else_stays_float(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Linear(8, 8, bias=False)
                self.bare = self.table.weight
                self.rest = nn.Linear(8, 400)

        model = Model()
        report = octavo.quantize(model, "w8a16")
        assert type(model.table) is nn.Linear and isinstance(model.rest, QuantLinear)
        assert {row.name: row.reason for row in report.rows if not row.scheme and "bias" not in row.name} == {
            "bare": "Model is not a layer kind that octavo knows",
            "table.weight": "tied to bare",
        }

    def test_packed_projections_that_are_shared_stay_float(self) -> None:
        first, second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
        second.in_proj_weight = first.in_proj_weight
        model = nn.ModuleList([first, second]).eval()
        x = torch.randn(3, 2, 8)
        expected = model[1](x, x, x)[0]
        with pytest.warns(OctavoWarning, match="shares its weight"):
            octavo.quantize(model, "w8a16")
        torch.testing.assert_close(model[1](x, x, x)[0], expected)

    def test_a_shared_bias_keeps_nothing_from_being_quantized(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].bias = model[0].bias
        octavo.quantize(model, "w8a16")
        assert all(isinstance(layer, QuantLinear) for layer in model)
        assert model[1].bias is model[0].bias

    def test_a_shared_table_has_one_scheme(self) -> None:
        """An embedding cannot be cut into groups, so its head is not either."""
        model = build(tied_llama)
        octavo.quantize(model, "w8a16", include=["OutputHead"], group_size=2)
        assert model.lm_head.weight_scale.shape == (96, 1)
        assert model.model.layers[0].mlp.up_proj.weight_scale.shape == (42, 16)
        model(tokens())

    def test_a_layer_in_two_places_computes_in_both(self) -> None:
        shared = nn.Linear(8, 8)
        model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
        x = torch.randn(2, 8)
        twin = copy.deepcopy(model)
        octavo.quantize(model, "w8a16")
        assert model[2][0] is model[0]
        torch.testing.assert_close(model(x), with_dequantized_weights(twin, model)(x))


class TestMoreOfTransformers:
    def config(self, name: str, **options: Any) -> Any:
        transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'octavo[hf]'")
        return getattr(transformers, f"{name}Config")(**options)

    def test_clip_keeps_the_convolution_whose_dtype_it_asks_for(self) -> None:
        from transformers import CLIPVisionModel

        config = self.config("CLIPVision", **{**VISION, "image_size": 32})
        model = CLIPVisionModel(config).eval()
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = model(pixels).last_hidden_state
            with pytest.warns(OctavoWarning, match=r"CLIPVisionEmbeddings\.forward reads its weight directly"):
                report = octavo.quantize(model, "w8a16")
            actual = model(pixels).last_hidden_state
        (row,) = [row for row in report.rows if row.name.endswith("patch_embedding.weight")]
        assert row.scheme is None and row.reason is not None and "reads its weight directly" in row.reason
        assert 0 < relative_error(actual, expected) < 0.03

    def test_opt_shares_its_table(self) -> None:
        from transformers import OPTForCausalLM

        config = self.config(
            "OPT", vocab_size=96, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=32,
        )  # fmt: skip
        model = OPTForCausalLM(config).eval()
        ids = tokens()
        with torch.no_grad():
            expected = model(ids).logits
            with pytest.warns(OctavoWarning, match="OPTLearnedPositionalEmbedding has a forward of its own"):
                report = octavo.quantize(model, "w8a16", include=["Embedding", "OutputHead"])
            actual = model(ids).logits
        positions = next(row for row in report.rows if "embed_positions" in row.name)
        assert positions.reason is not None and "has a forward of its own" in positions.reason
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
        assert 0 < relative_error(actual, expected) < 0.03

    def test_gemma_scales_what_it_looks_up_so_its_shared_table_stays_float(self) -> None:
        from transformers import Gemma3ForCausalLM

        options = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
        model = Gemma3ForCausalLM(self.config("Gemma3Text", **options)).eval()
        ids = tokens()
        with torch.no_grad():
            expected = model(ids).logits
            with pytest.warns(OctavoWarning, match="Gemma3TextScaledWordEmbedding has a forward of its own"):
                octavo.quantize(model, "w8a16", include=["OutputHead"])
            actual = model(ids).logits
        assert type(model.lm_head) is nn.Linear
        assert 0 < relative_error(actual, expected) < 0.03

    def test_mamba_keeps_what_its_kernels_read(self) -> None:
        from transformers import MambaForCausalLM

        config = self.config("Mamba", vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2)
        model = MambaForCausalLM(config).eval()
        ids = tokens()
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            with pytest.warns(OctavoWarning, match=r"MambaMixer\.forward reads its weight directly"):
                octavo.quantize(model, "w8a16")
            actual = model(ids, use_cache=False).logits
        mixer = model.backbone.layers[0].mixer
        assert type(mixer.conv1d) is nn.Conv1d and isinstance(mixer.in_proj, QuantLinear)
        assert 0 < relative_error(actual, expected) < 0.03

    def test_bloom_is_quantized_whole(self) -> None:
        """It reads two weights of each block in a branch that its configuration switches off."""
        from transformers import BloomForCausalLM

        model = BloomForCausalLM(self.config("Bloom", vocab_size=96, hidden_size=32, n_layer=2, n_head=4)).eval()
        ids = tokens()
        with torch.no_grad():
            expected = model(ids).logits
            octavo.quantize(model, "w8a16")
            actual = model(ids).logits
        assert {name for name, m in model.named_modules() if type(m) is nn.Linear} == {"lm_head"}
        assert 0 < relative_error(actual, expected) < 0.03


def norms(model: nn.Module) -> dict[str, str]:
    """Name of each RMS norm of a tiny Llama -> its class."""
    return {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("norm")}


class TestNorms:
    """Those that octavo.norms recognizes are swapped for modules that compute the same."""

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
        octavo.quantize(norm, "w8a16")
        assert type(norm).__name__ == "LlamaRMSNorm"


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


def test_a_weight_that_is_computed_stays_float_with_the_reason_that_it_is() -> None:
    model = nn.Sequential(nn.Linear(16, 8), weight_norm(nn.Linear(16, 8)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(OctavoWarning, match="stay float although the recipe did not ask for it"):
        report = octavo.quantize(model, "w8a16")
    reasons = {row.name: row.reason or "" for row in report.rows}
    assert "old-style weight_norm or pruning" in reasons["0.weight_orig"]
    for part in ("original0", "original1"):
        assert "remove_parametrizations first" in reasons[f"1.parametrizations.weight.{part}"]


def normed() -> nn.Sequential:
    """Convolutions under weight_norm, whose weights are not as long as when they were drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(
        weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), weight_norm(nn.ConvTranspose1d(8, 6, 4, stride=2), dim=1)
    )
    for layer in (model[0], model[2]):
        with torch.no_grad():
            layer.parametrizations.weight.original0 *= 1.5 + torch.rand(layer.parametrizations.weight.original0.shape)
    return model.eval()


def test_a_convolution_under_weight_norm_is_quantized_as_the_weight_that_is_computed() -> None:
    model, plain, x = normed(), normed(), torch.randn(2, 4, 9)
    for layer in (plain[0], plain[2]):
        remove_parametrizations(layer, "weight")
    report = octavo.quantize(model, "w8a16")
    octavo.quantize(plain, "w8a16")
    assert torch.equal(model(x), plain(x))
    assert {row.name for row in report.rows if row.scheme} == {"0.weight", "2.weight"}
    assert not [name for name, _ in model.named_parameters() if "parametrizations" in name]


def test_one_that_is_ignored_stays_under_weight_norm() -> None:
    model = normed()
    before, report = model[0].weight.clone(), octavo.quantize(model, "w8a16", ignore=["0"])
    assert torch.equal(model[0].weight, before) and isinstance(model[2], QuantModule)
    reasons = {row.name: row.reason for row in report.rows if row.name.startswith("0.parametrizations")}
    assert set(reasons.values()) == {"ignored by '0'"} and len(reasons) == 2


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


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_rows_longer_than_int32_can_sum_keep_float_inputs(scheme: str, tmp_path: Path) -> None:
    """131072 = 512 channels of 16 x 16, flattened: one more than the products of codes that surely fit."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(131072, 4), nn.Linear(4, 3)).bfloat16()
    x = torch.randn(2, 512, 16, 16).bfloat16()
    expected = model(x)
    stats = octavo.calibrate(model, [x]) if scheme == "w8a8-static" else None
    report = octavo.quantize(model, scheme, stats=stats)
    long, short = (next(row for row in report.rows if row.name == f"{name}.weight") for name in "12")
    assert long.scheme == "w8a16" and long.reason and "int32" in long.reason
    assert short.scheme == scheme
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
    octavo.save(model, tmp_path / "saved")
    again = nn.Sequential(nn.Flatten(), nn.Linear(131072, 4), nn.Linear(4, 3)).bfloat16()
    assert torch.equal(octavo.load(tmp_path / "saved", model=again)(x), model(x))


@pytest.mark.parametrize("model", [{"weight": torch.ones(2, 2)}, object(), None])
def test_what_is_no_module_is_told_so(model: Any) -> None:
    with pytest.raises(QuantizeError, match=f"model is a {type(model).__name__}, expected an nn.Module"):
        octavo.quantize(model, "w8a16")
    with pytest.raises(QuantizeError, match=f"model is a {type(model).__name__}, expected an nn.Module"):
        octavo.calibrate(model, [])
