"""THE table of ops: schema, fake kernel, gradient and Python wrapper of each, with shapes.

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

    float, in one kernel    operands                                       result
    float_linear            x [..., K], weight [N, K], bias [N]            [..., N]
    rms_norm                x [..., K], weight [K]                         [..., K]
    gated                   gate, up [..., I]                              [..., I]
    rotary                  q [B, H, T, D], k [B, KV, T, D], cos, sin [B or 1, T, D]   q, k
    recurrent               p [T, B, G * H] float, weight int8 [G * H, H]  [T, B, H]: all steps of a recurrent layer

Each w8a16 op computes sum(code * x), accumulated in fp32 (fp64 for an fp64 x), *then* multiplies by the scale, adds the
bias and rounds once to the output dtype: where the float model does not overflow fp16, neither does this, inside
autocast too. (K/g is 1 for per_channel. With per_group each group's sum is multiplied by its scale, in fp32; the
reference forms code * scale in fp32 first.)
w8a8_linear sums in int32, exactly, then multiplies by both scales. Its input is quantized by an op of its own, so that
layers which read the same tensor can share the codes (`octavo.modules.shared_input`); a row or a few are quantized and
multiplied by one call on CPUs (`w8a8_linear_at_once`). int8_attention quantizes its operands itself, and of codes its
query.
Results are contiguous, whatever the strides.

Of each op, `schemas.py` has the schema, `fakes.py` the result's shape, `gradients.py` the gradient; here are the
functions that modules call. `reference.py` and `attention.py` answer on every device; `native.py` loads the kernels for
CPUs and `triton/` has those for CUDA devices, registered for the same ops. `gates.py` names the activations of `gated`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo import primitives
from octavo.ops import attention, fakes, gradients, native, reference, triton  # noqa: F401  some register themselves
from octavo.ops.gates import GATES
from octavo.ops.schemas import OPS
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

_native = native.load()
_why_not_triton = "forced by OCTAVO_BACKEND" if native.reference_is_forced() else triton.load()

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
_w8a8_linear_at_once = torch.ops.octavo.w8a8_linear_at_once.default
_float_linear = torch.ops.octavo.float_linear.default
_rms_norm = torch.ops.octavo.rms_norm.default
_gated = torch.ops.octavo.gated.default
_rotary = torch.ops.octavo.rotary.default
_recurrent = torch.ops.octavo.recurrent.default
_float_attention = torch.ops.octavo.float_attention.default
_int8_attention_of_codes = torch.ops.octavo.int8_attention_of_codes.default
_float_attention_of_codes = torch.ops.octavo.float_attention_of_codes.default
_quantize_states = torch.ops.octavo.quantize_states.default


_KERNELS_TAKE = (torch.float32, torch.bfloat16, torch.float16)
"""Weights to be quantized. fp64 is no kernel's, and errors do not pass through them."""


# -- wrappers: what modules call ------------------------------------------------------------------------------------


def _run(op: Callable[..., Any], check: Callable[[], object], *args: Any) -> Any:
    """`op(*args)`; where it refuses them, `check` says why in the user's words. Where no gradient is wanted autograd is
    not asked, which would cost a call of Python each time."""
    gradients.refuse_forward_mode(args)
    try:
        return op(*args) if torch.is_grad_enabled() else _without_autograd(op, *args)
    except RuntimeError:
        check()
        raise


