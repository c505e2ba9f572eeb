"""How the functions of this package call an op or a kernel: through torch's dispatcher, or past parts of it.

A call of a PyTorch op goes through autograd and the dispatcher, which costs more than the kernel of a small layer. Two
shortcuts save that where nobody can notice:

    call                 skips autograd while gradients are off
    launch_directly      starts a kernel for CUDA devices without the dispatcher, while a model runs eagerly

The other functions here say whether a shortcut may be taken for a tensor, and whether this machine has kernels for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.ops import gradients, native, triton

__all__ = [
    "KERNEL_DTYPES", "call", "has_eager_kernels", "has_native_dtype", "is_plain_eager", "launch_directly",
    "may_bypass_dispatcher", "may_compile_float_linear", "may_run_native", "native_kernels", "why_not_triton",
    "without_autograd",
]  # fmt: skip

native_kernels = native.load()
"""The kernels for CPUs that this process uses."""

why_not_triton = "forced by OCTAVO_BACKEND" if native.reference_is_forced() else triton.load()
"""Why the kernels for CUDA devices are not used; None if they are, wherever `triton.why_not_here()` is None too."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Float dtypes that the native kernels take. fp64 goes to the reference."""


def call(op: Callable[..., Any], check: Callable[[], object], *args: Any) -> Any:
    """`op(*args)`, without autograd while gradients are off.

    check: called if the op raises; it raises an error in the user's words if the arguments are at fault.
    """
    gradients.refuse_forward_mode(args)
    try:
        return op(*args) if torch.is_grad_enabled() else without_autograd(op, *args)
    except RuntimeError:
        check()
        raise


def without_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """`op(*args)` past autograd; a compiler is given the plain call."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def launch_directly(op: str, x: Tensor, *args: Any) -> Any:
    """What the op returns, from a kernel for CUDA devices started without the dispatcher; None if that is not possible
    for these operands or not allowed now."""
    if why_not_triton is None and may_bypass_dispatcher(x):
        return triton.DIRECT[op](x, *args)
    return None


def is_plain_eager(x: Tensor) -> bool:
    """Whether nothing stands between a call on x and its kernel: no gradient, compiler, tracer, `torch.func` transform
    or `__torch_function__` or dispatch mode. Then a kernel that is no op of the table may be called."""
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


def may_bypass_dispatcher(x: Tensor) -> bool:
    """Whether a kernel may be started for x without the dispatcher: as `is_plain_eager`, and no profiler is running,
    which would not see the call."""
    return is_plain_eager(x) and not torch._C._autograd._profiler_enabled()


def has_native_dtype(x: Tensor) -> bool:
    """Whether native kernels are in use for tensors of x's device and dtype."""
    return native_kernels.isa is not None and x.device.type == "cpu" and x.dtype in KERNEL_DTYPES


def may_run_native(x: Tensor) -> bool:
    """Whether a native kernel that is no op of the table may be started for x."""
    return has_native_dtype(x) and is_plain_eager(x)  # before sizes are read: a tracer would record them as operands


def has_eager_kernels(x: Tensor) -> bool:
    """Whether there are kernels for what an eager model computes from x between its layers: norms, gates, rotations."""
    return why_not_triton is None and may_bypass_dispatcher(x) if x.is_cuda else may_run_native(x)


def may_compile_float_linear(x: Tensor) -> bool:
    """Whether a graph that is being compiled may multiply x by the native kernel for float linear layers."""
    served = has_native_dtype(x) and native_kernels.multiplies_in.get(x.dtype, 0) > 0 and x.dim() > 0
    return served and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
