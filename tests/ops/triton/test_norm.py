"""RMS norms in one kernel, next to the formula in float64, rounded where a model's class rounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.fused.norms import _FORMULAS
from octavo.ops.triton import direct

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(1,), (7,), (1, 64), (3, 1), (2, 5, 33), (9, 128), (40, 16), (2, 3, 4096)]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-6, 1e-5, 0.5]),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    round_first=st.booleans(),
)
def test_the_formula(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, eps: float, size: float, round_first: bool
) -> None:
    x, weight = operands(shape, dtype, device)
    x = (x.float() * size).to(dtype)
    y = direct.rms_norm(x, weight, eps, round_first)
    assert y is not None and y.shape == x.shape and y.dtype == dtype
    tolerance = (1 + round_first) * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.double(), exact(x, weight, eps), rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rounding", ["x", "last"])
def test_it_rounds_where_the_class_does(rounding: str, dtype: torch.dtype, device: str) -> None:
    x, weight = operands((64, 256), dtype, device)
    y = direct.rms_norm(x, weight, 1e-6, rounding == "x")
    assert y is not None
    same = (y == _FORMULAS[rounding](x, weight, 1e-6)).float().mean()
    other = (y == _FORMULAS["last" if rounding == "x" else "x"](x, weight, 1e-6)).float().mean()
    assert same > 0.999 and other < 0.9


def test_what_is_not_finite_stays_in_its_row(device: str) -> None:
    x, weight = operands((3, 64), torch.float32, device)
    x[1, 5] = float("nan")
    y = direct.rms_norm(x, weight, 1e-6, True)
    assert y is not None and y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 16384, 1001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_models(k: int, dtype: torch.dtype) -> None:
    x, weight = operands((300, k), dtype, "cuda")
    for _ in range(2):  # started anew, and from what is kept
        y = direct.rms_norm(x, weight, 1e-6, True)
        assert y is not None
        torch.testing.assert_close(y.double(), exact(x, weight, 1e-6), rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)
