"""RMS norms on GPUs in one kernel, instead of torch's op and a product with the weight.

    y = weight * x / sqrt(mean(x^2) + eps)      x [..., K], weight [K]      https://arxiv.org/abs/1910.07467

It serves eager models only (`direct.py`): when a model is compiled, torch fuses the formula with its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import Started, ceil_div, launch, power_of_two

__all__ = ["LONGEST_ROW", "start_rms_norm"]

LONGEST_ROW = 16384
"""A row is held whole, 16 elements to a thread, by 32 warps at most."""

PIECE = 2048
"""Elements that a program holds at least: several short rows, as the norm of a head's query is."""


def start_rms_norm(x: Tensor, weight: Tensor, y: Tensor, eps: float, round_first: bool) -> Started:
    """Launch the kernel for contiguous x [..., K]; all tensors are of one dtype.

    round_first: whether x / rms is rounded to that dtype before it is multiplied by the weight.
    """
    k = x.shape[-1]
    m, columns = x.numel() // k, max(power_of_two(k), 16)
    rows = max(1, min(PIECE // columns, power_of_two(m)))
    numbers = (m, k, eps, round_first, rows, columns)
    count, warps = ceil_div(m, rows), max(1, min(32, rows * columns // 512))
    return Started(launch(_rms_norm, (count,), x, weight, y, *numbers, num_warps=warps), (count,), numbers)


@triton.jit(do_not_specialize=["m"])  # so that another number of many rows compiles nothing
def _rms_norm(
    x_ptr, weight_ptr, y_ptr, m, k, eps, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    there = (rows < m)[:, None] & (columns < k)
    x = tl.load(x_ptr + rows[:, None] * k + columns, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < k, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) / k + eps)[:, None]
    if ROUND_FIRST:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * k + columns, (weight * y).to(y_ptr.dtype.element_ty), mask=there)
