"""Tiny models of many architectures with the smoothing pairs that a person would list, and outliers to put into them.

An outlier is put in without changing what the model computes: a channel of a source is multiplied by a factor, and the
columns that it meets are divided by it. So that this changes nothing is a test of the list, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 96
HEAD = 8
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """make: a model with two blocks. batch: an input of `n` tokens, as far as it has any. pairs: source -> its sinks'
    parameters; a * stands for the blocks. one_plus: whether its norms scale by 1 + weight."""

    make: Callable[[], Any]
    batch: Callable[[int], Batch]
    pairs: dict[str, str]
    one_plus: bool = False

    def build(self) -> Any:
        """The model in fp32 with reproducible weights of a size at which every block counts, none of them 0 or 1."""
        pytest.importorskip("transformers")
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 3 and ".experts." in name:
                    parameter.normal_(std=parameter.shape[_axis(model, name)] ** -0.5)
                elif parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    def expected(self) -> dict[str, tuple[str, ...]]:
        """The pairs with their blocks filled in."""
        filled: dict[str, tuple[str, ...]] = {}
        for source, sinks in self.pairs.items():
            if "*" in source:
                for block in "01":
                    filled[source.replace("*", block)] = tuple(sinks.replace("*", block).split())
            else:
                filled[source] = tuple(sink.replace("*", block) for block in "01" for sink in sinks.split())
            filled = {name: tuple(dict.fromkeys(of)) for name, of in filled.items()}
        return filled


def inject(architecture: Architecture, model: nn.Module, factor: float = 60.0) -> None:
    """Outliers, two channels of them, in the output of every norm of a pair and of every linear layer of one that is
    not fused; and in two of every expert's, each with channels of its own."""
    for source, sinks in architecture.expected().items():
        if is_stack(source):
            inject_in_experts(model, source, factor)
            continue
        layer = model.get_submodule(source)
        scaled = layer.weight.shape[0] if type(layer).__name__ != "Conv1D" else 0
        first = model.get_parameter(sinks[0])
        width = first.shape[_axis(model, sinks[0])]
        if scaled > width or not scaled:  # fused
            continue
        factors = torch.ones(scaled)
        factors[torch.randperm(scaled)[:2]] = factor
        _multiply_outputs(layer, factors, architecture.one_plus and layer.weight.dim() == 1)
        for sink in sinks:
            columns = factors[_fed_by(scaled, width)]
            weight, axis = model.get_parameter(sink), _axis(model, sink)
            weight.data /= columns if axis == -1 else columns.unsqueeze(1)


def is_stack(source: str) -> bool:
    """Whether a source is no layer but the up projection of a stack of experts."""
    return source.endswith(".experts.gate_up_proj")


def multiply_experts(model: nn.Module, source: str, factors: Tensor) -> None:
    """The up half of a stack multiplied by factors [E, I], and the columns that it meets divided by them."""
    up, down = model.get_parameter(source), model.get_parameter(source.replace("gate_up", "down"))
    if _transposed(model.get_submodule(source.rpartition(".")[0])):
        up.data[:, :, factors.shape[1] :] *= factors.unsqueeze(1)
        down.data /= factors.unsqueeze(2)
    else:
        up.data[:, factors.shape[1] :] *= factors.unsqueeze(2)
        down.data /= factors.unsqueeze(1)


def inject_in_experts(model: nn.Module, source: str, factor: float, experts: Any = ...) -> None:
    """Outliers in two channels of `experts`, by default of all."""
    down = model.get_parameter(source.replace("gate_up", "down"))
    transposed = _transposed(model.get_submodule(source.rpartition(".")[0]))
    factors = torch.ones(len(down), down.shape[1 if transposed else 2])
    for row in factors[experts].view(-1, factors.shape[1]):
        row[torch.randperm(len(row))[:2]] = factor
    multiply_experts(model, source, factors)


def _transposed(layer: Any) -> bool:
    return bool(getattr(layer, "is_transposed", type(layer).__name__ == "Llama4TextExperts"))


def _axis(model: nn.Module, param: str) -> int:
    layer = model.get_submodule(param.rpartition(".")[0])
    if type(layer).__name__ == "Conv1D":
        return 0
    return -2 if model.get_parameter(param).dim() == 3 and _transposed(layer) else -1


