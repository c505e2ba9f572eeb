"""w8a16_embedding on GPUs: only the rows that are looked up are read, multiplied by their scale and written.

An index outside the table cannot raise an error here, because the kernel runs later than the call. torch's own
embedding fails a device-side assertion, after which the process cannot use the GPU any more. Here such an index reads
no memory, and its row of the result is NaN, which shows in the model's output. On CPUs it is an error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops import reference
from octavo.ops.triton.launch import ceil_div, launch, power_of_two

__all__ = ["w8a16_embedding"]

PIECE = 2048
"""Codes that a program looks up, 16 to each of its 128 threads: one load. A long row is that of several programs, so
that even one token keeps a few of them busy."""


def w8a16_embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As in the table of `octavo.ops`. The product is rounded to fp32, and then to `dtype`."""
    if indices.dtype not in (torch.int32, torch.int64):
        return reference.w8a16_embedding(indices, weight, weight_scale, dtype)  # torch raises the error
    reference.check_table(weight, weight_scale)
    v, h = weight.shape
    y = torch.empty((*indices.shape, h), dtype=dtype, device=weight.device)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    columns = min(power_of_two(max(h, 16)), PIECE)
    rows = PIECE // columns
    launch(
        _look_up, (ceil_div(indices.numel(), rows), ceil_div(h, columns)), weight, indices.contiguous(),
        weight_scale.contiguous(), y, indices.numel(), v, h, weight.stride(0), ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["count"])  # so that another number of tokens compiles nothing
def _look_up(
    weight_ptr, indices_ptr, scale_ptr, y_ptr, count, v, h, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(indices_ptr + rows, mask=rows < count, other=0).to(tl.int64)
    found = (index >= 0) & (index < v)
    scale = tl.load(scale_ptr + index, mask=found, other=float("nan"))
    codes = tl.load(
        weight_ptr + index[:, None] * row_stride + columns[None, :],
        mask=found[:, None] & (columns < h)[None, :],
        other=0,
    )
    y = codes.to(tl.float32) * scale[:, None]
    y_rows = y_ptr + rows[:, None] * h + columns[None, :]
    tl.store(y_rows, y.to(y_ptr.dtype.element_ty), mask=(rows < count)[:, None] & (columns < h)[None, :])
