"""Which backend answers each op on this machine, and why that one: `octavo.backends()`."""

from __future__ import annotations

import dataclasses

import torch

from octavo.ops import dispatch, native, triton
from octavo.ops.schemas import OPS

__all__ = ["Serving", "backends"]


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
    kernels = dispatch.native_kernels
    rows = []
    for op in OPS:
        if kernels.isa is None:
            rows.append(Serving(op, "cpu", "reference", kernels.why))
        elif op in ("w8a16_conv", "w8a16_conv_transpose") and not kernels.convolves:
            rows.append(Serving(op, "cpu", "reference", f"no {kernels.isa} kernel"))
        elif op == "w8a16_conv_transpose":
            left = "the reference for filters strided and dilated, shorter than a stride, or padded beyond their reach"
            rows.append(Serving(op, "cpu", kernels.isa, f"{kernels.why}; {left}"))
        elif op == "int8_attention" and not kernels.attends:
            rows.append(Serving(op, "cpu", "reference", f"composed of other ops, which {kernels.isa} kernels serve"))
        elif op == "float_attention":
            rows.append(_float_attention_on_cpu(kernels))
        else:
            rows.append(Serving(op, "cpu", kernels.isa, kernels.why))
    if torch.cuda.is_available():
        rows += [_on_cuda(op) for op in OPS]
    return rows


def _float_attention_on_cpu(kernels: native.Native) -> Serving:
    """Float attention is torch's for the dtypes, and from the number of rows on, where no kernel is faster."""
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
    why_not = dispatch.why_not_triton or triton.why_not_here()
    if why_not is not None:
        return Serving(op, "cuda", "reference", why_not)
    if op == "float_attention":
        return Serving(op, "cuda", "reference", "torch's own")
    if op in triton.OPS:
        return Serving(op, "cuda", "triton", f"triton {triton.version()} is installed")
    return Serving(op, "cuda", "reference", "no native kernel in this version")
