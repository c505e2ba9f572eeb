"""Attention in float over keys and values that are int8 codes, for few rows: decode behind a long cache.

    _parts    for one part of the tokens, in fp32: the largest score m of each row, the sum l of exp(score - m), and the
              sum of exp(score - m) * v
    _join     add up the parts of a row, each weighted with exp(m - the largest m), and divide by the sum of the l

Query heads that share a key are rows of one tile, so that each key is read once for all of them. Codes are exact in
every float dtype, so the products take codes as they are: scores are multiplied by the key's scale afterwards, and
exp(score - m) by the value's scale beforehand.

For more rows (a prompt), torch computes attention over dequantized keys and values: there arithmetic is the bound, not
the bytes read.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from octavo.ops import attention
from octavo.ops.triton.attention import as_it_lies, broadcast_strides
from octavo.ops.triton.launch import ceil_div, launch, power_of_two

__all__ = ["float_attention_of_codes"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """How many tokens a program takes at a time, and how it is compiled."""

    tokens: int
    warps: int
    stages: int


_NARROW, _USUAL, _WIDE, _FP32 = Tile(64, 4, 2), Tile(32, 4, 2), Tile(16, 8, 3), Tile(32, 8, 2)
"""Heads of up to 64 channels, of up to 128 and of up to 256, and all in fp32: what leaves registers for the sums, for
with twice as many tokens, in fp32 with half as many warps, some are spilled. None of it is measured."""

_ROWS = 16
"""Of a tile: the least that tensor cores take, and the most that are not left to torch."""

_PROGRAMS = 528
"""Four for each of an H200's 132 SMs: with fewer, the tokens are split. Not measured."""

