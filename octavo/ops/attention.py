"""Attention with both products in int8: the definition, and an implementation by other ops that runs on every device.

SmoothQuant's BMM (Xiao et al., arXiv:2211.10438, section 4), with scales found on the fly:

    q, k, v         codes of query, key and value, a scale for each token of a head: sq [T, 1], sk [S, 1], sv [S, 1]
    scores          (q @ k.T) * sq * sk.T * scaling                an exact int32 sum over D, then fp32
    probabilities   softmax(softcap(scores) + mask)                fp32
    p, sp [T, 1]    codes of probabilities * sv.T, a scale a row   so that sv, which varies along the sum, is inside it
    result          (p @ v) * sp                                   an exact int32 sum over S, then fp32

`int8_attention_of_codes` is the same from the second line on, for keys and values that are codes already, as
`Int8Cache` holds them. `float_attention_of_codes` computes float attention over the keys and values code * scale:

    scores          (q @ k.T) * sk.T * scaling                     in fp32
    result          (softmax(scores) * sv.T) @ v                   in fp32

There is a scale for each token, so no token changes how another one is rounded: padding and later tokens have no
effect, and a key-value cache gives the same result as computing everything again. The scale sv is multiplied into the
probabilities before these are rounded, so that their 127 steps are used for what reaches the result: in most models the
first token draws most of the attention but has a small value, and would otherwise leave few steps for the other tokens.
For the same reason sv is 0 for a row of zeros.

Kernels for attention (see `octavo backends`) take the place of this implementation; it remains for float64 and for all
other machines. Float attention without a kernel is torch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.errors import QuantizeError
from octavo.ops.reference import LONGEST_EXACT, accumulator, check_rows, in_full_precision

__all__ = [
    "check_codes", "check_heads", "check_longest", "float_attention", "float_attention_of_codes", "int8_attention",
    "int8_attention_of_codes", "quantize_states", "value_codes",
]  # fmt: skip

_BLOCK_SCORES = 1 << 22
"""Query rows are processed in blocks of this many scores (16 MiB in fp32; a few such blocks exist at a time)."""


@in_full_precision
def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    return int8_attention_of_codes(query, *_codes(key), *value_codes(value), mask, scaling, softcap)


@in_full_precision
def int8_attention_of_codes(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    check_codes(query, key, key_scale, value, value_scale, mask)
    check_longest(key)
    (batch, heads, rows, _), (kv_heads, tokens) = query.shape, key.shape[1:3]
    # Query heads that share a key head are stacked as rows: [batch * kv_heads, heads / kv_heads * rows, ...].
    q, q_scale = (_by_key(part, kv_heads) for part in _codes(query))
    k, k_scale, v, v_scale = (part.flatten(0, 1) for part in (key, key_scale, value, value_scale))
    v_rows = v.mT.contiguous()
    no_scale = v_scale.new_ones((*v_rows.shape[:2], 1))
    y = query.new_empty((batch, heads, rows, value.shape[3]))
    step = max(1, _BLOCK_SCORES // max(1, batch * heads * tokens))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        shape = (batch, heads, block.stop - start)
        scores = _products(q[:, :, block].flatten(1, 2), q_scale[:, :, block].flatten(1, 2) * scaling, k, k_scale)
        weights = _probabilities(scores.view(*shape, tokens), _rows_of(mask, block), softcap)
        p, p_scale = _codes(weights.view(scores.shape) * v_scale.mT)
        y[:, :, block] = _products(p, p_scale, v_rows, no_scale).view(*shape, value.shape[3])
    return y


def float_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool
) -> Tensor:
    check_heads(query, key, value, mask)
    y = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    )
    return y.contiguous()


@in_full_precision
def float_attention_of_codes(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scaling: float,
    is_causal: bool,
) -> Tensor:
    check_codes(query, key, key_scale, value, value_scale, mask)
    wide = accumulator(query)
    keys, values = (codes.to(wide) * scale for codes, scale in ((key, key_scale), (value, value_scale)))
    return float_attention(query.to(wide), keys, values, mask, scaling, is_causal).to(query.dtype)


def check_codes(
    query: Tensor, key: Tensor, key_scale: Tensor, value: Tensor, value_scale: Tensor, mask: Tensor | None
) -> None:
    """Raise QuantizeError unless these are a query, and codes and scales of keys and values, as
    `octavo.ops.float_attention_of_codes` takes them."""
    check_rows(query)
    _check_shapes(query, key, value, mask)
    for name, codes, scale in (("key", key, key_scale), ("value", value, value_scale)):
        if codes.dtype != torch.int8:
            raise QuantizeError(f"{name}: dtype is {codes.dtype}, expected int8")
        if scale.dtype != torch.float32 or scale.shape != (*codes.shape[:3], 1):
            raise QuantizeError(
                f"{name}_scale: is {scale.dtype} {list(scale.shape)}, expected fp32 {[*codes.shape[:3], 1]}, one for "
                "each token"
            )


def check_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Raise QuantizeError unless shapes and dtypes are those that `octavo.ops.int8_attention` takes."""
    for x in (query, key, value):
        check_rows(x)
    _check_shapes(query, key, value, mask)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise QuantizeError(f"{name}: shape is {list(x.shape)}, expected [batch, heads, tokens, head size]")
    batch, heads, rows, size = query.shape
    _, kv_heads, tokens, _ = key.shape
    if (
        key.shape != (batch, kv_heads, tokens, size)
        or value.shape[:3] != (batch, kv_heads, tokens)
        or (heads % kv_heads if kv_heads else heads)
    ):
        raise QuantizeError(
            f"key and value: shapes are {list(key.shape)} and {list(value.shape)}, expected [{batch}, KV, S, {size}] "
            f"and [{batch}, KV, S, any] with {heads} a multiple of KV, for a query of shape {list(query.shape)}"
        )
    if mask is not None and not _broadcasts(mask, (batch, heads, rows, tokens)):
        raise QuantizeError(
            f"mask: shape is {list(mask.shape)}, expected [{batch}, {heads}, {rows}, {tokens}] or 1 in place of any of "
            "these"
        )


