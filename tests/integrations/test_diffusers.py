"""OctavoConfig in diffusers: int8 while it loads, int8 again from what it or octavo saved; models and pipelines."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import octavo
from octavo import CheckpointError, OctavoError, QuantizeError
from octavo.modules import QuantModule
from octavo.primitives import dequantize

diffusers = pytest.importorskip("diffusers")

from octavo.integrations.diffusers import OctavoConfig  # noqa: E402  # after the skip

STEM = "diffusion_pytorch_model"
SCHEMES = ["w8a16", "w8a8"]
Made = tuple[Any, dict[str, Any]]
"""A small model with random weights, and inputs for it."""


def unet() -> Made:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 7, 32),
    }  # fmt: skip


def flux() -> Made:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 7, 32), "guidance": None,
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3), "txt_ids": torch.randn(7, 3),
    }  # fmt: skip


def wan() -> Made:
    """Videos; some of its parts are kept in fp32."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }  # fmt: skip


def dit() -> Made:
    """Images of classes, which are looked up in an embedding."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=8, norm_type="ada_norm_zero",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1]),
    }  # fmt: skip


def vae() -> Made:
    """With attention, whose layers old checkpoints name otherwise."""
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 16, 16)}


def sound() -> Made:
    """Convolutions under weight_norm."""
    model = diffusers.AutoencoderOobleck(
        encoder_hidden_size=12, downsampling_ratios=[2, 4], decoder_channels=8, decoder_input_channels=6,
        audio_channels=2, channel_multiples=[1, 2], sampling_rate=8000,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 2, 64)}


pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
MAKERS = [unet, flux, wan, dit, vae, sound]


def made(make: Callable[[], Made], folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    """The model as diffusers loads it from `folder`, where it is saved, and inputs in the same dtype."""
    model, inputs = make()
    model.save_pretrained(folder, **options)
    floats = {name: x.to(dtype) for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return type(model).from_pretrained(folder, torch_dtype=dtype), {**inputs, **floats}


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**inputs, return_dict=False)[0]
    return y


def int8_layers(model: nn.Module) -> dict[str, QuantModule]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantModule)}


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / f"{STEM}.safetensors"), load_file(other / f"{STEM}.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])


# -- one model, whichever way it becomes int8, is saved and loaded ----------------------------------------------------


@pytest.mark.parametrize(("scheme", "dtype"), [("w8a16", torch.float32), ("w8a8", torch.bfloat16)])
@pytest.mark.parametrize("make", MAKERS)
def test_quantizing_while_loading_gives_what_quantizing_the_loaded_model_does(
    make: Callable[[], Made], scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, inputs = made(make, tmp_path / "float", dtype, max_shard_size="40KB")
    include = ["Embedding"] if make is dit else []
    octavo.quantize(model, scheme, include=include)
    expected = output(model, inputs)
    loaded = type(model).from_pretrained(
        tmp_path / "float", torch_dtype=dtype, quantization_config=OctavoConfig(scheme, include=include)
    )
    assert int8_layers(loaded).keys() == int8_layers(model).keys()
    assert torch.equal(output(loaded, inputs), expected)
    assert octavo.coverage(loaded) == octavo.coverage(model)

    loaded.save_pretrained(tmp_path / "int8", max_shard_size="30KB")
    again, info = type(model).from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(output(again, inputs), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "again"), inputs), expected)


@pytest.mark.parametrize("make", MAKERS)
def test_octavo_saves_loads_and_quantizes_files_of_diffusers(make: Callable[[], Made], tmp_path: Path) -> None:
    model, inputs = made(make, tmp_path / "float")
    octavo.quantize(model, "w8a16")
    expected = output(model, inputs)
    octavo.save(model, tmp_path / "saved")
    report = octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "files", "w8a16")
    assert report.unasked_fraction < 0.05
    assert_same_tensors(tmp_path / "saved", tmp_path / "files")
    for folder in (tmp_path / "saved", tmp_path / "files"):
        assert json.loads((folder / "config.json").read_text())["_class_name"] == type(model).__name__
        for again in (
            octavo.load(folder),
            type(model).from_pretrained(folder),
            octavo.load(folder, model=make()[0].eval()),
        ):
            assert int8_layers(again).keys() == int8_layers(model).keys()
            assert torch.equal(output(again, inputs), expected)


def test_sharded_files_have_the_names_of_diffusers(tmp_path: Path) -> None:
    model, inputs = made(unet, tmp_path / "float")
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "int8", max_shard_size="100KB")
    assert (tmp_path / "int8" / f"{STEM}.safetensors.index.json").is_file()
    assert torch.equal(output(octavo.load(tmp_path / "int8"), inputs), output(model, inputs))


@pytest.mark.parametrize("make", [unet, flux])
def test_an_int8_model_computes_what_its_codes_stand_for(make: Callable[[], Made], tmp_path: Path) -> None:
    model, inputs = made(make, tmp_path / "float")
    octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "int8", "w8a16")
    loaded = octavo.load(tmp_path / "int8")
    for name, layer in int8_layers(loaded).items():
        weight = model.get_submodule(name).weight
        weight.data = dequantize(*layer.codes_and_scale()).view(weight.shape)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_static_inputs_are_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = made(flux, tmp_path / "float")
    stats = octavo.calibrate(model, [inputs])
    octavo.smooth(model, stats, "auto", scheme="w8a8-static")
    octavo.quantize(model, "w8a8-static", stats=stats)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "theirs")
    octavo.save(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert torch.equal(output(type(model).from_pretrained(tmp_path / folder), inputs), expected)


def test_parts_kept_in_fp32_are_quantized_from_fp32(tmp_path: Path) -> None:
    model, _ = made(wan, tmp_path / "float", torch.bfloat16)
    embedder = "condition_embedder.time_embedder.linear_1"
    assert model.get_submodule(embedder).weight.dtype == torch.float32
    loaded = type(model).from_pretrained(
        tmp_path / "float", torch_dtype=torch.bfloat16, quantization_config=OctavoConfig("w8a16")
    )
    dtypes = {layer.float_dtype for name, layer in int8_layers(loaded).items() if "time_embedder" in name}
    assert dtypes == {torch.float32}
    assert int8_layers(loaded)["proj_out"].float_dtype == torch.bfloat16


def test_old_names_of_attention_layers(tmp_path: Path) -> None:
    model, inputs = made(vae, tmp_path / "float")
    file = tmp_path / "float" / f"{STEM}.safetensors"
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    for now, before in new.items():
        tensors = {name.replace(now, before): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, file)
    for scheme in SCHEMES:
        int8 = type(model).from_pretrained(tmp_path / "float")
        octavo.quantize(int8, scheme)
        expected = output(int8, inputs)
        octavo.quantize_checkpoint(tmp_path / "float", tmp_path / scheme, scheme)
        assert torch.equal(output(octavo.load(tmp_path / scheme), inputs), expected)
        while_loading = type(model).from_pretrained(tmp_path / "float", quantization_config=OctavoConfig(scheme))
        assert torch.equal(output(while_loading, inputs), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_file_is_quantized_while_it_loads(scheme: str, tmp_path: Path) -> None:
    model, inputs = made(flux, tmp_path / "float")
    octavo.quantize(model, scheme)
    loaded = type(model).from_single_file(
        str(tmp_path / "float" / f"{STEM}.safetensors"),
        config=str(tmp_path / "float"),
        quantization_config=OctavoConfig(scheme),
    )
    assert int8_layers(loaded).keys() == int8_layers(model).keys()
    assert torch.equal(output(loaded.eval(), inputs), output(model, inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_part_or_a_copy_that_is_int8_is_saved_as_int8(scheme: str, tmp_path: Path) -> None:
    model, inputs = made(flux, tmp_path / "float")
    octavo.quantize(model.transformer_blocks, scheme)
    copied = copy.deepcopy(model)
    expected = output(model, inputs)
    for each, folder in ((model, tmp_path / "one"), (copied, tmp_path / "other")):
        each.save_pretrained(folder)
        assert torch.equal(output(type(model).from_pretrained(folder), inputs), expected)


def test_a_float_model_is_saved_as_ever(tmp_path: Path) -> None:
    model, inputs = made(flux, tmp_path / "float")
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(output(octavo.load(tmp_path / "again"), inputs), output(model, inputs))


def test_compiles_whole(tmp_path: Path) -> None:
    model, inputs = made(dit, tmp_path / "float")
    octavo.quantize(model, "w8a8")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(output(compiled, inputs), output(model, inputs))


# -- pipelines ---------------------------------------------------------------------------------------------------------


def pipeline() -> Any:
    """Stable Diffusion, small: a UNet, a VAE, and a text encoder of transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae()[0].eval(),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=CLIPTokenizer(
            vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77
        ),
        unet=unet()[0].eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def picture(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a b", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(1))
    return torch.from_numpy(drawn.images)


def quietly(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    diffusers.utils.logging.disable_progress_bar()
    try:
        return load(*args, **kwargs)
    finally:
        diffusers.utils.logging.enable_progress_bar()


def test_a_pipeline_is_quantized_while_it_loads_saved_and_loaded(tmp_path: Path) -> None:
    pipe = pipeline()
    before = picture(pipe)
    pipe.save_pretrained(tmp_path / "float")
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="octavo", quant_kwargs={"scheme": "w8a8"}, components_to_quantize=["unet", "text_encoder"]
    )
    load = type(pipe).from_pretrained
    int8 = quietly(load, tmp_path / "float", quantization_config=config)
    assert int8_layers(int8.unet) and int8_layers(int8.text_encoder)
    assert not int8_layers(int8.vae)
    for part in (pipe.unet, pipe.text_encoder):
        octavo.quantize(part, "w8a8")
    expected = picture(pipe)
    assert torch.equal(picture(int8), expected)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(expected, before, atol=0.05, rtol=0)

    int8.save_pretrained(tmp_path / "theirs")
    pipe.save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        again = quietly(load, tmp_path / folder)
        assert int8_layers(again.unet) and int8_layers(again.text_encoder)
        assert torch.equal(picture(again), expected)


def test_a_component_is_quantized_from_file_to_file(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    octavo.quantize_checkpoint(tmp_path / "pipe" / "unet", tmp_path / "unet", "w8a16")
    shutil.rmtree(tmp_path / "pipe" / "unet")
    shutil.copytree(tmp_path / "unet", tmp_path / "pipe" / "unet")
    octavo.quantize(pipe.unet, "w8a16")
    assert torch.equal(picture(quietly(type(pipe).from_pretrained, tmp_path / "pipe")), picture(pipe))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_diffusers_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made(flux, tmp_path / "float")
    monkeypatch.delattr(octavo.integrations, "diffusers")
    monkeypatch.setitem(sys.modules, "octavo.integrations.diffusers", None)  # as if it could not be imported
    acts = (
        lambda: octavo.load(tmp_path / "float"),
        lambda: octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "out", "w8a16"),
        lambda: octavo.quantize(model, "w8a16"),
    )
    for act in acts:
        with pytest.raises(octavo.MissingExtra, match=r"pip install 'octavo\[diffusers\]'"):
            act()
    assert not int8_layers(model)
    own = nn.Sequential(nn.Linear(4, 4))  # of a model of one's own, whatever its config says
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"_class_name": "Mine"}')
    save_file(own.state_dict(), tmp_path / "own" / "weights.safetensors")
    octavo.quantize_checkpoint(tmp_path / "own", tmp_path / "out", "w8a16", model=own)
    assert int8_layers(octavo.load(tmp_path / "out", model=own))


