"""Quantizing from file to file: the same bits as in memory, one tensor at a time, and nothing left after an error."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import octavo
from octavo import CheckpointError, OctavoWarning, QuantizeError, RecipeError
from octavo.formats.checkpoint import CheckpointReader, CheckpointWriter
from tests import tiny_models
from tests.tiny_models import Net, build, llama

ROOT = Path(__file__).parents[2]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_checkpoint(a: Path, b: Path, unknown: Iterable[str] = ()) -> None:
    """`unknown`: tensors of the source that the model has no use for, copied from file to file."""
    one, other = tensors_of(a), tensors_of(b)
    assert {*one, *unknown} == {*other}
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (a, b)]
    assert configs[0] == configs[1]


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def both_ways(
    folder: Path, source: Path, unknown: Iterable[str] = (), scheme: str = "w8a16", **options: Any
) -> nn.Module:
    """Quantize `source` in memory and from file to file, into folder/memory and folder/stream. Returns the model."""
    before = digests(source)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", OctavoWarning
        )  # what stays float, or is for octavo only, is not the matter here
        model = octavo.load(source)
        coverage = octavo.quantize(model, scheme, **options)
        octavo.save(model, folder / "memory")
        streamed = octavo.quantize_checkpoint(source, folder / "stream", scheme, **options)
    assert digests(source) == before
    assert_same_checkpoint(folder / "memory", folder / "stream", unknown)
    # Rows of files and of the model differ where experts are stacked, and where a tied layer has no tensor of its own.
    for one, other in ((streamed, coverage), (coverage, streamed)):
        schemes = {row.scheme for row in one.rows if row.bytes_after}
        assert schemes == {row.scheme for row in other.rows if row.bytes_after}
    assert _int8_elements(streamed) == _int8_elements(coverage)
    return model


def _int8_elements(report: octavo.Coverage) -> int:
    return sum(math.prod(row.shape) for row in report.rows if row.scheme and row.bytes_after)


def source_of(folder: Path, make: Callable[..., Any], dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    build(make, dtype, **changes).save_pretrained(folder / "source")
    return folder / "source"


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_models.llama, {}),
        (tiny_models.llama, {"include": ["lm_head"]}),
        (tiny_models.llama, {"ignore": ["re:.*down_proj"]}),
        (tiny_models.llama, {"group_size": 2}),
        (tiny_models.llama, {"overrides": {"re:.*mlp": octavo.Scheme.of("w8a16", group_size=2)}}),
        (tiny_models.tied_llama, {}),
        (tiny_models.tied_llama, {"include": ["lm_head"]}),
        (tiny_models.tied_llama, {"include": ["Embedding"]}),
        (tiny_models.gpt2, {}),
        (tiny_models.gpt2, {"include": ["lm_head"], "group_size": 4}),
        (tiny_models.bert, {}),
        (tiny_models.bert, {"include": ["Embedding"]}),
        (tiny_models.bert_lm, {}),
        (tiny_models.t5, {}),
        (tiny_models.t5, {"include": ["Embedding"]}),
        (tiny_models.vit, {}),
        (tiny_models.whisper, {}),
        (tiny_models.whisper, {"include": ["Embedding"]}),
        (tiny_models.llava, {}),
        (tiny_models.llava, {"overrides": {"re:.*mlp": octavo.Scheme.of("w8a16", group_size=2)}}),
        (tiny_models.mixtral, {}),
        (tiny_models.qwen3_vl_moe, {}),
        (tiny_models.gte, {}),
        (tiny_models.gte, {"scheme": "w8a8", "ignore": ["re:.*[qv]_proj"]}),
        (tiny_models.llama, {"scheme": "w8a8"}),
        (tiny_models.llama, {"scheme": "w8a8", "overrides": {"re:.*mlp": octavo.Scheme.of("w8a16", group_size=2)}}),
        (tiny_models.gpt2, {"scheme": "w8a8"}),
        (tiny_models.t5, {"scheme": "w8a8", "include": ["Embedding"]}),
        (tiny_models.whisper, {"scheme": "w8a8"}),
        (tiny_models.llava, {"scheme": "w8a8", "ignore": ["re:.*vision_tower"]}),
        (tiny_models.mixtral, {"scheme": "w8a8"}),
        (tiny_models.dbrx, {}),
        (tiny_models.dbrx, {"overrides": {"re:.*blocks.1.*experts": octavo.Scheme.of("w8a8")}}),
        (tiny_models.dbrx, {"ignore": ["re:.*blocks.1.*experts"]}),
        (tiny_models.mixtral, {"scheme": "w8a8", "overrides": {"re:.*experts": octavo.Scheme.of("w8a16")}}),
        (tiny_models.mixtral, {"overrides": {"re:.*layers.1.*experts": octavo.Scheme.of("w8a8")}}),
        (tiny_models.encodec, {}),
        (tiny_models.encodec, {"ignore": ["re:decoder"]}),
        (tiny_models.bit, {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else ",".join(map(str, value)) or "-",
)
def test_from_file_to_file_is_quantize_and_save(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any]
) -> None:
    model = both_ways(tmp_path, source_of(tmp_path, make), **options)
    loaded = octavo.load(tmp_path / "stream")
    assert type(loaded) is type(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert octavo.coverage(loaded) == octavo.coverage(model)  # nothing silently float, and the same reasons


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_in_every_dtype_sharded_or_not(tmp_path: Path, dtype: torch.dtype, shards: str) -> None:
    build(llama, dtype).save_pretrained(tmp_path / "source", max_shard_size=shards)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) == 1 or shards == "20KB"
    both_ways(tmp_path, tmp_path / "source")
    octavo.quantize_checkpoint(tmp_path / "source", tmp_path / "shards", "w8a16", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 3
    assert_same_checkpoint(tmp_path / "stream", tmp_path / "shards")


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.mixtral, tiny_models.gte, tiny_models.encodec])
@pytest.mark.parametrize(
    ("dtype", "loaded"), [(torch.float32, "bfloat16"), (torch.float16, "bfloat16"), (torch.bfloat16, "float32")]
)
def test_in_the_dtype_that_the_config_says(
    tmp_path: Path, make: Callable[..., Any], dtype: torch.dtype, loaded: str
) -> None:
    """Readers cast what they read to it, scales too, which codes that were fitted to others do not survive."""
    source = source_of(tmp_path, make, dtype)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": loaded}))
    model = both_ways(tmp_path, source)
    assert str(next(model.parameters()).dtype) == f"torch.{loaded}"


def test_what_a_model_keeps_in_fp32(tmp_path: Path) -> None:
    both_ways(tmp_path, source_of(tmp_path, tiny_models.t5, torch.float16))
    scale = load_file(tmp_path / "stream/model.safetensors")["encoder.block.0.layer.1.DenseReluDense.wo.weight_scale"]
    assert scale.dtype == torch.float32


def test_a_checkpoint_with_legacy_names(tmp_path: Path) -> None:
    """BERT as it was first published: with a prefix, LayerNorm.gamma and LayerNorm.beta, and the pretraining heads."""
    source = source_of(tmp_path, tiny_models.bert, torch.float32)
    new = load_file(source / "model.safetensors")
    legacy = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in new.items()
    }
    assert any("gamma" in name for name in legacy)
    save_file({**legacy, "cls.seq_relationship.bias": torch.zeros(2)}, source / "model.safetensors")
    report = octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16")
    stored = tensors_of(tmp_path / "out")
    assert "bert.embeddings.LayerNorm.gamma" in stored
    assert "bert.encoder.layer.0.attention.self.query.weight_packed" in stored
    assert "cls.seq_relationship.bias" in stored
    (unknown,) = (row for row in report.rows if row.name == "cls.seq_relationship.bias")
    assert "not a parameter of BertModel" in str(unknown.reason)
    expected = build(tiny_models.bert)
    octavo.quantize(expected, "w8a16")
    loaded = octavo.load(tmp_path / "out")
    ids = tiny_models.tokens()
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, expected(ids).last_hidden_state)


@pytest.mark.filterwarnings("ignore:.*(read by octavo only|bytes stay float):octavo.OctavoWarning")
def test_weight_norm_under_the_names_that_it_had(tmp_path: Path) -> None:
    source = source_of(tmp_path, tiny_models.encodec, torch.float32)
    both_ways(tmp_path, source)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = load_file(source / "model.safetensors")
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert sum(key.endswith("weight_g") for key in tensors) > 10
    save_file(tensors, source / "model.safetensors")
    octavo.quantize_checkpoint(source, tmp_path / "old", "w8a16")
    assert_same_checkpoint(tmp_path / "stream", tmp_path / "old")


@pytest.mark.filterwarnings("ignore:.*(read by octavo only|bytes stay float):octavo.OctavoWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_under_the_older_weight_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.utils.parametrizations, "weight_norm")  # then the class takes the other
    source = source_of(tmp_path, tiny_models.encodec, torch.float32)
    assert sum(name.endswith("weight_g") for name in load_file(source / "model.safetensors")) > 10
    both_ways(tmp_path, source)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "1 parameters of EncodecModel are missing.*original0"),
        (lambda tensors, name: tensors.update({name: torch.ones(3, 1, 1)}), r"original0' has shape \[3, 1, 1\]"),
    ],
    ids=["missing", "another shape"],
)
def test_half_of_a_weight_under_weight_norm(tmp_path: Path, edit: Callable[..., object], message: str) -> None:
    source = source_of(tmp_path, tiny_models.encodec, torch.float32)
    tensors = load_file(source / "model.safetensors")
    edit(tensors, next(name for name in tensors if name.endswith("original0")))
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("include", [[], ["lm_head"]], ids=str)
def test_a_tied_weight_that_the_source_holds_twice_is_kept_once(tmp_path: Path, include: list[str]) -> None:
    source = source_of(tmp_path, tiny_models.tied_llama)
    tensors = load_file(source / "model.safetensors")
    # "lm_head" sorts first: the name must be the model's choice and not the file's.
    save_file({"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), **tensors}, source / "model.safetensors")
    both_ways(tmp_path, source, include=include)
    assert not any("lm_head" in name for name in tensors_of(tmp_path / "stream"))


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, tiny_models.tied_llama)
    tensors = load_file(source / "model.safetensors")
    save_file({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1, **tensors}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' and 'model.embed_tokens.weight' differ"):
        octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("meta", [False, True], ids=["built", "meta"])
def test_a_module_of_ones_own(tmp_path: Path, meta: bool) -> None:
    model = Net().eval()
    stored = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(stored, tmp_path / "net.safetensors")
    with torch.device("meta" if meta else "cpu"):
        skeleton = Net()
    octavo.quantize_checkpoint(tmp_path / "net.safetensors", tmp_path / "stream", "w8a16", model=skeleton)
    assert not any(isinstance(module, octavo.modules.QuantModule) for module in skeleton.modules())
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "memory")
    assert_same_checkpoint(tmp_path / "memory", tmp_path / "stream")
    loaded = octavo.load(tmp_path / "stream", model=Net()).eval()
    inputs = torch.randint(0, 50, (2, 9))
    assert torch.equal(loaded(inputs), model(inputs))


@pytest.mark.parametrize("scheme", ["o1", "o2"])
def test_weights_per_tensor_are_the_same_bits_too(tmp_path: Path, scheme: str) -> None:
    model = both_ways(tmp_path, source_of(tmp_path, tiny_models.gpt2), scheme=scheme)
    loaded = octavo.load(tmp_path / "stream")
    ids = tiny_models.tokens()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scheme", ["w8a8-static", "o3"])
def test_static_inputs_need_a_model_that_runs(tmp_path: Path, scheme: str) -> None:
    source = source_of(tmp_path, llama)
    with pytest.raises(
        QuantizeError, match=rf"q_proj: {scheme} has static inputs.*octavo\.calibrate\(model, batches\)"
    ):
        octavo.quantize_checkpoint(source, tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()


# -- what comes with it -----------------------------------------------------------------------------------------------


def test_companions_and_config_come_along(tmp_path: Path) -> None:
    source = source_of(tmp_path, llama)
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        (source / name).write_text(name)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "mine": [1], "quantization_config": None}))
    octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16")
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == {**config, "mine": [1]}


def test_the_report_is_in_bytes_on_disk(tmp_path: Path) -> None:
    source = source_of(tmp_path, llama)
    report = octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16")
    assert report.bytes_before == sum(tensor.nbytes for tensor in tensors_of(source).values())
    stored = {n: t for n, t in tensors_of(tmp_path / "out").items() if not n.endswith("_shape")}
    padding = sum(  # the last word of a row may be partly empty
        row.shape[0] * (-row.shape[1] % 4) for row in report.rows if row.scheme
    )
    assert report.bytes_after == sum(tensor.nbytes for tensor in stored.values()) - padding
    assert octavo.Coverage.from_dict(json.loads((tmp_path / "out/octavo_coverage.json").read_text())) == report


@pytest.mark.filterwarnings("ignore:53.3% of the model's bytes stay float")
def test_a_complex_layer_is_listed_as_in_memory(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))
    (tmp_path / "source").mkdir()
    save_file(model.state_dict(), tmp_path / "source/model.safetensors")
    streamed = octavo.quantize_checkpoint(tmp_path / "source", tmp_path / "out", "w8a16", model=model)
    rows = {row.name: (row.scheme, row.reason) for row in streamed.rows}
    assert rows == {row.name: (row.scheme, row.reason) for row in octavo.quantize(model, "w8a16").rows}


def test_steps_are_reported(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    octavo.quantize_checkpoint(
        source_of(tmp_path, llama), tmp_path / "out", "w8a16", progress=lambda *step: steps.append(step)
    )
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))


def test_float_experts_are_said_to_be_for_octavo_only(tmp_path: Path) -> None:
    source = source_of(tmp_path, tiny_models.mixtral)
    with pytest.warns(OctavoWarning) as caught:
        octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16", ignore=["Experts"])
    messages = [str(warning.message) for warning in caught]
    assert any("merged float tensors" in message and "read by octavo only" in message for message in messages)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "octavo"
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in config["ignore"]


def test_layers_left_alone_go_by_both_their_names(tmp_path: Path) -> None:
    octavo.quantize_checkpoint(source_of(tmp_path, tiny_models.llava), tmp_path / "out", "w8a16")
    ignore = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "language_model.lm_head"} <= set(ignore)  # transformers' name, and that on disk, for vLLM


# -- errors -----------------------------------------------------------------------------------------------------------


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def edit_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit_file(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        edit(tensors)
        save_file(tensors, source / "model.safetensors")

    return edit_file


def truncate(source: Path) -> None:
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def lead_out(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "secret.safetensors")
    weight_map = dict.fromkeys(load_file(source.parent / "secret.safetensors"), "../secret.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def miss_a_shard(source: Path) -> None:
    weight_map = dict.fromkeys(load_file(source / "model.safetensors"), "model.safetensors")
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(weight_map, "model-00001-of-00002.safetensors") | {"more": "model-2.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, CheckpointError, r"model\.safetensors: is not a whole safetensors file"),
        (lead_out, CheckpointError, r"leads out of the folder"),
        (miss_a_shard, CheckpointError, r"1 of its 2 shards are missing: model-2\.safetensors"),
        (edit_tensors(lambda t: t.pop(UP)), CheckpointError, rf"1 parameters of LlamaForCausalLM are missing.*'{UP}'"),
        (edit_tensors(lambda t: t.update({UP: t[UP][:, :8].clone()})), CheckpointError, rf"'{UP}' has shape \[42, 8\]"),
        (
            edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
            CheckpointError,
            r"'model\.norm\.weight' has shape \[3\], the model's \[32\]",
        ),
        (
            edit_tensors(lambda t: t.update({UP: t[UP].long()})),
            CheckpointError,
            rf"'{UP}' is torch\.int64, expected a fl",
        ),
        (edit_tensors(fill(UP, torch.nan)), QuantizeError, rf"{UP}: holds NaN"),
        (edit_tensors(fill(UP, -torch.inf)), QuantizeError, rf"{UP}: holds inf"),
        (edit_config(quantization_config={"quant_method": "fp8"}), CheckpointError, r"already quantized.*'fp8'"),
        (
            edit_config(quantization_config={"load_in_8bit": True}),
            CheckpointError,
            r"already quantized \(quant_method None",
        ),
        (
            edit_tensors(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
            CheckpointError,
            rf"already quantized \(tensor '{UP}'\)",
        ),
        (edit_config(architectures=["NobodyKnowsForCausalLM"]), CheckpointError, r"NobodyKnows.*upgrade transformers"),
        (edit_config(architectures=None), CheckpointError, r"architectures is None"),
        (edit_config(model_type="nobody_knows"), CheckpointError, r"config\.json: transformers cannot read it"),
        (lambda source: (source / "config.json").unlink(), CheckpointError, r"has no config\.json"),
        (lambda source: (source / "model.safetensors").unlink(), CheckpointError, r"holds no weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unusable_source_is_named_and_nothing_is_left(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    source = source_of(tmp_path, llama)
    damage(source)
    before = digests(source)
    with pytest.raises(error, match=message):
        octavo.quantize_checkpoint(source, tmp_path / "out" / "put", "w8a16")
    assert digests(source) == before
    assert not list(tmp_path.rglob("put*")) and not list(tmp_path.rglob(".put*"))


def test_what_octavo_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    octavo.quantize_checkpoint(source_of(tmp_path, llama), tmp_path / "int8", "w8a16")
    with pytest.raises(CheckpointError, match=r"already quantized \(quant_method 'compressed-tensors'\)"):
        octavo.quantize_checkpoint(tmp_path / "int8", tmp_path / "out", "w8a16")
    edit_config(quantization_config=None)(tmp_path / "int8")
    with pytest.raises(CheckpointError, match=r"already quantized \(tensor '.*weight_packed'\)"):
        octavo.quantize_checkpoint(tmp_path / "int8", tmp_path / "out", "w8a16")


def test_a_recipe_that_does_not_fit_is_known_before_anything_is_written(tmp_path: Path) -> None:
    source = source_of(tmp_path, llama)
    for options, message in (
        ({"ignore": ["re:.*gate_projj"]}, r"'re:\.\*gate_projj' matches no layer"),
        ({"group_size": 5}, r"group_size=5 does not divide K=32"),
    ):
        with pytest.raises(RecipeError, match=message):
            octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16", **options)
    with pytest.raises(QuantizeError, match="no layer of the model is int8"):
        octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16", ignore=["re:.*"])
    with pytest.raises(RecipeError, match="unknown scheme 'w4a4'; valid: "):
        octavo.quantize_checkpoint(source, tmp_path / "out", "w4a4")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("size", ["-1GB", "many", 0])
def test_a_shard_size_that_is_none_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size"):
        octavo.quantize_checkpoint(source_of(tmp_path, llama), tmp_path / "out", "w8a16", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    source = source_of(tmp_path, llama)
    before = digests(source)
    with pytest.raises(CheckpointError, match=r"source: already exists"):
        octavo.quantize_checkpoint(source, source, "w8a16")
    assert digests(source) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["killed", "full"])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | BaseException
) -> None:
    source = source_of(tmp_path, llama)
    write, written = CheckpointWriter.write, []

    def fail_late(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        written.append(name)
        if len(written) == 9:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", fail_late)
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as raised:
        octavo.quantize_checkpoint(source, tmp_path / "out", "w8a16")
    assert isinstance(raised.value, KeyboardInterrupt) or "the disk is full" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# -- real models, and memory ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("include", [[], ["lm_head"]], ids=["default", "all"])
def test_smollm2(tmp_path: Path, smollm2: Path, include: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OctavoWarning)
        report = octavo.quantize_checkpoint(smollm2, tmp_path / "stream", "w8a16", include=include)
        model = octavo.load(smollm2)
        octavo.quantize(model, "w8a16", include=include)
        octavo.save(model, tmp_path / "memory")
    assert_same_checkpoint(tmp_path / "memory", tmp_path / "stream")
    linears = [row for row in report.rows if row.scheme and row.kind == "Linear"]
    assert len(linears) == 210
    size = {
        folder: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (smollm2, tmp_path / "stream")
    }
    assert size[tmp_path / "stream"] / size[smollm2] <= (0.51 if include else 0.61)
    ours, theirs = model.state_dict(), octavo.load(tmp_path / "stream").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_minilm(tmp_path: Path, minilm: Path) -> None:
    both_ways(tmp_path, minilm, unknown=["embeddings.position_ids"])
    assert (tmp_path / "stream/1_Pooling/config.json").is_file()  # still a sentence-transformers model


PEAK = """
import sys, threading, time
import torch, octavo, transformers
from octavo.integrations import hub, transformers as _
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
action, source, out = sys.argv[1:]

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

