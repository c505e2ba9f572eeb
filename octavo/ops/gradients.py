"""Gradients of the ops, to the input and the bias, so that adapters can be trained on a frozen int8 base.

Importing this file registers them. Codes and scales are frozen: asking for their gradient is an error. So is asking for
forward-mode derivatives (`torch.func.jvp`), which the ops do not have: torch would silently treat the ops as constants.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from octavo.errors import OctavoError
from octavo.ops import reference
from octavo.ops.schemas import library

__all__ = ["forward_mode", "refuse_forward_mode"]


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed (inside `torch.func.jvp`, `jacfwd` or a `dual_level`)."""
    return forward_ad._current_level >= 0


def refuse_forward_mode(args: Iterable[object]) -> None:
    """Raise OctavoError if one of an op's arguments carries a forward-mode derivative, which the op would drop."""
    if not forward_mode():
        return
    floats = (x for x in args if isinstance(x, Tensor) and x.is_floating_point())
    if any(forward_ad.unpack_dual(x).tangent is not None for x in floats):
        raise OctavoError(
            "a forward-mode derivative through an int8 layer was asked for (torch.func.jvp, jacfwd), which has none; "
            "torch.autograd.functional.jvp finds it by reverse mode"
        )


def _refuse_weight_gradient(ctx: torch.autograd.function.FunctionCtx, weight: int = 1) -> None:
    """Raise OctavoError if a gradient of the weight or its scale is asked for. weight: its position among the op's
    arguments; the scale is the next one."""
    if any(ctx.needs_input_grad[weight : weight + 2]):  # type: ignore[attr-defined]
        raise OctavoError(
            "a gradient of an int8 weight or of its scale was asked for (requires_grad is set on weight_scale); int8 "
            "codes are frozen: train an adapter beside the layer, its bias, or the float model before quantizing"
        )


def _bias_gradient(grad: Tensor, channel: int, bias_dtype: torch.dtype | None) -> Tensor | None:
    if bias_dtype is None:
        return None
    others = [d for d in range(grad.dim()) if d != channel % grad.dim()]
    total = grad.sum(others, dtype=reference.accumulator(grad)) if others else grad
    return total.to(bias_dtype)


def _save_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _refuse_weight_gradient(ctx)
    _, weight, weight_scale, bias = inputs
    ctx.save_for_backward(weight, weight_scale)  # and not x: no gradient of a frozen weight asks for it
    ctx.bias_dtype = None if bias is None or not ctx.needs_input_grad[3] else bias.dtype


def _save_conv(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _refuse_weight_gradient(ctx)
    x, weight, weight_scale, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, weight_scale)
    ctx.bias_dtype = None if bias is None or not ctx.needs_input_grad[3] else bias.dtype


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, weight_scale = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = reference.linear_input_gradient(grad, weight, weight_scale)
    return dx, None, None, _bias_gradient(grad, -1, ctx.bias_dtype)


def _conv_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, weight_scale = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    dx = None
    if ctx.needs_input_grad[0]:
        dx = reference.conv_input_gradient(
            grad, x, weight, weight_scale, stride, padding, dilation, False, [0] * len(stride), groups
        )
    return dx, None, None, _bias_gradient(grad, 1, ctx.bias_dtype), None, None, None, None


def _conv_transpose_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, weight_scale = ctx.saved_tensors
    stride, padding, dilation, output_padding, groups = ctx.geometry
    dx = None
    if ctx.needs_input_grad[0]:
        dx = reference.conv_input_gradient(
            grad, x, reference.rows_to_transposed(weight, groups), weight_scale, stride, padding, dilation, True,
            output_padding, groups,
        )  # fmt: skip
    return dx, None, None, _bias_gradient(grad, 1, ctx.bias_dtype), None, None, None, None, None


for _name, _backward, _save in (
    ("w8a16_linear", _linear_backward, _save_linear),
    ("w8a16_conv", _conv_backward, _save_conv),
    ("w8a16_conv_transpose", _conv_transpose_backward, _save_conv),
):
    torch.library.register_autograd(f"octavo::{_name}", _backward, setup_context=_save, lib=library)


def _refuse_scale_gradient(ctx: torch.autograd.function.FunctionCtx, x_scale: int, weight_scale: int) -> None:
    """Raise OctavoError if a gradient of a scale is asked for. x_scale, weight_scale: positions among the op's
    arguments."""
    if ctx.needs_input_grad[x_scale] or ctx.needs_input_grad[weight_scale]:  # type: ignore[attr-defined]
        raise OctavoError(
            "a gradient of a scale of an int8 layer was asked for (requires_grad is set on x_scale or weight_scale); "
            "scales are frozen with their codes: train an adapter beside the layer, or its bias"
        )