def _without_autograd(op: Callable[..., Any], *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _directly(op: str, x: Tensor, *args: Any) -> Any:
    """What the op returns, its kernel started without the dispatcher; None where that is not for what is given."""
    if _why_not_triton is None and _nothing_listens(x):
        return triton.DIRECT[op](x, *args)
    return None


def _nothing_listens(x: Tensor) -> bool:
    """Whether a kernel may be started for x without the dispatcher, which would tell who profiles."""
    return _nothing_intercepts(x) and not torch._C._autograd._profiler_enabled()


def _nothing_intercepts(x: Tensor) -> bool:
    """Whether nobody differentiates, compiles, traces, maps or otherwise stands between a call and the kernel: one that
    is no op of the table may be called then. A profiler hears of it from the dispatcher."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not gradients.forward_mode()
        and type(x) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _is_native(x: Tensor) -> bool:
    return _native.isa is not None and x.device.type == "cpu" and x.dtype in _KERNELS_TAKE


def _is_compiled_natively(x: Tensor) -> bool:
    """Whether a graph that is being compiled may multiply x, which no gradient passes, by kernels for float layers."""
    served = _is_native(x) and _native.multiplies_in.get(x.dtype, 0) > 0 and x.dim() > 0
    return served and not torch.is_grad_enabled() and not torch.compiler.is_exporting()


def _takes_natively(x: Tensor) -> bool:
    """Whether a native kernel that is no op of the table may be started for x."""
    return _is_native(x) and _nothing_intercepts(x)  # asked before sizes are: a trace would take those for operands


def _is_served_between(x: Tensor) -> bool:
    """Whether there are kernels for what modules compute of x between their layers."""
    return _why_not_triton is None and _nothing_listens(x) if x.is_cuda else _takes_natively(x)


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = (x @ weight.T) * weight_scale.T + bias, with int8 weights.

    x: [..., K] bf16, fp16, fp32 or fp64; inside autocast cast to its dtype, but for fp64.
    weight: int8 [N, K]. weight_scale: fp32 [N, 1] or, per_group, [N, K/g]. bias: [N] float, or None.
    Returns: [..., N] of x's dtype.
    Raises: QuantizeError if x is not floating point or its last size is not K, or if scale or bias are not of the
        weight's shape.
    """
    x = autocast(x)
    if x.is_cuda and (y := _directly("w8a16_linear", x, weight, weight_scale, bias)) is not None:
        return y
    return _run(_linear, lambda: reference.check_input(x, weight, weight_scale, bias), x, weight, weight_scale, bias)


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
    return _run(_conv, lambda: reference.w8a16_conv(*args), *args)  # type: ignore[no-any-return]


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
    return _run(_conv_transpose, lambda: reference.w8a16_conv_transpose(*args), *args)  # type: ignore[no-any-return]


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

    return _run(_embedding, check, indices, weight, weight_scale, dtype)


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
    return _run(_experts_linear, lambda: reference.check_input(x, weight, weight_scale, bias), *args)


def w8a8_experts_linear(
    x: Tensor, x_scale: Tensor, ends: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same with int8 inputs: `w8a8_linear` of each expert for the rows that were routed to it.

    x: int8 [S, K], sorted by expert. x_scale: fp32 [S, 1] or [1]. ends: int32 [E]. weight: int8 [E, N, K].
    weight_scale: fp32 [E, N, 1]. bias: [E, N] float, or None.
    Returns: [S, N] of `dtype`; zeros for rows past the last end.
    Raises: QuantizeError as `w8a8_linear` does.
    """
    args = (x, x_scale, ends, weight, weight_scale, bias, dtype)
    return _run(_int8_experts_linear, lambda: reference.check_codes(x, x_scale, weight, weight_scale, bias), *args)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of an activation, with a scale for each row: scale = amax|x| / 127 over K, in fp32; 1 for a row of zeros.

    x: [..., K] float; not modified.
    Returns: codes int8 [..., K], scale fp32 [..., 1]. A row with NaN or inf gets a scale that is NaN or inf, which
        makes what is computed from it NaN.
    No gradient passes; see `straight_through`. Raises: QuantizeError if x is not floating point or 0-d.

    To a compiler for CUDA devices this, as the two below, is no op but its formula, which Inductor fuses with what
    makes x (a norm, an activation) into one kernel. That kernel rounds nothing in between to x's dtype, so a code that
    lies near the middle between two may differ by one from what is found without a compiler. On CPUs the native kernel
    is as fast as the fused one (decode and 512 rows of SmolLM2, within 2%), and compiling takes up to twice as long
    with the formula: there it stays an op, and so it does for `torch.export`.
    """
    if x.is_cuda and (quantized := _directly("quantize_per_token", x)) is not None:
        return quantized
    return _quantize(_per_token, reference.quantize_per_token, x)


def quantize_per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one scale for all rows. x: [..., K] float. Returns: codes int8 [..., K], scale fp32 [1]."""
    return _quantize(_per_tensor, reference.quantize_per_tensor, x)


def quantize_static(x: Tensor, input_scale: Tensor) -> Tensor:
    """Codes of an activation under a scale that calibration chose; what it did not foresee is clamped to +-127.

    x: [..., K] float; not modified. input_scale: fp32 [1]. NaN has no code: where x may hold it, quantize dynamically.
    Returns: int8 [..., K]. Raises: QuantizeError if x is not floating point or 0-d.
    """
    return _quantize(_static, reference.quantize_static, x, input_scale)


def _quantize(op: Callable[..., Any], formula: Callable[..., Any], x: Tensor, *scale: Tensor) -> Any:
    """`op(x, *scale)`, or `formula` of them where a compiler is at work that should see how x is quantized."""
    gradients.refuse_forward_mode((x,))
    x = x.detach() if x.requires_grad else x
    if x.is_cuda and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return formula(x, *scale)
    return _run(op, lambda: reference.check_rows(x), x, *scale)


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
    if not by_row or rows.dim() != 2 or not rows.numel() or weight.dtype not in _KERNELS_TAKE:
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
    if x.is_cuda and (y := _directly("w8a8_linear", x, x_scale, weight, weight_scale, bias, dtype)) is not None:
        return y
    args = (x, x_scale, weight, weight_scale, bias, dtype)
    return _run(_w8a8_linear, lambda: reference.check_codes(x, x_scale, weight, weight_scale, bias), *args)


_MOST_AT_ONCE = 8192
"""Elements of x: from about there on its codes are worth more than a call, to layers that can share them."""


def w8a8_linear_at_once(
    x: Tensor, input_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor | None:
    """`quantize_per_token`, or `quantize_static` given an input_scale, and `w8a8_linear` in one call: the same bits. It
    is for a row or a few on a CPU, where calls are what takes time.

    x: [..., K] float. input_scale: fp32 [1], or None. weight, weight_scale, bias: as `w8a8_linear` takes them.
    Returns: [..., N] of x's dtype; None wherever the two ops are to be called.
    Raises: QuantizeError as they do.
    """
    if not _takes_natively(x) or not x.dim() or x.numel() > _MOST_AT_ONCE:
        return None
    args = (x, input_scale, weight, weight_scale, bias)
    return _run(_w8a8_linear_at_once, lambda: reference.check_input(x, weight, weight_scale, bias), *args)  # type: ignore[no-any-return]


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

    return _run(_int8_attention, check, query, key, value, mask, scaling, softcap)


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
    return _run(_float_attention, lambda: attention.check_heads(query, key, value, mask), *args)  # type: ignore[no-any-return]


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
    """`int8_attention` of keys and values that were quantized before: the bits that it gives of what they were.

    query, mask, scaling, softcap: as there. key: int8 [B, KV, S, D], key_scale: fp32 [B, KV, S, 1], as
        `quantize_per_token` makes them. value: int8 [B, KV, S, Dv], value_scale: fp32 [B, KV, S, 1]: likewise, but 0
        for a row of zeros (`attention.value_codes`).
    Returns: [B, H, T, Dv] of query's dtype; zeros for a row whose mask is False or -inf everywhere.
    Raises: QuantizeError and OctavoError as there.
    """
    query = autocast(query)

    def check() -> None:
        attention.check_codes(query, key, key_scale, value, value_scale, mask)
        attention.check_longest(key)

    return _run(_int8_attention_of_codes, check, query, key, key_scale, value, value_scale, mask, scaling, softcap)


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
    """softmax(query @ (key * key_scale).T * scaling) @ (value * value_scale), with int8 keys and values: half of the
    bytes that attention in bf16 reads.

    query, mask, scaling, is_causal: as of `float_attention`. key: int8 [B, KV, S, D], key_scale: fp32 [B, KV, S, 1].
    value: int8 [B, KV, S, Dv], value_scale: fp32 [B, KV, S, 1].
    Returns: [B, H, T, Dv] of query's dtype; zeros for a row whose mask is False everywhere. Sums are fp32; e^(score -
        largest) times the scale of the value is rounded to bf16 where that is the dtype.
    Raises: QuantizeError for shapes that do not go together; OctavoError when a gradient is computed through it.
    """
    args = (query, key, key_scale, value, value_scale, mask, scaling, is_causal)
    return _run(_float_attention_of_codes, lambda: attention.check_codes(*args[:6]), *args)  # type: ignore[no-any-return]


def quantize_states(x: Tensor, codes: Tensor, scale: Tensor, *, are_values: bool) -> None:
    """`quantize_per_token` of keys, or of values, to where a cache keeps them. The scale of values that are zeros is 0.

    x: [B, KV, T, D] float. codes: int8 of its shape, scale: fp32 [B, KV, T, 1], written; they may lie anywhere.
    Raises: QuantizeError for another x.
    """
    _run(_quantize_states, lambda: reference.check_rows(x), x, codes, scale, are_values)


def attends_in_float(query: Tensor, key: Tensor) -> bool:
    """Whether `float_attention` has a kernel of its own, faster than torch's, for this query [B, H, T, D] and key
    [B, KV, S, D]."""
    most = _native.attends_in.get(query.dtype, 0) if query.device.type == "cpu" else 0
    return most > 0 and query.shape[1] // key.shape[1] * query.shape[2] <= most


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """y = x @ weight.T + bias by a kernel of this package, where that is faster than torch's: few rows, on a CPU, while
    no gradient is wanted.

    x: [..., K], weight: [N, K] and bias: [N] or None, all bf16, fp16 or fp32.
    Returns: [..., N] of that dtype, from sums in fp32; None wherever torch is to compute it, or to say what is wrong.
    """
    # A compiled graph may be for any number of rows: there the op itself leaves many to torch.
    usual = _is_compiled_natively(x) if torch.compiler.is_compiling() else _takes_natively(x) and _has_few_rows(x)
    if not usual or not _are_alike(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return None
    return _without_autograd(_float_linear, x, weight, bias)  # type: ignore[no-any-return]


def _has_few_rows(x: Tensor) -> bool:
    """Whether x [..., K] has no more rows than kernels for float linear layers are good for."""
    most = _native.multiplies_in.get(x.dtype, 0)
    return most > 0 and x.dim() > 0 and x.numel() <= most * x.shape[-1]


def _are_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are operands of a linear layer, in one dtype on one device, and the weight is a plain tensor (not
    one that others quantized) that lies as [N, K] does."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and all(one.dtype == x.dtype and one.device == x.device for one in (weight, bias) if one is not None)
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and weight.is_contiguous()
        and (bias is None or bias.shape == weight.shape[:1])
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, round_first: bool) -> Tensor | None:
    """y = weight * x / sqrt(mean(x^2) + eps) in one kernel, while a model runs eagerly and no gradient is wanted.

    x: [..., K] and weight: [K], both bf16, fp16 or fp32. round_first: whether x / rms is rounded to this dtype before
        it is multiplied; otherwise only the product is.
    Returns: [..., K] of that dtype, from sums in fp32; None wherever the formula is to be computed by torch's ops.
    """
    if x.is_cuda:
        return _directly("rms_norm", x, weight, eps, round_first)
    alike = weight.dtype == x.dtype and weight.device == x.device
    if not alike or not x.dim() or not _takes_natively(x):
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return _rms_norm(x, weight, eps, round_first)  # type: ignore[no-any-return]


_LEAST_TO_GATE = 8192
"""Elements, on CPUs: with fewer, a token of most models, torch's own two ops cost no more than a call of any other."""


def fuses_gates(x: Tensor) -> bool:
    """Whether `gated` has a kernel for what linear layers make of x: a model runs eagerly, no gradient is wanted, and
    on a CPU there is more than a row or two."""
    return _is_served_between(x) and (x.is_cuda or x.numel() >= _LEAST_TO_GATE)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, by one kernel where `fuses_gates` says so and they are alike; else by torch's two ops.

    gate, up: [..., I] float. activation: a name of octavo.ops.gates.
    Returns: [..., I] of their dtype, to which act(gate), in fp32, is rounded before it is multiplied.
    """
    act = GATES[activation]
    if gate.is_cuda:
        y = _directly("gated", gate, up, act.a, act.b)
    elif gate.shape == up.shape and gate.dtype == up.dtype and gate.device == up.device and fuses_gates(gate):
        with torch._C._AutoDispatchBelowAutograd():
            y = _gated(gate, up, act.a, act.b)
    else:
        y = None
    return act.formula(gate) * up if y is None else y  # type: ignore[no-any-return]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """x * cos + (-second, first) * sin of queries and keys x = (first, second), two halves, in one kernel, while a
    model runs eagerly and no gradient is wanted: rotary position embeddings (Su et al., arXiv:2104.09864).

    q: [B, H, T, D] and k: [B, KV, T, D], D even; cos, sin: [B or 1, T, D]; all bf16, fp16 or fp32.
    Returns: both of their dtype, to which each product is rounded, and the sum; None wherever torch's ops are to
    compute it.
    """
    if not _is_served_between(q) or not _are_rotary(q, k, cos, sin):
        return None
    if q.is_cuda:
        return triton.DIRECT["rotary"](q, k, cos, sin)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _rotary(q, k, cos, sin)  # type: ignore[no-any-return]


def _are_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether they are operands of `rotary`, alike."""
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == sin.dim() == 3
        and not q.shape[3] % 2
        and all(one.dtype == q.dtype and one.device == q.device for one in (k, cos, sin))
        and len(k) == len(q)
        and all(one.shape[-2:] == q.shape[2:] for one in (k, cos, sin))
        and all(len(one) in (1, len(q)) for one in (cos, sin))
    )


