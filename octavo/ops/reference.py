"""Every op in plain torch, for every device. Its results are the standard that native kernels are tested against.

The arithmetic is that of `primitives.py`; shapes are in the table of `octavo.ops`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.errors import QuantizeError
from octavo.primitives import dequantize, quantize_weight, rounded_quotient

__all__ = [
    "LONGEST_EXACT",
    "accumulator",
    "check_codes",
    "check_float",
    "check_indices",
    "check_input",
    "check_rows",
    "check_table",
    "conv_input_gradient",
    "experts_bias_gradient",
    "experts_input_gradient",
    "in_full_precision",
    "int8_matmul",
    "linear_input_gradient",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_static",
    "quantize_weight",
    "rows_to_transposed",
    "scale_of_rows",
    "w8a8_experts_linear",
    "w8a8_linear",
    "w8a16_conv",
    "w8a16_conv_transpose",
    "w8a16_embedding",
    "w8a16_experts_linear",
    "w8a16_linear",
]

_BLOCK_ELEMENTS = 1 << 19
"""Codes are widened to fp32 in blocks of rows of this many elements, which stay in the cache: at M = 1 a layer then
reads one byte a weight from memory, and no float copy of a weight ever exists."""


_QMAX = 127

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of x. torch has no arithmetic for narrower ones (fp8), and the result would be rounded to them."""

_Rest = ParamSpec("_Rest")


def in_full_precision(compute: Callable[Concatenate[Tensor, _Rest], Tensor]) -> Callable[..., Tensor]:
    """A decorator that disables autocast, which would round products to 16 bits before the scale is applied."""

    @functools.wraps(compute)
    def run(first: Tensor, *args: _Rest.args, **kwargs: _Rest.kwargs) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return compute(first, *args, **kwargs)

    return run


@in_full_precision
def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_input(x, weight, weight_scale, bias)
    n, k = weight.shape
    wide = accumulator(x)
    rows = x.reshape(math.prod(x.shape[:-1]), k).to(wide).contiguous()  # so that results do not depend on strides
    y = torch.empty((rows.shape[0], n), dtype=wide, device=x.device)
    per_channel = weight_scale.shape[1] == 1
    step = max(1, _BLOCK_ELEMENTS // max(k, 1))
    for start in range(0, n, step):
        codes, scale = weight[start : start + step], weight_scale[start : start + step]
        if per_channel:
            y[:, start : start + step] = (rows @ codes.to(wide).T) * scale.T
        else:
            y[:, start : start + step] = rows @ dequantize(codes, scale).to(wide).T
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], n)


def w8a16_linears(
    x: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor], bias: Sequence[Tensor | None]
) -> Tensor:
    """`w8a16_linear` of each layer; the results are concatenated."""
    layers = zip(weight, weight_scale, bias, strict=True)
    return torch.cat([torch.ops.octavo.w8a16_linear(x, *layer) for layer in layers], -1)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x)
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    scale = _input_scale(largest)
    return _codes(x, scale), scale


def quantize_per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x)
    scale = _input_scale(x.abs().amax().reshape(1) if x.numel() else x.new_zeros(1))
    return _codes(x, scale), scale


def quantize_static(x: Tensor, input_scale: Tensor) -> Tensor:
    check_rows(x)
    return _codes(x, input_scale)


def _input_scale(largest: Tensor) -> Tensor:
    """amax / 127 in fp32; 1 for zeros. NaN and inf are not checked for, which would wait for the device. They make the
    scale NaN or inf, and so the output NaN, as in the float model."""
    scale = rounded_quotient(largest.float(), _QMAX)
    return torch.where(scale == 0, 1.0, scale)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    # `contiguous`, because the codes would otherwise have the strides of a broadcast or transposed x.
    return (x.float() / scale).round_().clamp_(-_QMAX, _QMAX).to(torch.int8).contiguous()


@in_full_precision
def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    check_codes(x, x_scale, weight, weight_scale, bias)
    n, k = weight.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = int8_matmul(x.reshape(math.prod(x.shape[:-1]), k), weight).to(wide)
    # The scales are multiplied first: one rounding of their product, and one of the sum times the product.
    y *= x_scale.reshape(-1, 1).to(wide) * weight_scale.reshape(1, -1).to(wide)
    if bias is not None:
        y += bias
    return y.to(dtype).view(*x.shape[:-1], n)


