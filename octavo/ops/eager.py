"""Kernels that are used while a model runs eagerly, without gradients: one launch in place of several of torch's ops.

    w8a8_linear_at_once   quantize_per_token or quantize_static, then w8a8_linear
    float_linear          a linear layer that stays float
    rms_norm              RMS norm
    gated                 act(gate) * up of a gated MLP
    rotary                rotary position embeddings of queries and keys
    recurrent             all time steps of a recurrent layer

Each returns None where it does not apply (a compiler is at work, a gradient is wanted, no kernel for the dtype or
device), and the caller then runs the ops that it stands for; `gated` runs them itself. They have no fake kernels and no
gradients, which is what makes them cheap to call; only `float_linear` is also for compiled graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.ops import dispatch, reference, triton
from octavo.ops.dispatch import (
    call,
    has_eager_kernels,
    launch_directly,
    may_compile_float_linear,
    may_run_native,
    without_autograd,
)
from octavo.ops.gates import GATES

__all__ = [
    "RECURRENCES", "float_linear", "fuses_gates", "gated", "recurrent", "rms_norm", "rotary", "w8a8_linear_at_once",
]  # fmt: skip

_w8a8_linear_at_once = torch.ops.octavo.w8a8_linear_at_once.default
_float_linear = torch.ops.octavo.float_linear.default
_rms_norm = torch.ops.octavo.rms_norm.default
_gated = torch.ops.octavo.gated.default
_rotary = torch.ops.octavo.rotary.default
_recurrent = torch.ops.octavo.recurrent.default


_MOST_AT_ONCE = 8192
"""Elements of x. For more it is faster to quantize x once, and to let the layers that read it share the codes."""


def w8a8_linear_at_once(
    x: Tensor, input_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor | None:
    """`quantize_per_token` (with an input_scale `quantize_static`) and `w8a8_linear` in one call: the same bits.

    For a few rows on a CPU, where the overhead of two calls takes longer than the computation.

    x: [..., K] float. input_scale: fp32 [1], or None. weight, weight_scale, bias: as `w8a8_linear` takes them.
    Returns: [..., N] of x's dtype; None where the two ops are to be called instead.
    Raises: QuantizeError as they do.
    """
    if not may_run_native(x) or not x.dim() or x.numel() > _MOST_AT_ONCE:
        return None
    args = (x, input_scale, weight, weight_scale, bias)
    return call(_w8a8_linear_at_once, lambda: reference.check_input(x, weight, weight_scale, bias), *args)  # type: ignore[no-any-return]


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """y = x @ weight.T + bias, by a kernel of this package where it is faster than torch's: for few rows on a CPU.

    x: [..., K], weight: [N, K] and bias: [N] or None, all bf16, fp16 or fp32.
    Returns: [..., N] of that dtype, from sums in fp32; None where torch is to compute it, or to raise the error.
    """
    # A compiled graph may be for any number of rows: there the op itself leaves many to torch.
    usual = may_compile_float_linear(x) if torch.compiler.is_compiling() else may_run_native(x) and _has_few_rows(x)
    if not usual or not _are_alike(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return None
    return without_autograd(_float_linear, x, weight, bias)  # type: ignore[no-any-return]


def _has_few_rows(x: Tensor) -> bool:
    """Whether x [..., K] has so few rows that the kernel for float linear layers is faster than torch's."""
    most = dispatch.native_kernels.multiplies_in.get(x.dtype, 0)
    return most > 0 and x.dim() > 0 and x.numel() <= most * x.shape[-1]