RECURRENCES = ("LSTM", "GRU", "RNN_TANH")
"""Modes of recurrent layers that `recurrent` has a kernel for, in the order of `Recurrence::Kind` in csrc/kernels.h."""


def recurrent(
    mode: str,
    p: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    state: tuple[Tensor, ...],
    *,
    int8_inputs: bool,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """All steps of a recurrent layer in one direction by one call, while a model runs eagerly, without gradients.

    mode: torch's word for what the layer does. p: [T, B, G * H] float, W_ih x + b_ih of all steps; T is not 0.
    weight, weight_scale, bias: of W_hh, int8 [G * H, H], as of `w8a16_linear`. state: (h,), of an LSTM (h, c), before:
    [B, H] of p's dtype. int8_inputs: h is quantized before each step, per token. backwards: from the last step to the
    first.
    Returns: (h of all steps [T, B, H], the state after) of p's dtype, gates and c in fp32, by the formulas of
    octavo/modules/recurrent.py; None wherever its own ops are to compute them.
    """
    alike = all(part.dtype == p.dtype and part.device == p.device for part in state)
    if mode not in RECURRENCES or not alike or not p.numel() or not _takes_natively(p):
        return None
    h, *cells = state
    c = cells[0].to(torch.float32, copy=True).contiguous() if cells else None
    with torch._C._AutoDispatchBelowAutograd():
        y = _recurrent(p, weight, weight_scale, bias, h, c, RECURRENCES.index(mode), int8_inputs, backwards)
    after = y[0] if backwards else y[-1]
    return y, (after,) if c is None else (after, c.to(p.dtype))


def straight_through(y: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor | None = None) -> Tensor:
    """`y` with the gradient to `x` that a linear layer with the dequantized weight has: rounding passes it unchanged
    (the straight-through estimator, Bengio et al., arXiv:1308.3432). ends: of a linear layer of experts."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _straight_through(y, x, weight, weight_scale, ends)
    return y


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that it has inside autocast, if that is on."""
    if not torch._C._is_any_autocast_enabled():
        return x
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


# -- who serves ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Serving:
    """Which backend answers `op` on `device`, and why that one."""

    op: str
    device: str
    backend: str
    why: str


def backends() -> list[Serving]:
    """Which kernels serve which op on the devices of this machine, and why.

    Returns: a row for each op and device. backend: an instruction set of CPUs ("avx2", "avx512", ...), "triton" on CUDA
        devices, or "reference", plain torch.
    """
    rows = []
    for op in OPS:
        if _native.isa is None:
            rows.append(Serving(op, "cpu", "reference", _native.why))
        elif op in ("w8a16_conv", "w8a16_conv_transpose") and not _native.convolves:
            rows.append(Serving(op, "cpu", "reference", f"no {_native.isa} kernel"))
        elif op == "w8a16_conv_transpose":
            left = "the reference for filters strided and dilated, shorter than a stride, or padded beyond their reach"
            rows.append(Serving(op, "cpu", _native.isa, f"{_native.why}; {left}"))
        elif op == "int8_attention" and not _native.attends:
            rows.append(Serving(op, "cpu", "reference", f"composed of other ops, which {_native.isa} kernels serve"))
        elif op == "float_attention":
            rows.append(_on_cpu_in_float(_native))
        else:
            rows.append(Serving(op, "cpu", _native.isa, _native.why))
    if torch.cuda.is_available():
        rows += [_on_cuda(op) for op in OPS]
    return rows


def _on_cpu_in_float(kernels: native.Native) -> Serving:
    """Of float attention, which is torch's in the dtypes that have no kernel."""
    if not any(kernels.attends_in.values()) or kernels.isa is None:
        return Serving("float_attention", "cpu", "reference", "torch's own")
    why = kernels.why
    for dtype, most in kernels.attends_in.items():
        name = str(dtype).removeprefix("torch.")
        if not most:
            why += f"; torch's own in {name}"
        elif most < native.ANY_NUMBER:
            why += f"; torch's own in {name} from {most + 1} rows of a key head on"
    return Serving("float_attention", "cpu", kernels.isa, why)


def _on_cuda(op: str) -> Serving:
    why_not = _why_not_triton or triton.why_not_here()
    if why_not is not None:
        return Serving(op, "cuda", "reference", why_not)
    if op == "float_attention":
        return Serving(op, "cuda", "reference", "torch's own")
    if op in triton.OPS:
        return Serving(op, "cuda", "triton", f"triton {triton.version()} is installed")
    return Serving(op, "cuda", "reference", "no native kernel in this version")