def w8a8_linears(
    x: Tensor, x_scale: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`w8a8_linear` of each layer; the results are concatenated."""
    layers = zip(weight, weight_scale, bias, strict=True)
    return torch.cat([torch.ops.octavo.w8a8_linear(x, x_scale, *layer, dtype) for layer in layers], -1)


LONGEST_EXACT = (2**31 - 1) // 128**2
"""The largest K for which a sum of products of codes cannot overflow int32."""

_EXACT_K = 1024
"""127 * 127 * 1024 < 2**24: a sum of that many products of codes is exact in fp32."""


_HAS_INT_MM = ("cpu", "cuda")
"""Devices on which torch multiplies int8 matrices. On others, for shapes that cuBLAS refuses, and for K = 1 on CPUs
(torch 2.13 reads past the weight), `int8_matmul` uses fp32 products."""


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, exact: int8 [M, K], int8 [N, K] -> int32 [M, N] on any device."""
    m, k = x.shape
    n = weight.shape[0]
    takes = k > 1 if x.device.type == "cpu" else m > 16 and k % 8 == 0 and n % 8 == 0
    if x.device.type in _HAS_INT_MM and m and n and takes:
        return torch._int_mm(x, weight.T)
    y = torch.zeros((m, n), dtype=torch.int32, device=x.device)
    for start in range(0, k, _EXACT_K):
        part = slice(start, start + _EXACT_K)
        y += (x[:, part].float() @ weight[:, part].float().T).to(torch.int32)
    return y


def w8a16_experts_linear(x: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_input(x, weight, weight_scale, bias)
    y = x.new_zeros((len(x), weight.shape[1]))
    for e, rows in _routed(ends):
        y[rows] = w8a16_linear(x[rows], weight[e], weight_scale[e], None if bias is None else bias[e])
    return y


def w8a8_experts_linear(
    x: Tensor, x_scale: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_codes(x, x_scale, weight, weight_scale, bias)
    x_scale = scale_of_rows(x, x_scale)
    y = x.new_zeros((len(x), weight.shape[1]), dtype=dtype)
    for e, rows in _routed(ends):
        y[rows] = w8a8_linear(
            x[rows], x_scale[rows], weight[e], weight_scale[e], None if bias is None else bias[e], dtype
        )
    return y


def scale_of_rows(x: Tensor, x_scale: Tensor) -> Tensor:
    """The scales as [S, 1] for x [S, K], from one scale for all rows or one per row in any shape; no copy."""
    rows = (len(x), 1)
    return x_scale if x_scale.shape == rows else x_scale.reshape(-1, 1).expand(rows)


def experts_input_gradient(grad: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Gradient to x of a linear layer of experts: grad [S, N] float -> [S, K] of grad's dtype."""
    dx = grad.new_zeros((len(grad), weight.shape[2]))
    for e, rows in _routed(ends):
        dx[rows] = linear_input_gradient(grad[rows], weight[e], weight_scale[e])
    return dx


def experts_bias_gradient(grad: Tensor, ends: Tensor) -> Tensor:
    """Gradient to the biases of experts, the sum of each expert's rows: grad [S, N] float -> [E, N] of the
    accumulator's dtype."""
    rows = torch.arange(len(grad), dtype=ends.dtype, device=grad.device)
    expert = torch.searchsorted(ends, rows, right=True)  # E for a row past the last end
    total = torch.zeros((len(ends) + 1, grad.shape[1]), dtype=accumulator(grad), device=grad.device)
    return total.index_add_(0, expert, grad.to(total.dtype))[:-1]


def _routed(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each expert that has rows."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


@in_full_precision
def linear_input_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Gradient to x of a linear layer, (grad * scale) @ codes: grad [..., N] float -> [..., K] of grad's dtype."""
    wide = accumulator(grad)
    if weight_scale.shape[1] == 1:
        dx = (grad.to(wide) * weight_scale.T.squeeze(0)) @ weight.to(wide)
    else:
        dx = grad.to(wide) @ dequantize(weight, weight_scale).to(wide)
    return dx.to(grad.dtype)


@in_full_precision
def w8a16_conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    check_float(x)
    wide = accumulator(x)
    y = torch.ops.aten.convolution(
        x.to(wide), weight.to(wide), None, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return _finish(y, weight_scale, bias, x.dtype)


@in_full_precision
def w8a16_conv_transpose(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    check_float(x)
    wide = accumulator(x)
    layout = rows_to_transposed(weight, groups).to(wide, memory_format=torch.contiguous_format)
    y = torch.ops.aten.convolution(x.to(wide), layout, None, stride, padding, dilation, True, output_padding, groups)
    return _finish(y, weight_scale, bias, x.dtype)


@in_full_precision
def conv_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient to x of a (transposed) convolution, of x's shape and dtype. weight: codes in torch's own layout."""
    wide = accumulator(x)
    scaled = grad.to(wide) * _per_channel(weight_scale, grad.dim())
    dx, _, _ = torch.ops.aten.convolution_backward(
        scaled, x.to(wide), weight.to(wide), None, stride, padding, dilation, transposed, output_padding, groups,
        [True, False, False],
    )  # fmt: skip
    return dx.to(x.dtype)


def w8a16_embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_table(weight, weight_scale)
    return (F.embedding(indices, weight).float() * F.embedding(indices, weight_scale)).to(dtype)


def rows_to_transposed(weight: Tensor, groups: int) -> Tensor:
    """A weight [N, C/groups, *k], output channels first, in torch's layout for conv_transpose: [C, N/groups, *k]."""
    n, c = weight.shape[0] // groups, weight.shape[1]
    return weight.unflatten(0, (groups, n)).transpose(1, 2).reshape(groups * c, n, *weight.shape[2:])


def check_float(x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise QuantizeError(
            f"x: dtype is {x.dtype}, expected bf16, fp16 or fp32; if the model's code casts its input to "
            "`layer.weight.dtype`, put that layer on the ignore list"
        )
    if x.layout != torch.strided or x.is_nested:
        kind = "torch.strided, nested" if x.layout == torch.strided else x.layout
        raise QuantizeError(
            f"x: layout is {kind}, expected torch.strided: x.to_dense(), or to_padded_tensor of a nested one"
        )


def check_rows(x: Tensor) -> None:
    """Raise QuantizeError unless x is floating point [..., K]."""
    check_float(x)
    if x.dim() == 0:
        raise QuantizeError("x: is a 0-d tensor, expected [..., K]")


def _check_columns(x: Tensor, weight: Tensor) -> None:
    """Raise QuantizeError unless the last size of x is the K of the weight."""
    if x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        raise QuantizeError(
            f"x: shape is {list(x.shape)}, expected [..., {weight.shape[-1]}] for an int8 weight of shape "
            f"{list(weight.shape)}"
        )


def check_codes(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise QuantizeError unless x is int8 [..., K] with the K of weight [..., N, K], x_scale has one scale for each
    row of x or one for all, sums fit int32, and weight_scale and bias fit the weight."""
    k = weight.shape[-1]
    if x.dtype != torch.int8:
        raise QuantizeError(f"x: is {x.dtype} {list(x.shape)}, expected int8 [..., {k}]")
    _check_columns(x, weight)
    rows = x.shape[:-1]
    of_rows = x_scale.shape == (*rows, 1) or x_scale.numel() in (1, math.prod(rows))
    if x_scale.dtype != torch.float32 or not of_rows:
        raise QuantizeError(
            f"x_scale: is {x_scale.dtype} {list(x_scale.shape)}, expected fp32 {[*rows, 1]}, or [1] for all rows of x"
        )
    if k > LONGEST_EXACT:
        raise QuantizeError(
            f"weight: has rows of {k} codes, expected up to {LONGEST_EXACT}, of which a sum of products fits int32; "
            "quantize this layer with 'w8a16'"
        )
    _check_layer(x, weight, weight_scale, bias)


def check_table(weight: Tensor, weight_scale: Tensor) -> None:
    """Raise QuantizeError unless there is a scale for each row of the table [V, H]."""
    if weight.dim() != 2 or weight_scale.shape != (len(weight), 1):
        raise QuantizeError(
            f"weight_scale: shape is {list(weight_scale.shape)}, expected {[len(weight), 1]} for an int8 table of "
            f"shape {list(weight.shape)}"
        )


def check_indices(indices: Tensor, weight: Tensor) -> None:
    """Raise QuantizeError unless indices are int32 or int64, and IndexError if one is no row of the table [V, H]."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise QuantizeError(f"indices: dtype is {indices.dtype}, expected int32 or int64")
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= len(weight)):
        found = f"from {int(indices.min())} to {int(indices.max())}"
        raise IndexError(f"indices: out of range, {found}; expected rows of a table of {len(weight)}")


def check_input(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise QuantizeError unless x is floating point [..., K] with the K of weight [..., N, K], and weight_scale and
    bias fit the weight."""
    check_float(x)
    _check_columns(x, weight)
    _check_layer(x, weight, weight_scale, bias)


def _check_layer(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raise QuantizeError unless weight_scale has a scale for each row, or group in a row, of weight [..., N, K], bias
    one entry for each row, and x is on the same device. Kernels rely on these shapes."""
    *rows, k = weight.shape
    groups = weight_scale.shape[-1] if weight_scale.dim() == weight.dim() else 0
    grouped = x.dtype != torch.int8
    if not groups or k % groups or (groups > 1 and not grouped) or list(weight_scale.shape[:-1]) != rows:
        raise QuantizeError(
            f"weight_scale: shape is {list(weight_scale.shape)}, expected {[*rows, 1]}"
            + (f", or in place of 1 a number of groups that divides {k}," if grouped else "")
            + f" for an int8 weight of shape {list(weight.shape)}"
        )
    if bias is not None and list(bias.shape) != rows:
        raise QuantizeError(
            f"bias: shape is {list(bias.shape)}, expected {rows} for an int8 weight of shape {list(weight.shape)}"
        )
    if x.device != weight.device:
        raise QuantizeError(f"x: is on {x.device}, expected {weight.device}, where the int8 weight is")


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over x are accumulated in: fp32, and fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(values: Tensor, dims: int) -> Tensor:
    return values.reshape(1, -1, *([1] * (dims - 2)))


def _finish(y: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y *= _per_channel(weight_scale, y.dim())
    if bias is not None:
        y += _per_channel(bias, y.dim())
    return y.to(dtype).contiguous()
