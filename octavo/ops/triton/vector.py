"""One row of x times rows of int8 codes, on the ordinary cores: what a layer does when a token is decoded.

The time is that of reading the codes, as long as arithmetic keeps up. Each thread takes the same columns of ROWS rows,
so that it converts each element of x only once for ROWS codes. Threads exchange nothing before the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import Started, ceil_div, launch, power_of_two, rows_in_line

__all__ = ["ROWS", "piece", "rows_of_program", "rows_times_vector", "start_layers", "start_row"]

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
"""Columns of a program and of a warp, where one launch serves several layers."""


def piece(k: int, programs: int) -> tuple[int, int]:
    """(Columns that a program takes at a time, its warps) for rows of k codes. programs: how many are launched."""
    return _piece(k, MOST_COLUMNS, COLUMNS_OF_WARP if programs >= MANY_PROGRAMS else COLUMNS_OF_WARP // 2)


def piece_of_several(k: int) -> tuple[int, int]:
    """The same for several layers in one launch."""
    return _piece(k, *PIECE_OF_SEVERAL)


def _piece(k: int, most: int, of_warp: int) -> tuple[int, int]:
    columns = min(most, max(power_of_two(k), 16))
    if k % 16:  # unaligned rows are read a byte at a time: many loads, each of which takes registers
        of_warp = min(of_warp, 128)
    return columns, min(16, max(1, columns // of_warp))


def start_row(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor
) -> Started:
    """Launch a layer for one row of x. Elements of each row are adjacent. x_scale: for int8 x, else None."""
    n, k = weight.shape
    groups = weight_scale.shape[1]
    count = ceil_div(n, ROWS.value)
    columns, warps = piece(k, count)
    numbers = (n, k, weight.stride(0), k // groups if groups > 1 else 0, columns)
    operands = (x, x_scale, weight, weight_scale, bias, y)
    return Started(launch(_matrix_vector, (count,), *operands, *numbers, num_warps=warps), (count,), numbers)


def start_layers(
    x: Tensor, x_scale: Tensor | None, weight: Sequence[Tensor], weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Launch several layers for one row of x; all have the same groups. Returns: their outputs, concatenated."""
    weights = tuple(rows_in_line(one) for one in weight)
    sizes, row_strides = tuple(len(one) for one in weights), tuple(one.stride(0) for one in weights)
    k, groups = x.shape[-1], weight_scale[0].shape[1]
    y = x.new_empty((*x.shape[:-1], sum(sizes)), dtype=dtype)
    columns, warps = piece_of_several(k)
    launch(
        _matrix_vectors, (sum(ceil_div(size, ROWS.value) for size in sizes),), rows_in_line(x), x_scale, weights,
        tuple(one.contiguous() for one in weight_scale),
        tuple(None if one is None else one.contiguous() for one in bias), y, sizes, row_strides, k,
        GROUP=k // groups if groups > 1 else 0, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return y


@triton.jit
def _matrix_vector(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, n, k, row_stride,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Elements of y for one row of x. GROUP: columns per scale; 0 if the whole row has one."""
    program = tl.program_id(0)
    _rows_of_y(x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, program, n, k, row_stride, GROUP, COLUMNS)


@triton.jit
def _matrix_vectors(
    x_ptr, x_scale_ptr, weights, scales, biases, y_ptr, sizes, row_strides, k,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same for several layers, whose outputs follow each other in y. sizes: N of each layer."""
    program = tl.program_id(0)
    for layer in tl.static_range(len(weights)):
        programs = tl.cdiv(sizes[layer], ROWS)
        if (program >= 0) & (program < programs):
            _rows_of_y(
                x_ptr, x_scale_ptr, weights[layer], scales[layer], biases[layer], y_ptr, program, sizes[layer], k,
                row_strides[layer], GROUP, COLUMNS,
            )  # fmt: skip
        program -= programs
        y_ptr += sizes[layer]


@triton.jit
def _rows_of_y(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, program, n, k, row_stride,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = rows_of_program(program, n)
    dtype = tl.float32 if x_scale_ptr is None else tl.int32
    y = rows_times_vector(x_ptr, weight_ptr, scale_ptr, program, n, k, row_stride, dtype, GROUP, COLUMNS)
    y = y.to(tl.float32)
    if GROUP == 0:
        scale = tl.load(scale_ptr + rows)
        if x_scale_ptr is not None:
            scale *= tl.load(x_scale_ptr)
        y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty))


@triton.jit
def rows_of_program(program, n):
    """The program's ROWS rows of a weight of n rows; the last program may repeat the last row."""
    return tl.minimum(program.to(tl.int64) * ROWS + tl.arange(0, ROWS), n - 1)


@triton.jit
def rows_times_vector(
    x_ptr, weight_ptr, scale_ptr, program, n, k, row_stride,
    SUMS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Dot products [ROWS] of x with the rows of `rows_of_program`.

    SUMS: their dtype, fp32, or int32 for int8 x. GROUP: columns per scale, by which each group's sum is multiplied;
    0 without groups.
    """
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
    """For one row, the sums [C] of x [C, 16] times the codes, over each chunk of 16. firsts: each chunk's first
    column."""
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
