"""OctavoConfig: int8 while transformers loads, and int8 again from what `save_pretrained` wrote."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import octavo
from octavo import CheckpointError, OctavoWarning, QuantizeError, Recipe, RecipeError, Scheme
from octavo.fused.norms import FusedRMSNorm
from octavo.modules import QuantEmbedding, QuantLinear, QuantModule, StaticQuantLinear
from octavo.primitives import dequantize
from tests import tiny_models
from tests.tiny_models import build, llama, tokens

transformers = pytest.importorskip("transformers")

from octavo.integrations.transformers import OctavoConfig  # noqa: E402 -- needs transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*stay float although:octavo.OctavoWarning")


IDS = torch.arange(3, 75).reshape(4, 18)


def source_of(folder: Path, make: Callable[..., Any] = llama, dtype: torch.dtype = torch.bfloat16, **kw: Any) -> Any:
    """A float checkpoint in folder/float; returns its model's class."""
    model = build(make, dtype, **kw)
    model.save_pretrained(folder / "float")
    return type(model)


def expected_of(cls: Any, folder: Path, scheme: str = "w8a16", **options: Any) -> Any:
    """The float checkpoint, loaded by transformers alone and then quantized."""
    model = cls.from_pretrained(folder / "float")
    octavo.quantize(model, scheme, **options)
    return model


def with_static_inputs(
    folder: Path, scheme: str = "w8a8-static", dtype: torch.dtype = torch.bfloat16, **kw: Any
) -> Any:
    """A tiny Llama with static inputs wherever a layer can have them, calibrated on IDS."""
    model = source_of(folder, llama, dtype).from_pretrained(folder / "float")
    stats = octavo.calibrate(model, [IDS])
    octavo.quantize(model, scheme, stats=stats, repair=False, **kw)
    return model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert_same_tensors(ours, theirs)
    classes = [[(name, type(m)) for name, m in model.named_modules()] for model in (ours, theirs)]
    assert classes[0] == classes[1]


def assert_same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


CASES = [
    (tiny_models.llama, {}),
    (tiny_models.llama, {"include": ["lm_head"]}),
    (tiny_models.llama, {"group_size": 2}),
    (
        tiny_models.llama,
        {"ignore": ["re:.*down_proj"], "overrides": {"re:.*self_attn": Scheme.of("w8a16", group_size=4)}},
    ),
    (tiny_models.tied_llama, {}),
    (tiny_models.tied_llama, {"include": ["lm_head"]}),
    (tiny_models.gpt2, {}),
    (tiny_models.bert, {}),
    (tiny_models.bert_lm, {"include": ["Embedding"]}),
    (tiny_models.t5, {"include": ["Embedding"]}),
    (tiny_models.whisper, {}),
    (tiny_models.vit, {}),
    (tiny_models.llava, {}),
    (tiny_models.mixtral, {}),
    (tiny_models.qwen3_vl_moe, {}),
    (tiny_models.qwen3_moe, {}),
    (tiny_models.jetmoe, {}),
    (tiny_models.longcat, {}),
    (tiny_models.dbrx, {}),
    (tiny_models.dbrx, {"scheme": "w8a8"}),
    (tiny_models.gte, {}),
    (tiny_models.gte, {"ignore": ["re:.*[qv]_proj"]}),
    (tiny_models.llama, {"scheme": "w8a8"}),
    (tiny_models.llama, {"scheme": "w8a8", "overrides": {"re:.*mlp": Scheme.of("w8a16", group_size=2)}}),
    (tiny_models.tied_llama, {"scheme": "w8a8", "include": ["lm_head"]}),
    (tiny_models.gpt2, {"scheme": "w8a8"}),
    (tiny_models.whisper, {"scheme": "w8a8"}),
    (tiny_models.llava, {"scheme": "w8a8"}),
    (tiny_models.gemma3, {"include": ["Embedding", "OutputHead"]}),
    (tiny_models.bart, {"include": ["Embedding", "OutputHead"]}),
    (tiny_models.clip_vision, {"include": ["re:.*patch_embedding"]}),
    (tiny_models.encodec, {}),
    (tiny_models.encodec, {"scheme": "w8a8"}),
    (tiny_models.bit, {}),
]


