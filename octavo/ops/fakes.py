"""Fake kernels: what shape and dtype an op returns, without computing it, for torch.compile and torch.export.

Importing this file registers them. They refuse what the reference refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.ops import attention, reference
from octavo.ops.schemas import library

__all__: list[str] = []


@torch.library.register_fake("octavo::w8a16_linear", lib=library)
def _linear_fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    reference.check_input(x, weight, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("octavo::w8a16_linears", lib=library)
def _linears_fake(
    x: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor], bias: Sequence[Tensor | None]
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(len(one) for one in weight)))


@torch.library.register_fake("octavo::w8a8_linears", lib=library)
def _int8_linears_fake(
    x: Tensor, x_scale: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], sum(len(one) for one in weight)), dtype=dtype)


@torch.library.register_fake("octavo::w8a16_conv", lib=library)
def _conv_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    y = torch.ops.aten.convolution(
        x, weight.to(x.dtype), None, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return x.new_empty(y.shape)


@torch.library.register_fake("octavo::w8a16_conv_transpose", lib=library)
def _conv_transpose_fake(
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
    layout = reference.rows_to_transposed(weight, groups).to(x.dtype)
    y = torch.ops.aten.convolution(x, layout, None, stride, padding, dilation, True, output_padding, groups)
    return x.new_empty(y.shape)


@torch.library.register_fake("octavo::w8a16_embedding", lib=library)
def _embedding_fake(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    reference.check_table(weight, weight_scale)
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


@torch.library.register_fake("octavo::quantize_per_token", lib=library)
def _per_token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    reference.check_rows(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("octavo::quantize_per_tensor", lib=library)
def _per_tensor_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    reference.check_rows(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(1, dtype=torch.float32)


@torch.library.register_fake("octavo::quantize_static", lib=library)
def _static_fake(x: Tensor, input_scale: Tensor) -> Tensor:
    reference.check_rows(x)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.register_fake("octavo::quantize_weight", lib=library)
def _weight_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.new_empty((weight.shape[0], 1), dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


@torch.library.register_fake("octavo::w8a16_experts_linear", lib=library)
def _experts_linear_fake(x: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    reference.check_input(x, weight, weight_scale, bias)
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.register_fake("octavo::w8a8_experts_linear", lib=library)
def _int8_experts_linear_fake(
    x: Tensor, x_scale: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    reference.check_codes(x, x_scale, weight, weight_scale, bias)
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype)


@torch.library.register_fake("octavo::experts_input_gradient", lib=library)
def _experts_input_gradient_fake(grad: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[2]))


@torch.library.register_fake("octavo::straight_through", lib=library)
def _straight_through_fake(y: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor | None) -> Tensor:
    return torch.empty_like(y)


@torch.library.register_fake("octavo::w8a8_linear", lib=library)
def _w8a8_linear_fake(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    reference.check_codes(x, x_scale, weight, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("octavo::float_linear", lib=library)
def _float_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("octavo::int8_attention", lib=library)
def _int8_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    attention.check_heads(query, key, value, mask)
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.register_fake("octavo::int8_attention_of_codes", lib=library)
def _int8_attention_of_codes_fake(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    attention.check_codes(query, key, key_scale, value, value_scale, mask)
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.register_fake("octavo::float_attention_of_codes", lib=library)
def _float_attention_of_codes_fake(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scaling: float,
    is_causal: bool,
) -> Tensor:
    attention.check_codes(query, key, key_scale, value, value_scale, mask)
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.register_fake("octavo::float_attention", lib=library)
def _float_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool
) -> Tensor:
    attention.check_heads(query, key, value, mask)
    return query.new_empty((*query.shape[:3], value.shape[3]))
