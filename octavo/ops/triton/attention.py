"""Attention with both of its products in int8, in two passes over the keys: no score is ever written to memory.

The definition and the meaning of each letter are at the head of `octavo/ops/attention.py`. To quantize a row's
probabilities, the largest p * sv of the whole row is needed, which is known only after all keys have been read. So the
first pass finds it, and the second computes the scores again, which is cheap:

    _statistics   of each row: the largest score m, the sum l of exp(score - m), the largest g of exp(score - m) * sv
    _products     codes of exp(score - m) * sv under the scale g / 127, times v, summed exactly; times g / 127 / l
    _add_parts    add up the sums of several programs that share the keys of a row: integers, in any order

Query heads that share a key are rows of one matrix, as they are in memory already. So when one token is decoded, a
program reads each key once for all of them. There are then few rows and many keys, and the keys are split into enough
parts for the programs to fill a GPU. A part has at most 131072 keys, so that its sums fit int32.

For int8 products, tensor cores need the elements that are summed next to each other in memory, and in v they are not.
For many rows, v is transposed first. For few rows that would take longer than the attention itself. Then codes and
scales are read in place, where a cache keeps them, and each program rearranges its values byte by byte as it takes them
from shared memory.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops import attention
from octavo.ops.triton.launch import ceil_div, launch, power_of_two

__all__ = ["as_it_lies", "broadcast_strides", "int8_attention", "int8_attention_of_codes"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """How many rows of the query and how many keys a program takes at a time, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