def test_a_pipelines_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "unet" / f"{STEM}.safetensors")
    for act in (octavo.load, lambda folder: octavo.quantize_checkpoint(folder, tmp_path / "out", "w8a16")):
        with pytest.raises(CheckpointError, match=r"is a pipeline of several models.*/unet"):
            act(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_class_that_diffusers_does_not_have(tmp_path: Path) -> None:
    made(flux, tmp_path / "float")
    file = tmp_path / "float" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "DDIMScheduler"}))
    for act in (octavo.load, lambda folder: octavo.quantize_checkpoint(folder, tmp_path / "out", "w8a16")):
        with pytest.raises(CheckpointError, match=r"config.json: _class_name is 'DDIMScheduler'"):
            act(tmp_path / "float")


def test_a_config_that_no_model_has(tmp_path: Path) -> None:
    made(dit, tmp_path / "float")
    file = tmp_path / "float" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_type": "none"}))
    with pytest.raises(CheckpointError, match=r"config.json: diffusers cannot build a DiTTransformer2DModel"):
        octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "out", "w8a16")


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    made(flux, folder)
    tensors = load_file(folder / f"{STEM}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{STEM}.safetensors")
    return folder


def test_weights_that_are_missing_or_nan(tmp_path: Path) -> None:
    load, config = diffusers.FluxTransformer2DModel.from_pretrained, OctavoConfig("w8a16")
    lacking = damaged(tmp_path / "lacking", lambda tensors: tensors.pop("proj_out.weight"))
    with pytest.raises(CheckpointError, match=r"1 weights of FluxTransformer2DModel are missing.*proj_out.weight"):
        load(lacking, quantization_config=config)
    with pytest.raises(CheckpointError, match=r"proj_out.weight"):
        octavo.load(lacking)
    nan = damaged(tmp_path / "nan", lambda tensors: tensors["proj_out.weight"].fill_(torch.nan))
    with pytest.raises(QuantizeError, match=r"proj_out.weight"):
        load(nan, quantization_config=config)


