"""Stacks of experts on disk: one 2-D weight for each expert and projection, under the names that others read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

import octavo
from octavo.errors import CheckpointError
from octavo.formats.experts import Part, expert_parts
from octavo.modules import QuantExperts
from octavo.primitives import dequantize, quantize_weight
from tests import tiny_models
from tests.test_watched_experts import Around
from tests.tiny_models import build

# gpt-oss's experts have no names that others would look for, which is no matter here.
pytestmark = pytest.mark.filterwarnings("ignore:int8 layers of kind Experts:octavo.errors.OctavoWarning")

MODELS = [tiny_models.mixtral, tiny_models.qwen3_moe, tiny_models.gpt_oss]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(18).view(2, 9)).logits


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, make: Callable[..., Any], scheme: str) -> None:
    model = build(make)
    octavo.quantize(model, scheme)
    octavo.save(model, tmp_path / "one")
    loaded = octavo.load(tmp_path / "one")
    assert sum(isinstance(module, QuantExperts) for module in loaded.modules()) == 2
    assert torch.equal(logits(loaded), logits(model))
    octavo.save(loaded, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_int8_experts_are_not_initialized_from_around_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3-Omni would do it for experts that transformers finds missing in the files."""
    modeling = transformers.models.mixtral.modeling_mixtral
    initialize = modeling.MixtralPreTrainedModel._init_weights

    def and_experts(self: Any, module: nn.Module) -> None:
        initialize(self, module)
        if isinstance(module, modeling.MixtralSparseMoeBlock):
            initialization.normal_(module.experts.gate_up_proj)

    monkeypatch.setattr(modeling.MixtralPreTrainedModel, "_init_weights", and_experts)
    model = build(tiny_models.mixtral)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "int8")
    assert torch.equal(logits(octavo.load(tmp_path / "int8")), logits(model))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_from_file_to_file(tmp_path: Path, make: Callable[..., Any], scheme: str) -> None:
    """Experts one by one (Mixtral, Qwen) and in one piece (gpt-oss) on disk become what the loaded model becomes."""
    model = build(make, torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    report = octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "stream", scheme)
    octavo.quantize(model, scheme)
    octavo.save(model, tmp_path / "memory")
    one, two = weights(tmp_path / "memory"), weights(tmp_path / "stream")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("memory", "stream")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert not any(row.scheme is None and len(row.shape) == 3 for row in report.rows)


@pytest.mark.parametrize(
    ("make", "first"),
    [(tiny_models.jetmoe, "model.layers.0.self_attention.experts.input_linear.0"),
     (tiny_models.longcat, "model.layers.0.mlp.experts.0.gate_proj"),
     (tiny_models.dbrx, "transformer.blocks.0.ffn.experts.mlp.0.w1")],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_experts_that_are_known_by_what_they_do(
    tmp_path: Path, make: Callable[..., Any], first: str, scheme: str
) -> None:
    """Loaded as they were saved, and the same from file to file: LongCat's lie there one by one, JetMoe's
    and DBRX's in one."""
    model = build(make)
    model.save_pretrained(tmp_path / "float")
    report = octavo.quantize(model, scheme)
    assert report.unasked_fraction == 0
    octavo.save(model, tmp_path / "memory")
    there = weights(tmp_path / "memory")
    config = json.loads((tmp_path / "memory/config.json").read_text())["quantization_config"]
    assert (config["quant_method"] == "octavo") == (make is not tiny_models.longcat), "others know LongCat's names only"
    assert f"{first}.weight_scale" in there
    assert torch.equal(logits(octavo.load(tmp_path / "memory")), logits(model))
    octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "stream", scheme)
    streamed = weights(tmp_path / "stream")
    assert there.keys() == streamed.keys() and all(torch.equal(there[name], streamed[name]) for name in there)


@pytest.mark.parametrize(("make", "expert"), [(tiny_models.mixtral, "block_sparse_moe.experts.1.w1"),
                                             (tiny_models.qwen3_moe, "mlp.experts.1.gate_proj")])  # fmt: skip
