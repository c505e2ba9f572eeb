"""What all launches of kernels have in common: the right device, the arithmetic of grids, properties of operands.

When a model decodes eagerly the GPU waits for Python, so little is done before a launch (`triton.cdiv` takes 2 us, the
division here 0.1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Started",
    "ceil_div",
    "copied_on_hopper",
    "is_current",
    "is_hopper",
    "launch",
    "power_of_two",
    "rows_in_line",
]


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **meta: Any) -> Any:
    """`kernel[grid](first, *args, **meta)` on the device of the tensor `first`; does nothing for an empty grid.

    Returns: the compiled kernel; None for an empty grid, and under Triton's interpreter.

    Triton launches on the current device, which may be another one than that of the operands. enable_fp_fusion lets it
    compute a product and a sum with one rounding, as CUDA compilers do; Triton 3.10 no longer does so by default.
    """
    if 0 in grid:
        return None
    with torch.cuda.device_of(first):
        return kernel[grid](first, *args, enable_fp_fusion=True, **meta)


class Started(NamedTuple):
    """A launch, as needed to repeat it. kernel: compiled, None under the interpreter. programs: the grid. numbers: the
    arguments after the tensors."""

    kernel: Any
    programs: tuple[int, ...]
    numbers: tuple[int | float, ...]


def is_current(x: Tensor) -> bool:
    """Whether a kernel that is launched now runs on the device of x."""
    return not x.is_cuda or torch.cuda.current_device() == x.get_device()


def ceil_div(size: int, piece: int) -> int:
    """How many pieces of this size cover `size`."""
    return -(-size // piece)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, which is positive."""
    return 1 << (size - 1).bit_length()


def is_hopper(x: Tensor) -> bool:
    """Whether x is on a GPU of compute capability 9 (Hopper) or 10 (Blackwell for servers), which have a copy engine
    (TMA) and 227 KB of shared memory. (12, Blackwell for desktops, has only 99 KB.)"""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def copied_on_hopper(*operands: Tensor) -> bool:
    """Whether the copy engine of such a GPU (`is_hopper`) can fetch tiles of these operands [M, K] with contiguous
    rows: the rows have to begin at multiples of 16 bytes."""
    return is_hopper(operands[0]) and all(
        x.shape[1] > 0 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 for x in operands
    )


def rows_in_line(x: Tensor) -> Tensor:
    """x with contiguous rows; a copy only if they are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
