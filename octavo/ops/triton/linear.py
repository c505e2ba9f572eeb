"""w8a16_linear on GPUs: int8 codes are widened (converted to x's dtype) in registers, between memory and the product.

    y [M, N] = (x [M, K] @ weight [N, K].T) * scale [N] + bias [N]        per_group: each group's sum times its scale

Up to a few hundred rows of x, the time is that of reading the codes once. So two things matter: that many bytes are in
flight, and that widening takes few instructions. One row of x is multiplied on the ordinary cores (`vector.py`), more
rows on the tensor cores (`_matrix_product`), where few rows are one tile, padded to 16.

For thousands of rows, it would be faster to widen the whole weight and call cuBLAS. But cuBLAS rounds its result to x's
dtype before a scale can be applied: fp16 would overflow, and everything would be rounded twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.ops import reference
from octavo.ops.triton import vector
from octavo.ops.triton.launch import Started, ceil_div, copied_on_hopper, launch, rows_in_line

__all__ = [
    "InTiles", "Plan", "Tile", "add_parts", "contiguous_rows", "descriptors", "is_copied", "is_read", "plan",
    "programs", "start_copied", "start_tiles", "tile_of_program", "w8a16_linear", "w8a16_linears",
]  # fmt: skip


class Tile(NamedTuple):
    """An [m, n] piece of y that one program computes in steps of k, with so many warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


FEW_ROWS = (Tile(16, 64, 256, 4, 4), Tile(32, 64, 128, 8, 3), Tile(64, 64, 128, 4, 3))
"""Up to 16, 32 and 64 rows of x: the codes are read once. Two or three steps of 8 to 16 KB are under way in a program,
and there are two programs on each of 132 multiprocessors: 6 to 12 MB, where 4.8 TB/s are 5 MB in a microsecond. For
sm_90 it is 4 to 5 instructions for each code, of which a multiprocessor could do 28 a cycle; memory gives it 20. With 4
warps the second spills a register in fp16 (Triton 3.6 and 3.7)."""

ODD_GROUPS = (Tile(32, 64, 128, 4, 3),)
"""Any rows, if a group is no multiple of 16: a step of 16 lies in several groups, whose scales take registers. With 8
warps two of them are spilled (Triton 3.9)."""

MANY_ROWS = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3))
"""More rows: the first that gives nearly every multiprocessor a program. The tensor cores of sm_90 take their second
operand from shared memory only, so widened codes are written there, and a program does not widen and multiply at the
same time: two of the first tile fit a multiprocessor (80 KB, 128 registers a thread), and one widens (314 cycles) while
the other multiplies (512). Their 24 KB a step are then what bounds it: predicted are 0.55 to 0.6 of the tensor cores.
[256, 128] would read less, but fits once, and its steps follow each other: no more than 0.7, and on sm_80 too many
registers. weight @ x.T would widen into registers, without a second copy, but takes twice the instructions (Triton 3.9
reads the codes two at a time for it): 956 cycles to 466, next to 1024 of multiplying, in a [128, 256] tile."""

ON_HOPPER = Tile(256, 64, 128, 4, 3)
"""The same for 16 bits on sm_90: y.T = weight @ x.T, for which codes are widened in registers and stay there, for wgmma
takes its first operand from there; the copy engine fetches both. Measured on an H200 at 512 and 2048 rows, for [N, K]
of 4096 x 4096, 14336 x 4096 and 4096 x 14336: 1.2 to 2.2 times as fast as the tiles above, 0.7 to 0.9 times as fast
as cuBLAS in bf16. Shorter steps and tiles of 256 x 128 and 128 x 128 take 1.1 to 2.3 times as long."""

LEAST_ROWS_ON_HOPPER = 256
"""From so many rows on it is used: then a tile of x is full."""

ENOUGH_PROGRAMS = 120
"""A tile is taken if it makes so many programs: an H200 has 132 multiprocessors, an A100 108."""

WANTED_PROGRAMS = 264
"""Two for each multiprocessor. If there are fewer than `ENOUGH_PROGRAMS`, K is split to get so many."""

MOST_PARTS = 16
"""The most parts that K is split into. Adding them up takes one load for each, none of which waits for another."""

GROUP_OF_PROGRAMS = 8
"""Programs that run at the same time share so many tiles of the weight, which stay in the L2 cache meanwhile."""


