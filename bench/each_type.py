"""Every model type of transformers: a small model of each, and a process of its own to judge it in."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LARGEST", "LIMIT_S", "build", "in_processes", "model_types", "output"]

MAPPINGS = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "IMAGE_CLASSIFICATION",
)  # fmt: skip
LIMIT_S = 120
LARGEST = 200e6
DEPTH = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("experts_per_token", "num_selected_experts", "moe_num_active_primary_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_dense_layers", "first_k_dense_replace"), 1),
}
WIDTH = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("v_head_dim", "kv_lora_rank", "q_lora_rank", "rotary_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_topk"), 8),
}
HEAD = dict.fromkeys(("head_dim", "kv_channels", "d_kv"), 16)


Judge = Callable[[str, str], dict[str, Any]]
"""A type and its mapping -> what was found: its "type", its "class" and "errors" at least."""


def in_processes(judge: Judge, types: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Run `judge` on each type, each in a process of its own, as many at a time as there are cores."""
    with ThreadPool(os.cpu_count()) as pool:  # threads that wait, each for a process
        return pool.starmap(_in_a_process, [(judge, *each) for each in types], chunksize=1)


def _in_a_process(judge: Judge, name: str, mapping: str) -> dict[str, Any]:
    """Run it in a fork of this process, so that transformers is imported only once."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_quietly, args=(judge, name, mapping, send))
    process.start()
    send.close()
    try:
        return receive.recv()  # type: ignore[no-any-return]
    except EOFError:
        return {"type": name, "class": None, "errors": {"process": f"took more than {LIMIT_S} s, or broke down"}}
    finally:
        process.join()


def model_types() -> Iterator[tuple[str, str]]:
    """Each model type once, with the first mapping that has it."""
    from transformers.models.auto import configuration_auto, modeling_auto

    import octavo.integrations.transformers  # noqa: F401 -- before the processes are forked

    seen = set()
    for mapping in (*(f"MODEL_FOR_{task}_MAPPING" for task in MAPPINGS), "MODEL_MAPPING"):
        for name in getattr(modeling_auto, f"{mapping}_NAMES"):
            if name not in seen and name in configuration_auto.CONFIG_MAPPING_NAMES:
                seen.add(name)
                yield name, mapping


def _quietly(judge: Judge, name: str, mapping: str, send: Any) -> None:
    torch.set_num_threads(1)
    signal.alarm(LIMIT_S)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    send.send(judge(name, mapping))


def build(name: str, mapping: str) -> tuple[Any, dict[str, Tensor] | None]:
    """A small model of the type, and inputs for it or None; (None, None) if no small model can be built."""
    from transformers.models.auto import configuration_auto, modeling_auto

    built = None
    for sizes in ({**WIDTH, **DEPTH}, {**WIDTH, **DEPTH, **HEAD}, DEPTH, {}):
        try:
            config_class = configuration_auto.CONFIG_MAPPING[name]
            config = config_class(**_reduced(config_class(), sizes))
            classes = getattr(modeling_auto, mapping)[config_class]
            model_class = classes[0] if isinstance(classes, tuple) else classes
            with torch.device("meta"):
                parameters = sum(each.numel() for each in model_class(config).parameters())
            if parameters > LARGEST:
                continue
            torch.manual_seed(0)
            model = model_class(config).eval()
        except Exception:
            continue  # its sizes do not fit each other
        built = built or model
        try:
            inputs = _inputs(model)
            output(model, inputs)
        except Exception:
            continue
        return model, inputs
    return built, None


def _reduced(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Arguments for a config like `config` whose sizes are at most those given, in the configs within it too."""
    parts = {name: part for name, part in vars(config).items() if hasattr(part, "to_dict")}
    values = {name: getattr(config, name, None) for name in sizes}
    small = {name: sizes[name] for name, value in values.items() if type(value) is int and value > sizes[name]}
    return {**{name: _reduced(part, sizes) for name, part in parts.items()}, **small}


def _inputs(model: Any) -> dict[str, Tensor]:
    config = model.config
    ids = torch.randint(3, min(getattr(config.get_text_config(), "vocab_size", None) or 500, 500) - 2, (2, 12))
    takes = inspect.signature(model.forward).parameters
    name = model.main_input_name
    inputs = {"input_ids": ids} if name == "input_ids" or "input_ids" in takes else {}
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", None) or 224
        side = side[0] if isinstance(side, tuple | list) else side
        inputs["pixel_values"] = torch.randn(2, getattr(vision, "num_channels", None) or 3, side, side)
    if name == "input_values":
        inputs["input_values"] = torch.randn(2, 16000)
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.randn(2, getattr(config, "num_mel_bins", 80), frames)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first tensor of floats that the model returns."""
    return next(each for each in model(**inputs).values() if isinstance(each, Tensor) and each.is_floating_point())
