"""Rotary position embeddings on GPUs in one kernel, instead of torch's ten.

    y = x * cos + (-second, first) * sin      x = (first, second), two halves      https://arxiv.org/abs/2104.09864

It serves eager models only (`direct.py`): when a model is compiled, torch fuses the formula with its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import Started, ceil_div, launch, power_of_two

__all__ = ["start_rotary"]

ELEMENTS = 2048
"""Of a program, at least one head: 16 to a thread, which are two times 16 bytes of a 16-bit type."""


def start_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor) -> Started:
    """Launch the kernel for q [B, T, H, D], k [B, T, KV, D], cos and sin [B or 1, T, D].

    D is even; all are contiguous and of one dtype.
    """
    batch, tokens, heads, size = q.shape
    columns = power_of_two(max(size // 2, 1))
    rows = max(1, min(ELEMENTS // (2 * columns), power_of_two(heads)))
    of_query, of_key = ceil_div(heads, rows), ceil_div(k.shape[2], rows)
    numbers = (heads, k.shape[2], len(cos) * tokens, of_query, of_key, size // 2, rows, columns)
    count = batch * tokens * (of_query + of_key)
    kernel = launch(_rotary, (count,), q, k, cos, sin, q_out, k_out, *numbers, num_warps=4)
    return Started(kernel, (count,), numbers)


@triton.jit(do_not_specialize=["angles"])  # so that another number of tokens compiles nothing
def _rotary(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, heads, key_heads, angles,
    OF_QUERY: tl.constexpr, OF_KEY: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = (tl.program_id(0) // (OF_QUERY + OF_KEY)).to(tl.int64)
    part = tl.program_id(0) % (OF_QUERY + OF_KEY)
    angle = token % angles * 2 * HALF
    if part < OF_QUERY:
        _turn(q_ptr, cos_ptr + angle, sin_ptr + angle, q_out_ptr, token, part, heads, HALF, ROWS, COLUMNS)
    else:
        part -= OF_QUERY
        _turn(k_ptr, cos_ptr + angle, sin_ptr + angle, k_out_ptr, token, part, key_heads, HALF, ROWS, COLUMNS)


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, y_ptr, token, part, heads, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rotate `part` of the heads of one token."""
    rows, columns = part * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    there, within = (rows < heads) & (columns < HALF), columns < HALF
    at = (token * heads + rows) * (2 * HALF) + columns
    first, second = tl.load(x_ptr + at, mask=there), tl.load(x_ptr + at + HALF, mask=there)
    cos, sin = tl.load(cos_ptr + columns, mask=within), tl.load(sin_ptr + columns, mask=within)
    tl.store(y_ptr + at, _product(first, cos) - _product(second, sin), mask=there)
    cos, sin = tl.load(cos_ptr + HALF + columns, mask=within), tl.load(sin_ptr + HALF + columns, mask=within)
    tl.store(y_ptr + at + HALF, _product(second, cos) + _product(first, sin), mask=there)


@triton.jit
def _product(x, y):
    """A product rounded to its dtype, as torch rounds it before adding."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype).to(tl.float32)