class Plan(NamedTuple):
    """The tile for a shape, the number of tiles, the parts that K is split into, and the steps in each part."""

    tile: Tile
    tiles: int
    parts: int
    steps: int


def plan(m: int, n: int, k: int, few: Sequence[Tile], many: Sequence[Tile], step: int = 256) -> Plan:
    """For x [m, k] and weight [n, k]: a tile of `few` if one holds all rows, else of `many`. step: the longest of K."""
    if m <= few[-1].m:
        tile = next(tile for tile in few if m <= tile.m)
    else:
        tile = next((tile for tile in many if programs(tile, m, n) >= ENOUGH_PROGRAMS), many[-1])
    if k % 16:  # unaligned rows are read a few bytes at a time: many loads, each of which takes registers
        step = min(step, 64)
    tile = tile._replace(k=min(tile.k, step))
    steps = max(1, ceil_div(k, tile.k))
    tiles = programs(tile, m, n)
    parts = 1 if tiles >= ENOUGH_PROGRAMS else max(1, min(WANTED_PROGRAMS // tiles, steps // 2, MOST_PARTS))
    steps_of_part = ceil_div(steps, parts)
    return Plan(tile, tiles, ceil_div(steps, steps_of_part), steps_of_part)


def programs(tile: Tile, m: int, n: int) -> int:
    """The number of tiles that cover y [m, n]."""
    return ceil_div(m, tile.m) * ceil_div(n, tile.n)


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As in the table of `octavo.ops`. float64, which is slow on GPUs, and K = 0 are left to the reference."""
    reference.check_input(x, weight, weight_scale, bias)
    if x.dtype == torch.float64 or not weight.shape[1]:
        return reference.w8a16_linear(x, weight, weight_scale, bias)
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel():
        return y
    m = y.numel() // n
    weight = rows_in_line(weight)
    weight_scale = weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    if m == 1:
        vector.start_row(rows_in_line(x), None, weight, weight_scale, bias, y)
        return y
    x = contiguous_rows(x, m, k)
    if m >= LEAST_ROWS_ON_HOPPER and is_copied(x, weight, weight_scale.shape[1]):
        start_copied(y, *descriptors(x, weight, ON_HOPPER), weight_scale, bias)
    else:
        start_tiles(x, weight, weight_scale, bias, y)
    return y


class InTiles(NamedTuple):
    """The launches of a product in tiles.

    product: computes y, or the sums of each part of K if it is split.
    adding: adds up the parts; None if K is not split.
    shape, dtype, device: of the product's result.
    """

    product: Started
    adding: Started | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def kernel(self) -> Any:
        return self.product.kernel


def start_tiles(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor) -> InTiles:
    """Launch the kernel for tiles of y [..., n], and the one that adds up the parts of K if it is split.

    x: [m, k]. Elements of a row of x and of the weight are adjacent.
    """
    (m, k), n, groups = x.shape, len(weight), weight_scale.shape[1]
    group = k // groups if groups > 1 else 0
    few: Sequence[Tile] = FEW_ROWS
    many: Sequence[Tile] = MANY_ROWS
    if group % 16:
        few = many = ODD_GROUPS
    elif group or x.dtype == torch.float32:
        many = MANY_ROWS[-1:]
    tile, tiles, parts, steps = plan(m, n, k, few, many, _longest_step(x, group))
    sums = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
    numbers = (m, n, k, steps, x.stride(0), weight.stride(0), group, *tile[:3], GROUP_OF_PROGRAMS, parts == 1)
    kernel = launch(
        _matrix_product, (tiles, parts), x, weight, weight_scale, bias, sums, *numbers,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    adding = None if parts == 1 else add_parts(sums, None, weight_scale if group == 0 else None, bias, y)
    return InTiles(Started(kernel, (tiles, parts), numbers), adding, sums.shape, sums.dtype, sums.device)


def is_copied(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether `start_copied` takes x [m, k] and weight [n, k]: it needs the copy engine, and has no groups."""
    return x.dtype in (torch.bfloat16, torch.float16) and groups == 1 and copied_on_hopper(x, weight)


def start_copied(
    y: Tensor, x: TensorDescriptor, weight: TensorDescriptor, weight_scale: Tensor, bias: Tensor | None
) -> Started:
    """Launch the kernel for many rows, whose operands the copy engine fetches. See `descriptors`."""
    (m, k), n = x.shape, weight.shape[0]
    count, numbers = programs(ON_HOPPER, m, n), (m, n, k, *ON_HOPPER[:3], GROUP_OF_PROGRAMS)
    kernel = launch(
        _copied_product, (count,), y, x, weight, weight_scale, bias, *numbers,
        num_warps=ON_HOPPER.warps, num_stages=ON_HOPPER.stages,
    )  # fmt: skip
    return Started(kernel, (count,), numbers)


def descriptors(x: Tensor, weight: Tensor, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of x [m, k] and weight [n, k], by which the copy engine (TMA) fetches pieces of a tile's size."""
    return TensorDescriptor.from_tensor(x, [tile.m, tile.k]), TensorDescriptor.from_tensor(weight, [tile.n, tile.k])


def w8a16_linears(
    x: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor], bias: Sequence[Tensor | None]
) -> Tensor:
    """Several layers of one input; outputs concatenated. One launch if x has one row and all have the same groups."""
    k = x.shape[-1]
    groups = {scale.shape[1] for scale in weight_scale}
    total = sum(len(one) for one in weight)
    if x.numel() != k or x.dtype == torch.float64 or not k or not total or len(groups) > 1:
        return reference.w8a16_linears(x, weight, weight_scale, bias)
    for layer in zip(weight, weight_scale, bias, strict=True):
        reference.check_input(x, *layer)
    return vector.start_layers(x, None, weight, weight_scale, bias, x.dtype)


def contiguous_rows(x: Tensor, m: int, k: int) -> Tensor:
    """x [..., k] as [m, k] with adjacent elements in each row; a copy only if they are not."""
    return rows_in_line(x if x.dim() == 2 else x.reshape(m, k))


def _longest_step(x: Tensor, group: int) -> int:
    """The longest step of K: a power of two that divides the group; short for fp32, whose parts take registers."""
    longest = 32 if x.dtype == torch.float32 else 256
    return 16 if group % 16 else math.gcd(group, longest)


@triton.jit(do_not_specialize=["m"])  # so that another number of rows compiles nothing
def _matrix_product(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, m, n, k, steps, x_stride, weight_stride,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """An [M, N] tile of y [m, n], or of the sums of one part of K: y_ptr is then fp32 [parts, m, n]."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), m, n, M, N, TILES)
    part = tl.program_id(1)
    rows = tile_m * M + tl.arange(0, M)
    channels = tile_n * N + tl.arange(0, N)
    # Past the end, the last row and channel are read again; their results are not stored.
    x_rows = x_ptr + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * x_stride
    channel = tl.minimum(channels, n - 1)
    weight_rows = weight_ptr + channel.to(tl.int64)[None, :] * weight_stride
    inner = tl.arange(0, K)
    if GROUP:
        scale_rows = scale_ptr + channel.to(tl.int64) * (k // GROUP)
    sums = tl.zeros((M, N), tl.float32)
    for start in range(part * steps * K, tl.minimum((part + 1) * steps * K, k), K):
        columns = start + inner
        x = tl.load(x_rows + columns[None, :], mask=is_read(rows, columns, m, k, M), other=0.0)
        codes = tl.load(weight_rows + columns[:, None], mask=columns[:, None] < k, other=0)
        if GROUP == 0:
            sums = _add_product(x, codes, sums)
        elif GROUP % K == 0:
            scale = tl.load(scale_rows + start // GROUP)
            sums += _add_product(x, codes, tl.zeros((M, N), tl.float32)) * scale[None, :]
        else:
            scale = tl.load(scale_rows[None, :] + columns[:, None] // GROUP, mask=columns[:, None] < k, other=0.0)
            sums = tl.dot(x.to(tl.float32), codes.to(tl.float32) * scale, sums, input_precision="ieee")
    if FINISH:
        if GROUP == 0:
            sums *= tl.load(scale_ptr + channel)[None, :]
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + tl.minimum(channels, n - 1)).to(tl.float32)[None, :]
    y = y_ptr + (part.to(tl.int64) * m + rows)[:, None] * n + channels[None, :]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (channels < n)[None, :])


@triton.jit(do_not_specialize=["m"])
def _copied_product(
    y_ptr, x_tiles, weight_tiles, scale_ptr, bias_ptr, m, n, k,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """An [M, N] tile of y. x_tiles, weight_tiles: `descriptors`. Past the ends, the copy engine pads with zeros."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), m, n, M, N, TILES)
    sums = tl.zeros((N, M), tl.float32)
    for start in range(0, k, K):
        x = x_tiles.load([tile_m * M, start])
        codes = weight_tiles.load([tile_n * N, start])
        sums = tl.dot(_widened(codes, x.dtype), x.T, sums)
    rows, channels = tile_m * M + tl.arange(0, M), tile_n * N + tl.arange(0, N)
    channel = tl.minimum(channels, n - 1)
    sums *= tl.load(scale_ptr + channel)[:, None]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + channel).to(tl.float32)[:, None]
    y = y_ptr + rows.to(tl.int64)[None, :] * n + channels[:, None]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=(rows < m)[None, :] & (channels < n)[:, None])


@triton.jit
def _add_product(x, codes, sums):
    """sums + x @ codes. Codes are exact in 16 bits; fp32 x is split into three bf16 numbers, exactly."""
    if x.dtype == tl.float32:
        codes = codes.to(tl.bfloat16)
        high = _upper_half(x)
        rest = x - high
        rest = tl.where(rest == rest, rest, 0.0)  # NaN if x is infinite, which `high` holds already
        middle = _upper_half(rest)
        sums = tl.dot(high.to(tl.bfloat16), codes, sums)
        sums = tl.dot(middle.to(tl.bfloat16), codes, sums)
        return tl.dot((rest - middle).to(tl.bfloat16), codes, sums)
    else:
        return tl.dot(x, _widened(codes, x.dtype), sums)


@triton.jit
def _widened(codes, dtype: tl.constexpr):
    """Codes in bf16 or fp16, exactly.

    In fp16 by bit arithmetic, two codes at a time, where a conversion takes one: 1536 is 0x6600, and the next number,
    1537, is 0x6601.
    """
    if dtype == tl.float16:
        return (codes.to(tl.int16) + 0x6600).to(tl.float16, bitcast=True) - 1536.0
    else:
        return codes.to(tl.bfloat16)


@triton.jit
def _upper_half(x):
    """fp32 with the lower 16 bits cleared: a bf16 number."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def is_read(rows, columns, m, k, M: tl.constexpr):
    """The mask [rows, columns] of the elements that a program reads of its tile of x, which has M rows.

    In the smallest tile, only rows that exist are read. Otherwise, of four rows, each program would read the last one
    13 times, all from the same place of the L2 cache. Larger tiles are more than half full, and have no registers to
    spare for the mask (on sm_80 three are spilled; Triton 3.9).
    """
    within = (columns < k)[None, :]
    if M == 16:
        within = within & (rows < m)[:, None]
    return within


@triton.jit
def tile_of_program(program, m, n, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr):
    """The tile of y that a program computes: TILES tiles of the weight meet all rows of x before the next ones do."""
    along_m, along_n = tl.cdiv(m, M), tl.cdiv(n, N)
    first = program // (TILES * along_m) * TILES
    height = tl.minimum(along_n - first, TILES)
    within = program % (TILES * along_m)
    return within // height, first + within % height


def add_parts(parts: Tensor, x_scale: Tensor | None, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> Started:
    """Launch the kernel for y = the sum of `parts` [P, M, N] over P, in that order, times the scales, plus the bias.

    x_scale: fp32 [M] or [1]; scale: fp32 [N]; all but `parts` and `y` may be None.
    """
    count, m, n = parts.shape
    grid, numbers = (m, ceil_div(n, 512)), (m, n, x_scale is not None and x_scale.numel() > 1, count, 512)
    return Started(launch(_add_parts, grid, parts, x_scale, scale, bias, y, *numbers, num_warps=4), grid, numbers)


@triton.jit(do_not_specialize=["m"])
def _add_parts(
    parts_ptr, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, m, n,
    EACH_ROW: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < n
    y = tl.load(parts_ptr + row * n + columns, mask=there)
    for part in tl.static_range(1, PARTS):
        y += tl.load(parts_ptr + (part * m + row) * n + columns, mask=there)
    y = y.to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + columns, mask=there)
        if x_scale_ptr is not None:
            scale *= tl.load(x_scale_ptr + (row if EACH_ROW else 0))
        y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=there).to(tl.float32)
    tl.store(y_ptr + row * n + columns, y.to(y_ptr.dtype.element_ty), mask=there)
