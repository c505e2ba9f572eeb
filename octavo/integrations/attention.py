"""Int8 attention in every transformers model that goes through `AttentionInterface`.

    use_int8_attention(model)                                               a model at hand
    octavo.quantize(model, "w8a8", attention="int8")                        with its linear layers
    AutoModel.from_pretrained(id, attn_implementation="octavo_int8")        from the start

Importing this module registers the name "octavo_int8" with transformers, with the masks of eager attention: they are
always materialized, so that everything (causality, padding, sliding windows) is in the mask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from octavo import ops
from octavo.errors import QuantizeError
from octavo.integrations.int8_states import Int8States

__all__ = [
    "NAME", "attention_of", "check_int8_attention", "int8_attention_forward", "set_implementation",
    "use_int8_attention",
]  # fmt: skip

NAME = "octavo_int8"
"""Name of this attention in transformers' `attn_implementation`."""

_INSTEAD = "use float attention (attn_implementation='eager')"

_NO_EFFECT = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "num_items_in_batch", "position_ids", "seq_idx",
})  # fmt: skip
"""Tensors that models pass to every attention function and that eager attention ignores."""


def use_int8_attention(model: PreTrainedModel) -> None:
    """Switch every attention of a transformers model to int8 products, in place; `octavo.save` keeps it so.

    Raises: QuantizeError, before anything is changed, if the model's attention cannot be switched.
    """
    check_int8_attention(model)
    # Part by part: before 5.23 transformers skips parts that have a copy of the model's config (T5's stacks).
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            set_implementation(part, NAME)


def set_implementation(part: PreTrainedModel, name: str) -> None:
    """Set the attention function of one model, but not of models inside it that have their own config. (Naming a config
    that belongs to no model would make transformers warn.)"""
    part.set_attn_implementation({"": name})


def attention_of(model: PreTrainedModel) -> str:
    """How the attention of a transformers model is computed: "float" or "int8"."""
    return "int8" if model.config._attn_implementation == NAME else "float"


def check_int8_attention(model: nn.Module) -> None:
    """Raise QuantizeError unless `use_int8_attention` can switch the attention of `model`."""
    if not isinstance(model, PreTrainedModel):
        raise QuantizeError(
            f"attention: 'int8' switches the attention of a transformers model, got a {type(model).__name__}; call "
            "octavo.ops.int8_attention in its own code, or leave attention='float'"
        )
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not part._can_set_attn_implementation():
            raise QuantizeError(
                f"attention: {type(part).__name__} computes its attention itself instead of asking transformers' "
                "AttentionInterface, so it cannot be int8; leave attention='float'"
            )
        if getattr(part, "sinks", None) is not None:
            raise QuantizeError(f"attention: {_no_sinks(part)}; leave attention='float'")
    if not any(_asks_the_interface(part) for part in model.modules()):
        raise QuantizeError(f"attention: {type(model).__name__} has no attention to be int8; leave attention='float'")


def _asks_the_interface(module: nn.Module) -> bool:
    return hasattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS")


def int8_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: what eager attention computes, softmax(scaling * q k^T + mask) v, with
    both products in int8, as octavo.ops.attention defines them.

    query: [B or 1, H, T, D] float. key, value: [B, KV, S, D] float, H a multiple of KV.
    attention_mask, position_bias: [B or 1, H or 1, T or 1, S], added to the scores.
    Returns: [B, T, H, D] of query's dtype; None in place of the probabilities.
    Raises: QuantizeError for what it does not have: dropout, probabilities, sinks, a paged cache, sparse attention.
    """
    for problem in _unsupported(module, dropout, kwargs):
        raise QuantizeError(f"int8 attention in {type(module).__name__}: {problem}; {_INSTEAD}")
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else position_bias + attention_mask
    query = query.expand(key.shape[0], -1, -1, -1)  # learned queries are of batch 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Int8States) and isinstance(value, Int8States):
        y = ops.int8_attention_of_codes(
            query, key.codes, key.scale, value.codes, value.scale, attention_mask, scaling, softcap
        )
    else:
        y = ops.int8_attention(query, key, value, attention_mask, scaling, softcap)
    return y.transpose(1, 2).contiguous(), None


def _unsupported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> Iterator[str]:
    if dropout:
        yield f"dropout is {dropout}, and it is for inference; call model.eval()"
    if getattr(module, "sinks", None) is not None:
        yield _no_sinks(module)
    if kwargs.get("output_attentions"):
        yield "output_attentions is True, and it keeps no probabilities"
    if kwargs.get("cache") is not None:
        yield "continuous batching's paged cache is not read"
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in _NO_EFFECT:  # a bias, indices of tokens, ...: it would be ignored
            yield f"got the tensor {name!r}, which it does not know"


def _no_sinks(module: nn.Module) -> str:
    return f"{type(module).__name__} has attention sinks, which int8 attention does not have"


AttentionInterface.register(NAME, int8_attention_forward)
AttentionMaskInterface.register(NAME, eager_mask)
