"""The linear layers of a stack of experts in one launch: rows sorted by expert, a grid that does not depend on routing.

    row tiles        expert 0      expert 1      expert 3    past the last end
    of rows          [0 .. 15]     [16 .. 20]    [21 .. 29]  [30 .. 31]: zeros

The number of tiles is known only on the device. So the grid has as many programs as the shapes allow tiles,
(S + (BLOCK_M - 1) * min(E + 1, S)) / BLOCK_M. Each program counts in `ends` the tiles of the experts before it, and so
finds its own tile, or that there is none for it. An expert without rows has no tile: its weights are not read.

Two kernels serve both ops, in float and in int8:

    _vector_kernel   a program for each row, for when hardly two rows have the same expert, as in decoding a token.
                     Multiplies on the ordinary cores (`vector.py`).
    _tile_kernel     a program for each BLOCK_M rows of one expert: y.T = weight @ x.T on tensor cores. The weight is
                     the left operand because Hopper's wgmma needs 64 rows of that one and takes it from registers,
                     where codes are converted to x's dtype. The few rows of x are the right operand.

Neither splits K: in no mixture of experts is N * S too small for the programs to fill a GPU, see the tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops import reference
from octavo.ops.triton import vector
from octavo.ops.triton.launch import ceil_div, launch, power_of_two, rows_in_line
from octavo.ops.triton.linear import Tile

__all__ = ["w8a8_experts_linear", "w8a16_experts_linear"]


_FLOAT = (Tile(16, 64, 128, 4, 4), Tile(32, 64, 128, 4, 4), Tile(64, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3))
_INT8 = (Tile(16, 64, 128, 4, 4), Tile(32, 64, 128, 4, 4), Tile(64, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4))
_FP32 = (Tile(16, 64, 32, 4, 3), Tile(32, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3))
"""By the rows an expert has on average, S / E: up to 10 a tile of 16, up to 24 of 32, up to 64 of 64, else of 128.

Up to 64 rows the bound is the weights' bytes: a tile keeps 3 steps of 8 KiB of codes under way in 30 to 56 KiB of
shared memory, at least 3 programs on an SM of an H200, 2 of an A100, 1 of sm_86. From 64 rows on, 128 channels share
the rows of x, whose bytes would otherwise ask more of the L2 cache than the weights do; at 128 a code, once converted,
serves 128 rows.

