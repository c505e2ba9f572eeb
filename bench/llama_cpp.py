"""The model of `bench.quantize.llama` as llama.cpp runs it: a GGUF file with weights in Q8_0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from octavo.cli.bench_worker import Round

__all__ = ["POSITIONS", "start", "time_round", "write"]

POSITIONS = 1024
"""That the engine has room for."""
_engine: list[Any] = []


def write(model: Any, file: Path) -> None:
    """Write a transformers Llama whose head is tied to its embedding: norms in fp32, all else in Q8_0, which is int8 in
    blocks of 32, each with a scale in fp16."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float()
        rotated = heads.get(name.split(".")[-2])
        if rotated:
            values = with_pairs_together(values, rotated)
        to = names.get_name(name, try_suffixes=(".weight",))
        if values.dim() == 1:
            writer.add_tensor(to, values.numpy())
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(to, gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_pairs_together(weight: Tensor, heads: int) -> Tensor:
    """[heads * D, K] with the two rows that a rotary embedding turns, D / 2 apart in transformers, side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# -- in a process of its own ------------------------------------------------------------------------------------------


def start(path: str, threads: int, ids: Sequence[int]) -> Tensor:
    """Start the engine. Returns: the logprobs of the token after `ids`, fp32 [V]."""
    import llama_cpp

    engine = llama_cpp.Llama(
        path, n_ctx=POSITIONS, n_batch=len(ids), n_ubatch=len(ids), n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    _engine.append(engine)
    return torch.log_softmax(_feed(engine, ids), -1)


def time_round(ids: Sequence[int], new_tokens: int) -> Round:
    """As `bench_worker.time_round`."""
    (engine,) = _engine
    engine.reset()
    begin = time.perf_counter()
    token = int(_feed(engine, ids).argmax())
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = int(_feed(engine, [token]).argmax())
    return Round(first - begin, time.perf_counter() - first)


def _feed(engine: Any, ids: Sequence[int]) -> Tensor:
    """The logits after `ids`, fp32 [V], in the engine's own memory: valid until it is fed again."""
    import llama_cpp

    engine.eval(ids)
    return torch.from_numpy(numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(engine.ctx), (engine.n_vocab(),)))
