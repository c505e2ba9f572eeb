"""w8a16_embedding: a lookup that dequantizes what it looks up, and nothing else."""

from __future__ import annotations

import pytest
import torch

from octavo import ops
from octavo.errors import OctavoError, QuantizeError
from octavo.primitives import quantize_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(shape: tuple[int, ...], index: torch.dtype, dtype: torch.dtype) -> None:
    codes, scale = quantize_weight(torch.randn(11, 6))
    indices = torch.randint(0, 11, shape).to(index)
    y = ops.w8a16_embedding(indices, codes, scale, dtype)
    table = codes.double() * scale.double()  # exact: 8 and 24 bits
    assert y.dtype == dtype
    assert torch.equal(y, table[indices.long()].float().to(dtype))


def test_transposed_indices_give_contiguous_rows() -> None:
    codes, scale = quantize_weight(torch.randn(11, 6))
    indices = torch.randint(0, 11, (3, 5)).T
    y = ops.w8a16_embedding(indices, codes, scale, torch.float32)
    assert y.is_contiguous()
    assert torch.equal(y, ops.w8a16_embedding(indices.contiguous(), codes, scale, torch.float32))


@pytest.mark.parametrize("index", [-1, 11])
def test_an_index_outside_of_the_table_is_an_error(index: int) -> None:
    """-1 too, as in nn.Embedding: it is a padding label that was not masked, not the last row."""
    codes, scale = quantize_weight(torch.randn(11, 6))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        ops.w8a16_embedding(torch.tensor([index]), codes, scale, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float32])
def test_indices_of_another_dtype_are_an_error(dtype: torch.dtype) -> None:
    codes, scale = quantize_weight(torch.randn(11, 6))
    with pytest.raises(QuantizeError, match=rf"indices: dtype is {dtype}, expected int32 or int64"):
        ops.w8a16_embedding(torch.ones(2, dtype=dtype), codes, scale, torch.float32)


def test_only_the_rows_looked_up_are_dequantized() -> None:
    """A table of 128 MB of bf16 values: dequantized as a whole it would show."""
    codes, scale = torch.zeros(1 << 20, 64, dtype=torch.int8), torch.ones(1 << 20, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.w8a16_embedding(torch.tensor([5, 1 << 19]), codes, scale, torch.bfloat16)
    assert sum(max(event.cpu_memory_usage, 0) for event in profile.events()) < 100_000


def test_no_gradient_of_the_table() -> None:
    codes, scale = quantize_weight(torch.randn(11, 6))
    assert not ops.w8a16_embedding(torch.tensor([1]), codes, scale, torch.float32).requires_grad
    with pytest.raises(OctavoError, match="int8 codes are frozen"):
        ops.w8a16_embedding(torch.tensor([1]), codes, scale.requires_grad_(), torch.float32)
