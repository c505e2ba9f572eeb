"""How every kernel is started: on the device that its operands are on; and the arithmetic of its grid.

In eager decode a GPU waits for Python, so what a call does before the launch is kept short (`triton.cdiv`, which
compilers can call, takes 2 us; the division here 0.1).
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
    """`kernel[grid](first, *args, **meta)` on the device of `first`, a tensor; nothing for an empty grid. Returns: the
    kernel as it was compiled, None where it is interpreted.

    Triton takes the device that is current, which need not be the one of the operands where there are several. A
    product and a sum may be fused into one rounding, as every compiler of CUDA does; Triton 3.10 would no longer do so
    by itself.
    """
    if 0 in grid:
        return None
    with torch.cuda.device_of(first):
        return kernel[grid](first, *args, enable_fp_fusion=True, **meta)


class Started(NamedTuple):
    """A launch. kernel: as compiled, None where it is interpreted; programs: how many, along each axis of the grid;
    numbers: the arguments after the tensors."""

    kernel: Any
    programs: tuple[int, ...]
    numbers: tuple[int | float, ...]


def is_current(x: Tensor) -> bool:
    """Whether a kernel that is launched now runs on the device of x."""
    return not x.is_cuda or torch.cuda.current_device() == x.get_device()


def ceil_div(size: int, piece: int) -> int:
    """How many pieces cover the size."""
    return -(-size // piece)


def power_of_two(size: int) -> int:
    """The least that is not below the size, which is positive."""
    return 1 << (size - 1).bit_length()


def is_hopper(x: Tensor) -> bool:
    """Whether x is on a GPU of compute capability 9 (Hopper) or 10 (Blackwell for servers): with a copy engine, and
    with 227 KB of shared memory, of which 12 (Blackwell for desktops) has 99."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def copied_on_hopper(*operands: Tensor) -> bool:
    """Whether the copy engine of such a GPU (`is_hopper`) fetches tiles of these [M, K] operands, whose rows are
    in line: they begin at multiples of 16 bytes."""
    return is_hopper(operands[0]) and all(
        x.shape[1] > 0 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 for x in operands
    )


def rows_in_line(x: Tensor) -> Tensor:
    """x with elements of a row next to each other; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