Float32 has no tensor cores here (tf32 would cost it 13 bits): tiles that fit registers.
"""

_UNALIGNED = Tile(32, 64, 32, 4, 3)
"""Where K is no multiple of 16, rows of codes start anywhere and are loaded byte by byte: a larger tile has no
registers for so many addresses. No model is known to have such experts; it has to be right, not fast."""

_GROUP_M = 8
"""Row tiles that take turns at one block of weights before the next: their rows stay in the L2 cache (8 * 128 rows of
4096 bf16 values are 8 MiB of an H200's 50), the weights are read once for all of them."""

_BLOCK_E = 512
"""Experts whose ends are looked at in one step."""


def w8a16_experts_linear(x: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As `octavo.ops.w8a16_experts_linear`. float64 is left to the reference, which waits for the device."""
    reference.check_input(x, weight, weight_scale, bias)
    if x.dtype == torch.float64:
        return reference.w8a16_experts_linear(x, ends, weight, weight_scale, bias)
    return _linear(x, None, ends, weight, weight_scale, bias, x.dtype)


def w8a8_experts_linear(
    x: Tensor, x_scale: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `octavo.ops.w8a8_experts_linear`. A float64 result is left to the reference, which waits for the device."""
    reference.check_codes(x, x_scale, weight, weight_scale, bias)
    if dtype == torch.float64:
        return reference.w8a8_experts_linear(x, x_scale, ends, weight, weight_scale, bias, dtype)
    return _linear(x, reference.scale_of_rows(x, x_scale), ends, weight, weight_scale, bias, dtype)


def _linear(
    x: Tensor, x_scale: Tensor | None, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (rows, k), (experts, n, _) = x.shape, weight.shape
    y = torch.empty((rows, n), dtype=dtype, device=x.device)
    x, weight = rows_in_line(x), rows_in_line(weight)
    if bias is not None:
        bias = rows_in_line(bias)
    args = (
        x, x_scale, ends.contiguous(), weight, weight_scale.contiguous(), bias, rows, n, k, experts, x.stride(0),
        0 if x_scale is None else x_scale.stride(0), weight.stride(0), weight.stride(1),
        0 if bias is None else bias.stride(0),
    )  # fmt: skip
    block_e = min(_BLOCK_E, power_of_two(experts + 1))
    if _hardly_two_share(rows, experts):
        count = ceil_div(n, vector.ROWS.value) * rows
        columns, warps = vector.piece(k, count)
        launch(
            _vector_kernel, (count,), y, *args,
            COLUMNS=columns, BLOCK_E=block_e, num_warps=warps,
        )  # fmt: skip
    else:
        tile = _tile_of(x.dtype, rows, experts, k)
        row_tiles = (rows + (tile.m - 1) * min(experts + 1, rows)) // tile.m
        launch(
            _tile_kernel, (ceil_div(n, tile.n) * row_tiles,), y, *args, row_tiles,
            BLOCK_M=tile.m, GROUP_M=_GROUP_M, BLOCK_E=block_e, **_options(tile),
        )  # fmt: skip
    return y


def _options(tile: Tile) -> dict[str, int]:
    return {"BLOCK_N": tile.n, "BLOCK_K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages}


def _hardly_two_share(rows: int, experts: int) -> bool:
    """Whether so few rows meet so many experts that hardly two share one.

    The limit is 1 token of Mixtral (E = 8, top 2), 4 of Qwen3 (128, 8) and 8 of DeepSeek-V3 (256, 8): if experts were
    chosen uniformly, 12 % of the rows would share theirs with an earlier row.
    """
    return rows <= 2 or 4 * rows <= experts


def _tile_of(dtype: torch.dtype, rows: int, experts: int, k: int) -> Tile:
    if k % 16:
        return _UNALIGNED
    table = _INT8 if dtype == torch.int8 else _FP32 if dtype == torch.float32 else _FLOAT
    average = rows // max(1, experts)
    step = 0 if average <= 10 else 1 if average <= 24 else 2 if average <= 64 else 3
    return table[min(step, len(table) - 1)]


# Not specialized: the number of rows changes from call to call, and each kind of number would compile anew.
@triton.jit(do_not_specialize=["rows"])
def _vector_kernel(
    y, x, x_scale, ends, weight, weight_scale, bias, rows, n, k, experts, x_row, x_scale_row, weight_expert,
    weight_row, bias_expert,
    COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[row, channels] for one row. Row numbers change fastest, so that rows of one expert read its weights
    together."""
    row = tl.program_id(0) % rows
    program = tl.program_id(0) // rows
    expert = _expert_of_row(ends, rows, experts, row, BLOCK_E)
    routed = expert < experts

    row, expert = row.to(tl.int64), expert.to(tl.int64)
    sums = vector.rows_times_vector(
        x + row * x_row, weight + expert * weight_expert, None, program, n, tl.where(routed, k, 0), weight_row,
        tl.float32 if x_scale is None else tl.int32, 0, COLUMNS,
    )  # fmt: skip
    channel = vector.rows_of_program(program, n)
    wanted = channel < tl.where(routed, n, 0)
    scale = tl.load(weight_scale + expert * n + channel, mask=wanted, other=0)
    if x_scale is not None:
        scale *= tl.load(x_scale + row * x_scale_row, mask=routed, other=0)
    result = sums.to(tl.float32) * scale
    if bias is not None:
        result += tl.load(bias + expert * bias_expert + channel, mask=wanted, other=0).to(tl.float32)
    tl.store(y + row * n + channel, result.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def _tile_kernel(
    y, x, x_scale, ends, weight, weight_scale, bias, rows, n, k, experts, x_row, x_scale_row, weight_expert,
    weight_row, bias_expert, row_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[rows, channels] for a tile of the rows of one expert, or of the rows that belong to none."""
    group = tl.program_id(0) // (GROUP_M * tl.cdiv(n, BLOCK_N))
    within = tl.program_id(0) % (GROUP_M * tl.cdiv(n, BLOCK_N))
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    expert, row, end = _rows_of_tile(ends, rows, experts, group * GROUP_M + within % height, BLOCK_M, BLOCK_E)
    if row >= end:
        return  # the grid has more programs than there are tiles
    routed = expert < experts

    row = row + tl.arange(0, BLOCK_M)
    present = row < end
    row, expert = row.to(tl.int64), expert.to(tl.int64)
    channel = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    x_at = x + row[None, :] * x_row + column[:, None]
    weight_at = weight + expert * weight_expert + channel[:, None].to(tl.int64) * weight_row + column[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if x_scale is None else tl.int32)
    for first in range(0, tl.where(routed, k, 0), BLOCK_K):
        inside = column < k - first
        codes = tl.load(weight_at + first, mask=(channel < n)[:, None] & inside[None, :], other=0)
        values = tl.load(x_at + first, mask=present[None, :] & inside[:, None], other=0)
        if x_scale is None:
            total = tl.dot(codes.to(values.dtype), values, total, input_precision="ieee")
        else:
            total = tl.dot(codes, values, total, out_dtype=tl.int32)

    wanted = channel < tl.where(routed, n, 0)
    scale = tl.load(weight_scale + expert * n + channel, mask=wanted, other=0)[:, None]
    if x_scale is not None:
        scale = scale * tl.load(x_scale + row * x_scale_row, mask=row < tl.where(routed, end, 0), other=0)[None, :]
    result = total.to(tl.float32) * scale
    if bias is not None:
        result += tl.load(bias + expert * bias_expert + channel, mask=wanted, other=0).to(tl.float32)[:, None]
    y_at = y + row[None, :] * n + channel[:, None]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=present[None, :] & (channel < n)[:, None])


@triton.jit
def _expert_of_row(ends, rows, experts, row, BLOCK_E: tl.constexpr):
    """The expert that a row belongs to; `experts` for a row past the last end."""
    expert = 0
    for first in range(0, experts, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        expert += tl.sum((tl.load(ends + e, mask=e < experts, other=rows) <= row).to(tl.int32))
    return expert


@triton.jit
def _rows_of_tile(ends, rows, experts, tile, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of the expert's rows) of row tile number `tile`.

    Rows past the last end belong to expert number `experts`. A tile that does not exist has no rows.
    """
    expert = 0
    earlier = 0  # tiles of the experts before it
    counted = 0
    for first in range(0, experts + 1, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        start = tl.load(ends + e - 1, mask=(e > 0) & (e <= experts), other=0)
        end = tl.load(ends + e, mask=e < experts, other=rows)
        tiles = tl.where(e <= experts, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
        so_far = counted + tl.cumsum(tiles, 0)
        passed = (so_far <= tile) & (e <= experts)
        expert += tl.sum(passed.to(tl.int32))
        earlier = tl.maximum(earlier, tl.max(tl.where(passed, so_far, 0)))
        counted += tl.sum(tiles)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert <= experts), other=0)
    end = tl.minimum(tl.load(ends + expert, mask=expert < experts, other=rows), rows)
    return expert, start + (tile - earlier) * BLOCK_M, tl.where(expert <= experts, end, 0)