@pytest.mark.parametrize(
    ("make", "options"),
    CASES,
    ids=lambda value: value.__name__ if callable(value) else ",".join(map(str, value)) or "-",
)
def test_while_loading_is_load_then_quantize_and_comes_back(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any]
) -> None:
    cls = source_of(tmp_path, make)
    expected = expected_of(cls, tmp_path, **options)
    config = OctavoConfig(**{"scheme": "w8a16", **options})
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    assert_same(model, expected)
    assert octavo.coverage(model) == octavo.coverage(expected)
    assert not model.training

    model.save_pretrained(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved")
    assert_same(again, expected)
    # No float copy of an int8 weight exists, here or in the file.
    int8 = {name for name, module in again.named_modules() if isinstance(module, QuantModule) and module.codes()}
    assert int8 and not any(name.endswith("weight") and p.dim() > 1 for n in int8 for name, p in
                            again.get_submodule(n).named_parameters(recurse=False))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OctavoWarning)
        octavo.save(model, tmp_path / "octavo")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("octavo", "saved"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("make", "options"), CASES)
def test_what_was_quantized_in_memory_is_saved_as_int8(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any]
) -> None:
    """By the method that every user of transformers knows, which by itself would take the codes for weights."""
    cls = source_of(tmp_path, make)
    model = expected_of(cls, tmp_path, **options)
    model.save_pretrained(tmp_path / "int8")
    assert_same(cls.from_pretrained(tmp_path / "int8"), model)


def test_a_model_within_one_is_saved_as_int8(tmp_path: Path) -> None:
    model = source_of(tmp_path).from_pretrained(tmp_path / "float")
    octavo.quantize(nn.ModuleDict({"lm": model}), "w8a16")
    model.model.save_pretrained(tmp_path / "inner")
    assert_same(type(model.model).from_pretrained(tmp_path / "inner"), model.model)


@pytest.mark.parametrize("how", ["loaded", "while loading", "into a model"])
def test_a_model_within_one_that_was_loaded_is_saved_as_int8(tmp_path: Path, how: str) -> None:
    model_class = source_of(tmp_path)
    if how == "while loading":
        model = model_class.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())
    else:
        octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "int8", "w8a16")
        own = None if how == "loaded" else build(tiny_models.llama)
        model = octavo.load(tmp_path / "int8", model=own)
    for name, part in (("inner", model.model), ("outer", model)):
        part.save_pretrained(tmp_path / name)
        assert "weight_packed" in {each.rpartition(".")[2] for each in names_in(tmp_path / name)}
        assert_same(type(part).from_pretrained(tmp_path / name), part)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (tiny_models.llava, "model.language_model"),
        (tiny_models.llava, "model.vision_tower"),
        (tiny_models.llama, "model.layers"),
        (tiny_models.llama, "model.layers.1"),
    ],
)
def test_a_model_of_which_a_part_was_quantized_is_saved_as_int8(
    tmp_path: Path, make: Callable[[], Any], part: str
) -> None:
    model = source_of(tmp_path, make).from_pretrained(tmp_path / "float")
    octavo.quantize(model.get_submodule(part), "w8a16")
    model.save_pretrained(tmp_path / "int8")
    assert_same_tensors(type(model).from_pretrained(tmp_path / "int8"), model)


def test_a_model_that_an_int8_one_was_put_into_is_saved_as_int8(tmp_path: Path) -> None:
    body = source_of(tmp_path).from_pretrained(tmp_path / "float").model
    octavo.quantize(body, "w8a16")
    model = transformers.LlamaForSequenceClassification(body.config).to(torch.bfloat16)
    model.model = body
    model.save_pretrained(tmp_path / "int8")
    assert_same(type(model).from_pretrained(tmp_path / "int8"), model)


def test_models_without_int8_layers_have_no_quantizer() -> None:
    octavo.quantize(build(tiny_models.llama), "w8a16")
    assert not hasattr(build(tiny_models.llama), "hf_quantizer")
    assert not hasattr(transformers.PreTrainedModel, "hf_quantizer")


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.llava, tiny_models.mixtral, tiny_models.qwen3_vl_moe])
def test_the_model_without_its_int8_head_and_the_other_way_round(
    tmp_path: Path, make: Callable[[], Any], scheme: str
) -> None:
    """As float checkpoints do, an int8 one loads into the model within, and that of the model within into the whole."""
    cls = source_of(tmp_path, make)
    config = OctavoConfig(scheme, include=["lm_head"])
    whole = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    whole.save_pretrained(tmp_path / "whole")
    assert_same(type(whole.model).from_pretrained(tmp_path / "whole"), whole.model)
    whole.model.save_pretrained(tmp_path / "within")
    assert_same(cls.from_pretrained(tmp_path / "within").model, whole.model)