hub.skeleton(source)  # the model's classes are imported
peak, running = 0, True
def watch():  # memory of the process's own; pages of mapped files are the system's to drop
    global peak
    while running:
        peak = max(peak, status("RssAnon:"))
        time.sleep(0.002)
thread = threading.Thread(target=watch)
before = status("RssAnon:")
thread.start()
if action == "stream":
    octavo.quantize_checkpoint(source, out, "w8a16")
elif action == "load":
    model = octavo.load(source)
else:
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=_.OctavoConfig("w8a16"))
running = False
thread.join()
print(peak - before, status("RssAnon:") - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1.5 GB of bf16 in the shape of a Llama, written one tensor at a time."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("big")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=14, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    with CheckpointWriter(folder, {n: (torch.bfloat16, shape) for n, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape[-1]).to(torch.bfloat16).expand(shape) / 50)
    return folder


def measured(action: str, source: Path, out: Path) -> tuple[int, int]:
    """Bytes of its own that a process had at most, and at the end, above what it had before."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc/self/status")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PEAK, action, str(source), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    peak, end = map(int, run.stdout.split())
    return peak, end


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor_and_never_of_two_models(tmp_path: Path, big: Path) -> None:
    with CheckpointReader(big) as reader:
        sizes = [reader.info(name).nbytes for name in reader.names]
    assert sum(sizes) > 1.3e9
    peak, _ = measured("stream", big, tmp_path / "int8")
    assert peak < 2.2 * max(sizes), f"{peak / 1e6:.0f} MB for tensors of at most {max(sizes) / 1e6:.0f} MB"
    int8 = sum(file.stat().st_size for file in (tmp_path / "int8").glob("*.safetensors"))
    for action, source in (("load", tmp_path / "int8"), ("quantize", big)):
        peak, end = measured(action, source, tmp_path)
        assert 0.75 * int8 < end < 1.15 * int8  # float tensors may stay mapped files
        assert peak < 1.3 * int8, f"{action}: {peak / 1e6:.0f} MB at most, for a model of {int8 / 1e6:.0f} MB"
