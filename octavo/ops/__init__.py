"""THE table of ops, with shapes; and the functions by which modules call them.

    op                      x, indices            weight (codes)        weight_scale   result
    w8a16_linear            [..., K] float        int8 [N, K]           fp32 [N, K/g]  [..., N] dtype of x
    w8a16_conv              [B, C, *D] float      int8 [N, C/groups, *k]  fp32 [N, 1]  [B, N, *D'] dtype of x
    w8a16_conv_transpose    [B, C, *D] float      int8 [N, C/groups, *k]  fp32 [N, 1]  [B, N, *D'] dtype of x
    w8a16_embedding         [...] int             int8 [V, H]           fp32 [V, 1]    [..., H] dtype asked for
    w8a8_linear             [..., K] int8         int8 [N, K]           fp32 [N, 1]    [..., N] dtype asked for

    op                      x, sorted by expert   ends            weight (codes)   weight_scale    result
    w8a16_experts_linear    [S, K] float          int32 [E]       int8 [E, N, K]   fp32 [E, N, 1]  [S, N] dtype of x
    w8a8_experts_linear     [S, K] int8           int32 [E]       int8 [E, N, K]   fp32 [E, N, 1]  [S, N] as asked

    op                      x                     result
    quantize_per_token      [..., K] float        int8 [..., K], scale fp32 [..., 1]
    quantize_per_tensor     [..., K] float        int8 [..., K], scale fp32 [1]
    quantize_static         [..., K] float, scale fp32 [1]   int8 [..., K]
    quantize_weight         [N, K] float          int8 [N, K], scale fp32 [N, 1]
    quantize_states         [B, KV, T, D] float   int8 of its shape, scale fp32 [B, KV, T, 1], written into a cache

    op                      query                 key, value                  mask                         result
    int8_attention          [B, H, T, D] float    [B, KV, S, D] float         bool or float [B, H, T, S]   [B, H, T, D]
    float_attention         [B, H, T, D] float    [B, KV, S, D] float         bool [B, H, T, S]            [B, H, T, D]
    int8_attention_of_codes   likewise            int8 [B, KV, S, D], scales fp32 [B, KV, S, 1]   likewise   likewise
    float_attention_of_codes  likewise            int8 [B, KV, S, D], scales fp32 [B, KV, S, 1]   likewise   likewise

    in one kernel           operands                                       result
    float_linear            x [..., K], weight [N, K], bias [N]            [..., N]
    rms_norm                x [..., K], weight [K]                         [..., K]
    gated                   gate, up [..., I]                              [..., I]
    rotary                  q [B, H, T, D], k [B, KV, T, D], cos, sin [B or 1, T, D]   q, k
    recurrent               p [T, B, G * H] float, weight int8 [G * H, H]  [T, B, H]: all steps of a recurrent layer

w8a16 ops compute sum(code * x), accumulated in fp32 (fp64 for an fp64 x), *then* multiply by the scale, add the bias
and round once to the output dtype. So they do not overflow fp16 where the float model does not, also inside autocast.
K/g is 1 for per_channel. With per_group the sum of each group is multiplied by its scale, in fp32 (the reference forms
code * scale in fp32 first).

w8a8 ops sum codes times codes in int32, exactly, then multiply by both scales. Inputs are quantized by ops of their
own, so that layers that read the same tensor can share the codes (`octavo.modules.shared_input`).

int8_attention quantizes query, key and value itself; int8_attention_of_codes only the query.

Results are contiguous, whatever the strides of the operands.

schemas.py     the schema of each op; fakes.py the shape of its result, gradients.py its gradient
reference.py   each op in plain torch, on every device; attention.py those of attention
native.py      loads the kernels for CPUs (csrc/); triton/ has those for CUDA devices, registered for the same ops
dispatch.py    how ops are called: with autograd or without, through torch's dispatcher or past it
eager.py       the section "in one kernel" of the table: used while a model runs eagerly; gates.py its activations
serving.py     which backend answers which op on this machine: `backends`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo import primitives
from octavo.ops import attention, dispatch, fakes, gradients, reference  # noqa: F401  fakes register themselves
from octavo.ops.dispatch import KERNEL_DTYPES, call, launch_directly
from octavo.ops.eager import (
    RECURRENCES,
    float_linear,
    fuses_gates,
    gated,
    recurrent,
    rms_norm,
    rotary,
    w8a8_linear_at_once,
)
from octavo.ops.schemas import OPS
from octavo.ops.serving import Serving, backends
from octavo.primitives import Granularity

__all__ = [
    "OPS",
    "RECURRENCES",
    "Serving",
    "attends_in_float",
    "autocast",
    "backends",
    "float_attention",
    "float_attention_of_codes",
    "float_linear",
    "fuses_gates",
    "gated",
    "int8_attention",
    "int8_attention_of_codes",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_states",
    "quantize_static",
    "quantize_weight",
    "recurrent",
    "rms_norm",
    "rotary",
    "straight_through",
    "w8a8_experts_linear",
    "w8a8_linear",
    "w8a8_linear_at_once",
    "w8a16_conv",
    "w8a16_conv_transpose",
    "w8a16_embedding",
    "w8a16_experts_linear",
    "w8a16_linear",
]

_straight_through = torch.ops.octavo.straight_through.default
_linear = torch.ops.octavo.w8a16_linear.default
_conv = torch.ops.octavo.w8a16_conv.default
_conv_transpose = torch.ops.octavo.w8a16_conv_transpose.default
_embedding = torch.ops.octavo.w8a16_embedding.default
_per_token = torch.ops.octavo.quantize_per_token.default
_per_tensor = torch.ops.octavo.quantize_per_tensor.default
_static = torch.ops.octavo.quantize_static.default
_weight = torch.ops.octavo.quantize_weight.default
_w8a8_linear = torch.ops.octavo.w8a8_linear.default
_experts_linear = torch.ops.octavo.w8a16_experts_linear.default
_int8_experts_linear = torch.ops.octavo.w8a8_experts_linear.default
_int8_attention = torch.ops.octavo.int8_attention.default
_float_attention = torch.ops.octavo.float_attention.default
_int8_attention_of_codes = torch.ops.octavo.int8_attention_of_codes.default
_float_attention_of_codes = torch.ops.octavo.float_attention_of_codes.default
_quantize_states = torch.ops.octavo.quantize_states.default


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = (x @ weight.T) * weight_scale.T + bias, with int8 weights.

    x: [..., K] bf16, fp16, fp32 or fp64; inside autocast cast to its dtype, but for fp64.
    weight: int8 [N, K]. weight_scale: fp32 [N, 1] or, per_group, [N, K/g]. bias: [N] float, or None.
    Returns: [..., N] of x's dtype.
    Raises: QuantizeError if x is not floating point or its last size is not K, or if scale or bias are not of the
        weight's shape.
    """
    x = autocast(x)
    if x.is_cuda and (y := launch_directly("w8a16_linear", x, weight, weight_scale, bias)) is not None:
        return y
    return call(_linear, lambda: reference.check_input(x, weight, weight_scale, bias), x, weight, weight_scale, bias)


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
    """`torch.nn.functional.conv1d/2d/3d` with int8 weights, one scale for each output channel.

    x: [B, C, *D] float. weight: int8 [N, C/groups, *k]. weight_scale: fp32 [N, 1]. bias: [N] float, or None.
    Returns: [B, N, *D'] of x's dtype.
    """
    args = (autocast(x), weight, weight_scale, bias, stride, padding, dilation, groups)
    return call(_conv, lambda: reference.w8a16_conv(*args), *args)  # type: ignore[no-any-return]


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
    """`torch.nn.functional.conv_transpose1d/2d/3d` with int8 weights, one scale for each output channel.

    x: [B, C, *D] float. weight: int8 [N, C/groups, *k], output channels first (torch's float layout is
    [C, N/groups, *k]). weight_scale: fp32 [N, 1]. bias: [N] float, or None.
    Returns: [B, N, *D'] of x's dtype.
    """
    args = (autocast(x), weight, weight_scale, bias, stride, padding, dilation, output_padding, groups)
    return call(_conv_transpose, lambda: reference.w8a16_conv_transpose(*args), *args)  # type: ignore[no-any-return]


