"""w8a16_linear of one row, without torch's dispatcher and without Triton's look-up of the compiled kernel.

When a model decodes eagerly, a GPU waits for Python: the kernel of a layer takes 8 us, a call of the op several times
as long. Of that time the dispatcher, which finds this package's Python in the end, takes a third, and most of the rest
Triton, which asks at each call what every argument means for the kernel that it compiled. Here that is asked once for
all layers of a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.ops.triton.launch import is_current
from octavo.ops.triton.linear import start_row

__all__ = ["w8a16_row"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class _Started(NamedTuple):
    """A compiled kernel on its grid, and the numbers that it takes after the tensors."""

    run: Callable[..., None]
    numbers: tuple[int, ...]


_started: dict[tuple[Any, ...], _Started] = {}
"""By all that decides which kernel is compiled; what the tensors hold is no part of it."""


def w8a16_row(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """As `octavo.ops.w8a16_linear` for one row of x. None for what is not as usual: the op answers that."""
    if x.numel() != weight.shape[1] or not x.is_contiguous() or not is_current(x):
        return None
    pointers = x.data_ptr() | weight.data_ptr() | weight_scale.data_ptr() | (0 if bias is None else bias.data_ptr())
    if pointers % 16:  # another kernel is compiled for these
        return None
    key = (
        x.dtype, x.get_device(), weight.shape, weight.stride(), weight_scale.shape, weight_scale.stride(),
        None if bias is None else (bias.dtype, bias.stride()),
    )  # fmt: skip
    started = _started.get(key)
    if started is None:
        return _start(key, x, weight, weight_scale, bias)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    started.run(x, weight, weight_scale, bias, y, *started.numbers)
    return y


def _start(key: tuple[Any, ...], x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """The first call for a key: by the usual way, which returns the compiled kernel."""
    n, k = weight.shape
    usual = (
        (x.dtype in _FLOATS and x.dim() and x.shape[-1] == k and n > 0)
        and (weight.dtype == torch.int8 and weight_scale.dtype == torch.float32)
        and (weight.stride(1) == 1 and weight_scale.is_contiguous() and (bias is None or bias.is_contiguous()))
        and all(one is None or one.device == x.device for one in (weight, weight_scale, bias))
    )
    if not usual:
        return None
    y = x.new_empty((*x.shape[:-1], n))
    compiled, grid, numbers = start_row(x, weight, weight_scale, bias, y)
    if compiled is not None:  # there is none where the kernel is interpreted
        _started[key] = _Started(compiled[(grid, 1, 1)], numbers)
    return y
