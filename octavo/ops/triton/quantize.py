"""Floats to int8 codes on GPUs, with the same bits as `primitives.py` and `reference.py` give.

    scale = amax|x| / 127        code = clamp(round_half_even(x / scale), -127, 127)

Three tricks:

- Both divisions must round to nearest, which Triton's `/` does not. x / scale is computed as x times the reciprocal of
  the scale, one for the whole row, and then corrected by the remainder. This gives exactly the quotient's bits
  (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990) in fewer instructions
  than a division.
- To round to an integer, 1.5 * 2**23 is added. fp32 numbers of that size are 1 apart, so the lowest 8 bits of the sum
  are the code.
- The largest magnitude is a maximum of bits without the sign, read as integers. Their order is that of the numbers,
  with NaN after infinity; so NaN is kept, which a maximum of floats would lose.

A row is read once, and stays in registers between the maximum and the codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops import attention, reference
from octavo.ops.triton.launch import Started, ceil_div, launch, power_of_two
from octavo.ops.triton.linear import contiguous_rows

__all__ = [
    "quantize_per_tensor", "quantize_per_token", "quantize_states", "quantize_static", "quantize_weight", "start_rows",
]  # fmt: skip

PIECE = 4096
"""Elements that a program holds at a time, 16 to 32 to a thread: several short rows, or a part of a tensor."""

LONGEST_ROW, LONGEST_FULL_ROW = 8192, 16384
"""That is held whole, by 16 warps: the first whatever its length, the second if it leaves an eighth of a power of two
empty at most. Others are read twice, by 4096 elements at a time, the second time from the L2 cache. On an H200, of

    rows x columns    2048 x 4096    512 x 14336    2048 x 14336    2048 x 11008
    held whole            9.0 us        10.0 us         29.3 us         28.3 us
    read twice                          10.0            34.0            26.4
"""

PARTIAL_PROGRAMS = 512
"""That look for the largest magnitude of a tensor, about four on each multiprocessor; each program of the second launch
then looks through what they found, 2 KB."""

LEAST_USUAL, MOST_USUAL = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
"""Scales between which neither a reciprocal nor a remainder is a denormal."""

PIECE_OF_STATES = 1024
"""Elements of keys or values that a program holds: 8 tokens of 128 channels, the key heads of one decoded token of most
models. Not measured."""


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    reference.check_rows(x)
    return _rows(x, of_weight=False)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K]. NaN and inf give scales that are not finite, and no error: a check would wait for the device."""
    if weight.dim() != 2 or not weight.is_floating_point():
        return reference.quantize_weight(weight)
    return _rows(weight, of_weight=True)


def _rows(x: Tensor, of_weight: bool) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    m = scale.numel()
    if not m:
        return codes, scale
    x = contiguous_rows(x, m, k)
    start_rows(x, codes, scale, x.stride(0), of_weight)
    return codes, scale


