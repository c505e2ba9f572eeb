"""How every kernel is started: on the device of its operands, and with little work for the processor.

Triton looks at every argument of every launch to find out which variant of a kernel fits, which takes longer than a
small kernel runs. What decides that is little: dtypes, whether addresses and integers are multiples of 16, and ones.
Under these the compiled kernel is kept here, and started directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_hopper", "launch", "rows_in_line"]

_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
"""(device, kernel, description of its arguments) -> the compiled kernel, and its constants in their order."""


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **meta: Any) -> None:
    """`kernel[grid](first, *args, **meta)` on the device of `first`, a tensor; nothing for an empty grid.

    Triton takes the device that is current, which need not be the one of the operands where there are several. A
    product and a sum may be fused into one rounding, as every compiler of CUDA does; Triton 3.10 would no longer do so
    by itself.
    """
    if 0 in grid:
        return
    if not first.is_cuda:
        kernel[grid](first, *args, enable_fp_fusion=True, **meta)
    elif first.get_device() == torch.cuda.current_device():
        _start(kernel, grid, (first, *args), meta)
    else:
        with torch.cuda.device_of(first):
            _start(kernel, grid, (first, *args), meta)


def _start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    described, values = _described(args)
    key = (args[0].get_device(), kernel, described, *meta.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, enable_fp_fusion=True, **meta)
        _compiled[key] = compiled, [meta[name] for name in kernel.arg_names if name in meta]
        return
    compiled, constants = found
    compiled[(*grid, 1, 1)](*values, *constants)


def _described(args: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """What Triton compiles a kernel for, or more, and the arguments with addresses in the place of tensors."""
    described: list[Any] = []
    values: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            described += (value.dtype, address % 16 == 0)
            values.append(address)
            continue
        if isinstance(value, int):
            described.append((value == 1, value % 16 == 0, value >= 2**31))
        else:
            described.append(type(value))
        values.append(value)
    return tuple(described), values


def is_hopper(x: Tensor) -> bool:
    """Whether x is on a GPU of compute capability 9 or above, with its wgmma and 227 KB of shared memory."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def rows_in_line(x: Tensor) -> Tensor:
    """x with elements of a row next to each other; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