def names_in(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.fixture
def named_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's layers lie on disk under other names, by a rule that ends with "weight", as some of transformers' do."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # makes the cache
    rule = WeightRenaming(r"model\.out\.(\d+)\.weight", r"model.layers.\1.mlp.down_proj.weight")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [rule])


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_codes_have_the_names_that_the_weight_has_on_disk(tmp_path: Path, named_otherwise: None, scheme: str) -> None:
    model = build(tiny_models.llama)
    octavo.quantize(model, scheme)
    octavo.save(model, tmp_path / "a")
    names = {name.rpartition(".")[0] for name in load_file(tmp_path / "a" / "model.safetensors")}
    assert "model.out.1" in names and "model.layers.1.mlp.down_proj" not in names
    loaded = octavo.load(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    ids = tokens()
    for again in (loaded, octavo.load(tmp_path / "b"), octavo.load(tmp_path / "a", model=build(tiny_models.llama))):
        assert torch.equal(again(ids).logits, model(ids).logits)
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert a.keys() == b.keys()


@pytest.mark.filterwarnings("ignore:.*read by octavo only:octavo.OctavoWarning")
def test_a_head_that_comes_before_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    """The table is the embedding's, as transformers has it, in memory, on disk and from file to file."""

    def xlm_roberta() -> Any:
        config = transformers.XLMRobertaConfig(**tiny_models.TEXT, is_decoder=True, pad_token_id=0)
        return transformers.XLMRobertaForCausalLM(config)

    model, include = build(xlm_roberta), ["Embedding", "OutputHead"]
    model.save_pretrained(tmp_path / "float")
    octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "stream", "w8a16", include=include)
    octavo.quantize(model, "w8a16", include=include)
    octavo.save(model, tmp_path / "out")
    stored, streamed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "stream"))
    assert stored.keys() == streamed.keys() and not [name for name in stored if "decoder.weight" in name]
    loaded, ids = octavo.load(tmp_path / "out"), tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.decoder.codes() == {} and loaded.roberta.embeddings.word_embeddings.codes()


def test_a_head_that_the_checkpoint_lacks_is_new_and_stays_float(tmp_path: Path) -> None:
    """transformers gives it random numbers, to be trained; there are no codes that could be made of its weight."""
    source_of(tmp_path)
    cls, config = transformers.LlamaForSequenceClassification, OctavoConfig()
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config, num_labels=3)
    assert type(model.model.layers[0].mlp.up_proj) is QuantLinear
    assert isinstance(model.score, nn.Linear) and 0.01 < model.score.weight.detach().std().item() < 0.03
    (row,) = (row for row in octavo.coverage(model).rows if row.name == "score.weight")
    assert row.reason == "not in the checkpoint: it is new, and to be trained"
    model.save_pretrained(tmp_path / "saved")
    assert_same(cls.from_pretrained(tmp_path / "saved"), model)


@pytest.mark.filterwarnings("ignore:int8 layers of kind Embedding:octavo.OctavoWarning")
@pytest.mark.parametrize("include", [[], ["lm_head"], ["Embedding"], ["Embedding", "lm_head"]])
@pytest.mark.parametrize("apart", [True, False])
def test_the_files_say_whether_a_head_is_tied_and_under_which_name(
    tmp_path: Path, include: list[str], apart: bool
) -> None:
    """transformers ties what is one in the files, also where that is called as the head, and nothing that differs
    there, whatever the config says."""
    cls = source_of(tmp_path, tiny_models.tied_llama)
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = -table if apart else tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    expected = expected_of(cls, tmp_path, include=include)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig(include=include))
    octavo.save(expected, tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    ids = tokens()
    for one in (model, octavo.load(tmp_path / "out"), cls.from_pretrained(tmp_path / "saved")):
        assert torch.equal(one(ids).logits, expected(ids).logits)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is not apart


def test_a_rule_makes_experts_only_if_it_names_them_whole() -> None:
    """Inkling's for its shared experts ends as the name of its routed ones does."""
    from transformers.core_model_loading import Chunk, WeightConverter

    from octavo.integrations.weight_rules import merges

    rule = WeightConverter("shared_w13_weight", ["gate_proj", "up_proj"], [Chunk(1)])
    assert not merges(rule, {"layers.0.mlp.experts.gate_up_proj"})
    assert merges(rule, {"layers.0.mlp.experts.up_proj"})


def test_float_tensors_keep_their_names(tmp_path: Path) -> None:
    """Of the rules by which transformers renames old checkpoints' tensors, only those that it used are undone."""
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "float")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig("w8a16"))
    octavo.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    norms = {name for name in names_in(tmp_path / "float") if "LayerNorm" in name}
    assert norms and norms <= names_in(tmp_path / "ours") & names_in(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_the_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    cls = source_of(tmp_path, llama, dtype)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())
    assert_same(model, expected_of(cls, tmp_path))
    assert model.model.layers[0].mlp.up_proj.float_dtype == dtype