def start_rows(
    x: Tensor, codes: Tensor, scale: Tensor, row_stride: int | None = None, of_weight: bool = False
) -> Started:
    """Launch the kernel for rows x [..., k], `row_stride` elements apart; None: contiguous rows."""
    m, k = scale.numel(), x.shape[-1]
    row_stride = k if row_stride is None else row_stride
    padded = max(power_of_two(k), 16)
    whole = k <= LONGEST_ROW or (k <= LONGEST_FULL_ROW and 8 * k >= 7 * padded)
    columns = padded if whole else PIECE
    rows = max(1, min(PIECE // columns, power_of_two(m)))
    numbers = (m, k, row_stride, of_weight, whole, rows, columns)
    count, warps = ceil_div(m, rows), max(1, min(16, rows * columns // 512))
    return Started(launch(_quantize_rows, (count,), x, codes, scale, *numbers, num_warps=warps), (count,), numbers)


def quantize_per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two launches: the first finds the largest magnitude of each piece, the second computes the codes."""
    reference.check_rows(x)
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    pieces = max(1, ceil_div(x.numel(), PIECE))
    programs = min(pieces, PARTIAL_PROGRAMS)
    largest = torch.empty(programs, dtype=torch.int32, device=x.device)
    launch(_largest_magnitudes, (programs,), x, largest, x.numel(), PIECE=PIECE, num_warps=4)
    launch(
        _quantize_pieces, (pieces,), x, codes, scale, largest, x.numel(), programs, PARTIALS=PARTIAL_PROGRAMS,
        PIECE=PIECE, num_warps=4,
    )  # fmt: skip
    return codes, scale


def quantize_static(x: Tensor, input_scale: Tensor) -> Tensor:
    reference.check_rows(x)
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    launch(
        _quantize_pieces, (ceil_div(x.numel(), PIECE),), x, codes, input_scale, None, x.numel(), 0,
        PARTIALS=PARTIAL_PROGRAMS, PIECE=PIECE, num_warps=4,
    )  # fmt: skip
    return codes


def quantize_states(x: Tensor, codes: Tensor, scale: Tensor, are_values: bool) -> None:
    """As `octavo.ops.quantize_states`, in one launch that takes x, codes and scale with their strides.

    Other shapes, and heads too long for a program to hold a row in registers, are left to the reference.
    """
    reference.check_rows(x)
    alike = x.dim() == 4 and codes.shape == x.shape and scale.shape == (*x.shape[:3], 1)
    if not alike or codes.dtype != torch.int8 or scale.dtype != torch.float32 or x.shape[3] > LONGEST_ROW:
        return attention.quantize_states(x, codes, scale, are_values)
    _, heads, tokens, size = x.shape
    columns = max(16, power_of_two(size))
    rows = max(1, PIECE_OF_STATES // columns)
    launch(
        _quantize_states, (ceil_div(scale.numel(), rows),), x, codes, scale, scale.numel(), heads, tokens, size,
        *x.stride(), *codes.stride(), *scale.stride()[:3], ARE_VALUES=are_values, ROWS=rows, COLUMNS=columns,
        num_warps=min(16, rows * columns // 256),
    )  # fmt: skip


@triton.jit(do_not_specialize=["m"])  # so that another number of many rows compiles nothing
def _quantize_rows(
    x_ptr, codes_ptr, scale_ptr, m, k, row_stride,
    OF_WEIGHT: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    there = (rows < m)[:, None]
    x_rows = x_ptr + rows[:, None] * row_stride
    codes_rows = codes_ptr + rows[:, None] * k
    if WHOLE:
        x = tl.load(x_rows + columns, mask=there & (columns < k), other=0.0).to(tl.float32)
        scale = _scale(tl.max(_magnitude(x), axis=1), x_ptr.dtype.element_ty, OF_WEIGHT)
        # Both branches store: passing codes out of them would take registers that rows of 16384 lack (Triton 3.6).
        if _are_usual(scale) and not OF_WEIGHT:
            tl.store(codes_rows + columns, _usual_codes(x, scale[:, None]), mask=there & (columns < k))
        else:
            tl.store(codes_rows + columns, _codes(x, scale[:, None]), mask=there & (columns < k))
    else:
        largest = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in range(0, k, COLUMNS):
            x = tl.load(x_rows + start + columns, mask=there & (start + columns < k), other=0.0)
            largest = tl.maximum(largest, _magnitude(x.to(tl.float32)))
        scale = _scale(tl.max(largest, axis=1), x_ptr.dtype.element_ty, OF_WEIGHT)
        for start in range(0, k, COLUMNS):
            x = tl.load(x_rows + start + columns, mask=there & (start + columns < k), other=0.0)
            codes = _codes(x.to(tl.float32), scale[:, None])
            tl.store(codes_rows + start + columns, codes, mask=there & (start + columns < k))
    tl.store(scale_ptr + rows, scale, mask=rows < m)


@triton.jit(do_not_specialize=["m", "tokens"])
def _quantize_states(
    x_ptr, codes_ptr, scale_ptr, m, heads, tokens, size, x_batch, x_head, x_token, x_channel, codes_batch, codes_head,
    codes_token, codes_channel, scale_batch, scale_head, scale_token,
    ARE_VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """m rows, one for each token of each head; the token changes fastest, then the head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)[None, :]
    there = (row < m)[:, None] & (channel < size)
    token, head = (row % tokens).to(tl.int64), (row // tokens % heads).to(tl.int64)
    batch = (row // tokens // heads).to(tl.int64)
    x_rows = x_ptr + (batch * x_batch + head * x_head + token * x_token)[:, None]
    x = tl.load(x_rows + channel * x_channel, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(_magnitude(x), axis=1)
    scale = _scale(largest, tl.float32, False)
    codes_rows = codes_ptr + (batch * codes_batch + head * codes_head + token * codes_token)[:, None]
    tl.store(codes_rows + channel * codes_channel, _codes(x, scale[:, None]), mask=there)
    if ARE_VALUES:  # a scale of 1 and a largest magnitude below 1: all are zeros
        scale = tl.where((scale == 1.0) & (largest.to(tl.float32, bitcast=True) < 1.0), 0.0, scale)
    tl.store(scale_ptr + batch * scale_batch + head * scale_head + token * scale_token, scale, mask=row < m)


@triton.jit
def _largest_magnitudes(x_ptr, largest_ptr, count, PIECE: tl.constexpr):
    largest = tl.zeros((PIECE,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * PIECE
    for start in range(first, count, tl.num_programs(0).to(tl.int64) * PIECE):
        elements = start + tl.arange(0, PIECE)
        x = tl.load(x_ptr + elements, mask=elements < count, other=0.0)
        largest = tl.maximum(largest, _magnitude(x.to(tl.float32)))
    tl.store(largest_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["programs"])
def _quantize_pieces(
    x_ptr, codes_ptr, scale_ptr, largest_ptr, count, programs, PARTIALS: tl.constexpr, PIECE: tl.constexpr
):
    """Codes under one scale: a given one, or the one for the largest of the magnitudes that the first launch found."""
    if largest_ptr is None:
        scale = tl.load(scale_ptr)
    else:
        partials = tl.arange(0, PARTIALS)
        largest = tl.load(largest_ptr + partials, mask=partials < programs, other=0)
        scale = _scale(tl.max(largest, axis=0), tl.float32, False)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
    elements = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    x = tl.load(x_ptr + elements, mask=elements < count, other=0.0).to(tl.float32)
    tl.store(codes_ptr + elements, _codes(x, scale), mask=elements < count)


@triton.jit
def _magnitude(x):
    """The bits of |x|, as an integer."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest, dtype: tl.constexpr, OF_WEIGHT: tl.constexpr):
    """The scale for the bits of the largest magnitude. A weight's is rounded to `dtype`, and up if it would clip."""
    largest = largest.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, 127.0)
    if OF_WEIGHT:
        if dtype == tl.bfloat16 or dtype == tl.float16:
            stored = scale.to(dtype)
            step_up = (stored.to(tl.int16, bitcast=True) + 1).to(dtype, bitcast=True).to(tl.float32)
        else:
            stored = scale
            step_up = (stored.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
        scale = stored.to(tl.float32)
        clips = (scale == 0) | (tl.div_rn(largest, tl.where(scale == 0, 1.0, scale)) > 127.5)
        return tl.where(largest == 0, 1.0, tl.where(clips, step_up, scale))
    else:
        return tl.where(scale == 0, 1.0, scale)


@triton.jit
def _codes(x, scale):
    """The codes of x fp32 [R, C] under scale fp32 [R, 1], or of x [C] under a scalar."""
    # Multiplying by a power of two loses nothing, and keeps the reciprocal and its products from being denormal.
    power = tl.where(scale < LEAST_USUAL, MOST_USUAL, 1.0)
    power = tl.where(scale > MOST_USUAL, LEAST_USUAL, power)
    scale *= power
    most = 127 * scale
    steps = _quotient(tl.clamp(x * power, -most, most, propagate_nan=tl.PropagateNan.ALL), scale)
    steps = tl.where(steps == steps, steps, 0.0)  # NaN is inf / inf here; a maximum may drop it
    return _nearest(steps)


@triton.jit
def _are_usual(scale):
    """Whether none of the scales [R] is NaN, infinite, or so small or large that `_codes` rescales it."""
    return tl.min(((scale > LEAST_USUAL) & (scale < MOST_USUAL)).to(tl.int32), axis=0) == 1


@triton.jit
def _usual_codes(x, scale):
    """The same in half the instructions, for usual scales (`_are_usual`) that are a row's largest magnitude / 127.

    No quotient is then NaN, and none needs clamping: it exceeds 127 by no more than the scale was rounded down, so the
    nearest integer is 127.
    """
    return _nearest(_quotient(x, scale))


@triton.jit
def _quotient(x, scale):
    reciprocal = tl.div_rn(1.0, scale)
    steps = x * reciprocal
    return tl.fma(tl.fma(steps, -scale, x), reciprocal, steps)


@triton.jit
def _nearest(steps):
    return (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
