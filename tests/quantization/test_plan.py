"""Which layers become int8, which stay float, and the reasons."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import octavo
from octavo import OctavoWarning, Recipe, RecipeError, Scheme
from octavo.modules import QuantEmbedding, QuantLinear, QuantModule, TiedQuantLinear
from octavo.quantization.plan import output_heads, plan
from tests.nearness import relative_error
from tests.tiny_models import build, llama, tied_llama, tokens, whisper


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

    def test_a_subclass_that_multiplies_by_itself(self) -> None:
        class Doubled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return nn.functional.linear(input, 2 * self.weight, self.bias)

        class Renamed(nn.Linear):
            pass

        model = nn.ModuleDict({"a": Doubled(8, 8), "b": Renamed(8, 8)})
        assert self.reason(model, "a.weight") == "Doubled.forward reads its weight directly instead of calling it"
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

    def test_bare_weights_are_listed_and_warned_of(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.two = nn.Bilinear(8, 8, 8)
                self.experts = nn.Parameter(torch.randn(4, 8, 8))
                self.out = nn.Linear(8, 8)

        model = Model()
        with pytest.warns(OctavoWarning, match="stay float although the recipe did not ask"):
            report = octavo.quantize(model, "w8a16")
        reasons = {row.name: row.reason or "" for row in report.rows if not row.scheme}
        assert "Bilinear" in reasons["two.weight"] and "3-D" in reasons["experts"]
        assert type(model.two) is nn.Bilinear

    def test_a_layer_whose_weight_is_read_behind_its_back(self) -> None:
        class Multiplies(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(8, 8)
                self.out = nn.Linear(8, 80)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(x @ self.proj.weight.T)

        model = nn.Sequential(Multiplies())
        with pytest.warns(OctavoWarning, match=r"Multiplies\.forward"):
            octavo.quantize(model, "w8a16")
        assert type(model[0].proj) is nn.Linear and isinstance(model[0].out, QuantLinear)

    def test_no_warning_for_what_was_asked(self) -> None:
        octavo.quantize(build(llama), "w8a16", ignore=["model.layers.0"])  # warnings are errors


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
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return self.out_proj(nn.functional.linear(x, self.in_proj_weight)[..., :8])

        model = nn.ModuleDict({"a": Attention(8, 2)})
        with pytest.warns(OctavoWarning, match=r"Attention\.forward reads its weight directly"):
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

    def test_the_float_user_of_a_weight_is_named(self) -> None:
        """Wherever it stands; `table` has the weight's first name."""
        model = nn.ModuleDict({"table": nn.Linear(8, 8), "other": nn.Module()})
        model["other"].bare = model["table"].weight
        (decision,) = plan(model, Recipe())
        assert decision.reason == "shares its weight with other.bare, which stays float"

    @pytest.mark.parametrize(
        ("layer", "one", "other"),
        [
            (nn.GRU(8, 8, num_layers=2), "weight_ih_l0", "weight_ih_l1"),
            (nn.RNNCell(8, 8), "weight_ih", "weight_hh"),
            (nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "k_proj_weight", "v_proj_weight"),
        ],
    )
    def test_a_layer_that_shares_a_weight_with_itself_stays_float(self, layer: nn.Module, one: str, other: str) -> None:
        model = nn.ModuleDict({"a": copy.deepcopy(layer), "b": nn.Linear(8, 8)})
        setattr(model["a"], other, getattr(model["a"], one))
        with pytest.warns(OctavoWarning, match=rf"shares its weight with a\.{other}, which stays float"):
            octavo.quantize(model, "w8a16")
        assert type(model["a"]) is type(layer) and isinstance(model["b"], QuantLinear)

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
        """Nor does it make one table of two, or keep those that are from being one."""
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        model[1].bias, model[3].weight = model[0].bias, model[2].weight
        x = torch.randn(5, 8)
        expected = model(x)
        octavo.quantize(model, "w8a16")
        assert all(isinstance(layer, QuantLinear) for layer in model)
        assert model[1].bias is model[0].bias and model[3].weight is model[2].weight is not model[1].weight
        assert 0 < relative_error(model(x), expected) < 0.03

    def test_so_does_a_shared_bias_of_recurrent_layers(self) -> None:
        first, second = nn.LSTM(8, 8), nn.LSTM(8, 8)
        second.bias_ih_l0 = first.bias_ih_l0
        model = nn.ModuleList([first, second])
        x = torch.randn(5, 3, 8)
        expected = [layer(x)[0] for layer in model]
        assert octavo.quantize(model, "w8a16").quantized_fraction > 0.8
        for layer, before in zip(model, expected, strict=True):
            assert 0 < relative_error(layer(x)[0], before) < 0.03
        assert model[1].bias_ih_l0 is model[0].bias_ih_l0

    def test_linear_layers_that_share_are_in_groups_and_have_float_inputs(self) -> None:
        for options, shape, note in (
            ({"scheme": "w8a16", "group_size": 4}, (8, 2), None),
            ({"scheme": "w8a8"}, (8, 1), "its weight is shared: its inputs stay float"),
        ):
            model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
            model[1].weight = model[0].weight
            (row, _) = octavo.quantize(model, **options).rows
            assert model[1].weight_scale is model[0].weight_scale and model[0].weight_scale.shape == shape
            assert row.reason == note and str(row.scheme).startswith("w8a16")

    def test_a_table_that_cannot_be_int8_keeps_its_head_float_though_none_asked_for_it(self) -> None:
        model = nn.ModuleDict({"table": nn.Embedding(9, 8, max_norm=1.0), "head": nn.Linear(8, 9, bias=False)})
        model["head"].weight = model["table"].weight
        fates = {d.name: (d.scheme, d.reason, d.asked) for d in plan(model, Recipe.of("w8a16", include=["OutputHead"]))}
        assert fates == {
            "table": (None, "max_norm renormalizes the float table at every lookup", False),
            "head": (None, "shares its weight with table, which stays float", False),
        }

    def test_a_layer_within_one_that_stays_float_does_not(self) -> None:
        class Adapted(nn.Linear):
            def __init__(self) -> None:
                super().__init__(8, 8)
                self.adapter = nn.Linear(8, 8)

            def forward(self, input: Tensor) -> Tensor:
                return nn.functional.linear(input, 2 * self.weight) + self.adapter(input)

        outer, inner = plan(nn.ModuleList([Adapted()]), Recipe())
        assert (outer.scheme, inner.name, inner.scheme) == (None, "0.adapter", Scheme())

    def test_a_shared_table_has_one_scheme(self) -> None:
        """An embedding cannot be cut into groups, so its head is not either."""
        model = build(tied_llama)
        octavo.quantize(model, "w8a16", include=["OutputHead"], group_size=2)
        assert model.lm_head.weight_scale.shape == (96, 1)
        assert model.model.layers[0].mlp.up_proj.weight_scale.shape == (42, 16)
        model(tokens())