_FEW, _MANY, _MANY_UNALIGNED, _WIDE = Tile(16, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(16, 32, 4, 2)
"""Up to 16 rows (decoding, up to 16 heads to a key): bytes of keys are the bound, 8 KiB of them a step. More rows: what
fits registers, 32 scores and, of 128 channels, 64 sums a thread. A mask whose rows do not start at multiples of 16, as
for any odd number of keys, is read entry by entry, for whose addresses there is room with half as many keys. Heads of
more than 128 channels: a quarter of the rows. What the mask hides is computed all the same. None of it is measured.
"""

_PROGRAMS = 264
"""Two for each of an H200's 132 SMs: with fewer, the keys are split."""

_LEAST_KEYS, _MOST_KEYS = 256, 131072
"""Of a part: below, its program would do little but start; above, 127 * 127 a key could pass 2 ** 31."""


def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """As `octavo.ops.int8_attention`. A float64 query or mask is left to the composition in `ops/attention.py`."""
    attention.check_heads(query, key, value, mask)
    k, k_scale = torch.ops.octavo.quantize_per_token(key)
    v, v_scale = attention.value_codes(value)
    return int8_attention_of_codes(query, k, k_scale, v, v_scale, mask, scaling, softcap)


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
    """As `octavo.ops.int8_attention_of_codes`. float64 as above."""
    attention.check_codes(query, key, key_scale, value, value_scale, mask)
    if torch.float64 in (query.dtype, None if mask is None else mask.dtype):
        return attention.int8_attention_of_codes(query, key, key_scale, value, value_scale, mask, scaling, softcap)
    (batch, heads, rows, size), (kv_heads, keys), width = query.shape, key.shape[1:3], value.shape[3]
    y = torch.empty((batch, heads, rows, width), dtype=query.dtype, device=query.device)
    if not keys or not y.numel():
        return y.zero_()
    q, q_scale = torch.ops.octavo.quantize_per_token(query)
    shared, groups = heads // kv_heads * rows, batch * kv_heads
    if shared <= _FEW.rows:
        k, k_scale, v, v_scale = (as_it_lies(x) for x in (key, key_scale, value, value_scale))
    else:
        k, k_scale, v_scale = (x.contiguous() for x in (key, key_scale, value_scale))
        # Rows of the transposed v start at multiples of 16 bytes. The padding is multiplied by codes that are 0.
        padded = (batch, kv_heads, width, ceil_div(keys, 16) * 16)
        v = torch.empty(padded, dtype=torch.int8, device=query.device).mT
        v[:, :, :keys] = value
    # Triton infers alignment for multiples of 16 only. A cached token takes 8 bytes more: reads would be byte by byte.
    unit = math.gcd(16, *k.stride()[:3])

    tile = _tile_of(shared, max(size, width), mask)
    tiles = ceil_div(shared, tile.rows)
    steps = _steps_of_part(tiles * groups, keys, tile.keys)
    parts = ceil_div(keys, steps * tile.keys)
    # m, l and g for each row of each part.
    statistics = torch.empty((3, parts, groups * shared), dtype=torch.float32, device=query.device)
    strides = (0, 0, 0, 0) if mask is None else broadcast_strides(mask)
    operands = (
        q, q_scale, k, k_scale, v_scale, mask, scaling, softcap, tuple(stride // unit for stride in k.stride()[:3]),
        k_scale.stride()[:3], v_scale.stride()[:3], *strides, rows, shared, groups, heads // kv_heads, kv_heads, size,
        keys, steps,
    )  # fmt: skip
    blocks = {
        "UNIT": unit, "BLOCK_M": tile.rows, "BLOCK_S": tile.keys, "BLOCK_D": max(32, power_of_two(size)),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    block_n = max(16, power_of_two(width))
    launch(_statistics, (tiles * groups * parts,), statistics, *operands, **blocks)
    sums = y if parts == 1 else torch.empty((parts, groups * shared, width), dtype=torch.int32, device=query.device)
    launch(
        _products, (tiles * groups * parts,), sums, statistics, v, v.stride(), v.shape[2], *operands, parts, width,
        WHOLE=parts == 1, BLOCK_N=block_n, **blocks,
    )  # fmt: skip
    if parts > 1:
        launch(_add_parts, (groups * shared,), y, sums, statistics, parts, width, BLOCK_N=block_n, num_warps=1)
    return y


def as_it_lies(x: Tensor) -> Tensor:
    """x [B, KV, S, n], or a contiguous copy if the n elements of a token are not adjacent, or if offsets within a head
    do not fit 32 bits."""
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def _tile_of(rows: int, width: int, mask: Tensor | None) -> Tile:
    if width > 128:
        return _WIDE
    if rows <= 16:
        return _FEW
    by_sixteen = mask is None or (mask.stride(3) == 1 and mask.stride(2) % 16 == 0 and mask.shape[3] % 16 == 0)
    return _MANY if by_sixteen else _MANY_UNALIGNED


def _steps_of_part(programs: int, keys: int, step: int) -> int:
    """How many steps of `step` keys each program takes. programs: how many there would be if keys were not split."""
    wanted = max(1, min(_PROGRAMS // programs, keys // _LEAST_KEYS))
    return min(ceil_div(keys, wanted * step), _MOST_KEYS // step)


def broadcast_strides(mask: Tensor) -> tuple[int, ...]:
    """The strides of a mask; 0 for dimensions that it broadcasts over."""
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


# Not specialized: arguments that change from one decoded token to the next, as each kind would compile anew.
@triton.jit(do_not_specialize=["rows", "shared", "steps"])
def _statistics(
    statistics, q, q_scale, k, k_scale, v_scale, mask, scaling, softcap, k_strides, k_scale_strides, v_scale_strides,
    mask_batch, mask_head, mask_row, mask_key, rows, shared, groups, heads, kv_heads, size, keys, steps,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m, l and g of a tile of rows, over one part of the keys."""
    row, group, part = _place(shared, groups, BLOCK_M)
    first = part * steps * BLOCK_S
    q_codes, scale = _query(q, q_scale, scaling, row, group, shared, size, BLOCK_D)
    mask_at = _mask_rows(mask_batch, mask_head, mask_row, row, group, rows, shared, heads, kv_heads)
    k += _first_token(k_strides, group, kv_heads) * UNIT
    k_scale += _first_token(k_scale_strides, group, kv_heads)
    v_scale += _first_token(v_scale_strides, group, kv_heads)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    heaviest = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, tl.minimum(first + steps * BLOCK_S, keys), BLOCK_S):
        token = start + tl.arange(0, BLOCK_S)
        scores = _scores(
            q_codes, scale, k, k_scale, k_strides[2] * UNIT, k_scale_strides[2], mask, mask_at, softcap, mask_key,
            token, size, keys, BLOCK_D,
        )  # fmt: skip
        before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(largest == float("-inf"), 0.0, largest)
        exponentials = tl.exp(scores - origin[:, None])
        shrunk = tl.exp(before - origin)
        total = total * shrunk + tl.sum(exponentials, 1)
        weights = exponentials * tl.load(v_scale + token * v_scale_strides[2], mask=token < keys, other=0.0)[None, :]
        weights = tl.where(weights == weights, weights, float("inf"))  # a maximum may drop NaN
        heaviest = tl.maximum(_shrink(heaviest, shrunk), tl.max(weights, 1))
    at = statistics + (part.to(tl.int64) * groups + group) * shared + row
    one = tl.cdiv(keys, steps * BLOCK_S).to(tl.int64) * groups * shared
    tl.store(at, largest, mask=row < shared)
    tl.store(at + one, total, mask=row < shared)
    tl.store(at + 2 * one, heaviest, mask=row < shared)


@triton.jit(do_not_specialize=["rows", "shared", "steps", "parts"])
def _products(
    y, statistics, v, v_strides, readable, q, q_scale, k, k_scale, v_scale, mask, scaling, softcap, k_strides,
    k_scale_strides, v_scale_strides, mask_batch, mask_head, mask_row, mask_key, rows, shared, groups, heads, kv_heads,
    size, keys, steps, parts, width,
    WHOLE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [rows, width] for a tile of rows; with several parts, their int32 sums in y [parts, rows, width]."""
    row, group, part = _place(shared, groups, BLOCK_M)
    first = part * steps * BLOCK_S
    q_codes, scale = _query(q, q_scale, scaling, row, group, shared, size, BLOCK_D)
    mask_at = _mask_rows(mask_batch, mask_head, mask_row, row, group, rows, shared, heads, kv_heads)
    k += _first_token(k_strides, group, kv_heads) * UNIT
    k_scale += _first_token(k_scale_strides, group, kv_heads)
    v_scale += _first_token(v_scale_strides, group, kv_heads)
    at = group * shared + row
    origin, total, heaviest = _of_all_parts(statistics + at, row < shared, tl.cast(groups, tl.int64) * shared, parts)
    inverse = 127.0 / heaviest
    channel = tl.arange(0, BLOCK_N)
    v += _first_token(v_strides, group, kv_heads) + channel[None, :] * v_strides[3]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(first, tl.minimum(first + steps * BLOCK_S, keys), BLOCK_S):
        token = start + tl.arange(0, BLOCK_S)
        scores = _scores(
            q_codes, scale, k, k_scale, k_strides[2] * UNIT, k_scale_strides[2], mask, mask_at, softcap, mask_key,
            token, size, keys, BLOCK_D,
        )  # fmt: skip
        weights = tl.exp(scores - origin[:, None])
        weights *= tl.load(v_scale + token * v_scale_strides[2], mask=token < keys, other=0.0)[None, :]
        # Adding 1.5 * 2 ** 23 leaves the code, rounded half to even, in the lowest bits.
        codes = (tl.minimum(weights * inverse[:, None], 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        inside = (token < readable)[:, None] & (channel < width)[None, :]
        values = tl.load(v + token[:, None] * v_strides[2], mask=inside, other=0)
        sums = tl.dot(codes, values, sums, out_dtype=tl.int32)
    mask_y = (row < shared)[:, None] & (channel < width)[None, :]
    if WHOLE:
        result = sums.to(tl.float32) * _result_scale(total, heaviest)[:, None]
        tl.store(y + at[:, None] * width + channel[None, :], result.to(y.dtype.element_ty), mask=mask_y)
    else:
        at += part.to(tl.int64) * groups * shared
        tl.store(y + at[:, None] * width + channel[None, :], sums, mask=mask_y)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(y, sums, statistics, parts, width, BLOCK_N: tl.constexpr):
    """One row of y: the int32 sums of the parts, added in int64, which is exact."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.int64)
    for part in range(0, parts):
        total += tl.load(sums + (part * rows + row) * width + channel, mask=channel < width, other=0).to(tl.int64)
    only = tl.arange(0, 1)
    _, exponentials, heaviest = _of_all_parts(statistics + row + only, only == 0, rows, parts)
    result = total.to(tl.float32) * _result_scale(exponentials, heaviest)
    tl.store(y + row * width + channel, result.to(y.dtype.element_ty), mask=channel < width)


@triton.jit
def _place(shared, groups, BLOCK_M: tl.constexpr):
    """This program's (rows [BLOCK_M], group of heads, part of the keys). The tile of rows changes fastest."""
    tiles = tl.cdiv(shared, BLOCK_M)
    program = tl.program_id(0)
    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    group = program // tiles % groups
    return row, group.to(tl.int64), program // (tiles * groups)


@triton.jit
def _query(q, q_scale, scaling, row, group, shared, size, BLOCK_D: tl.constexpr):
    """The rows' codes [BLOCK_M, BLOCK_D], and their scales times the scaling of the scores."""
    channel = tl.arange(0, BLOCK_D)
    at = group * shared + row
    inside = (row < shared)[:, None] & (channel < size)[None, :]
    codes = tl.load(q + at[:, None] * size + channel[None, :], mask=inside, other=0)
    return codes, tl.load(q_scale + at, mask=row < shared, other=0.0) * tl.cast(scaling, tl.float32)


@triton.jit
def _mask_rows(mask_batch, mask_head, mask_row, row, group, rows, shared, heads, kv_heads):
    """The offset of each row in the mask. Rows past the end take that of the last row."""
    row = tl.minimum(row, shared - 1)
    number = group.to(tl.int32)  # 64 bits are slow to divide
    head = (number % kv_heads * heads + row // rows).to(tl.int64)
    batch = (number // kv_heads).to(tl.int64)
    return batch * mask_batch + head * mask_head + (row % rows).to(tl.int64) * mask_row


@triton.jit
def _first_token(strides, group, kv_heads):
    """The offset of the first token of a group of heads."""
    number = group.to(tl.int32)
    return (number // kv_heads).to(tl.int64) * strides[0] + (number % kv_heads).to(tl.int64) * strides[1]


@triton.jit
def _scores(
    q_codes, scale, k, k_scale, k_token, k_scale_token, mask, mask_at, softcap, mask_key, token, size, keys,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of the rows for BLOCK_S keys, in fp32; -inf for keys that the mask hides and for those past the end.

    Offsets within the keys of one group fit 32 bits.
    """
    channel = tl.arange(0, BLOCK_D)
    k_codes = tl.load(
        k + token[None, :] * k_token + channel[:, None],
        mask=(token < keys)[None, :] & (channel < size)[:, None], other=0,
    )  # fmt: skip
    scores = tl.dot(q_codes, k_codes, out_dtype=tl.int32).to(tl.float32)
    scores *= scale[:, None] * tl.load(k_scale + token * k_scale_token, mask=token < keys, other=0.0)[None, :]
    if softcap is not None:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        cap = tl.cast(softcap, tl.float32)
        scores = (1.0 - 2.0 / (tl.exp(2.0 * (scores / cap)) + 1.0)) * cap
    if mask is not None:
        at = mask + mask_at[:, None] + token[None, :].to(tl.int64) * mask_key
        masked = tl.load(at, mask=(token < keys)[None, :], other=0)
        if masked.dtype == tl.int1:
            scores = tl.where(masked, scores, float("-inf"))
        else:
            scores += masked.to(tl.float32)
    return tl.where((token < keys)[None, :], scores, float("-inf"))


@triton.jit
def _of_all_parts(at, present, rows, parts):
    """Combine m, l and g over the parts of the keys. at: offset of each row's first m.

    m is 0 for a row that may attend to nothing. g is at least 2 ** -119, so that 127 / g is finite, and inf for a row
    whose result is NaN.
    """
    largest = tl.load(at, mask=present, other=0.0)
    for part in range(1, parts):
        largest = tl.maximum(largest, tl.load(at + part * rows, mask=present, other=0.0))
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros_like(largest)
    heaviest = tl.zeros_like(largest) + 1.5046328e-36
    for part in range(0, parts):
        shrunk = tl.exp(tl.load(at + part * rows, mask=present, other=0.0) - origin)
        total += tl.load(at + (parts + part) * rows, mask=present, other=0.0) * shrunk
        of_part = tl.load(at + (2 * parts + part) * rows, mask=present, other=float("inf"))
        heaviest = tl.maximum(heaviest, _shrink(of_part, shrunk))
    return origin, total, heaviest


@triton.jit
def _shrink(heaviest, shrunk):
    """g for a larger m. inf, which marks a row whose result is NaN, stays inf."""
    return tl.where(heaviest == float("inf"), heaviest, heaviest * shrunk)


@triton.jit
def _result_scale(total, heaviest):
    """sp of rows from l and g; 0 for a row that may attend to nothing."""
    scale = tl.where(total == 0.0, 0.0, heaviest / 127.0 / tl.where(total == 0.0, 1.0, total))
    return tl.where(heaviest == float("inf"), float("nan"), scale)
