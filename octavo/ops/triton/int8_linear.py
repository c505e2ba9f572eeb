"""w8a8_linear on GPUs: the tensor cores multiply int8 and sum in int32, exactly; no code is widened.

    y [M, N] = (x [M, K] @ weight [N, K].T) * (x_scale [M] * weight_scale [N]) + bias [N]

As in `linear.py`, one row of x is multiplied on the ordinary cores, and K is split if there are few tiles. Sums of
integers do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.ops import reference
from octavo.ops.triton import vector
from octavo.ops.triton.launch import Started, copied_on_hopper, launch, rows_in_line
from octavo.ops.triton.linear import (
    GROUP_OF_PROGRAMS,
    InTiles,
    Tile,
    add_parts,
    contiguous_rows,
    descriptors,
    is_read,
    plan,
    programs,
    tile_of_program,
)

__all__ = ["copied_tile", "start_copied", "start_tiles", "w8a8_linear", "w8a8_linears"]

FEW_ROWS = (Tile(16, 64, 256, 4, 4), Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 4, 4))
"""As in `linear.py`: the weight is read once, 8 to 16 KB a step, three of them under way."""

MANY_ROWS = (Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3), Tile(64, 64, 128, 4, 4))
"""More rows: the first that gives nearly every multiprocessor a program. A step of the first reads 32 KB for 512 cycles
of the tensor cores: 64 bytes a cycle where the L2 cache gives about 32, so half of the tensor cores is predicted. Two
programs fit a multiprocessor of sm_90 (96 KB, 128 registers a thread)."""

ON_HOPPER, ALONE_ON_HOPPER = Tile(128, 128, 128, 8, 3), Tile(128, 128, 256, 4, 3)
"""Where the copy engine of sm_90 fetches the operands (`_copied_product`): no thread computes addresses, and two
programs of this tile fit a multiprocessor (98 KB, 112 registers a thread), so that one stores its results while the
other multiplies. Measured on an H200 for [N, K] of 4096 x 4096 and 14336 x 4096: 1.2 to 1.4 times as fast as the tiles
above, at 512 rows and at 2048; [128, 256] and [256, 128], of which one fits, are 2 to 10% slower, and so are programs
that take one tile after the other. Where a multiprocessor has one program at most, 4 warps and longer steps are 1.2 to
1.4 times as fast; 64 x 256 and a fifth stage of 128 change nothing, steps of 64 take 1.3 times as long."""

MULTIPROCESSORS = 132
"""Of an H200."""


def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As in the table of `octavo.ops`. A float64 result is left to the reference."""
    reference.check_codes(x, x_scale, weight, weight_scale, bias)
    if dtype == torch.float64:
        return reference.w8a8_linear(x, x_scale, weight, weight_scale, bias, dtype)
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    if not y.numel():
        return y
    m = y.numel() // n
    weight = rows_in_line(weight)
    x_scale, weight_scale = x_scale.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    if m == 1:
        vector.start_row(rows_in_line(x), x_scale, weight, weight_scale, bias, y)
        return y
    x = contiguous_rows(x, m, k)
    if m > FEW_ROWS[-1].m and copied_on_hopper(x, weight):
        start_copied(y, *descriptors(x, weight, copied_tile(m, n)), x_scale, weight_scale, bias)
    else:
        start_tiles(x, x_scale, weight, weight_scale, bias, y)
    return y


