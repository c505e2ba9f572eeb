"""Float attention of one query on CPUs: two products for all heads that share a key.

    y = softmax(scaling * q k^T) v          in fp32, rounded once

In decode a sequence asks with one query. On CPUs torch's `scaled_dot_product_attention` then takes head by head and
lays keys and values out anew for each, which takes many times as long as the products. Here the heads that share a key
(grouped-query attention) are rows of one matrix, and keys and values are widened once. Everything else (prefill, masks,
batches with padding, fp32, GPUs, compiled graphs) is passed on to transformers' "sdpa", in whose place this is.

Importing this module registers the name "octavo_sdpa" with transformers, with the masks of "sdpa".
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["NAME", "decode_attention_forward", "use_decode_attention"]

NAME = "octavo_sdpa"
"""Of this attention, in `attn_implementation`."""

AT_ONCE, MOST = 2**19, 2**20
"""Numbers of keys, and of values, that are widened at a time, 2 MB each; and how many there may be of one key head, in
all sequences together, for more heads are not taken apart. Larger pieces leave the caches, and their memory is the
operating system's anew at each call, which takes longer than the products."""

_ASKS_FOR_SDPA = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b)[^:]*sdpa")


def use_decode_attention(model: nn.Module) -> None:
    """Switch a transformers model that uses "sdpa", in all of its parts, to "octavo_sdpa", in place.

    Others are left alone, and so are those whose code asks whether the name is "sdpa".
    `model.set_attn_implementation("sdpa")` undoes it, as transformers' `generate_batch` demands, which asks too.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if parts and all(map(_is_switchable, parts)):
        for part in parts:
            part.set_attn_implementation(NAME)


def _is_switchable(part: PreTrainedModel) -> bool:
    if part.config._attn_implementation != "sdpa" or not part._can_set_attn_implementation():
        return False
    try:
        source = inspect.getsource(sys.modules[type(part).__module__])
    except (OSError, TypeError):
        return False
    return not _ASKS_FOR_SDPA.search(source)


def decode_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: what "sdpa" computes.

    query: [B, H, T, D] float. key, value: [B, KV, S, D] float. attention_mask: [B or 1, H or 1, T, S] or None.
    Returns: [B, T, H, D] of query's dtype; None in place of the probabilities.
    """
    if attention_mask is None and not dropout and _is_one_query(query, key, value, kwargs):
        return _one_query(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return attended


def _is_one_query(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    batch, heads, tokens, _ = query.shape
    return (
        not torch.compiler.is_compiling()
        and tokens == 1
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)  # in fp32 torch's kernel is as fast
        and batch == len(key) == len(value)
        and heads % key.shape[1] == 0
        and batch * key.shape[2] * max(key.shape[3], value.shape[3]) <= MOST
        and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
        and not kwargs.get("output_attentions")
    )


def _one_query(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query [B, H, 1, D], key [B, KV, S, D], value [B, KV, S, Dv] -> [B, 1, H, Dv]."""
    batch, heads, _, size = query.shape
    key_heads, tokens = key.shape[1:3]
    rows = (query.float() * scaling).reshape(batch, key_heads, heads // key_heads, size)
    step = max(1, AT_ONCE // max(1, batch * tokens * max(size, value.shape[3])))
    parts = []
    for some in zip(rows.split(step, 1), key.split(step, 1), value.split(step, 1), strict=True):
        q, k, v = some
        parts.append(torch.softmax(q @ k.float().mT, -1) @ v.float())
    return torch.cat(parts, 1).to(query.dtype).view(batch, 1, heads, value.shape[3])


AttentionInterface.register(NAME, decode_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
