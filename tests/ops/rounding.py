"""What every linear op promises: a sum that is as good as its accumulation, rounded once to the dtype of the result."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_off_by", "linear_in_double"]


def assert_off_by(y: Tensor, expected: Tensor, error: Tensor) -> None:
    """y is `expected` [float64], contiguous, rounded to its dtype; before that it was off by `error` at most."""
    unit = torch.finfo(y.dtype)
    rounding = expected.abs() * unit.eps / 2 * (1 + 2.0**-20) + unit.smallest_normal * unit.eps
    assert y.shape == expected.shape and y.is_contiguous()
    assert ((y.double() - expected).abs() <= rounding + error).all()


def linear_in_double(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A linear layer in float64, and the sum of the sizes of what it sums: what its rounding is in proportion to."""
    w = codes.double() * scale.double().repeat_interleave(codes.shape[1] // max(scale.shape[1], 1), dim=1)
    y, terms = x.double() @ w.T, x.double().abs() @ w.abs().T
    return (y, terms) if bias is None else (y + bias.double(), terms + bias.double().abs())