def _are_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are the operands of one linear layer: of one dtype, on one device, with a contiguous weight [N, K]
    that is a plain tensor (no subclass that holds quantized values)."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and all(one.dtype == x.dtype and one.device == x.device for one in (weight, bias) if one is not None)
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and weight.is_contiguous()
        and (bias is None or bias.shape == weight.shape[:1])
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, round_first: bool) -> Tensor | None:
    """y = weight * x / sqrt(mean(x^2) + eps) in one kernel.

    x: [..., K] and weight: [K], both bf16, fp16 or fp32. round_first: whether x / rms is rounded to this dtype before
        it is multiplied; otherwise only the product is.
    Returns: [..., K] of that dtype, from sums in fp32; None where torch's ops are to compute the formula.
    """
    if x.is_cuda:
        return launch_directly("rms_norm", x, weight, eps, round_first)
    alike = weight.dtype == x.dtype and weight.device == x.device
    if not alike or not x.dim() or not may_run_native(x):
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return _rms_norm(x, weight, eps, round_first)  # type: ignore[no-any-return]


_LEAST_TO_GATE = 8192
"""Elements on CPUs. For fewer (one token of most models) torch's own two ops are as fast as one call of a kernel."""


def fuses_gates(x: Tensor) -> bool:
    """Whether `gated` will use a kernel in a gated MLP whose input is x; on CPUs not for a row or two."""
    return has_eager_kernels(x) and (x.is_cuda or x.numel() >= _LEAST_TO_GATE)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up: by one kernel if `fuses_gates` and both have one shape and dtype, else by torch's two ops.

    gate, up: [..., I] float. activation: a name of octavo.ops.gates.
    Returns: [..., I] of their dtype. act(gate) is computed in fp32 and rounded to that dtype before the product.
    """
    act = GATES[activation]
    if gate.is_cuda:
        y = launch_directly("gated", gate, up, act.a, act.b)
    elif gate.shape == up.shape and gate.dtype == up.dtype and gate.device == up.device and fuses_gates(gate):
        with torch._C._AutoDispatchBelowAutograd():
            y = _gated(gate, up, act.a, act.b)
    else:
        y = None
    return act.formula(gate) * up if y is None else y  # type: ignore[no-any-return]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rotary position embeddings (Su et al., arXiv:2104.09864) of queries and keys in one kernel.

        y = x * cos + (-second, first) * sin       where x = (first, second), the two halves of a head

    q: [B, H, T, D] and k: [B, KV, T, D], D even; cos, sin: [B or 1, T, D]; all bf16, fp16 or fp32.
    Returns: q and k rotated, of their dtype, to which each product and the sum are rounded; None where torch's ops are
        to compute it.
    """
    if not has_eager_kernels(q) or not _are_rotary(q, k, cos, sin):
        return None
    if q.is_cuda:
        return triton.DIRECT["rotary"](q, k, cos, sin)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _rotary(q, k, cos, sin)  # type: ignore[no-any-return]


def _are_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether shapes, dtypes and devices are those that `rotary` takes."""
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
"""torch's names of the recurrent layers that have a kernel, in the order of `Recurrence::Kind` in csrc/kernels.h."""


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
    """All steps of a recurrent layer in one direction, by one call. The formulas are in octavo/modules/recurrent.py.

    mode: torch's name for the kind of layer, such as "LSTM".
    p: [T, B, G * H] float, W_ih x + b_ih of all T > 0 steps.
    weight, weight_scale, bias: those of W_hh, weight int8 [G * H, H], as `w8a16_linear` takes them.
    state: the state before the first step: (h,), for an LSTM (h, c), [B, H] each, of p's dtype.
    int8_inputs: quantize h before each step, per token. backwards: go from the last step to the first.
    Returns: (h after each step [T, B, H], the final state), of p's dtype; gates and c are computed in fp32. None where
        the layer's own ops are to compute it.
    """
    alike = all(part.dtype == p.dtype and part.device == p.device for part in state)
    if mode not in RECURRENCES or not alike or not p.numel() or not may_run_native(p):
        return None
    h, *cells = state
    c = cells[0].to(torch.float32, copy=True).contiguous() if cells else None
    with torch._C._AutoDispatchBelowAutograd():
        y = _recurrent(p, weight, weight_scale, bias, h, c, RECURRENCES.index(mode), int8_inputs, backwards)
    after = y[0] if backwards else y[-1]
    return y, (after,) if c is None else (after, c.to(p.dtype))