def _save_w8a8_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _refuse_scale_gradient(ctx, 1, 3)
    bias = inputs[4]
    ctx.bias_dtype = None if bias is None or not ctx.needs_input_grad[4] else bias.dtype


def _w8a8_linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return None, None, None, None, _bias_gradient(grad, -1, ctx.bias_dtype), None


torch.library.register_autograd(
    "octavo::w8a8_linear", _w8a8_linear_backward, setup_context=_save_w8a8_linear, lib=library
)


def _int8_attention_backward(ctx, grad):  # type: ignore[no-untyped-def]
    raise OctavoError(
        "a gradient through int8 attention was asked for, which is for inference; train with float attention "
        "(model.set_attn_implementation('sdpa'))"
    )


for _op in ("int8_attention", "int8_attention_of_codes"):
    torch.library.register_autograd(f"octavo::{_op}", _int8_attention_backward, lib=library)


def _float_attention_backward(ctx, grad):  # type: ignore[no-untyped-def]
    raise OctavoError(
        "a gradient through octavo's float attention was asked for, which is for inference; use torch's "
        "scaled_dot_product_attention"
    )


for _op in ("float_attention", "float_attention_of_codes"):
    torch.library.register_autograd(f"octavo::{_op}", _float_attention_backward, lib=library)


def _save_experts_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _refuse_weight_gradient(ctx, 2)
    _, ends, weight, weight_scale, bias = inputs
    ctx.save_for_backward(ends, weight, weight_scale)
    ctx.bias_dtype = None if bias is None or not ctx.needs_input_grad[4] else bias.dtype


def _experts_linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    ends, weight, weight_scale = ctx.saved_tensors
    dx = torch.ops.octavo.experts_input_gradient(grad, ends, weight, weight_scale) if ctx.needs_input_grad[0] else None
    return dx, None, None, None, _experts_bias_gradient(grad, ends, ctx.bias_dtype)


def _save_int8_experts_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _refuse_scale_gradient(ctx, 1, 4)
    ends, bias = inputs[2], inputs[5]
    ctx.save_for_backward(ends)
    ctx.bias_dtype = None if bias is None or not ctx.needs_input_grad[5] else bias.dtype


def _int8_experts_linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ends,) = ctx.saved_tensors
    return None, None, None, None, None, _experts_bias_gradient(grad, ends, ctx.bias_dtype), None


def _experts_bias_gradient(grad: Tensor, ends: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else reference.experts_bias_gradient(grad, ends).to(dtype)


torch.library.register_autograd(
    "octavo::w8a16_experts_linear", _experts_linear_backward, setup_context=_save_experts_linear, lib=library
)
torch.library.register_autograd(
    "octavo::w8a8_experts_linear", _int8_experts_linear_backward, setup_context=_save_int8_experts_linear, lib=library
)


def _save_experts_input_gradient(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _experts_input_gradient_backward(ctx, grad):  # type: ignore[no-untyped-def]
    ends, weight, weight_scale = ctx.saved_tensors
    return torch.ops.octavo.w8a16_experts_linear(grad, ends, weight, weight_scale, None), None, None, None


torch.library.register_autograd(
    "octavo::experts_input_gradient",
    _experts_input_gradient_backward,
    setup_context=_save_experts_input_gradient,
    lib=library,
)


def _save_straight_through(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, x, weight, weight_scale, ends = inputs
    ctx.save_for_backward(weight, weight_scale, ends)
    ctx.dtype = x.dtype


def _straight_through_backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, weight_scale, ends = ctx.saved_tensors
    if ends is None:
        dx = reference.linear_input_gradient(grad, weight, weight_scale)
    else:
        dx = torch.ops.octavo.experts_input_gradient(grad, ends, weight, weight_scale)
    return grad, dx.to(ctx.dtype), None, None, None


torch.library.register_autograd(
    "octavo::straight_through", _straight_through_backward, setup_context=_save_straight_through, lib=library
)


def _embedding_save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _refuse_weight_gradient(ctx)


def _embedding_backward(ctx, grad):  # type: ignore[no-untyped-def]
    raise AssertionError("a lookup has no input with a gradient, and the table's was refused")


torch.library.register_autograd(
    "octavo::w8a16_embedding", _embedding_backward, setup_context=_embedding_save, lib=library
)
