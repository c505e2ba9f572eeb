"""w8a16_embedding of the Triton kernels: the rows of the table in float64, rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.ops.triton import embedding
from octavo.ops.triton.embedding import w8a16_embedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def table(v: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-128, 128, (v, h), dtype=torch.int8), torch.rand(v, 1)


@given(
    shape=st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (300,)]),
    h=st.sampled_from([0, 1, 6, 64, 100, embedding.PIECE, embedding.PIECE + 3]),
    index=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from(DTYPES),
)
def test_rows(device: str, shape: tuple[int, ...], h: int, index: torch.dtype, dtype: torch.dtype) -> None:
    codes, scale = table(11, h)
    indices = torch.randint(0, 11, shape).to(index)
    y = w8a16_embedding(indices.to(device), codes.to(device), scale.to(device), dtype).cpu()
    exact = codes.double() * scale.double()  # 8 and 24 bits
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, exact[indices.long()].float().to(dtype))


def test_strides_do_not_matter(device: str) -> None:
    codes, scale = (t.to(device) for t in table(11, 48))
    indices = torch.randint(0, 11, (3, 10), device=device)
    wide = torch.zeros(11, 64, dtype=torch.int8, device=device)
    wide[:, :48] = codes
    expected = w8a16_embedding(indices, codes, scale, torch.float32)
    for weight in (wide[:, :48], codes.T.contiguous().T):
        assert torch.equal(w8a16_embedding(indices, weight, scale, torch.float32), expected)
    for of in (indices.T, indices[:, ::2], indices[:1].expand(4, 10)):
        y = w8a16_embedding(of, codes, scale, torch.float32)
        assert y.is_contiguous()
        assert torch.equal(y, w8a16_embedding(of.contiguous(), codes, scale, torch.float32))
    assert torch.equal(w8a16_embedding(indices, codes, scale.expand(11, 2)[:, :1], torch.float32), expected)


@pytest.mark.parametrize("index", [-1, 11, 2**40, -(2**40)])
def test_an_index_outside_of_the_table_gives_nan_in_its_row(device: str, index: int) -> None:
    codes, scale = table(11, 6)
    indices = torch.tensor([3, index, 4])
    y = w8a16_embedding(indices.to(device), codes.to(device), scale.to(device), torch.bfloat16).cpu()
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], (codes.float() * scale)[[3, 4]].bfloat16())


def test_other_indices_are_refused(device: str) -> None:
    codes, scale = (t.to(device) for t in table(11, 6))
    with pytest.raises(RuntimeError, match="Expected tensor for argument"):
        w8a16_embedding(torch.zeros(2, dtype=torch.int16, device=device), codes, scale, torch.float32)
