"""The Triton kernels of attention over int8 keys and values against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.errors import QuantizeError
from octavo.ops.attention import value_codes
from octavo.ops.triton import codes_attention
from octavo.ops.triton.codes_attention import float_attention_of_codes
from tests.ops.test_attention import as_cached, causal, exact, heads

UNIT = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def quantized(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return as_cached(*ops.quantize_per_token(key), *value_codes(value))


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, device: str) -> None:
    operands = quantized(key.to(device), value.to(device))
    mask_there = None if mask is None else mask.to(device)
    y = float_attention_of_codes(query.to(device), *operands, mask_there, 0.3, is_causal).cpu()
    k, v = (codes.cpu().double() * scale.cpu() for codes, scale in (operands[:2], operands[2:]))
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril() if is_causal else mask
    expected = exact(query, k, v, allowed, 0.3)
    assert y.dtype == query.dtype and y.shape == expected.shape and y.is_contiguous()
    largest = v.abs().max() if v.numel() else 0.0
    assert ((y.double() - expected).abs() <= UNIT[query.dtype] * largest).all()


@given(
    batch=st.integers(0, 2),
    kv=st.integers(1, 2),
    shared=st.integers(1, 3),
    rows=st.integers(0, 7),
    tokens=st.integers(0, 9),
    size=st.integers(1, 20),
    value=st.integers(1, 12),
    dtype=st.sampled_from(list(UNIT)),
    broadcast=st.tuples(*[st.booleans()] * 4),
    kind=st.sampled_from(["none", "bool", "causal"]),
)
def test_every_shape_and_mask(
    batch: int,
    kv: int,
    shared: int,
    rows: int,
    tokens: int,
    size: int,
    value: int,
    dtype: torch.dtype,
    broadcast: tuple[bool, ...],
    kind: str,
    device: str,
) -> None:
    query, key, values = heads(batch, kv, shared, rows, tokens, size, value)
    full = (batch, kv * shared, rows, tokens)
    mask = torch.rand([1 if one else n for one, n in zip(broadcast, full, strict=True)]) < 0.7
    check(query.to(dtype), key, values, mask if kind == "bool" else None, kind == "causal", device)


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize(
    ("rows", "size", "value"), [(1, 64, 64), (4, 128, 128), (3, 200, 40), (40, 64, 64), (1, 300, 300)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_many_tokens(
    rows: int, size: int, value: int, masked: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several parts, of which the mask hides one whole; more rows, and wider heads, are torch's."""
    monkeypatch.setattr(codes_attention, "_PROGRAMS", 8)
    query, key, values = heads(1, 2, 3, rows, 1100, size, value)
    mask = causal(rows, 1100) & (torch.arange(1100) > 500) if masked else None
    check(query.to(dtype) / size**0.5, key, values, mask, False, device)


def test_a_row_that_may_attend_to_nothing_is_zero(device: str) -> None:
    query, key, value = heads(1, 1, 2, 3, 70)
    mask = causal(3, 70).clone()
    mask[:, :, 1] = False
    operands = [x.to(device) for x in quantized(key, value)]
    y = float_attention_of_codes(query.to(device), *operands, mask.to(device), 0.3, False).cpu()
    assert not y[:, :, 1].any() and y[:, :, [0, 2]].all()


def test_what_does_not_go_together_is_refused(device: str) -> None:
    query, key, value = heads()
    k, k_scale, v, v_scale = (x.to(device) for x in quantized(key, value))
    with pytest.raises(QuantizeError, match=r"key_scale: is torch\.float32"):
        float_attention_of_codes(query.to(device), k, k_scale[..., 0], v, v_scale, None, 0.3, False)


def test_what_32_bits_do_not_reach_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[object, ...]] = []
    monkeypatch.setattr(codes_attention, "launch", lambda kernel, grid, *args, **meta: launched.append(args))
    far = torch.empty_strided((1, 1, 3, 8), (8, 8, 2**30, 1), device="meta", dtype=torch.int8)
    query, scale = torch.empty(1, 1, 1, 8, device="meta"), torch.empty(1, 1, 3, 1, device="meta")
    float_attention_of_codes(query, far, scale, far, scale, None, 0.3, False)
    tensors = [x for x in launched[0] if isinstance(x, Tensor)]
    assert len(tensors) == 7 and all(x.is_contiguous() for x in tensors)
