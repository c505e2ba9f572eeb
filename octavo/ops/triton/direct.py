"""Ops without torch's dispatcher, and without Triton's look-up of the compiled kernel.

When a model runs eagerly, a GPU waits for Python: the kernel of a layer and a row takes 8 us, a call of its op several
times as long. Of that time the dispatcher, which finds this package's Python in the end, takes a third, and most of the
rest Triton, which asks at each call what every argument means for the kernel that it compiled. Here that is asked once
for all layers of a shape.

The functions have the names and arguments of the ops that models spend their time in. They return None for what is
not as usual, and there the op is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from octavo.ops.triton import int8_linear, quantize, vector
from octavo.ops.triton.launch import Started, copied_on_hopper, is_current

__all__ = ["quantize_per_token", "w8a8_linear", "w8a16_linear"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (Tensor, nn.Parameter)  # and nothing that is derived from them, which may have no memory of its own

MOST_KEPT = 10_000
"""Kernels and shapes, which are kept until then; prompts of every length have one."""

_kept: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[int, ...]]] = {}
"""By all that decides which kernel is compiled and how it is started: what runs it, and the arguments after the
tensors. What the tensors hold is no part of it."""


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """For one row of x."""
    n, k = weight.shape
    if x.numel() != k or not _are_usual(x, weight, weight_scale, bias):
        return None
    key = ("w8a16_linear", *_described(x, weight, weight_scale, bias))
    if key not in _kept and not (x.dtype in _FLOATS and _are_layer(x, weight, weight_scale, bias)):
        return None
    y = x.new_empty((*x.shape[:-1], n))
    _start(key, vector.start_row, x, None, weight, weight_scale, bias, y)
    return y


def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """For one row of x, or as many as the copy engine fetches."""
    n, k = weight.shape
    m = x.numel() // max(1, k)
    if not m or 1 < m <= int8_linear.FEW_ROWS[-1].m or not _are_usual(x, weight, weight_scale, bias, x_scale):
        return None
    key = ("w8a8_linear", dtype, x_scale.dtype, x_scale.numel(), *_described(x, weight, weight_scale, bias))
    if key not in _kept and not (
        (dtype in _FLOATS and x.dtype == torch.int8 and _are_layer(x, weight, weight_scale, bias))
        and weight_scale.shape[1] == 1
        and (x_scale.dtype == torch.float32 and x_scale.numel() in (1, m))
        and (m == 1 or copied_on_hopper(x.view(m, k), weight))
    ):
        return None
    y = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    if m == 1:
        _start(key, vector.start_row, x, x_scale, weight, weight_scale, bias, y)
    else:
        operands = int8_linear.copied_operands(x.view(m, k), x_scale, weight, weight_scale, bias, y)
        _start(key, int8_linear.start_copied, *operands)
    return y


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor] | None:
    if not x.numel() or not _are_usual(x):
        return None
    key = ("quantize_per_token", x.dtype, x.get_device(), x.shape)
    if key not in _kept and x.dtype not in _FLOATS:
        return None
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _start(key, quantize.start_rows, x, codes, scale)
    return codes, scale


def _start(key: tuple[Any, ...], start: Callable[..., Started], *operands: Any) -> None:
    """The kernel that is kept for the key, on these; the first time by `start`, as the op does it."""
    kept = _kept.get(key)
    if kept is not None:
        run, numbers = kept
        run(*operands, *numbers)
        return
    started = start(*operands)
    if started.kernel is None:  # it is interpreted
        return
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = started.kernel[(started.programs, 1, 1)], started.numbers


def _are_usual(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel can be started now on these as they are: contiguous and where x is, at multiples of 16 bytes
    (for other addresses another kernel is compiled)."""
    addresses, device = x.data_ptr(), x.get_device()
    for one in others:
        if one is not None:
            if type(one) not in _PLAIN or one.get_device() != device or not one.is_contiguous():
                return False
            addresses |= one.data_ptr()
    return not addresses % 16 and x.is_contiguous() and x.dim() > 0 and not x.is_neg() and is_current(x)


def _described(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """What these decide of a launch, if they are usual."""
    return (
        x.get_device(), x.dtype, x.shape, weight.dtype, weight.shape, weight_scale.dtype, weight_scale.shape,
        None if bias is None else (bias.dtype, bias.shape),
    )  # fmt: skip


def _are_layer(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool:
    """Whether these are rows of x, and codes, scales and a bias for them."""
    n, k = weight.shape
    return (
        n > 0 and x.shape[-1] == k and weight.dtype == torch.int8
        and weight_scale.dtype == torch.float32 and len(weight_scale) == n and k % weight_scale.shape[1] == 0
        and (bias is None or bias.shape == (n,))
    )  # fmt: skip
