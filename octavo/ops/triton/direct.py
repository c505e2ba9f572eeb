"""Call ops without torch's dispatcher and without Triton's look-up of the compiled kernel.

When a model runs eagerly the GPU waits for Python: the kernel of a layer for one row takes 8 us, a call of its op
several times as long. A third of that is the dispatcher. Most of the rest is Triton, which analyzes all arguments at
each call to find the compiled kernel. Here that is done once for all layers of a shape, and the launch is kept and
repeated.

There is a function for each of the most frequent ops, with the same name and arguments, and three for what eager models
compute between their layers. They return None for unusual operands; the caller then calls the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.ops.reference import LONGEST_EXACT
from octavo.ops.triton import int8_linear, linear, quantize, vector
from octavo.ops.triton.gate import start_gated
from octavo.ops.triton.launch import Started, copied_on_hopper, is_current
from octavo.ops.triton.linear import InTiles
from octavo.ops.triton.norm import LONGEST_ROW, start_rms_norm
from octavo.ops.triton.rotary import start_rotary

__all__ = ["gated", "quantize_per_token", "rms_norm", "rotary", "w8a8_linear", "w8a16_linear"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (Tensor, nn.Parameter)  # not their subclasses, which may have no memory of their own

MOST_KEPT = 10_000
"""All kept launches are dropped when there are so many. Every new length of a prompt adds one for each kind of
layer."""

_kept: dict[tuple[Any, ...], Callable[..., None]] = {}
"""Everything that decides which kernel is compiled and how it is launched -> a function that launches it for given
addresses or tensors."""


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """For any number of rows of x; for many only if the copy engine can fetch the operands."""
    (n, k), groups = weight.shape, weight_scale.shape[-1]
    m = x.numel() // max(1, k)
    many = m >= linear.LEAST_ROWS_ON_HOPPER
    places = _places(x, None, weight, weight_scale, bias) if m else None
    if places is None:
        return None
    key = ("w8a16_linear", *_described(x, weight, weight_scale, bias))
    kept = _kept.get(key)
    if kept is None and not (
        (x.dtype in _FLOATS and _are_layer(x, weight, weight_scale, bias))
        and (not many or linear.is_copied(x.view(m, k), weight, groups))
    ):
        return None
    y = x.new_empty((*x.shape[:-1], n))
    if many:
        operands = (y, *_pieces(kept, x, weight, places, linear.ON_HOPPER), weight_scale, bias)
        _start(key, kept, linear.start_copied, operands, operands)
    elif m > 1:
        rows = x if kept is not None else x.view(m, k)
        first, _, codes, scale, offset = places
        adding = (None, scale if groups == 1 else None, offset, y.data_ptr())
        both = ((first, codes, scale, offset), adding)
        _start(key, kept, linear.start_tiles, (rows, weight, weight_scale, bias, y), both)
    else:
        _start(key, kept, vector.start_row, (x, None, weight, weight_scale, bias, y), (*places, y.data_ptr()))
    return y


def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """For any number of rows of x; for many only if the copy engine can fetch the operands."""
    n, k = weight.shape
    m = x.numel() // max(1, k)
    many = m > int8_linear.FEW_ROWS[-1].m
    places = _places(x, x_scale, weight, weight_scale, bias) if m else None
    if places is None:
        return None
    key = ("w8a8_linear", dtype, x_scale.dtype, x_scale.numel(), *_described(x, weight, weight_scale, bias))
    kept = _kept.get(key)
    if kept is None and not (
        (dtype in _FLOATS and x.dtype == torch.int8 and _are_layer(x, weight, weight_scale, bias))
        and weight_scale.shape[1] == 1
        and k <= LONGEST_EXACT
        and (x_scale.dtype == torch.float32 and x_scale.numel() in (1, m))
        and (not many or copied_on_hopper(x.view(m, k), weight))
    ):
        return None
    y = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    if many:
        pieces = _pieces(kept, x, weight, places, int8_linear.copied_tile(m, n))
        operands = (y, *pieces, x_scale, weight_scale, bias)
        _start(key, kept, int8_linear.start_copied, operands, operands)
    elif m > 1:
        rows = x if kept is not None else x.view(m, k)
        both = (places, (places[1], *places[3:], y.data_ptr()))
        _start(key, kept, int8_linear.start_tiles, (rows, x_scale, weight, weight_scale, bias, y), both)
    else:
        _start(key, kept, vector.start_row, (x, x_scale, weight, weight_scale, bias, y), (*places, y.data_ptr()))
    return y


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor] | None:
    places = _places(x) if x.numel() else None
    if places is None:
        return None
    key = ("quantize_per_token", x.dtype, x.get_device(), x.shape)
    kept = _kept.get(key)
    if kept is None and x.dtype not in _FLOATS:
        return None
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _start(key, kept, quantize.start_rows, (x, codes, scale), (*places, codes.data_ptr(), scale.data_ptr()))
    return codes, scale


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor | None:
    """weight * x / rms, x and weight [K] of one dtype: `norm.py`."""
    return _like_first(start_rms_norm, _is_weight_of_norm, x, weight, eps, round_first)


def gated(gate: Tensor, up: Tensor, a: float, b: float) -> Tensor | None:
    """act(gate) * up, of one shape and dtype: `gate.py`."""
    return _like_first(start_gated, _are_of_one_shape, gate, up, a, b)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """For q and k whose memory is laid out as [B, T, heads, D]: `rotary.py`."""
    queries, keys = q.transpose(1, 2), k.transpose(1, 2)
    places = _places(queries, keys, cos, sin) if q.numel() and k.numel() else None
    if places is None:
        return None
    key = ("rotary", q.dtype, q.get_device(), q.shape, k.shape[1], len(cos), len(sin))
    kept = _kept.get(key)
    if kept is None and not (q.dtype in _FLOATS and len(cos) == len(sin)):
        return None
    turned = queries.new_empty(queries.shape), keys.new_empty(keys.shape)
    operands = (queries, keys, cos, sin, *turned)
    _start(key, kept, start_rotary, operands, (*places, *(one.data_ptr() for one in turned)))
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def _is_weight_of_norm(x: Tensor, weight: Tensor) -> bool:
    return weight.shape == x.shape[-1:] and len(weight) <= LONGEST_ROW


def _are_of_one_shape(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape


def _like_first(
    start: Callable[..., Started], fit: Callable[[Tensor, Tensor], bool], x: Tensor, other: Tensor, *numbers: float
) -> Tensor | None:
    """The result y, of the shape and dtype of x, of the kernel that `start` launches for two operands of one dtype.

    fit: whether the shapes of the operands are supported.
    """
    places = _places(x, other) if x.numel() else None
    if places is None:
        return None
    key = (start, *numbers, x.dtype, other.dtype, x.get_device(), x.shape, other.shape)
    kept = _kept.get(key)
    if kept is None and not (x.dtype in _FLOATS and other.dtype == x.dtype and fit(x, other)):
        return None
    y = x.new_empty(x.shape)
    _start(key, kept, start, (x, other, y, *numbers), (*places, y.data_ptr()))
    return y


def _start(
    key: tuple[Any, ...], kept: Callable[..., None] | None, first: Callable[..., Started | InTiles],
    operands: tuple[Any, ...], places: tuple[Any, ...],
) -> None:  # fmt: skip
    """Repeat the launch that is kept for `key`, on these addresses; if none is, launch by `first`, and keep that."""
    if kept is not None:
        kept(*places)
        return
    started, device = first(*operands), operands[0].get_device()
    if started.kernel is None:  # it is interpreted
        return
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = _starter_of_tiles(started, device) if isinstance(started, InTiles) else _starter(started, device)


def _starter(started: Started, device: int) -> Callable[..., None]:
    """A function that repeats the launch on other operands, as Triton does it, but without calling its launch hooks
    (`_places` has checked that there are none)."""
    kernel, programs, numbers = started
    run, (width, height) = kernel.run, (*programs, 1)[:2]

    def start(*operands: Any) -> None:
        stream = driver.active.get_current_stream(device)
        run(width, height, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *operands, *numbers)

    return start


def _starter_of_tiles(started: InTiles, device: int) -> Callable[..., None]:
    """The same for a product and the kernel that adds up its parts. The partial sums between the two are allocated at
    each call; the last address given is that of y."""
    multiply = _starter(started.product, device)
    if started.adding is None:
        return lambda operands, adding: multiply(*operands, adding[-1])
    add = _starter(started.adding, device)

    def start(operands: Sequence[Any], adding: Sequence[Any]) -> None:
        sums = torch.empty(started.shape, dtype=started.dtype, device=started.device)
        place = sums.data_ptr()
        multiply(*operands, place)
        add(place, *adding)

    return start


def _places(x: Tensor, *others: Tensor | None) -> list[int | None] | None:
    """The addresses of the operands (None for None), or None if a kept launch cannot be used for them.

    The operands have to be contiguous, on the device of x, and at multiples of 16 bytes (for others Triton compiles
    another kernel), and nobody may have registered a launch hook. Addresses are used because Triton accepts them as
    they are, while it asks the driver about tensors.
    """
    first, device = x.data_ptr(), x.get_device()
    places: list[int | None] = [first]
    for one in others:
        if one is None:
            places.append(None)
            continue
        if type(one) not in _PLAIN or one.get_device() != device or not one.is_contiguous():
            return None
        place = one.data_ptr()
        places.append(place)
        first |= place
    runtime = knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler's
        return None
    return places if not first % 16 and x.is_contiguous() and x.dim() > 0 and not x.is_neg() and is_current(x) else None


class _Place:
    """An address in place of a tensor in a TensorDescriptor, so that the descriptor keeps no memory alive."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def _pieces(
    kept: Callable[..., None] | None, x: Tensor, weight: Tensor, places: Sequence[Any], tile: linear.Tile
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors by which the copy engine fetches tiles of x, as rows [m, k], and of the weight. For a kept launch
    they are made from addresses, and cached."""
    n, k = weight.shape
    m = x.numel() // k
    if kept is None:
        return linear.descriptors(x.view(m, k), weight, tile)
    return (
        _described_to_copy_engine(places[0], x.dtype, m, k, tile.m, tile.k),
        _described_to_copy_engine(places[2], weight.dtype, n, k, tile.n, tile.k),
    )


# Cached, because a model's weights do not move, and its activations are allocated at the same addresses again.
@functools.lru_cache(MOST_KEPT)
def _described_to_copy_engine(
    address: int, dtype: torch.dtype, rows: int, columns: int, tile_rows: int, tile_columns: int
) -> TensorDescriptor:
    return TensorDescriptor(_Place(address, dtype), (rows, columns), (columns, 1), [tile_rows, tile_columns])


def _described(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """The properties of these operands that decide which kernel is launched, and how."""
    return (
        x.get_device(), x.dtype, x.shape, weight.dtype, weight.shape, weight_scale.dtype, weight_scale.shape,
        None if bias is None else (bias.dtype, bias.shape),
    )  # fmt: skip


def _are_layer(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool:
    """Whether x has rows of K values, and the others are codes [N, K], scales and a bias that fit."""
    n, k = weight.shape
    return (
        n > 0 and x.shape[-1] == k and weight.dtype == torch.int8
        and weight_scale.dtype == torch.float32 and len(weight_scale) == n and k % weight_scale.shape[1] == 0
        and (bias is None or bias.shape == (n,))
    )  # fmt: skip