def test_norms_are_fused_while_loading_and_when_loaded_again(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())
    model.save_pretrained(tmp_path / "saved")
    octavo.quantize(plain := cls.from_pretrained(tmp_path / "float"), "w8a16", ignore=["re:.*norm"])
    for each in (model, cls.from_pretrained(tmp_path / "saved"), octavo.load(tmp_path / "saved")):
        assert isinstance(each.model.norm, FusedRMSNorm)
        assert isinstance(each.model.layers[1].input_layernorm, FusedRMSNorm)
        with torch.no_grad():
            assert torch.equal(each(IDS).logits, plain(IDS).logits)


def test_a_norm_that_is_ignored_stays_while_loading(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    config = OctavoConfig(ignore=["model.norm"])
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
    assert isinstance(model.model.layers[1].input_layernorm, FusedRMSNorm)


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.t5])
def test_a_norm_that_the_file_lacks_starts_with_ones(tmp_path: Path, make: Callable[[], Any]) -> None:
    cls = source_of(tmp_path, make)
    file = tmp_path / "float/model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name in ("model.norm.weight", "decoder.final_layer_norm.weight"))
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())
    norm = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(norm, FusedRMSNorm) and torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_saved_in_shards_tied_and_with_everything_int8(tmp_path: Path) -> None:
    cls = source_of(tmp_path, tiny_models.tied_llama)
    config = OctavoConfig("w8a16", include=["lm_head"])
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="5KB")
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 2
    assert not any("lm_head" in name for name in index["weight_map"])
    again = cls.from_pretrained(tmp_path / "saved")
    assert_same(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert isinstance(again.model.embed_tokens, QuantEmbedding)
    assert all(p.dim() < 2 for p in again.parameters())
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_third_generation_is_the_first(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig()).save_pretrained(tmp_path / "one")
    cls.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    assert_same(octavo.load(tmp_path / "two"), expected_of(cls, tmp_path))  # and octavo alone loads it


def test_through_the_auto_class_with_a_device_map_and_generate(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=OctavoConfig("w8a16"), device_map="cpu"
    )
    expected = expected_of(cls, tmp_path)
    assert_same(model, expected)
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantLinear)
    ids = tokens(1, 5)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


def test_a_device_has_room_for_what_fits_as_int8(tmp_path: Path) -> None:
    source_of(tmp_path)
    nbytes = sum(file.stat().st_size for file in (tmp_path / "float").glob("*.safetensors"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config=OctavoConfig("w8a16", include=["Embedding", "lm_head"]),
        device_map="auto",
        max_memory={"cpu": int(0.8 * nbytes)},
    )
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}  # not "meta", as what is put off to disk is


def test_copies_and_pickles_answer_the_same(tmp_path: Path) -> None:
    cls = source_of(tmp_path, tiny_models.tied_llama)
    config = OctavoConfig("w8a16", include=["lm_head"], ignore=[lambda name, module: name.endswith("k_proj")])
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        copied = copy.deepcopy(model)
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        assert torch.equal(copied(ids).logits, expected)
        model.save_pretrained(tmp_path / "saved")  # a predicate is not saved: what it chose lies in the tensors
        again = cls.from_pretrained(tmp_path / "saved")
        assert torch.equal(pickle.loads(pickle.dumps(again))(ids).logits, expected)
    assert isinstance(again.model.layers[0].self_attn.k_proj, nn.Linear)