def start_tiles(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor
) -> InTiles:
    """Launch the kernel for tiles of y [..., n], and the one that adds up the parts of K if it is split.

    x: [m, k]. Elements of a row of x and of the weight are adjacent.
    """
    (m, k), n = x.shape, len(weight)
    tile, tiles, parts, steps = plan(m, n, k, FEW_ROWS, MANY_ROWS)
    sums = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.int32, device=x.device)
    each_row = x_scale.numel() > 1
    numbers = (m, n, k, steps, x.stride(0), weight.stride(0), each_row, *tile[:3], GROUP_OF_PROGRAMS, parts == 1)
    kernel = launch(
        _matrix_product, (tiles, parts), x, x_scale, weight, weight_scale, bias, sums, *numbers,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    adding = None if parts == 1 else add_parts(sums, x_scale, weight_scale, bias, y)
    return InTiles(Started(kernel, (tiles, parts), numbers), adding, sums.shape, sums.dtype, sums.device)


def start_copied(
    y: Tensor, x: TensorDescriptor, weight: TensorDescriptor, x_scale: Tensor, weight_scale: Tensor,
    bias: Tensor | None,
) -> Started:  # fmt: skip
    """Launch the kernel for many rows, whose operands the copy engine fetches in pieces of `copied_tile`."""
    (m, k), n = x.shape, weight.shape[0]
    tile = copied_tile(m, n)
    count, numbers = programs(tile, m, n), (m, n, k, x_scale.numel() > 1, *tile[:3], GROUP_OF_PROGRAMS)
    kernel = launch(
        _copied_product, (count,), y, x, weight, x_scale, weight_scale, bias, *numbers,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Started(kernel, (count,), numbers)


def copied_tile(m: int, n: int) -> Tile:
    """The tile of y [m, n] for operands that the copy engine fetches."""
    return ON_HOPPER if programs(ON_HOPPER, m, n) > MULTIPROCESSORS else ALONE_ON_HOPPER


def w8a8_linears(
    x: Tensor, x_scale: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Several layers of one input; outputs concatenated. One launch if x has one row."""
    k = x.shape[-1]
    total = sum(len(one) for one in weight)
    if x.numel() != k or dtype == torch.float64 or not k or not total:
        return reference.w8a8_linears(x, x_scale, weight, weight_scale, bias, dtype)
    for layer in zip(weight, weight_scale, bias, strict=True):
        reference.check_codes(x, x_scale, *layer)
    return vector.start_layers(x, x_scale, weight, weight_scale, bias, dtype)


@triton.jit(do_not_specialize=["m"])  # so that another number of rows compiles nothing
def _copied_product(
    y_ptr, x_codes, weight_codes, x_scale_ptr, scale_ptr, bias_ptr, m, n, k,
    EACH_ROW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """An [M, N] tile of y. x_codes, weight_codes: `descriptors`. Past the ends, the copy engine pads with zeros."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), m, n, M, N, TILES)
    sums = tl.zeros((M, N), tl.int32)
    for start in range(0, k, K):
        x = x_codes.load([tile_m * M, start])
        codes = weight_codes.load([tile_n * N, start])
        sums = tl.dot(x, codes.T, sums, out_dtype=tl.int32)
    rows = tile_m * M + tl.arange(0, M)
    channels = tile_n * N + tl.arange(0, N)
    _store_scaled(y_ptr, sums, x_scale_ptr, scale_ptr, bias_ptr, rows, channels, m, n, EACH_ROW)


@triton.jit
def _store_scaled(y_ptr, sums, x_scale_ptr, scale_ptr, bias_ptr, rows, channels, m, n, EACH_ROW: tl.constexpr):
    """Store y = sums * (x_scale * weight_scale) + bias for rows and channels within [m, n]."""
    row, channel = tl.minimum(rows, m - 1), tl.minimum(channels, n - 1)
    x_scale = tl.load(x_scale_ptr + (row if EACH_ROW else row * 0))
    scaled = sums.to(tl.float32) * (x_scale[:, None] * tl.load(scale_ptr + channel)[None, :])
    if bias_ptr is not None:
        scaled += tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    y = y_ptr + rows.to(tl.int64)[:, None] * n + channels[None, :]
    tl.store(y, scaled.to(y_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (channels < n)[None, :])


@triton.jit(do_not_specialize=["m"])  # so that another number of rows compiles nothing
def _matrix_product(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, m, n, k, steps, x_stride, weight_stride,
    EACH_ROW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """An [M, N] tile of y [m, n], or of the sums of one part of K: y_ptr is then int32 [parts, m, n]."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), m, n, M, N, TILES)
    part = tl.program_id(1)
    rows = tile_m * M + tl.arange(0, M)
    channels = tile_n * N + tl.arange(0, N)
    # Past the end, the last row and channel are read again; their results are not stored.
    row, channel = tl.minimum(rows, m - 1), tl.minimum(channels, n - 1)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + channel.to(tl.int64)[None, :] * weight_stride
    inner = tl.arange(0, K)
    sums = tl.zeros((M, N), tl.int32)
    for start in range(part * steps * K, tl.minimum((part + 1) * steps * K, k), K):
        columns = start + inner
        x = tl.load(x_rows + columns[None, :], mask=is_read(rows, columns, m, k, M), other=0)
        codes = tl.load(weight_rows + columns[:, None], mask=columns[:, None] < k, other=0)
        sums = tl.dot(x, codes, sums, out_dtype=tl.int32)
    if FINISH:
        _store_scaled(y_ptr, sums, x_scale_ptr, scale_ptr, bias_ptr, rows, channels, m, n, EACH_ROW)
    else:
        y = y_ptr + (part.to(tl.int64) * m + rows)[:, None] * n + channels[None, :]
        tl.store(y, sums, mask=(rows < m)[:, None] & (channels < n)[None, :])
