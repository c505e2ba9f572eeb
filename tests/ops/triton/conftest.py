"""Where the Triton kernels run in these tests: on a GPU, or in Triton's interpreter, on tensors of the CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")


@pytest.fixture(scope="session")
def device() -> str:
    """Of the tensors that kernels are given: "cuda", or "cpu" where `TRITON_INTERPRET` interprets them."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _arithmetic_as_on_a_gpu() -> None:
    """The interpreter holds bf16 as the integers of its bits: up to Triton 3.9 `tl.dot` multiplies those, integers
    become them when they are cast, and fp32 is cut off where a GPU rounds to nearest even. Before Triton 3.9 `tl.fma`
    rounds twice."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        if before == tl.bfloat16:
            bits = torch.from_numpy(numpy.ascontiguousarray(source.data).view(numpy.int16))
            return cast(self, TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32), target)
        rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(numpy.uint16), after)

    def widening_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = rounding_cast(self, a, tl.float32), rounding_cast(self, b, tl.float32)
        return dot(self, a, b, *rest)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        return TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, widening_dot
    InterpreterBuilder.create_fma = fused


def fma(x: numpy.ndarray, y: numpy.ndarray, z: numpy.ndarray) -> numpy.ndarray:
    """x * y + z in fp32, rounded once. The product is exact in fp64; the sum is rounded there to odd, so that rounding
    it again to fp32 gives what one rounding does (Boldo and Melquiond, IEEE Transactions on Computers 57(4), 2008)."""
    product, z = x.astype(numpy.float64) * y.astype(numpy.float64), z.astype(numpy.float64)
    with numpy.errstate(all="ignore"):
        total = product + z
        part = total - product
        error = (product - (total - part)) + (z - part)
        even = (total.view(numpy.int64) & 1) == 0
        odd = numpy.nextafter(total, numpy.where(error > 0, numpy.inf, -numpy.inf))
        inexact = numpy.isfinite(total) & (error != 0) & even
        return numpy.where(inexact, odd, total).astype(numpy.float32)