class TestMoreOfTransformers:
    def config(self, name: str, **options: Any) -> Any:
        transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'octavo[hf]'")
        return getattr(transformers, f"{name}Config")(**options)

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
            report = octavo.quantize(model, "w8a16", include=["Embedding", "OutputHead"])
            actual = model(ids).logits
        assert all(row.scheme for row in report.rows if "embed" in row.name)  # the learned positions too
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
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


class NamesItsHead(nn.Module):
    """As models of transformers do, some through a part that they have not: `head` is then an exception."""

    def __init__(self, head: nn.Module | type[Exception] | None) -> None:
        super().__init__()
        self.first, self.lm_head, self.said = nn.Linear(4, 4), nn.Linear(4, 9), head

    def get_output_embeddings(self) -> nn.Module | None:
        if self.said is not None and not isinstance(self.said, nn.Module):
            raise self.said
        return self.said


@pytest.mark.parametrize(
    ("said", "heads"),
    [
        (nn.Linear(4, 9), {"said"}),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9)), {"said.0", "said.1"}),
        (None, set()),
        (NotImplementedError, set()),
        (AttributeError, set()),
    ],
)
def test_output_heads_are_what_the_model_says_and_what_is_called_one(said: Any, heads: set[str]) -> None:
    assert output_heads(NamesItsHead(said)) == {"lm_head", *heads}


def test_int32_holds_the_sums_of_as_many_products_as_the_arithmetic_says() -> None:
    k = (2**31 - 1) // 128**2
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(k, 1), nn.Linear(k + 1, 1))
    assert [str(decision.scheme) for decision in plan(model, Recipe.of("w8a8"))] == ["w8a8", "w8a16"]


def test_the_plan_of_a_skeleton_is_that_of_the_model() -> None:
    model = build(tied_llama)
    with torch.device("meta"):
        skeleton = tied_llama()
    skeleton.tie_weights()
    recipe = Recipe.of("w8a16", include=["lm_head"], ignore=["re:.*q_proj"])
    assert plan(skeleton, recipe) == plan(model, recipe)


def test_a_weight_that_is_computed_stays_float_with_the_reason_that_it_is() -> None:
    model = nn.Sequential(nn.Linear(16, 8), weight_norm(nn.Linear(16, 8)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(OctavoWarning, match="stay float although the recipe did not ask for it"):
        report = octavo.quantize(model, "w8a16")
    reasons = {row.name: row.reason or "" for row in report.rows}
    assert "old-style weight_norm or pruning" in reasons["0.weight_orig"]
    assert "prune.remove" in reasons["0.weight_orig"]
    for part in ("original0", "original1"):
        assert "remove_parametrizations first" in reasons[f"1.parametrizations.weight.{part}"]


class AsksWhereItIs(nn.Module):
    """As many do for their device: torch raises StopIteration where there is no parameter."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.device))


@pytest.mark.filterwarnings("ignore:.*bytes stay float:octavo.OctavoWarning")
@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ((nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)), {"a.layers.1"}),
        ((nn.Linear(8, 8, bias=False), nn.LayerNorm(8)), set()),
        ((nn.Linear(8, 8),), set()),
        ((weight_norm(nn.Conv1d(8, 8, 3, bias=False)), nn.Linear(6, 2, bias=False)), {"a.layers.1"}),
        ((AsksWhereItIs(nn.Linear(8, 4, bias=False)), nn.Linear(4, 8, bias=False)), {"a.layers.0.layers.0"}),
    ],
)
def test_a_module_that_asks_for_its_first_parameter_has_one(layers: tuple[nn.Module, ...], kept: set[str]) -> None:
    model, x = nn.ModuleDict({"a": AsksWhereItIs(*copy.deepcopy(layers)), "b": nn.Linear(8, 8)}), torch.randn(2, 8, 8)
    report = octavo.quantize(model, "w8a16")
    assert {name for name, layer in model.named_modules() if type(layer) is nn.Linear} == kept
    assert all("takes the first parameter" in str(row.reason) for row in report.rows if row.name[:-7] in kept)
    assert model["a"](x).isfinite().all()


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