def test_a_damaged_int8_checkpoint(tmp_path: Path) -> None:
    model, _ = made(flux, tmp_path / "float")
    octavo.quantize(model, "w8a8")
    model.save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / f"{STEM}.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.weight_scale"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"proj_out.weight"):
        type(model).from_pretrained(tmp_path / "int8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_int8_weights_are_not_quantized_again(scheme: str, tmp_path: Path) -> None:
    model, _ = made(flux, tmp_path / "float")
    octavo.quantize(model, scheme)
    model.save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"belongs to int8 codes, expected float weights"):
        type(model).from_pretrained(tmp_path / "int8", quantization_config=OctavoConfig())
    with pytest.raises(QuantizeError, match="the model already holds int8 layers"):
        octavo.quantize(model, scheme)


def test_arguments_that_int8_models_cannot_have(tmp_path: Path) -> None:
    model, _ = made(flux, tmp_path / "float")
    load = type(model).from_pretrained
    with pytest.raises(QuantizeError, match="attention is 'int8'"):
        load(tmp_path / "float", quantization_config=OctavoConfig(attention="int8"))
    with pytest.raises(OctavoError, match="device_map"):
        load(tmp_path / "float", quantization_config=OctavoConfig(), device_map={"": "disk"}, offload_folder=tmp_path)
    octavo.quantize(model, "w8a16")
    with pytest.raises(QuantizeError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
