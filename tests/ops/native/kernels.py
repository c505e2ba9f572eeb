"""The instruction sets that this machine has kernels for, what they are fed, and float64 arithmetic to hold them to."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.errors import QuantizeError
from octavo.ops import native

FORCED = os.environ.get("OCTAVO_ISA", "")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MANY = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 9, 13, 25, 33, 37, 64, 81, 100, 193, 513, 1100])
ODD = st.sampled_from([1, 2, 3, 5, 31, 32, 33, 67])
LONG = st.sampled_from([0, 1, 2, 7, 15, 17, 33, 63, 64, 65, 100, 129, 1030, 2100])


def instruction_sets() -> list[str]:
    if all(row.backend == "reference" for row in ops.backends()):
        return []
    found = []
    for name in ("scalar", "avx2", "avxvnni", "avx512", "amx"):
        try:
            native.select(name)
        except QuantizeError:
            continue
        found.append(name)
    native.select(FORCED)
    return found


ISAS = instruction_sets()
WITH_KERNELS = pytest.mark.skipif(not ISAS, reason="octavo is installed without its native kernels")


def codes(*shape: int, extreme: bool = False) -> Tensor:
    """Random codes, -128 and 127 alone if `extreme`: where 16 bits or a byte without sign are too few, it shows."""
    if extreme:
        return torch.where(torch.rand(shape) < 0.5, -128, 127).to(torch.int8)
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def strided(x: Tensor, how: str) -> Tensor:
    """The same values, with gaps between them, or transposed in memory."""
    if how == "gaps":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    return x.T.contiguous().T if how == "transposed" and x.dim() == 2 else x


def assert_rounds_to(y: Tensor, expected: Tensor, error: Tensor) -> None:
    """y is `expected` [float64] to within `error` and the rounding of its dtype."""
    limits = torch.finfo(y.dtype)
    allowed = error + expected.abs() * limits.eps + limits.smallest_normal * limits.eps
    wrong = ~((y.double() - expected).abs() <= allowed)
    assert not wrong.any(), f"{y[wrong][:4]} is not {expected[wrong][:4]} to within {allowed[wrong][:4]}"


def linear_in_double(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, steps: float
) -> tuple[Tensor, Tensor]:
    """A linear layer in float64, and what a fp32 sum that is rounded about `steps` times may be off by."""
    wide = (
        weight.double().unflatten(-1, (weight_scale.shape[-1], -1)) * weight_scale.double().unsqueeze(-1)
        if weight.numel()
        else weight.double().unsqueeze(-1)
    ).flatten(-2)
    y = x.double() @ wide.T
    added = torch.zeros(()).double() if bias is None else bias.double()
    error = 2.0**-24 * (steps * (x.double().abs() @ wide.abs().T) + 4 * y.abs() + 2 * added.abs())
    return y + added, error
