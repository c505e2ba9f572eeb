"""One row of x times rows of int8 codes, on the ordinary cores: what a layer does when a token is decoded.

The time is that of reading the codes, as long as computing keeps up with it. Each thread has the same columns of ROWS
rows, so that x, which is widened too, is widened once for that many codes; nothing is asked of another thread before
the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.ops.triton.launch import power_of_two

__all__ = ["ROWS", "piece", "piece_of_several", "rows_of_program", "rows_times_vector"]

ROWS = tl.constexpr(4)
"""Of the weight, that a program takes."""

MOST_COLUMNS, COLUMNS_OF_WARP = 2048, 512
"""That a program takes at a time: 16 columns a thread, or 8 (`MANY_PROGRAMS`). Never a split of K: adding its parts up
would be a second launch, which costs more than it gains."""

MANY_PROGRAMS = 4096
"""Fewer do not fill 132 multiprocessors with their warps, and have twice as many. Measured on an H200, in us, for
[N, K] of

    columns, warps    4096 x 4096    4096 x 11008    11008 x 4096    32000 x 4096    three of    two of 11008 x 4096
    2048, 4               8.4            20.5            16.6            39.3           19.0           29.3
    2048, 8               7.9            17.9            16.3            41.3           19.7           30.2
    4096, 4               9.0            19.4            17.4            40.2           17.4           28.0
    4096, 8               8.7            18.6            16.9            41.4           19.7           31.8
    1024, 2               9.8            22.9            18.3            40.2           20.8           30.8

"Three of" and "two of" are layers side by side in one launch: `PIECE_OF_SEVERAL`."""

PIECE_OF_SEVERAL = 4096, 1024
"""Columns of a program, and of a warp, where one launch is of several layers."""


def piece(k: int, programs: int) -> tuple[int, int]:
    """Columns that one of these programs takes at a time for rows of k codes, and its warps."""
    return _piece(k, MOST_COLUMNS, COLUMNS_OF_WARP if programs >= MANY_PROGRAMS else COLUMNS_OF_WARP // 2)


def piece_of_several(k: int) -> tuple[int, int]:
    """The same for layers side by side."""
    return _piece(k, *PIECE_OF_SEVERAL)


def _piece(k: int, most: int, of_warp: int) -> tuple[int, int]:
    columns = min(most, max(power_of_two(k), 16))
    if k % 16:  # rows that start anywhere are read a byte at a time: many loads, each with registers
        of_warp = min(of_warp, 128)
    return columns, min(16, max(1, columns // of_warp))


@triton.jit
def rows_of_program(program, n):
    """ROWS rows of a weight of n; the last program computes its last row more than once."""
    return tl.minimum(program.to(tl.int64) * ROWS + tl.arange(0, ROWS), n - 1)


@triton.jit
def rows_times_vector(
    x_ptr, weight_ptr, scale_ptr, program, n, k, row_stride,
    SUMS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS] of the products of these rows (`rows_of_program`), in the dtype SUMS: fp32, or int32 for an int8 x.
    GROUP: columns to a scale, by which each group's sum is multiplied; 0 if there are no groups."""
    first = program.to(tl.int64) * ROWS
    chunks = tl.arange(0, COLUMNS // 16) * 16
    zeros = tl.zeros((COLUMNS // 16,), SUMS)
    sums = (zeros, zeros, zeros, zeros)
    for start in range(0, k, COLUMNS):
        firsts = start + chunks
        columns = firsts[:, None] + tl.arange(0, 16)[None, :]
        x = tl.load(x_ptr + columns, mask=columns < k, other=0).to(SUMS)
        sums = (
            sums[0] + _sums_of_chunks(x, weight_ptr, scale_ptr, first, 0, n, k, row_stride, firsts, columns, GROUP),
            sums[1] + _sums_of_chunks(x, weight_ptr, scale_ptr, first, 1, n, k, row_stride, firsts, columns, GROUP),
            sums[2] + _sums_of_chunks(x, weight_ptr, scale_ptr, first, 2, n, k, row_stride, firsts, columns, GROUP),
            sums[3] + _sums_of_chunks(x, weight_ptr, scale_ptr, first, 3, n, k, row_stride, firsts, columns, GROUP),
        )
    four = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
    return tl.reshape(tl.sum(four, axis=0), (ROWS,))


@triton.jit
def _sums_of_chunks(
    x, weight_ptr, scale_ptr, first, row, n, k, row_stride, firsts, columns, GROUP: tl.constexpr
):  # fmt: skip
    """Of one row: x [C, 16] times its codes there, each chunk of 16 added up, [C]; firsts: the column of each chunk."""
    row = tl.minimum(first + row, n - 1)
    codes = tl.load(weight_ptr + row * row_stride + columns, mask=columns < k, other=0)
    products = codes.to(x.dtype) * x
    if GROUP == 0:
        return tl.sum(products, axis=1)
    elif GROUP % 16 == 0:
        scale = tl.load(scale_ptr + row * (k // GROUP) + firsts // GROUP, mask=firsts < k, other=0.0)
        return tl.sum(products, axis=1) * scale
    else:
        scale = tl.load(scale_ptr + row * (k // GROUP) + columns // GROUP, mask=columns < k, other=0.0)
        return tl.sum(products * scale, axis=1)