def check_longest(key: Tensor) -> None:
    """Raise QuantizeError if int32 cannot hold sums over the tokens or over the channels of key [B, KV, S, D].

    The kernels for CUDA devices have no such limit: they sum over parts of the tokens.
    """
    for size, of in zip(key.shape[2:], ("tokens", "channels"), strict=True):
        if size > LONGEST_EXACT:
            raise QuantizeError(
                f"key: has {size} {of}, expected up to {LONGEST_EXACT}, of which a sum of products of codes fits "
                "int32; use float attention (attention='float')"
            )


def _broadcasts(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.dim() == 4 and all(has in (1, wanted) for has, wanted in zip(mask.shape, shape, strict=True))


def _by_key(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, rows, n] -> [batch * kv_heads, heads / kv_heads, rows, n]."""
    batch, heads, *rest = x.shape
    return x.view(batch * kv_heads, heads // max(1, kv_heads), *rest)


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = torch.ops.octavo.quantize_per_token(x)
    return codes, scale


def value_codes(value: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_per_token`, with a scale of 0 for a row of zeros, so that it takes no steps of the probabilities."""
    codes, scale = _codes(value)
    zeros = (scale == 1) & (codes == 0).all(-1, keepdim=True)
    return codes, scale.masked_fill(zeros, 0)


def quantize_states(x: Tensor, codes: Tensor, scale: Tensor, are_values: bool) -> None:
    for to, made in zip((codes, scale), value_codes(x) if are_values else _codes(x), strict=True):
        to.copy_(made)


def _products(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """(x @ weight.mT) * x_scale * weight_scale.mT for each matrix of a batch, with exact sums.

    Computed by the op for experts, with each matrix as an expert.

    x: int8 [B, M, K]. x_scale: fp32 [B, M, 1]. weight: int8 [B, N, K]. weight_scale: fp32 [B, N, 1].
    Returns: fp32 [B, M, N].
    """
    count, rows = x.shape[:2]
    ends = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * rows
    y: Tensor = torch.ops.octavo.w8a8_experts_linear(
        x.flatten(0, 1), x_scale.flatten(0, 1), ends, weight, weight_scale, None, torch.float32
    )
    return y.view(count, rows, weight.shape[1])


def _rows_of(mask: Tensor | None, block: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, block]


def _probabilities(scores: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """softmax over the last axis, in fp32; zeros for a row that may attend to nothing (every score -inf)."""
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill_(nowhere, 0)