_LEAST_TOKENS = 256
"""Of a part: below, its program would do little but start."""


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
    """As `octavo.ops.float_attention_of_codes`. float64 is left to the reference."""
    attention.check_codes(query, key, key_scale, value, value_scale, mask)
    (batch, heads, rows, size), (kv_heads, tokens), width = query.shape, key.shape[1:3], value.shape[3]
    if query.dtype == torch.float64:
        return attention.float_attention_of_codes(query, key, key_scale, value, value_scale, mask, scaling, is_causal)
    shared = heads // max(1, kv_heads) * rows
    if shared > _ROWS or max(size, width) > 256 or (mask is not None and mask.dtype != torch.bool):
        keys, values = ((codes * scale).to(query.dtype) for codes, scale in ((key, key_scale), (value, value_scale)))
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=True
        ).contiguous()
    y = torch.empty((batch, heads, rows, width), dtype=query.dtype, device=query.device)
    if not tokens or not y.numel():
        return y.zero_()
    groups = batch * kv_heads
    tile = _tile_of(max(size, width), query.dtype)
    wanted = max(1, min(_PROGRAMS // groups, tokens // _LEAST_TOKENS))
    steps = ceil_div(tokens, wanted * tile.tokens)
    parts = ceil_div(tokens, steps * tile.tokens)
    sums = torch.empty((parts, groups * shared, width), dtype=torch.float32, device=query.device)
    statistics = torch.empty((2, parts, groups * shared), dtype=torch.float32, device=query.device)
    key, key_scale, value, value_scale = (as_it_lies(x) for x in (key, key_scale, value, value_scale))
    # Triton infers alignment for multiples of 16 only. A cached token takes 8 bytes more: reads would be byte by byte.
    # fp32 does read byte by byte: tensor cores do not multiply it, and wider loads would leave too few registers.
    unit = 1 if query.dtype == torch.float32 else math.gcd(16, *key.stride()[:3])
    strides = [s // unit for s in key.stride()[:3]]
    strides += [s for x in (key_scale, value, value_scale) for s in x.stride()[:3]]
    of_mask = (0, 0, 0, 0) if mask is None else broadcast_strides(mask)
    block_n = max(16, power_of_two(width))
    launch(
        _parts, (groups * parts,), sums, statistics, query.contiguous(), key, key_scale, value, value_scale, mask,
        scaling, *strides, *of_mask, rows, shared, groups, heads // kv_heads, kv_heads, size, width, tokens, steps,
        parts, CAUSAL=is_causal, UNIT=unit, BLOCK_M=_ROWS, BLOCK_S=tile.tokens, BLOCK_D=max(16, power_of_two(size)),
        BLOCK_N=block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    launch(_join, (groups * shared,), y, sums, statistics, parts, width, BLOCK_N=block_n, num_warps=1)
    return y


def _tile_of(width: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return _FP32
    return _NARROW if width <= 64 else _USUAL if width <= 128 else _WIDE


# Not specialized: arguments that change from one decoded token to the next, as each kind would compile anew.
@triton.jit(do_not_specialize=["rows", "shared", "tokens", "steps", "parts"])
def _parts(
    sums, statistics, q, k, k_scale, v, v_scale, mask, scaling, k_batch, k_head, k_token, k_scale_batch, k_scale_head,
    k_scale_token, v_batch, v_head, v_token, v_scale_batch, v_scale_head, v_scale_token, mask_batch, mask_head,
    mask_row, mask_token, rows, shared, groups, heads, kv_heads, size, width, tokens, steps, parts,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """m, l and the weighted sum of values for one group of heads, over one part of the tokens."""
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    batch, head = (group // kv_heads).to(tl.int64), (group % kv_heads).to(tl.int64)
    row, channel, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    at = group.to(tl.int64) * shared + row
    there = row < shared
    query = tl.load(
        q + at[:, None] * size + channel[None, :], mask=there[:, None] & (channel < size)[None, :], other=0.0
    )
    k += (batch * k_batch + head * k_head) * UNIT
    v += batch * v_batch + head * v_head
    k_scale += batch * k_scale_batch + head * k_scale_head
    v_scale += batch * v_scale_batch + head * v_scale_head
    of_row = tl.minimum(row, shared - 1)
    if mask is not None:
        mask += batch * mask_batch + (head * heads + of_row // rows) * mask_head + of_row % rows * mask_row
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * steps * BLOCK_S
    for start in range(first, tl.minimum(first + steps * BLOCK_S, tokens), BLOCK_S):
        token = start + tl.arange(0, BLOCK_S)
        inside = token < tokens
        keys = tl.load(
            k + token[None, :] * (k_token * UNIT) + channel[:, None],
            mask=inside[None, :] & (channel < size)[:, None], other=0,
        )  # fmt: skip
        scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee")
        scores *= tl.load(k_scale + token * k_scale_token, mask=inside, other=0.0)[None, :] * scaling
        allowed = inside[None, :] & there[:, None]
        if CAUSAL:
            allowed = allowed & (token[None, :] <= (row % rows)[:, None])
        if mask is not None:
            allowed = allowed & tl.load(
                mask[:, None] + token[None, :].to(tl.int64) * mask_token, mask=inside[None, :], other=0
            ).to(tl.int1)
        scores = tl.where(allowed, scores, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp(scores - origin[:, None])
        shrunk = tl.exp(before - origin)
        total = total * shrunk + tl.sum(weights, 1)
        values = tl.load(
            v + token[:, None] * v_token + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0
        )
        scale = tl.load(v_scale + token * v_scale_token, mask=inside, other=0.0)
        if query.dtype == tl.float32:
            weights *= scale[None, :]
            products = tl.dot(weights, values.to(tl.float32), products * shrunk[:, None], input_precision="ieee")
        else:
            # In fp16, which resolves numbers from 0 to 1 eight times as finely as bf16.
            heaviest = tl.max(scale, 0)
            weights *= (scale / tl.where(heaviest == 0.0, 1.0, heaviest))[None, :]
            products = products * shrunk[:, None] + tl.dot(weights.to(tl.float16), values.to(tl.float16)) * heaviest
    place = part.to(tl.int64) * groups * shared + at
    tl.store(statistics + place, largest, mask=there)
    tl.store(statistics + parts.to(tl.int64) * groups * shared + place, total, mask=there)
    tl.store(sums + place[:, None] * width + column[None, :], products, mask=there[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _join(y, sums, statistics, parts, width, BLOCK_N: tl.constexpr):
    """One row of y; zeros if it may attend to nothing."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    largest = float("-inf")
    for part in range(0, parts):
        largest = tl.maximum(largest, tl.load(statistics + part * rows + row))
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    total = 0.0
    result = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(0, parts):
        weight = tl.exp(tl.load(statistics + part * rows + row) - origin)
        total += weight * tl.load(statistics + (parts + part) * rows + row)
        result += weight * tl.load(sums + (part * rows + row) * width + column, mask=column < width, other=0.0)
    result = tl.where(total == 0.0, 0.0, result / tl.where(total == 0.0, 1.0, total))
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=column < width)
