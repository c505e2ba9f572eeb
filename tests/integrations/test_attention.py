"""Int8 attention in real transformers models: near float attention, right under every mask, and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo import CheckpointError, QuantizeError, Recipe, RecipeError
from octavo.modules import QuantModule
from tests.tiny_models import TEXT, bert, build, gpt2, llama, qwen2, t5, tokens, vit, whisper

transformers = pytest.importorskip("transformers")

from octavo.integrations.attention import NAME, attention_of, int8_attention_forward, use_int8_attention  # noqa: E402

SHARP = {
    20.0: ("q_proj.weight", "query.weight", "SelfAttention.q.weight", "c_attn.weight"),
    5.0: ("v_proj.weight", "value.weight", "o_proj.weight", "out_proj.weight", "attention.output.dense.weight"),
}
"""Weights are multiplied by this: the attention of a random model is otherwise so even, and so small beside the
residual, that neither masks nor scores matter to the output."""


def mistral() -> Any:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4, tie_word_embeddings=False)
    )


def gemma2() -> Any:
    config = transformers.Gemma2Config(
        **TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0
    )
    return transformers.Gemma2ForCausalLM(config)


def mixtral() -> Any:
    config = {**TEXT, "intermediate_size": 40}  # torch's grouped product wants rows of 16 bytes
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**config, num_key_value_heads=2, num_local_experts=4)
    )


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_scaling=None
    )
    return transformers.GptOssForCausalLM(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4))


def use_float_attention(model: Any) -> None:
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.set_attn_implementation("eager")


def sharp(make: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model in eval mode whose queries are large; eager attention."""
    model = build(make, dtype)
    for name, parameter in model.named_parameters():
        for factor, names in SHARP.items():
            if name.endswith(names):
                parameter.data *= factor
    use_float_attention(model)
    return model


def inputs_of(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16).to(model.dtype)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(1, 8, 32).to(model.dtype), "decoder_input_ids": tokens(1, 5)}
    decoder = {"decoder_input_ids": tokens(2, 6)} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens(2, 12), **decoder}


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    answer = model(**inputs)
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


def assert_near(y: Tensor, expected: Tensor) -> None:
    cosine = nn.functional.cosine_similarity(y.double().flatten(0, -2), expected.double().flatten(0, -2))
    assert cosine.min() > 0.998  # scores twice as large give 0.997 in the worst of these models, no mask 0.6
    assert not torch.equal(y, expected), "the attention is still float"


# -- every architecture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, mistral, gemma2, qwen2, mixtral, gpt2, bert, vit, t5, whisper])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_near_that_of_float_attention(make: Callable[..., Any], dtype: torch.dtype) -> None:
    model = sharp(make, dtype)
    inputs = inputs_of(model)
    expected = output(model, inputs)
    use_int8_attention(model)
    assert attention_of(model) == "int8"
    assert_near(output(model, inputs), expected)
    use_float_attention(model)
    assert torch.equal(output(model, inputs), expected)


def padded(inputs: dict[str, Tensor], left: bool) -> dict[str, Tensor]:
    """The same with five tokens of padding on one side."""
    ids = inputs["input_ids"]
    parts = [(tokens(2, 5), ids), (torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(ids))]
    longer, mask = (torch.cat(part if left else part[::-1], 1) for part in parts)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if left else {}
    return {**inputs, "input_ids": longer, "attention_mask": mask, **positions}


@pytest.mark.parametrize(
    ("make", "left"),
    [(llama, True), (mistral, True), (gemma2, True), (llama, False), (mistral, False), (gemma2, False), (bert, False)],
)
def test_padding_changes_nothing_at_the_other_positions(make: Callable[..., Any], left: bool) -> None:
    model = sharp(make)
    use_int8_attention(model)
    inputs = inputs_of(model)
    expected = output(model, inputs)
    y = output(model, padded(inputs, left))
    y = y[:, 5:] if left else y[:, :12]
    # A sum that fp32 takes in another order puts a code to the other side of a rounding now and then.
    assert (y - expected).norm() < 0.01 * expected.norm()


def test_padding_of_an_encoder_changes_nothing_in_its_decoder() -> None:
    model = sharp(t5)
    use_int8_attention(model)
    inputs = inputs_of(model)
    expected = output(model, inputs)
    assert (output(model, padded(inputs, left=False)) - expected).norm() < 0.01 * expected.norm()