def test_what_octavo_wrote_is_loaded_by_either(tmp_path: Path) -> None:
    cls = source_of(tmp_path, tiny_models.gpt2)
    with pytest.warns(OctavoWarning, match="read by octavo only"):
        octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "int8", "w8a16")
    assert_same(cls.from_pretrained(tmp_path / "int8"), expected_of(cls, tmp_path))


# -- int8 inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["o1", "o2"])
@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2])
def test_smoothquants_dynamic_levels_while_loading(tmp_path: Path, make: Callable[[], Any], scheme: str) -> None:
    cls = source_of(tmp_path, make)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig(scheme))
    assert_same(model, expected_of(cls, tmp_path, scheme=scheme))
    model.save_pretrained(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved")
    assert_same(again, model)
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w8a8-static", "o3"])
def test_static_inputs_come_back_with_their_scales(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    model = with_static_inputs(tmp_path, scheme, dtype)
    octavo.save(model, tmp_path / "one")
    again = octavo.load(tmp_path / "one")
    assert_same(again, model)
    again.save_pretrained(tmp_path / "two")
    third = type(model).from_pretrained(tmp_path / "two")
    assert_same(third, model)
    layer = third.model.layers[1].mlp.down_proj
    assert type(layer) is StaticQuantLinear and str(layer.scheme) == "w8a8-static" and layer.float_dtype == dtype
    ids = tokens()
    with torch.no_grad():
        for loaded in (again, third):
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


MIXED = {"re:.*down_proj": Scheme("w8a16"), "re:.*o_proj": Scheme("w8a8")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "overrides", "tolerance"),
    [
        # A static scale leaves the package nothing to choose: the same codes, but where x / scale is half a step.
        ("w8a8-static", {}, 5e-4),
        ("w8a8-static", {"re:.*down_proj": Scheme("w8a16")}, 5e-4),
        # A dynamic scale is amax / 127.5 in the package and amax / 127 here: other codes, the same error on average.
        ("w8a8", {}, 1.5e-2),
        ("o1", {}, 1.5e-2),
        ("o2", {}, 1.5e-2),
        ("w8a8", {"re:.*down_proj": Scheme("w8a16")}, 1.5e-2),
        ("w8a8-static", MIXED, 1.5e-2),
    ],
)
def test_plain_transformers_agrees_to_the_rounding_of_activations(
    tmp_path: Path, scheme: str, overrides: dict[str, Scheme], tolerance: float, dtype: torch.dtype
) -> None:
    """transformers runs an int8 checkpoint in float: compressed-tensors dequantizes the weights, and at each layer's
    input quantizes and dequantizes, with the `input_scale` of the files if it is static. So logits can be compared.
    """
    pytest.importorskip("compressed_tensors")
    if Scheme(scheme).is_static:
        model = with_static_inputs(tmp_path, scheme, dtype, overrides=overrides)
    else:
        model = expected_of(source_of(tmp_path, llama, dtype), tmp_path, scheme=scheme, overrides=overrides)
    octavo.save(model, tmp_path / "int8")
    written = json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert written["format"] == ("mixed-precision" if overrides else "int-quantized")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8").eval()
    with torch.no_grad():
        ours, other = model(IDS).logits.double(), theirs(IDS).logits.double()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantModule):
            expected = dequantize(layer.weight, layer.weight_scale, dtype)
            assert torch.equal(theirs.get_submodule(name).weight, expected), name
    rounding = max(tolerance, 1.5e-2 if dtype == torch.bfloat16 else 0)
    assert ((other - ours).norm() / ours.norm()).item() < rounding


def test_the_config_with_static_inputs_says_what_to_do_instead() -> None:
    for given in ("w8a8-static", Scheme("o3"), Recipe.of("w8a8", overrides={"re:.*mlp": Scheme("w8a8-static")})):
        with pytest.raises(RecipeError, match=r"static inputs.*stats = octavo\.calibrate\(model, batches\)"):
            OctavoConfig(given)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_as_others_write_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """llm-compressor's weights per tensor have one scale, and a static input's may have no dimension."""
    model = with_static_inputs(tmp_path, "o3")
    octavo.save(model, tmp_path / "int8")
    file = tmp_path / "int8/model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            assert len(tensor.unique()) == 1
            tensors[name] = tensor.flatten()[0].reshape(shape).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "int8/config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    (tmp_path / "int8/config.json").write_text(json.dumps(config))
    assert_same(octavo.load(tmp_path / "int8"), model)
    assert_same(octavo.load(tmp_path / "int8", model=type(model)(model.config)), model)