def _fed_by(outputs: int, inputs: int) -> Tensor:
    """The output that each input comes from; where there are fewer outputs they are key-value heads."""
    heads = torch.arange(outputs).view(-1, HEAD) if outputs < inputs else torch.arange(outputs).view(1, -1)
    return heads.repeat_interleave(inputs // outputs, dim=0).reshape(-1)


def _multiply_outputs(layer: nn.Module, factors: Tensor, one_plus: bool) -> None:
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias.data *= factors
    weight = layer.weight
    if one_plus:
        weight.data = (1 + weight.data) * factors - 1
    else:
        weight.data *= factors if weight.dim() == 1 else factors.unsqueeze(1)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """What a model of the table computes."""
    with torch.no_grad():
        result = model(**batch)
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def relative_error(model: nn.Module, batch: Batch, wanted: Tensor) -> float:
    """|y' - y|^2 / |y|^2 over all of the output."""
    return float((outputs(model, batch) - wanted).square().sum() / wanted.square().sum())


def _tokens(n: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, n), generator=torch.Generator().manual_seed(n))


def _text(n: int) -> Batch:
    return {"input_ids": _tokens(n)}


def _text_to_text(n: int) -> Batch:
    return {"input_ids": _tokens(n), "decoder_input_ids": _tokens(n + 1)[:, :7]}


def _image(n: int) -> Batch:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(n))}


def _sound(n: int) -> Batch:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(n))
    return {"input_features": features, "decoder_input_ids": _tokens(n)[:, :7]}