def w8a16_embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of an int8 table; only the rows looked up are dequantized.

    indices: [...] int32 or int64. weight: int8 [V, H]. weight_scale: fp32 [V, 1].
    Returns: [..., H] of `dtype`.
    Raises: QuantizeError for indices of another dtype and for other scales, IndexError on CPUs for an index that is no
        row of the table; the kernel for GPUs gives NaN for it.
    """

    def check() -> None:
        reference.check_table(weight, weight_scale)
        reference.check_indices(indices, weight)

    return call(_embedding, check, indices, weight, weight_scale, dtype)


def w8a16_experts_linear(
    x: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer of each expert for the rows that were routed to it; only the experts that have rows are touched.

    x: [S, K] float, sorted by expert. ends: int32 [E], expert e has rows ends[e - 1] to ends[e] (as torch's
    `_grouped_mm` takes them). weight: int8 [E, N, K]. weight_scale: fp32 [E, N, 1]. bias: [E, N] float, or None.
    Returns: [S, N] of x's dtype; zeros for rows past the last end.
    Raises: QuantizeError as `w8a16_linear` does.
    """
    x = autocast(x)
    args = (x, ends, weight, weight_scale, bias)
    return call(_experts_linear, lambda: reference.check_input(x, weight, weight_scale, bias), *args)