# -- the config -------------------------------------------------------------------------------------------------------


def test_the_recipe_may_come_in_any_form(tmp_path: Path) -> None:
    recipe = Recipe.of("w8a16", ignore=["re:.*mlp"])
    for given in (recipe, recipe.to_dict()):
        assert OctavoConfig(given).recipe == recipe
    assert OctavoConfig(Scheme.of("w8a16", group_size=8)).recipe.scheme.weight.group_size == 8
    assert OctavoConfig("w8a16", group_size=8).recipe == Recipe.of("w8a16", group_size=8)
    assert OctavoConfig().recipe == Recipe.of("w8a16")


def test_the_config_on_disk_says_what_is_int8(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig(ignore=["re:.*mlp"]))
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "octavo"
    assert "model.layers.0.mlp.up_proj" in written["ignore"] and "lm_head" in written["ignore"]
    assert written["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert json.loads(json.dumps(model.config.to_dict()["quantization_config"])) == written


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OctavoConfig("w4a4"), "unknown scheme 'w4a4'; valid"),
        (lambda: OctavoConfig("w8a16", ignore="lm_head"), r"write \['lm_head'\]"),
        (lambda: OctavoConfig({"shceme": "w8a16"}), "unknown key 'shceme'; valid: scheme"),
        (lambda: OctavoConfig("w8a16", ignore=["re:("]), "not a regular expression"),
    ],
    ids=["scheme", "string", "key", "regex"],
)
def test_a_recipe_that_is_none_is_known_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["re:.*gate_projj"]}, r"ignore: 're:\.\*gate_projj' matches no layer of this model; did you mean"),
        ({"include": ["re:nothing"]}, r"'re:nothing' matches no layer"),
        ({"group_size": 5}, r"group_size=5 does not divide K=32"),
    ],
    ids=["ignore", "include", "group"],
)
def test_a_recipe_that_does_not_fit_the_model_is_readable(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    cls = source_of(tmp_path)
    with pytest.raises(RecipeError, match=message):
        cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig("w8a16", **options))


@pytest.mark.parametrize(("value", "found"), [(torch.nan, "NaN"), (torch.inf, "inf")])
def test_a_weight_that_cannot_be_quantized_is_named(tmp_path: Path, value: float, found: str) -> None:
    cls = source_of(tmp_path)
    file = tmp_path / "float/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QuantizeError, match=rf"^{name}: holds {found}"):
        cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())


def test_more_than_a_few_float_bytes_are_a_warning(tmp_path: Path) -> None:
    cls = source_of(tmp_path, tiny_models.xlnet)
    with pytest.warns(OctavoWarning, match="stay float although the recipe did not ask for it"):
        cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())


UP = "model.layers.0.mlp.up_proj"


def damage(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill_(torch.nan), r"up_proj\.weight_scale: holds NaN"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_shape"), r"no tensor '.*up_proj\.weight_shape'"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(42, 3, dtype=torch.int32)}),
            r"up_proj\.weight_packed: is torch\.int32 \[42, 3\], expected torch\.int32 \[42, 8\]",
        ),
        (
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight_packed"),
            r"up_proj\.weight' is missing, expected int8 codes",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(42, 32)}),
            r"holds '.*up_proj\.weight' \(torch\.float32\) and its int8 codes, '.*up_proj\.weight_packed'",
        ),
    ],
    ids=["nan", "missing", "shape", "codes", "both"],
)
def test_a_damaged_int8_checkpoint_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    cls = source_of(tmp_path)
    cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig()).save_pretrained(tmp_path / "saved")
    damage(tmp_path / "saved", edit)
    with pytest.raises(CheckpointError, match=message):
        cls.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t[f"{UP}.weight_scale"].fill_(torch.nan), r"up_proj\.weight_scale: holds NaN"),
        (lambda t: t.pop(f"{UP}.weight_scale"), r"has no tensor '.*up_proj\.weight_scale'"),
        (lambda t: t.pop(f"{UP}.input_scale"), r"up_proj\.input_scale' is missing"),
        (lambda t: t[f"{UP}.input_scale"].fill_(0), r"up_proj\.input_scale: is 0\.0"),
        (
            lambda t: t.update({f"{UP}.weight": torch.zeros(42, 31, dtype=torch.int8)}),
            r"up_proj\.weight' has shape \[42, 31\], the model's has \[42, 32\]",
        ),
        (
            lambda t: t.update({f"{UP}.input_zero_point": torch.zeros(1, dtype=torch.int8)}),
            r"up_proj\.input_zero_point' means asymmetric inputs",
        ),
        (
            lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].bfloat16()}),
            r"up_proj\.weight' is torch\.bfloat16, exp",
        ),
        (
            lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].to(torch.uint8)}),
            r"up_proj\.weight' is torch\.uint8, exp",
        ),
    ],
    ids=["nan", "scale", "input_scale", "zero", "shape", "asymmetric", "cast", "unsigned"],
)
def test_a_damaged_checkpoint_with_int8_inputs_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    octavo.save(with_static_inputs(tmp_path), tmp_path / "saved")
    damage(tmp_path / "saved", edit)
    with pytest.raises(CheckpointError, match=message):
        octavo.load(tmp_path / "saved")