def test_plain_transformers_loads_them(tmp_path: Path, make: Callable[..., Any], expert: str) -> None:
    """By compressed-tensors, dequantized: the logits of our int8 model, to the rounding of sums."""
    model = build(make)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    assert f"model.layers.0.{expert}.weight_packed" in weights(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert any(name.endswith(".gate") for name in config["ignore"]), "vLLM's routers are linear layers"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.set_experts_implementation("eager")  # its grouped kernel wants sizes that are multiples of 16 bytes
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_gate_and_up_are_the_right_rows_of_the_right_axis(tmp_path: Path) -> None:
    """gpt-oss holds [E, H, 2I], gate and up in turn: an expert's gate is every other *column*."""
    model = build(tiny_models.gpt_oss)
    experts = model.model.layers[0].mlp.experts
    stack = experts.gate_up_proj.detach().clone()  # [E, H, 2I]
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    there = weights(tmp_path / "out")
    from octavo.formats.compressed_tensors import decode

    for name, first in (("gate_proj", 0), ("up_proj", 1)):
        stem = f"model.layers.0.mlp.experts.2.{name}.weight"
        codes, scale, _ = decode(stem, {key: t for key, t in there.items() if key.startswith(stem)})
        expected_codes, expected_scale = quantize_weight(stack[2, :, first::2].T)
        assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "octavo"


@pytest.mark.parametrize("make", MODELS)
def test_a_model_within_the_one_that_was_saved_and_around_it(tmp_path: Path, make: Callable[..., Any]) -> None:
    """On disk all names of the one begin with "model.", those of the other do not."""
    model = build(make)
    octavo.quantize(model, "w8a16")
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    expected = hidden(model.model)
    base, whole = type(model.model), type(model)
    loaded = base.from_pretrained(tmp_path / "whole")
    assert torch.equal(hidden(loaded), expected)
    assert torch.equal(hidden(whole.from_pretrained(tmp_path / "base").model), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(hidden(base.from_pretrained(tmp_path / "again")), expected)


@pytest.mark.filterwarnings("ignore:merged float tensors:octavo.errors.OctavoWarning")
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_experts_that_are_float_in_one_layer_and_int8_in_another(
    tmp_path: Path, make: Callable[..., Any], scheme: str
) -> None:
    """Those of the one are merged by their library's rules, those of the other not."""
    model = build(make)
    model.set_experts_implementation("eager")  # the grouped kernel wants sizes that are multiples of 16 bytes
    model.save_pretrained(tmp_path / "float")
    ignore = [r"re:.*layers\.0\.mlp\.experts"]
    octavo.quantize(model, scheme, ignore=ignore)
    octavo.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "theirs")
    report = octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "streamed", scheme, ignore=ignore)
    own = [row for row in report.rows if ".0.mlp.experts" in row.name or "0.block_sparse_moe.experts" in row.name]
    stacks = [row for row in own if not row.name.endswith("bias")]
    assert stacks and all(row.asked and row.reason == f"ignored by {ignore[0]!r}" for row in stacks)
    octavo.load(tmp_path / "saved").save_pretrained(tmp_path / "again")
    for folder in ("saved", "theirs", "streamed", "again"):
        loaded = octavo.load(tmp_path / folder, experts_implementation="eager")
        assert torch.equal(logits(loaded), logits(model)), folder
    base = type(model.model).from_pretrained(tmp_path / "theirs", experts_implementation="eager")
    assert torch.equal(hidden(base), hidden(model.model))


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(18).view(2, 9)).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*is not a layer kind that octavo knows:octavo.errors.OctavoWarning")
def test_parts_whose_names_the_library_changes(tmp_path: Path) -> None:
    """HY4's experts are kept whole by its library, which calls each `gate_proj` otherwise on disk: those of experts,
    cut by octavo, too."""
    library = pytest.importorskip("transformers.models.hy_v4")
    own = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "mlp_layer_types": ["sparse", "sparse"]}
    config = library.HYV4Config(
        **{
            **tiny_models.TEXT,
            "num_key_value_heads": 4,
            **own,
            **heads,
            **index,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )
    model = build(lambda: library.HYV4ForCausalLM(config))
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "saved")
    expected = logits(model)
    loaded = octavo.load(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("saved", "again"):
        assert torch.equal(logits(octavo.load(tmp_path / folder)), expected)


class ConditionalFeedForward(nn.Module):
    """gpt-fast's: w1, w3 [E, I, D], w2 [E, D, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.randn(4, *shape)) for shape in ((6, 8), (8, 6), (6, 8)))

    def forward(self, x: Tensor, expert_indices: Tensor) -> Tensor:
        x1 = F.silu(torch.einsum("ti,taoi -> tao", x, self.w1[expert_indices]))
        x3 = torch.einsum("ti, taoi -> tao", x, self.w3[expert_indices])
        return torch.einsum("tao, taio -> tai", (x1 * x3), self.w2[expert_indices])


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = ConditionalFeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, torch.tensor([[0, 3], [1, 0], [2, 3]])).sum(1)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = Own()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    assert "experts.3.w2.weight_packed" in weights(tmp_path / "out")
    with torch.device("meta"):
        empty = Own()
    loaded = octavo.load(tmp_path / "out", model=empty)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))
    truth = Own()
    with torch.no_grad():
        for name in ("w1", "w2", "w3"):
            getattr(truth.experts, name).copy_(
                torch.stack([dequantize(c, s) for c, s in zip(*model.experts.codes()[name], strict=True)])
            )
    torch.testing.assert_close(model(x), truth(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_experts_of_ones_own_whose_weights_a_child_holds(tmp_path: Path, scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Around(), nn.Linear(32, 8))
    routing = torch.randn(6, 32), torch.randint(5, (6, 2)), torch.rand(6, 2)
    octavo.quantize(model, scheme)
    octavo.save(model, tmp_path / "out")
    assert {"0.inner.4.up.weight_scale", "0.inner.0.down.weight_scale"} <= weights(tmp_path / "out").keys()
    for build_on in ("cpu", "meta"):
        with torch.device(build_on):
            fresh = nn.Sequential(Around(), nn.Linear(32, 8))
        loaded = octavo.load(tmp_path / "out", model=fresh)
        assert torch.equal(loaded[0](*routing), model[0](*routing))
        assert octavo.coverage(loaded) == octavo.coverage(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_model_within_dbrx_and_around_it(tmp_path: Path) -> None:
    model = build(tiny_models.dbrx)
    octavo.quantize(model, "w8a16")
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "base")
    expected = hidden(model.transformer)
    assert torch.equal(hidden(type(model.transformer).from_pretrained(tmp_path / "whole")), expected)
    assert torch.equal(hidden(type(model).from_pretrained(tmp_path / "base").transformer), expected)


def test_parts_are_all_rows_once() -> None:
    for make in (*MODELS, tiny_models.dbrx):
        model = build(make)
        parts = expert_parts(model)
        rows: dict[str, list[int]] = {}
        for part in parts.values():
            rows.setdefault(part.param, []).extend(part.rows.tolist())
        for param, found in rows.items():
            total = math.prod(model.get_parameter(param).shape)
            assert sorted(found) == list(range(len(found))) and total % len(found) == 0


@pytest.mark.parametrize("make", MODELS)
def test_no_more_than_one_layers_rows_are_numbered_at_once(make: Callable[..., Any]) -> None:
    """A large mixture has a hundred million rows: their numbers would be gigabytes, kept as long as its files are."""
    model = build(make)
    calls: list[set[str]] = []

    def on_disk(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append({name.rpartition(".")[0] for name in tensors})
        return dict(transformers.core_model_loading.revert_weight_conversion(model, tensors))

    parts = expert_parts(model, on_disk)
    assert len(calls) == 2 and all(len(stacks) <= 1 for stacks in calls)
    assert not any(isinstance(value, Tensor) for part in parts.values() for value in vars(part).values())


@pytest.mark.parametrize("rows", [[], [5], [3, 4, 5], [1, 3, 5], [3, 3], [5, 3, 1], [1, 2, 4]])
def test_rows_of_any_order_are_kept(rows: list[int]) -> None:
    kept = Part.of_rows("experts", "stack", torch.tensor(rows, dtype=torch.int64), True).rows
    assert kept.tolist() == rows and kept.dtype == torch.int64


def damaged(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PART = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: [t.pop(f"{PART}_{part}") for part in ("packed", "scale", "shape")],
            "is missing or float, and others",
        ),
        (lambda t: t.pop(f"{PART}_scale"), f"has no tensor '{PART}_scale'"),
        (lambda t: t[f"{PART}_scale"].fill_(torch.nan), f"{PART}_scale: holds NaN or inf"),
        (lambda t: t[f"{PART}_shape"].copy_(torch.tensor([1, 2])), r"has shape \[1, 2\], the model's has"),
    ],
)
def test_damage_is_named(tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    model = build(tiny_models.mixtral)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    damaged(tmp_path / "out", edit)
    with pytest.raises(CheckpointError, match=message):
        octavo.load(tmp_path / "out")


def test_experts_in_groups_of_another_program_are_refused(tmp_path: Path) -> None:
    model = build(tiny_models.mixtral)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    damaged(tmp_path / "out", lambda t: t.update({f"{PART}_scale": t[f"{PART}_scale"].repeat(1, 2)}))
    config = json.loads((tmp_path / "out/config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= {"strategy": "group", "group_size": 16}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a scale for each 16 of its 32 columns, and experts run with one a row"):
        octavo.load(tmp_path / "out")


def test_a_float_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    build(tiny_models.mixtral).save_pretrained(tmp_path / "float")
    damaged(tmp_path / "float", lambda t: t.pop(PART))
    with pytest.raises(CheckpointError, match="parameters of MixtralForCausalLM are missing"):
        octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "out", "w8a16")
    assert not (tmp_path / "out").exists()