def _of(model: str, config: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


def _gated(block: str) -> dict[str, str]:
    """Llama's pairs, and those of most after it."""
    return {
        f"{block}.input_layernorm": f"{block}.self_attn.q_proj.weight {block}.self_attn.k_proj.weight "
        f"{block}.self_attn.v_proj.weight",
        f"{block}.self_attn.v_proj": f"{block}.self_attn.o_proj.weight",
        f"{block}.post_attention_layernorm": f"{block}.mlp.gate_proj.weight {block}.mlp.up_proj.weight",
        f"{block}.mlp.up_proj": f"{block}.mlp.down_proj.weight",
    }


_BLOCK = "model.layers.*"
_LLAMA = {**_gated(_BLOCK), "model.norm": "lm_head.weight"}
_WITHOUT_MLP = {source: sinks for source, sinks in _LLAMA.items() if "mlp" not in sinks}


def _mixture(*fed_by_norm: str, mlp: str = "mlp", shared: str = "", up_to_down: bool = True) -> dict[str, str]:
    """Llama's pairs with experts for its MLP. fed_by_norm: parameters of the block, in the order in which they run.
    shared: name of the expert that every token goes through. up_to_down: whether the gate lets factors through."""
    mlp = f"{_BLOCK}.{mlp}"
    pairs = {**_WITHOUT_MLP, f"{_BLOCK}.post_attention_layernorm": " ".join(f"{mlp}.{name}" for name in fed_by_norm)}
    if shared:
        pairs[f"{mlp}.{shared}.up_proj"] = f"{mlp}.{shared}.down_proj.weight"
    if up_to_down:
        pairs[f"{mlp}.experts.gate_up_proj"] = f"{mlp}.experts.down_proj"
    return pairs


_MIXTURE = _mixture("gate.weight", "experts.gate_up_proj")
_SHARED_LAST = _mixture(
    "gate.weight", "experts.gate_up_proj", "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight",
    shared="shared_experts",
)  # fmt: skip
_LATENT = {  # attention of DeepSeek V3
    f"{_BLOCK}.input_layernorm": f"{_BLOCK}.self_attn.q_a_proj.weight {_BLOCK}.self_attn.kv_a_proj_with_mqa.weight",
    f"{_BLOCK}.self_attn.q_a_layernorm": f"{_BLOCK}.self_attn.q_b_proj.weight",
    f"{_BLOCK}.self_attn.kv_a_layernorm": f"{_BLOCK}.self_attn.kv_b_proj.weight",
}
_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
_GEMMA = {  # the norms after attention and after the MLP end in the residual stream, and the head is tied
    **{source: sinks for source, sinks in _gated(_BLOCK).items() if "post_attention" not in source},
    f"{_BLOCK}.pre_feedforward_layernorm": f"{_BLOCK}.mlp.gate_proj.weight {_BLOCK}.mlp.up_proj.weight",
}
_FUSED = {  # of BLOOM and Falcon
    "transformer.h.*.input_layernorm": "transformer.h.*.self_attention.query_key_value.weight",
    "transformer.h.*.self_attention.query_key_value": "transformer.h.*.self_attention.dense.weight",
    "transformer.h.*.post_attention_layernorm": "transformer.h.*.mlp.dense_h_to_4h.weight",
}
_PHI = {
    f"{_BLOCK}.input_layernorm": f"{_BLOCK}.self_attn.qkv_proj.weight",
    f"{_BLOCK}.self_attn.qkv_proj": f"{_BLOCK}.self_attn.o_proj.weight",
    f"{_BLOCK}.post_attention_layernorm": f"{_BLOCK}.mlp.gate_up_proj.weight",
    f"{_BLOCK}.mlp.gate_up_proj": f"{_BLOCK}.mlp.down_proj.weight",
    "model.norm": "lm_head.weight",
}


def _attention(block: str, norm: str, attention: str, names: str, out: str) -> dict[str, str]:
    """norm -> the projections `names`, the last of which is the values' and feeds `out`."""
    projections = [f"{block}.{attention}.{name}" for name in names.split()]
    return {
        f"{block}.{norm}": " ".join(f"{name}.weight" for name in projections),
        projections[-1]: f"{block}.{attention}.{out}.weight",
    }


def _whisper_block(side: str) -> dict[str, str]:
    block = f"model.{side}.layers.*"
    return {
        **_attention(block, "self_attn_layer_norm", "self_attn", "q_proj k_proj v_proj", "out_proj"),
        f"{block}.final_layer_norm": f"{block}.fc1.weight",
    }


def _across(decoder_block: str, attention: str, norm: str, encoder_norm: str, names: str, out: str) -> dict[str, str]:
    """The pairs of cross attention: queries from the decoder's norm, keys and values from the encoder's."""
    q, k, v = (f"{decoder_block}.{attention}.{name}" for name in names.split())
    return {
        f"{decoder_block}.{norm}": f"{q}.weight",
        encoder_norm: f"{k}.weight {v}.weight",
        v: f"{decoder_block}.{attention}.{out}.weight",
    }


def _t5(gated: bool) -> Architecture:
    pairs = {}
    for side, mlp in (("encoder", 1), ("decoder", 2)):
        block = f"{side}.block.*"
        pairs |= _attention(block, "layer.0.layer_norm", "layer.0.SelfAttention", "q k v", "o")
        dense = f"{block}.layer.{mlp}.DenseReluDense"
        pairs[f"{block}.layer.{mlp}.layer_norm"] = (
            f"{dense}.wi_0.weight {dense}.wi_1.weight" if gated else f"{dense}.wi.weight"
        )
        pairs[f"{dense}.wi_1" if gated else f"{dense}.wi"] = f"{dense}.wo.weight"
    cross = _across(
        "decoder.block.*", "layer.1.EncDecAttention", "layer.1.layer_norm", "encoder.final_layer_norm", "q k v", "o"
    )
    config = {"d_model": 32, "d_kv": HEAD, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    kind = "gated-gelu" if gated else "relu"
    make = _of("T5ForConditionalGeneration", "T5Config", **config, feed_forward_proj=kind, decoder_start_token_id=0)
    return Architecture(make, _text_to_text, {**pairs, **cross})


def _causal(family: str, pairs: dict[str, str], *, one_plus: bool = False, config: str = "", **options: Any) -> Any:
    make = _of(f"{family}ForCausalLM", config or f"{family}Config", **options)
    return Architecture(make, _text, pairs, one_plus)


_OPT_BLOCK = "model.decoder.layers.*"
_NEOX_BLOCK = "gpt_neox.layers.*"
_GPT2_BLOCK = "transformer.h.*"
_BERT_BLOCK = "encoder.layer.*"
_VIT_BLOCK = "vit.layers.*"

ARCHITECTURES: dict[str, Architecture] = {
    "opt": _causal(
        "OPT",
        {
            **_attention(_OPT_BLOCK, "self_attn_layer_norm", "self_attn", "q_proj k_proj v_proj", "out_proj"),
            f"{_OPT_BLOCK}.final_layer_norm": f"{_OPT_BLOCK}.fc1.weight",
            f"{_OPT_BLOCK}.fc1": f"{_OPT_BLOCK}.fc2.weight",  # relu lets factors through
        },
        **{**TEXT, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": _causal("Bloom", _FUSED, vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "llama": _causal("Llama", _LLAMA, **GROUPED),
    "mistral": _causal("Mistral", _LLAMA, **GROUPED),
    "mixtral": _causal("Mixtral", _MIXTURE, **GROUPED, num_local_experts=4),
    "falcon": _causal(
        "Falcon",
        {
            "transformer.h.*.input_layernorm": "transformer.h.*.self_attention.query_key_value.weight "
            "transformer.h.*.mlp.dense_h_to_4h.weight",
            "transformer.h.*.self_attention.query_key_value": "transformer.h.*.self_attention.dense.weight",
        },
        **TEXT,
        multi_query=True,
        parallel_attn=True,
    ),
    "falcon, sequential": _causal(
        "Falcon", _FUSED, **TEXT, multi_query=False, parallel_attn=False, bias=True, alibi=True
    ),
    "falcon, new decoder": _causal(
        "Falcon",
        {
            "transformer.h.*.ln_attn": "transformer.h.*.self_attention.query_key_value.weight",
            "transformer.h.*.ln_mlp": "transformer.h.*.mlp.dense_h_to_4h.weight",
            "transformer.h.*.self_attention.query_key_value": "transformer.h.*.self_attention.dense.weight",
        },
        **TEXT,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "gpt2": Architecture(
        _of("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
        _text,
        {
            f"{_GPT2_BLOCK}.ln_1": f"{_GPT2_BLOCK}.attn.c_attn.weight",
            f"{_GPT2_BLOCK}.attn.c_attn": f"{_GPT2_BLOCK}.attn.c_proj.weight",
            f"{_GPT2_BLOCK}.ln_2": f"{_GPT2_BLOCK}.mlp.c_fc.weight",
        },
    ),
    "gpt-neox": _causal(
        "GPTNeoX",
        {
            f"{_NEOX_BLOCK}.input_layernorm": f"{_NEOX_BLOCK}.attention.query_key_value.weight",
            f"{_NEOX_BLOCK}.attention.query_key_value": f"{_NEOX_BLOCK}.attention.dense.weight",
            f"{_NEOX_BLOCK}.post_attention_layernorm": f"{_NEOX_BLOCK}.mlp.dense_h_to_4h.weight",
            "gpt_neox.final_layer_norm": "lm_head.weight",
        },
        **{**TEXT, "tie_word_embeddings": False},
    ),
    "gemma2": _causal("Gemma2", _GEMMA, one_plus=True, **{**GROUPED, "head_dim": HEAD, "tie_word_embeddings": True}),
    "gemma3": _causal(
        "Gemma3",
        _GEMMA,
        one_plus=True,
        config="Gemma3TextConfig",
        **{**GROUPED, "head_dim": HEAD, "tie_word_embeddings": True},
    ),
    "qwen2": _causal("Qwen2", _LLAMA, **GROUPED),
    "qwen3": _causal("Qwen3", _LLAMA, **GROUPED, head_dim=HEAD),  # nothing of q_norm and k_norm
    "qwen3-moe": _causal("Qwen3Moe", _MIXTURE, **GROUPED, **_FOUR, head_dim=HEAD, moe_intermediate_size=24),
    "qwen2-moe": _causal(
        "Qwen2Moe",
        _mixture(
            "shared_expert.gate_proj.weight",
            "shared_expert.up_proj.weight",
            "gate.weight",
            "experts.gate_up_proj",
            "shared_expert_gate.weight",
            shared="shared_expert",
        ),
        **GROUPED,
        **_FOUR,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "olmoe": _causal("Olmoe", _MIXTURE, **GROUPED, **_FOUR),
    "glm4-moe": _causal("Glm4Moe", _SHARED_LAST, **GROUPED, **_ROUTED, head_dim=HEAD, moe_intermediate_size=24),
    "deepseek-v3": _causal(
        "DeepseekV3",
        {**{source: sinks for source, sinks in _SHARED_LAST.items() if "self_attn" not in sinks}, **_LATENT},
        **{**GROUPED, **_ROUTED, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "llama4": _causal(
        "Llama4",
        _mixture(
            "router.weight",
            "experts.gate_up_proj",
            "shared_expert.gate_proj.weight",
            "shared_expert.up_proj.weight",
            mlp="feed_forward",
            shared="shared_expert",
        ),
        config="Llama4TextConfig",
        **GROUPED,
        head_dim=HEAD,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
    "gpt-oss": _causal(  # up + 1, clamped
        "GptOss",
        _mixture("router.weight", "experts.gate_up_proj", up_to_down=False),
        **GROUPED,
        head_dim=HEAD,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    ),
    "phi3": _causal("Phi3", _PHI, **GROUPED),
    "bert": Architecture(  # every norm is followed by a residual
        _of("BertModel", "BertConfig", **TEXT),
        _text,
        {f"{_BERT_BLOCK}.attention.self.value": f"{_BERT_BLOCK}.attention.output.dense.weight"},
    ),
    "vit": Architecture(
        _of(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        _image,
        {
            **_attention(_VIT_BLOCK, "layernorm_before", "attention", "q_proj k_proj v_proj", "o_proj"),
            f"{_VIT_BLOCK}.layernorm_after": f"{_VIT_BLOCK}.mlp.fc1.weight",
            "vit.layernorm": "classifier.weight",
        },
    ),
    "whisper": Architecture(
        _of(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        _sound,
        {
            **_whisper_block("encoder"),
            **_whisper_block("decoder"),
            **_across(
                "model.decoder.layers.*",
                "encoder_attn",
                "encoder_attn_layer_norm",
                "model.encoder.layer_norm",
                "q_proj k_proj v_proj",
                "out_proj",
            ),
        },
    ),
    "t5": _t5(gated=False),
    "t5, gated": _t5(gated=True),
}


EVERY_ARCHITECTURE = [pytest.param(architecture, id=name) for name, architecture in ARCHITECTURES.items()]
"""The table as parameters of a test."""