@pytest.mark.parametrize("part", ["weights", "input_activations"])
def test_asymmetric_int8_is_refused_by_the_config(tmp_path: Path, part: str) -> None:
    octavo.save(with_static_inputs(tmp_path), tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"][part]["symmetric"] = False
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{part}\.symmetric False, expected True"):
        octavo.load(tmp_path / "saved")


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_codes_are_not_quantized_once_more(tmp_path: Path, scheme: str) -> None:
    """Of a config that is not that of the checkpoint, as a tower's is not, transformers makes new weights."""
    model = build(llama)
    octavo.quantize(model, scheme)
    octavo.save(model, tmp_path / "int8")
    with pytest.raises(CheckpointError, match=r"holds int8 codes \(model\.layers\.0.*expected float weights"):
        type(model).from_pretrained(tmp_path / "int8", config=model.config, quantization_config=OctavoConfig())


def test_a_model_without_an_int8_layer_is_not_saved_as_int8(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig(ignore=["re:.*"]))
    with pytest.raises(QuantizeError, match="no layer of the model is int8"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("shape", [(96, 32), (42, 31)])
def test_a_float_weight_of_another_shape_is_an_error(tmp_path: Path, shape: tuple[int, int]) -> None:
    cls = source_of(tmp_path)
    damage(tmp_path / "float", lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: has shape .*the model's \[42, 32\]"):
        cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())


def test_gradients_reach_an_adapter_on_the_int8_base(tmp_path: Path) -> None:
    cls = source_of(tmp_path, llama, torch.float32)
    model = cls.from_pretrained(tmp_path / "float", quantization_config=OctavoConfig())
    assert model.hf_quantizer.is_trainable
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_real_model(tmp_path: Path, smollm2: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=OctavoConfig("w8a16"))
    assert_same(model, _quantized(smollm2))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(again, model)
    assert sum(isinstance(module, QuantLinear) for module in again.modules()) == 210


def _quantized(source: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    octavo.quantize(model, "w8a16")
    return model


def test_a_recipe_in_a_dict_of_ones_own(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    asked = {"quant_method": "octavo", "scheme": "w8a8", "ignore": ["re:.*down_proj"]}
    model = cls.from_pretrained(tmp_path / "float", quantization_config=dict(asked))
    assert_same(model, expected_of(cls, tmp_path, "w8a8", ignore=["re:.*down_proj"]))
    with pytest.raises(RecipeError, match=r"unknown key 'nonsense'; expected scheme.* or attention"):
        cls.from_pretrained(tmp_path / "float", quantization_config={**asked, "nonsense": 1})


def test_a_dict_without_a_scheme_says_the_rest(tmp_path: Path) -> None:
    cls = source_of(tmp_path)
    model = cls.from_pretrained(tmp_path / "float", quantization_config={"quant_method": "octavo", "group_size": 2})
    assert_same(model, expected_of(cls, tmp_path, group_size=2))
    with pytest.raises(RecipeError, match="unknown key 'group'"):
        cls.from_pretrained(tmp_path / "float", quantization_config={"quant_method": "octavo", "group": 8})
