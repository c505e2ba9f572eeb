"""Rotary embeddings in one kernel, next to the formula in torch's ops, whose rounding it has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.ops.triton import direct

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def operands(
    batch: int, tokens: int, heads: tuple[int, int], size: int, one: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    q, k = (torch.randn(batch, tokens, count, size, device=device).to(dtype).transpose(1, 2) for count in heads)
    cos, sin = (torch.randn(one, tokens, size, device=device).to(dtype) for _ in range(2))
    return q, k, cos, sin


def assert_right(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    turned = direct.rotary(q, k, cos, sin)
    assert turned is not None
    for x, y in zip((q, k), turned, strict=True):
        assert y.shape == x.shape and y.dtype == x.dtype and y.transpose(1, 2).is_contiguous()
        if x.dtype != torch.float32:
            assert torch.equal(y, formula(x, cos, sin))
        exact = formula(x.double(), cos.double(), sin.double())
        other = x.double().roll(x.shape[3] // 2, 3)
        summands = (x.double() * cos.double()[:, None]).abs() + (other * sin.double()[:, None]).abs()
        assert ((y.double() - exact).abs() <= torch.finfo(x.dtype).eps * summands).all()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([1, 2]),
    tokens=st.sampled_from([1, 2, 5]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (64, 8)]),
    size=st.sampled_from([2, 16, 34, 64, 128]),
    own_angles=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_the_formula(
    device: str, batch: int, tokens: int, heads: tuple[int, int], size: int, own_angles: bool, dtype: torch.dtype
) -> None:
    assert_right(*operands(batch, tokens, heads, size, batch if own_angles else 1, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2048])
def test_heads_of_models(tokens: int, dtype: torch.dtype) -> None:
    for _ in range(2):  # started anew, and from what is kept
        assert_right(*operands(1, tokens, (32, 8), 128, 1, dtype, "cuda"))