def test_what_a_model_asks_of_the_scores_is_done() -> None:
    """Against the eager functions of Gemma 2 (softcap) and T5 (position bias), and the default scaling."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_eager
    from transformers.models.t5.modeling_t5 import eager_attention_forward as t5_eager

    module = nn.Module().eval()
    module.num_key_value_groups, module.head_dim = 1, 16
    query, key, value = torch.randn(3, 2, 4, 9, 16).unbind()
    query *= 4
    causal = torch.zeros(1, 1, 9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    for eager, options in (
        (gemma2_eager, {"softcap": 1.0, "scaling": 0.5}),
        (t5_eager, {"position_bias": 3 * torch.randn(1, 4, 9, 9), "scaling": 1.0}),
        (t5_eager, {}),
    ):
        for mask in (causal, None):
            expected, _ = eager(module, query, key, value, mask, **options)
            y, probabilities = int8_attention_forward(module, query, key, value, mask, **options)
            assert probabilities is None
            assert (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("make", [llama, mistral, gemma2, gpt2, whisper])
def test_generating_with_and_without_a_cache_is_the_same(make: Callable[..., Any]) -> None:
    model = sharp(make)
    use_int8_attention(model)
    inputs = inputs_of(model)
    inputs.pop("decoder_input_ids", None)
    cached, anew = (
        model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    )  # fmt: skip
    assert torch.equal(cached.sequences, anew.sequences)
    for one, other in zip(cached.logits, anew.logits, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_static_cache_has_empty_places() -> None:
    model = sharp(llama)
    use_int8_attention(model)
    ids = tokens(1, 6)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    static = model.generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(ids, **options))


# -- what it does not have --------------------------------------------------------------------------------------------


def test_dropout_is_refused() -> None:
    model = sharp(lambda: llama(attention_dropout=0.1))
    use_int8_attention(model)
    model.train()
    with pytest.raises(QuantizeError, match=r"LlamaAttention: dropout is 0.1, .* call model.eval\(\)"):
        model(tokens())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "output_attentions is True, and it keeps no probabilities"),
        ({"s_aux": torch.zeros(4)}, "got the tensor 's_aux', which it does not know"),
        ({"cache": object()}, "continuous batching's paged cache is not read"),
    ],
)
def test_what_would_be_ignored_is_refused(given: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(QuantizeError, match=message):
        int8_attention_forward(nn.Identity(), x, x, x, None, **given)
    harmless = {"is_causal": True, "sliding_window": 4, "position_ids": torch.arange(3), "sinks": None}
    assert int8_attention_forward(nn.Identity(), x, x, x, None, **harmless)[0].shape == (1, 3, 2, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt_oss, "GptOssAttention has attention sinks, which int8 attention does not have"),
        (bloom, "BloomForCausalLM computes its attention itself instead of asking transformers' AttentionInterface"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "got a Sequential; call octavo.ops.int8_attention in its own code"),
    ],
)
def test_a_model_that_cannot_is_refused_before_anything_is_changed(make: Callable[..., Any], message: str) -> None:
    model = make().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(QuantizeError, match=message):
        octavo.quantize(model, "w8a16", attention="int8")
    assert not any(isinstance(module, QuantModule) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- in a recipe, and on disk -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("w8a16", {"attention": "int8"}), (Recipe.of("w8a16", attention="int8"), {})],
)
def test_a_recipe_switches_the_attention_with_the_layers(scheme: Any, options: dict[str, Any]) -> None:
    model = sharp(llama)
    float_attention = sharp(llama)
    float_attention.load_state_dict(model.state_dict())
    inputs = inputs_of(model)
    octavo.quantize(float_attention, "w8a16")
    octavo.quantize(model, scheme, **options)
    assert any(isinstance(module, QuantModule) for module in model.modules())
    assert_near(output(model, inputs), output(float_attention, inputs))


def test_float_attention_is_the_default_and_can_be_asked_for() -> None:
    for options in ({}, {"attention": "float"}):
        model = sharp(llama)
        octavo.quantize(model, "w8a16", **options)
        assert model.config._attn_implementation == "eager"
    with pytest.raises(RecipeError, match="attention is 'int4', expected one of 'float', 'int8'"):
        octavo.quantize(sharp(llama), "w8a16", attention="int4")


def test_quantize_is_the_function_that_it_wraps() -> None:
    from octavo.quantization.quantize import quantize

    assert octavo.quantize.__doc__ == quantize.__doc__
    assert octavo.quantize.__name__ == "quantize"


def saved(folder: Path) -> tuple[Any, dict[str, Tensor], Tensor]:
    """An int8 checkpoint in folder/int8, its float one in folder/float; its model, inputs, and output."""
    sharp(llama).save_pretrained(folder / "float")
    model = octavo.load(folder / "float")
    octavo.quantize(model, "w8a16", attention="int8")
    octavo.save(model, folder / "int8")
    inputs = inputs_of(model)
    return model, inputs, output(model, inputs)


def test_a_loaded_checkpoint_has_its_attention(tmp_path: Path) -> None:
    _, inputs, expected = saved(tmp_path)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"]["attention"] == "int8"
    assert NAME not in json.dumps(config), "transformers without octavo does not know that name"
    for loaded in (octavo.load(tmp_path / "int8"), octavo.load(tmp_path / "int8", model=build(llama))):
        assert attention_of(loaded) == "int8"
        assert torch.equal(output(loaded, inputs), expected)


def test_an_attention_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "int8" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["attention"] = "int4"
    file.write_text(json.dumps(config))
    for model in (None, build(llama)):
        with pytest.raises(CheckpointError, match="attention is 'int4', expected one of 'float', 'int8'"):
            octavo.load(tmp_path / "int8", model=model)


def test_a_checkpoint_of_float_attention_says_nothing_of_it(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path)
    model.set_attn_implementation("sdpa")
    octavo.save(model, tmp_path / "back")
    assert "attention" not in json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert attention_of(octavo.load(tmp_path / "back")) == "float"


def test_transformers_without_octavo_runs_it_with_float_attention(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    _, inputs, expected = saved(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert_near(output(loaded, inputs), expected)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("w8a16", {"attention": "int8"}), (Recipe.of("w8a16", attention="int8"), {})],
)
def test_files_and_loading_quantize_with_the_attention(tmp_path: Path, scheme: Any, options: dict[str, Any]) -> None:
    from octavo.integrations.transformers import OctavoConfig

    _, inputs, expected = saved(tmp_path)
    octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "streamed", scheme, **options)
    assert torch.equal(output(octavo.load(tmp_path / "streamed"), inputs), expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=OctavoConfig(scheme, **options)
    )
    assert torch.equal(output(loaded, inputs), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(octavo.load(tmp_path / "again"), inputs), expected)


def test_files_of_a_model_that_cannot_are_refused(tmp_path: Path) -> None:
    build(bloom).save_pretrained(tmp_path / "float")
    with pytest.raises(QuantizeError, match="BloomForCausalLM computes its attention itself"):
        octavo.quantize_checkpoint(tmp_path / "float", tmp_path / "int8", "w8a16", attention="int8")
    assert not (tmp_path / "int8").exists()
