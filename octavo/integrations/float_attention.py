"""Float attention of transformers models on CPUs, where torch's `scaled_dot_product_attention` is slow.

    y = softmax(scaling * q k^T) v

torch's function processes one head at a time, and does not use the processor's instructions for bf16. Where this
package has a kernel (`ops.float_attention`), it is used for prompts, masks and single queries. Without a kernel, single
queries (decode) are computed as two fp32 products for all heads that share a key (grouped-query attention), rounded
once. Keys and values of an `Int8Cache` are multiplied as codes, on GPUs too. Everything else (biases, gradients, GPUs,
exported graphs) is passed on to transformers' "sdpa", which this replaces.

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

from octavo import ops
from octavo.integrations.attention import set_implementation
from octavo.integrations.int8_states import Int8States

__all__ = ["NAME", "float_attention_forward", "use_float_attention"]

NAME = "octavo_sdpa"
"""Name of this attention in transformers' `attn_implementation`."""

AT_ONCE, MOST = 2**19, 2**20
"""AT_ONCE: elements of keys, and of values, that are converted to fp32 at a time, 2 MB each. MOST: the largest number
of elements of one key head, in all sequences together, since a head is not split. Larger pieces do not fit the caches,
and their memory would be allocated from the operating system at each call, which takes longer than the products."""

_ASKS_FOR_SDPA = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b)[^:]*sdpa")


def use_float_attention(model: nn.Module) -> None:
    """Switch a transformers model that uses "sdpa", in all of its parts, to "octavo_sdpa", in place.

    Others are left alone, and so are those whose code asks whether the name is "sdpa".
    `model.set_attn_implementation("sdpa")` undoes it, as transformers' `generate_batch` demands, which asks too.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if parts and all(map(_is_switchable, parts)):
        for part in parts:
            set_implementation(part, NAME)


def _is_switchable(part: PreTrainedModel) -> bool:
    if part.config._attn_implementation != "sdpa" or not part._can_set_attn_implementation():
        return False
    try:
        source = inspect.getsource(sys.modules[type(part).__module__])
    except (OSError, TypeError):
        return False
    return not _ASKS_FOR_SDPA.search(source)


def float_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: what "sdpa" computes, softmax(scaling * q k^T + mask) v.

    query: [B, H, T, D] float. key, value: [B, KV, S, D] float, H a multiple of KV. attention_mask: [B or 1, H or 1, T,
        S], bool (True: may attend) or float, added to the scores; None for a causal mask where `module` is causal.
    scaling: None for 1 / sqrt(D).
    Returns: [B, T, H, D] of query's dtype; None in place of the probabilities.
    """
    if not dropout and _is_plain(query, key, value, kwargs):
        by = query.shape[-1] ** -0.5 if scaling is None else scaling
        if isinstance(key, Int8States) and isinstance(value, Int8States) and _is_allowed(attention_mask, by):
            return _of_codes(module, query, key, value, attention_mask, by, kwargs), None
        if _has_kernel(query, key, attention_mask, by):
            is_causal = attention_mask is None and query.shape[2] > 1 and _is_causal(module, kwargs)
            if is_causal:
                key, value = (x[:, :, : query.shape[2]] for x in (key, value))
            y = ops.float_attention(query, key, value, attention_mask, by, is_causal=is_causal)
            return y.transpose(1, 2).contiguous(), None
        if attention_mask is None and _is_one_query(query, key, value):
            return _one_query(query, key, value, by), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return attended


def _is_plain(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the call asks for nothing but the formula, without a gradient, and not for an exported or traced
    graph."""
    return (
        torch._C._get_tracing_state() is None
        and not torch.compiler.is_exporting()
        and not torch._C._is_any_autocast_enabled()
        and query.dtype == key.dtype == value.dtype
        and len(query) == len(key) == len(value)
        and query.shape[1] % key.shape[1] == 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
        and not kwargs.get("output_attentions")
    )


def _has_kernel(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> bool:
    """Whether a kernel of this package answers, faster than torch's."""
    return ops.attends_in_float(query, key) and _is_allowed(mask, scaling)


def _is_allowed(mask: Tensor | None, scaling: float) -> bool:
    """Whether the ops of float attention support this mask and scaling."""
    return scaling > 0 and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4))


def _of_codes(
    module: nn.Module, query: Tensor, key: Int8States, value: Int8States, mask: Tensor | None, scaling: float,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Attention over keys and values of an `Int8Cache`: [B, T, H, D]."""
    is_causal = mask is None and query.shape[2] > 1 and _is_causal(module, kwargs)
    k, k_scale, v, v_scale = key.codes, key.scale, value.codes, value.scale
    if is_causal:
        k, k_scale, v, v_scale = (x[:, :, : query.shape[2]] for x in (k, k_scale, v, v_scale))
    y = ops.float_attention_of_codes(query, k, k_scale, v, v_scale, mask, scaling, is_causal=is_causal)
    return y.transpose(1, 2).contiguous()


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether several queries without a mask attend causally, decided as "sdpa" does."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _is_one_query(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.shape[2] == 1
        and query.dtype in (torch.bfloat16, torch.float16)
        and len(key) * key.shape[2] * max(key.shape[3], value.shape[3]) <= MOST
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


AttentionInterface.register(NAME, float_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