def w8a8_experts_linear(
    x: Tensor, x_scale: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `w8a16_experts_linear`, with int8 inputs: `w8a8_linear` of each expert for the rows that were routed to it.

    x: int8 [S, K], sorted by expert. x_scale: fp32 [S, 1] or [1]. ends: int32 [E]. weight: int8 [E, N, K].
    weight_scale: fp32 [E, N, 1]. bias: [E, N] float, or None.
    Returns: [S, N] of `dtype`; zeros for rows past the last end.
    Raises: QuantizeError as `w8a8_linear` does.
    """
    args = (x, x_scale, ends, weight, weight_scale, bias, dtype)
    return call(_int8_experts_linear, lambda: reference.check_codes(x, x_scale, weight, weight_scale, bias), *args)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of an activation, with a scale for each row: scale = amax|x| / 127 over K, in fp32; 1 for a row of zeros.

    x: [..., K] float; not modified.
    Returns: codes int8 [..., K], scale fp32 [..., 1]. A row with NaN or inf gets a scale that is NaN or inf, which
        makes what is computed from it NaN.
    No gradient passes; see `straight_through`. Raises: QuantizeError if x is not floating point or 0-d.

    When torch.compile compiles for CUDA devices, this function and the two below are traced as their formula instead of
    as an op, so that Inductor can fuse them with what computes x (a norm, an activation). The fused kernel does not
    round x to its dtype in between, so a value near the middle between two codes may get the other one. On CPUs they
    stay ops: the native kernel is as fast as the fused one (decode and 512 rows of SmolLM2, within 2%), and compiling
    the formula takes up to twice as long. They stay ops for `torch.export` too.
    """
    if x.is_cuda and (quantized := launch_directly("quantize_per_token", x)) is not None:
        return quantized
    return _quantize(_per_token, reference.quantize_per_token, x)


def quantize_per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_per_token`, with one scale for all rows.

    x: [..., K] float. Returns: codes int8 [..., K], scale fp32 [1]. Raises: QuantizeError as `quantize_per_token` does.
    """
    return _quantize(_per_tensor, reference.quantize_per_tensor, x)


def quantize_static(x: Tensor, input_scale: Tensor) -> Tensor:
    """Codes of an activation under a scale that calibration chose; larger values are clamped to +-127.

    x: [..., K] float; not modified. Its NaNs get arbitrary codes: quantize dynamically where x may hold NaN.
    input_scale: fp32 [1].
    Returns: int8 [..., K]. Raises: QuantizeError if x is not floating point or 0-d.
    """
    return _quantize(_static, reference.quantize_static, x, input_scale)


def _quantize(op: Callable[..., Any], formula: Callable[..., Any], x: Tensor, *scale: Tensor) -> Any:
    """`op(x, *scale)`; or `formula(x, *scale)`, where torch.compile should see how x is quantized."""
    gradients.refuse_forward_mode((x,))
    x = x.detach() if x.requires_grad else x
    if x.is_cuda and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return formula(x, *scale)
    return call(op, lambda: reference.check_rows(x), x, *scale)


def quantize_weight(
    weight: Tensor, granularity: Granularity = "per_channel", *, group_size: int | None = None, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """`primitives.quantize_weight`, the same bits, at the speed of memory where there are native kernels.

    weight: [N, ...] float; not modified. granularity, group_size, name: as there.
    Returns: codes int8 of the weight's shape, scale fp32 [N, 1], [N, K/g] or [1].
    Raises: QuantizeError as there.
    """
    if granularity == "per_group":
        primitives.check_group_size(weight, group_size, name)
        rows = weight.reshape(-1, group_size or 1)
    else:
        rows = weight.flatten(1) if weight.dim() > 1 else weight
    by_row = granularity == "per_group" or (granularity == "per_channel" and group_size is None)
    if not by_row or rows.dim() != 2 or not rows.numel() or weight.dtype not in KERNEL_DTYPES:
        return primitives.quantize_weight(weight, granularity, group_size=group_size, name=name)
    codes, scale = _weight(rows.detach())
    if not weight.is_meta and not bool(torch.isfinite(scale).all()):
        primitives.amax(weight, granularity, group_size=group_size, name=name)  # raises: it says what is there
    return codes.view(weight.shape), scale.view(len(weight), -1)


def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = (x @ weight.T) * x_scale * weight_scale.T + bias: an exact int32 sum, then fp32, rounded once to `dtype`
    (fp64 where that is `dtype`).

    x: int8 [..., K]. x_scale: fp32 [..., 1] or [1]. weight: int8 [N, K]. weight_scale: fp32 [N, 1].
    bias: [N] float, or None. Returns: [..., N] of `dtype`.
    Raises: QuantizeError if x is not int8 or its last size is not K, if x_scale is not fp32 or not of its rows, for a K
        above 131071, whose sums int32 may not hold, or if weight_scale or bias are not of the weight's shape.
    """
    if x.is_cuda and (y := launch_directly("w8a8_linear", x, x_scale, weight, weight_scale, bias, dtype)) is not None:
        return y
    args = (x, x_scale, weight, weight_scale, bias, dtype)
    return call(_w8a8_linear, lambda: reference.check_codes(x, x_scale, weight, weight_scale, bias), *args)


def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """softmax(query @ key.T * scaling + mask) @ value with both products in int8; the formula is in `attention.py`
    (after SmoothQuant, Xiao et al., arXiv:2211.10438, section 4).

    query: [B, H, T, D] float. key: [B, KV, S, D] float. value: [B, KV, S, Dv] float. Query head h reads key and
        value head h // (H / KV). None of them is modified.
    mask: [B, H, T, S], or 1 in place of any of these: float, added to the scores, or bool, True where a query may
        attend; None if everywhere. A causal attention needs its mask.
    scaling: of the scores, usually D ** -0.5. softcap: bounds them before the mask, as softcap * tanh(score / softcap).
    Returns: [B, H, T, Dv] of query's dtype; zeros for a row whose mask is False or -inf everywhere.
    Memory: the codes of key and value, and scores of 12 rows for each thread; where attention has no kernels of its own
        (`backends`), the codes and a few blocks of 16 MiB. Whatever T is.
    Raises: QuantizeError for shapes that do not go together or operands that are not floating point; OctavoError when
        a gradient is computed through it: it is for inference.
    """
    query = autocast(query)

    def check() -> None:
        attention.check_heads(query, key, value, mask)
        attention.check_longest(key)

    return call(_int8_attention, check, query, key, value, mask, scaling, softcap)


def float_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, *, is_causal: bool = False
) -> Tensor:
    """softmax(query @ key.T * scaling) @ value: torch's `scaled_dot_product_attention`, or a kernel faster than that.

    query: [B, H, T, D] float. key: [B, KV, S, D], value: [B, KV, S, Dv] of its dtype. Query head h reads key and value
        head h // (H / KV).
    mask: bool [B, H, T, S], or 1 in place of any of these, True where a query may attend; None if everywhere.
    scaling: of the scores, usually D ** -0.5. is_causal: query t may attend to tokens 0 to t; then there is no mask.
    Returns: [B, H, T, Dv] of query's dtype; zeros for a row whose mask is False everywhere. Sums are fp32; e^(score -
        largest) is rounded to bf16 where that is the dtype.
    Raises: QuantizeError for shapes that do not go together; OctavoError when a gradient is computed through it.
    """
    args = (query, key, value, mask, scaling, is_causal)
    return call(_float_attention, lambda: attention.check_heads(query, key, value, mask), *args)  # type: ignore[no-any-return]


def int8_attention_of_codes(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """`int8_attention` of keys and values that are quantized already, with the same bits as a result.

    query, mask, scaling, softcap: as for `int8_attention`.
    key: int8 [B, KV, S, D], key_scale: fp32 [B, KV, S, 1], from `quantize_per_token`.
    value: int8 [B, KV, S, Dv], value_scale: fp32 [B, KV, S, 1], likewise, but with a scale of 0 for a row of zeros
        (`attention.value_codes`).
    Returns: [B, H, T, Dv] of query's dtype; zeros for a row whose mask is False or -inf everywhere.
    Raises: QuantizeError and OctavoError as `int8_attention` does.
    """
    query = autocast(query)

    def check() -> None:
        attention.check_codes(query, key, key_scale, value, value_scale, mask)
        attention.check_longest(key)

    return call(_int8_attention_of_codes, check, query, key, key_scale, value, value_scale, mask, scaling, softcap)


def float_attention_of_codes(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    is_causal: bool = False,
) -> Tensor:
    """softmax(query @ (key * key_scale).T * scaling) @ (value * value_scale), with int8 keys and values, which are half
    the bytes that attention in bf16 reads.

    query, mask, scaling, is_causal: as for `float_attention`. key: int8 [B, KV, S, D], key_scale: fp32 [B, KV, S, 1].
    value: int8 [B, KV, S, Dv], value_scale: fp32 [B, KV, S, 1].
    Returns: [B, H, T, Dv] of query's dtype; zeros for a row whose mask is False everywhere. Sums are fp32; e^(score -
        largest) times the scale of the value is rounded to bf16 where that is the dtype.
    Raises: QuantizeError for shapes that do not go together; OctavoError when a gradient is computed through it.
    """
    args = (query, key, key_scale, value, value_scale, mask, scaling, is_causal)
    return call(_float_attention_of_codes, lambda: attention.check_codes(*args[:6]), *args)  # type: ignore[no-any-return]


def quantize_states(x: Tensor, codes: Tensor, scale: Tensor, *, are_values: bool) -> None:
    """`quantize_per_token` of keys or values, written into a cache.

    x: [B, KV, T, D] float. codes: int8 of x's shape, and scale: fp32 [B, KV, T, 1], both written to, of any strides.
    are_values: give a row of zeros the scale 0, as attention expects of values.
    Raises: QuantizeError if x is not floating point.
    """
    call(_quantize_states, lambda: reference.check_rows(x), x, codes, scale, are_values)


def attends_in_float(query: Tensor, key: Tensor) -> bool:
    """Whether `float_attention` uses a kernel that is faster than torch's for query [B, H, T, D] and key
    [B, KV, S, D]."""
    most = dispatch.native_kernels.attends_in.get(query.dtype, 0) if query.device.type == "cpu" else 0
    return most > 0 and query.shape[1] // key.shape[1] * query.shape[2] <= most


def straight_through(y: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor | None = None) -> Tensor:
    """`y`, whose gradient to `x` is that of a linear layer with the dequantized weight, as if x were not rounded: the
    straight-through estimator (Bengio et al., arXiv:1308.3432).

    y: [..., N], the result of a linear op on the codes of x. ends: as that op took them, of a layer of experts.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _straight_through(y, x, weight, weight_scale, ends)
    return y


def autocast(x: Tensor) -> Tensor:
    """`x` cast to the dtype of autocast, if that is on for x's device; fp64 is not cast."""
    if not torch._C._is_any_autocast_enabled():
        return x
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
