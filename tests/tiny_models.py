"""Models of every shape that a checkpoint can have, small enough to be built in a test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 96
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 42,  # four codes a word: 42 columns do not fill the last one
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))


class Net(nn.Module):
    """No transformers model: convolutions, batch norm's buffers, attention, a head tied to the embedding."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, hidden)
        self.conv = nn.Conv1d(hidden, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 6, 2, groups=2)
        self.out = nn.Linear(6, hidden)
        self.lm_head = nn.Linear(hidden, 50, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embedding(tokens).transpose(1, 2))).transpose(1, 2)
        x = self.up(self.encoder(x).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(self.out(x))


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 2, shape or (2, 9))


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}))


def tied_llama(**changes: Any) -> Any:
    return llama(tie_word_embeddings=True, **changes)


def qwen2(**changes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "num_key_value_heads": 2, **changes}))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT))


def bert_lm() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**TEXT))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=VOCABULARY)
    return T5ForConditionalGeneration(config)


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VISION))


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def llava() -> Any:
    """Its tensors have other names on disk than in the model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, num_key_value_heads=2),
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=VOCABULARY - 1,
    )
    return LlavaForConditionalGeneration(config)


def mixtral(**changes: Any) -> Any:
    """On disk each expert has its own tensors, in the model they are merged."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**{**TEXT, "num_key_value_heads": 2, "num_local_experts": 4, **changes}))


def jetmoe() -> Any:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
        intermediate_size=40, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return JetMoeForCausalLM(config)


def xlnet() -> Any:
    """Its attention holds 3-D weights of a kind that nothing is known of."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    return XLNetLMHeadModel(XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=40))


def longcat() -> Any:
    """Of its experts two return what they are given."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=1, num_hidden_layers=2, num_attention_heads=2,
        ffn_hidden_size=40, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
        head_dim=8, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=24, moe_topk=2,
    )  # fmt: skip
    return LongcatFlashForCausalLM(config)


def dbrx() -> Any:
    """A child holds the weights of the experts, in two dimensions, one expert's rows after another's."""
    from transformers import DbrxConfig, DbrxForCausalLM

    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}
    config = DbrxConfig(
        vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, ffn_config=ffn, attn_config=attention,
        tie_word_embeddings=False,
    )  # fmt: skip
    return DbrxForCausalLM(config)


def qwen3_moe(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24}
    routing = {"num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**TEXT, **own, **routing, **changes}))


def gte() -> Any:
    """On disk q, k and v are one tensor, and so are the projections up and of the gate."""
    from transformers import GteConfig, GteModel

    return GteModel(GteConfig(**TEXT))


def qwen3_vl_moe() -> Any:
    """On disk a stack of experts is one tensor, turned around: [E, K, N]."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        **TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 10, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "out_hidden_size": 32,
              "num_position_embeddings": 16, "deepstack_visual_indexes": []}  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def falcon() -> Any:
    """Its linear layers are of a class of its own."""
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    return GptOssForCausalLM(config)


def gemma3() -> Any:
    """Its embedding, which the head shares, scales what it looks up."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True))


def bart() -> Any:
    """So do its embeddings, of which there are three with one table; its learned positions are asked by a shape."""
    from transformers import BartConfig, BartForConditionalGeneration

    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_ffn_dim": 42, "decoder_ffn_dim": 42}
    return BartForConditionalGeneration(BartConfig(**sizes, **layers, max_position_embeddings=32, scale_embedding=True))


def clip_vision() -> Any:
    """It casts its input to the dtype of a weight."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**{**VISION, "image_size": 32}))


def encodec(**changes: Any) -> Any:
    """All of its convolutions are under weight_norm."""
    from transformers import EncodecConfig, EncodecModel

    small = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 32, "num_lstm_layers": 1}
    return EncodecModel(EncodecConfig(**{**small, "upsampling_ratios": [4, 2], **changes}))


def bit() -> Any:
    """Its convolutions standardize their weight each time."""
    from transformers import BitConfig, BitModel

    return BitModel(BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4))


def build(make: Callable[..., Any], dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with reproducible weights, in eval mode; skips the test where transformers is missing."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return make(**changes).to(dtype).eval()


def older_weight_norm(layer: nn.Module, name: str = "weight", dim: int = 0) -> nn.Module:
    """A hook that computes the weight before each forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, name, dim)
