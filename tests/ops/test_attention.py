"""int8_attention against attention in float64, and against the same codes multiplied in 64-bit integers by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.errors import OctavoError, QuantizeError
from octavo.ops import attention
from tests.ops.simulated_attention import fake_int8_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def heads(
    batch: int = 2, kv: int = 2, shared: int = 2, rows: int = 7, tokens: int = 11, size: int = 16, value: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, kv * shared, rows, size), (batch, kv, tokens, size), (batch, kv, tokens, value))
    query, key, values = (torch.randn(shape) for shape in shapes)
    return query, key, values


def causal(rows: int, tokens: int) -> Tensor:
    """True where a query may attend; the last query sees every token."""
    return torch.ones(1, 1, rows, tokens, dtype=torch.bool).tril(tokens - rows)


def exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention in float64."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(shared, 1) for x in (key, value))
    scores = query.double() @ key.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0) @ value


def sqnr_db(y: Tensor, expected: Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (y.double() - expected).norm()))


def as_cached(key: Tensor, key_scale: Tensor, value: Tensor, value_scale: Tensor) -> tuple[Tensor, ...]:
    """The same, both scales of a token behind the codes of its key, as a cache keeps them."""
    size = key.shape[-1]
    width = (size + 3) // 4 * 4
    packed = key.new_empty(*key.shape[:3], width + 8)
    packed[..., :size], packed[..., width:] = key, torch.cat((key_scale, value_scale), -1).view(torch.int8)
    scales = packed[..., width:].view(torch.float32)
    return packed[..., :size], scales[..., :1], value, scales[..., 1:]


def in_integers(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> np.ndarray[Any, Any]:
    """The definition at the head of octavo/ops/attention.py: numpy, 64-bit integers and, around them, float64."""
    shared = query.shape[1] // key.shape[1]
    (q, sq), (k, sk), (v, sv) = (
        codes(np.repeat(x.double().numpy(), times, 1)) for x, times in ((query, 1), (key, shared), (value, shared))
    )
    scores = (q @ k.swapaxes(-1, -2)) * sq * sk.swapaxes(-1, -2) * scaling
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        scores = np.where(mask.numpy(), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    p, sp = codes(weights * sv.swapaxes(-1, -2))
    return (p @ v) * sp


def codes(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale).astype(np.int64), scale


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def assert_same_codes(y: Tensor, expected: Tensor) -> None:
    """But for a probability, here and there, that fell to the other side of a rounding: a step in its row."""
    difference = (y.double() - expected).abs() / expected.double().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert difference.max() < 0.02
    assert (difference < 1e-5).double().mean() > 0.98


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_sums_are_those_of_integers(masked: bool, softcap: float | None) -> None:
    query, key, value = heads(rows=40, tokens=1300, size=24, value=20)  # sums that are beyond what fp32 counts
    mask = causal(40, 1300) if masked else None
    y = ops.int8_attention(query, key, value, mask, 0.2, softcap)
    expected = torch.from_numpy(in_integers(query, key, value, mask, 0.2, softcap))
    assert_same_codes(y, expected)


@given(
    batch=st.integers(0, 2),
    kv=st.integers(1, 3),
    shared=st.integers(1, 3),
    rows=st.integers(0, 6),
    tokens=st.integers(1, 9),
    size=st.integers(1, 20),
    value=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
)
def test_every_shape_is_near_the_float_attention(
    batch: int, kv: int, shared: int, rows: int, tokens: int, size: int, value: int, dtype: torch.dtype
) -> None:
    query, key, values = (x.to(dtype) for x in heads(batch, kv, shared, rows, tokens, size, value))
    mask = torch.rand(batch, 1, rows, tokens) < 0.7
    y = ops.int8_attention(query, key, values, mask, size**-0.5)
    expected = exact(query, key, values, mask, size**-0.5)
    assert y.dtype == dtype
    assert y.shape == (batch, kv * shared, rows, value)
    assert y.is_contiguous()
    largest = values.double().abs().max() if values.numel() else torch.tensor(0.0)
    assert ((y.double() - expected).abs() <= 0.06 * largest).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_error_is_that_of_eight_bits(dtype: torch.dtype, masked: bool) -> None:
    query, key, value = (x.to(dtype) for x in heads(rows=200, tokens=300, size=64, value=64))
    mask = causal(200, 300) if masked else None
    y = ops.int8_attention(query, key, value, mask, 64**-0.5)
    assert sqnr_db(y, exact(query, key, value, mask, 64**-0.5)) > 32


def test_decoding_one_token_over_a_long_cache() -> None:
    query, key, value = heads(rows=1, tokens=5000, size=64, value=64)
    y = ops.int8_attention(query, key, value, None, 64**-0.5)
    assert sqnr_db(y, exact(query, key, value, None, 64**-0.5)) > 25


def test_a_first_token_that_draws_the_attention_leaves_steps_for_the_rest() -> None:
    """An attention sink: 0.9 of the probability, next to no value. Codes of the bare probabilities would all be 0 for
    the other tokens."""
    query, key, value = heads(kv=1, shared=1, rows=5, tokens=400, size=32)
    query[..., 0] = 10
    key[..., 0], key[:, :, 0, 0] = 0, 5
    value[:, :, 0] *= 1e-3
    probabilities = (query.double() @ key.double().mT * 32**-0.5).softmax(-1)
    assert (probabilities[..., 1:] < probabilities[..., :1] / 254).double().mean() > 0.7
    assert sqnr_db(ops.int8_attention(query, key, value, None, 32**-0.5), exact(query, key, value, None, 32**-0.5)) > 25


@pytest.mark.parametrize("zeros", [1, 3, 7])
def test_tokens_whose_value_is_zero_leave_the_steps_to_the_rest(zeros: int) -> None:
    """As where values are shifted by a token, or padded: a scale of 1 for them would be far above all others."""
    query, key, value = heads(1, 2, 2, 8, 8, 64, 64)
    value *= 0.1
    value[:, :, :zeros] = 0
    expected = exact(query, key, value, None, 0.125)
    for attend in (ops.int8_attention, attention.int8_attention, fake_int8_attention):
        assert sqnr_db(attend(query, key, value, None, 0.125), expected) > 35
    assert not ops.int8_attention(query, key, torch.zeros_like(value), None, 0.125).any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_fake_and_real_agree_to_rounding(masked: bool, softcap: float | None) -> None:
    query, key, value = heads(rows=30, tokens=40)
    mask = causal(30, 40) if masked else None
    fake = fake_int8_attention(query, key, value, mask, 0.25, softcap)
    real = ops.int8_attention(query, key, value, mask, 0.25, softcap)
    difference = (fake - real).abs() / real.abs().amax(-1, keepdim=True)
    assert difference.max() < 0.02  # a probability that fell to the other side of a rounding
    assert (difference < 1e-5).double().mean() > 0.98
    assert sqnr_db(fake, exact(query, key, value, mask, 0.25, softcap)) < 60, "nothing was rounded"


def test_values_whose_scale_is_one_are_no_zeros() -> None:
    """Codes of 127 and 0 at once: only of zeros a scale of 1 stands for nothing."""
    query, key, _ = heads(tokens=1)
    value = torch.tensor([127.0, 0.0, -64.0, 3.0]).expand(2, 2, 1, 4)
    y = ops.int8_attention(query, key, value, None, 0.25)
    torch.testing.assert_close(y, value[:, :1].expand(2, 4, 7, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [(2, 4, 10, 12), (2, 1, 1, 12)])
def test_blocks_of_rows_change_nothing(masked: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the composition: of the kernels, see native/test_attention.py."""
    operands = (*heads(rows=10, tokens=12), torch.rand(masked) < 0.8, 0.25)
    whole = attention.int8_attention(*operands)
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 3 * 2 * 4 * 12)
    assert torch.equal(attention.int8_attention(*operands), whole)


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masks_of_every_form_say_the_same() -> None:
    query, key, value = heads()
    allowed = causal(7, 11) & (torch.arange(11) > 1)
    expected = ops.int8_attention(query, key, value, allowed, 0.25)
    infinite = torch.zeros(1, 1, 7, 11).masked_fill(~allowed, -torch.inf)
    for mask in (
        allowed.expand(2, 4, 7, 11),
        infinite,
        infinite.clamp(min=torch.finfo(torch.float32).min),
        infinite.bfloat16().clamp(min=torch.finfo(torch.bfloat16).min),
    ):
        assert torch.equal(ops.int8_attention(query, key, value, mask, 0.25), expected)
    padding = torch.rand(2, 1, 1, 11) < 0.6
    assert torch.equal(
        ops.int8_attention(query, key, value, padding, 0.25),
        ops.int8_attention(query, key, value, padding.expand(2, 4, 7, 11), 0.25),
    )


def test_an_additive_mask_is_a_bias() -> None:
    query, key, value = heads()
    bias = torch.randn(1, 4, 7, 11)
    y = ops.int8_attention(query, key, value, bias, 0.25)
    assert sqnr_db(y, exact(query, key, value, bias, 0.25)) > 30
    assert sqnr_db(y, exact(query, key, value, None, 0.25)) < 20


def test_a_row_that_may_attend_to_nothing_is_zero() -> None:
    query, key, value = heads()
    allowed = causal(7, 11).clone()
    rest = ops.int8_attention(query, key, value, allowed, 0.25)
    allowed[:, :, 3] = False
    for mask in (allowed, torch.zeros(1, 1, 7, 11).masked_fill(~allowed, -torch.inf)):
        y = ops.int8_attention(query, key, value, mask, 0.25)
        assert (y[:, :, 3] == 0).all()
        assert torch.equal(y[:, :, [0, 1, 2, 4, 5, 6]], rest[:, :, [0, 1, 2, 4, 5, 6]])


def test_the_lowest_number_everywhere_averages_as_float_attention_does() -> None:
    query, key, value = heads()
    mask = torch.full((1, 1, 1, 11), torch.finfo(torch.float32).min)
    y = ops.int8_attention(query, key, value, mask, 0.25)
    torch.testing.assert_close(y, value.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(y), atol=0.02, rtol=0)


def test_no_token_changes_how_another_is_rounded() -> None:
    """What is masked, padding or the future, may hold anything: the result keeps its bits."""
    query, key, value = heads()
    mask = causal(7, 11) & (torch.arange(11) > 1)
    before = ops.int8_attention(query, key, value, mask, 0.25)
    for hidden, rows in ((slice(0, 2), slice(0, 7)), (slice(8, 11), slice(0, 4))):
        changed_key, changed_value = key.clone(), value.clone()
        changed_key[:, :, hidden] *= 50
        changed_value[:, :, hidden] *= 50
        after = ops.int8_attention(query, changed_key, changed_value, mask, 0.25)
        assert torch.equal(after[:, :, rows], before[:, :, rows])


def test_one_row_at_a_time_is_all_rows_at_once() -> None:
    query, key, value = heads(rows=11, tokens=11)
    whole = ops.int8_attention(query, key, value, causal(11, 11), 0.25)
    for row in range(11):
        cached = (query[:, :, row : row + 1], key[:, :, : row + 1], value[:, :, : row + 1])
        torch.testing.assert_close(ops.int8_attention(*cached, None, 0.25)[:, :, 0], whole[:, :, row])


# -- tensors of every kind --------------------------------------------------------------------------------------------


def test_strides_change_no_bit() -> None:
    query, key, value = heads()
    expected = ops.int8_attention(query, key, value, None, 0.25)

    def as_projected(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    other = (as_projected(query), key.mT.contiguous().mT, torch.cat([value, value], -1)[..., :16])
    assert torch.equal(ops.int8_attention(*other, None, 0.25), expected)


def test_the_operands_are_not_modified() -> None:
    operands = (*heads(), torch.randn(1, 1, 7, 11))
    copies = [x.clone() for x in operands]
    ops.int8_attention(*operands, 0.25, 2.0)
    assert all(torch.equal(x, copy) for x, copy in zip(operands, copies, strict=True))


def test_no_tokens_give_zeros() -> None:
    query, key, value = heads(tokens=0)
    assert torch.equal(ops.int8_attention(query, key, value, None, 0.25), torch.zeros(2, 4, 7, 16))


def test_nan_stays_in_its_row() -> None:
    query, key, value = heads()
    expected = ops.int8_attention(query, key, value, None, 0.25)
    query[0, 1, 2, 3] = torch.nan
    y = ops.int8_attention(query, key, value, None, 0.25)
    assert y[0, 1, 2].isnan().all()
    expected[0, 1, 2] = torch.nan
    assert torch.equal(y.nan_to_num(9), expected.nan_to_num(9))


def test_autocast_decides_the_dtype_and_not_the_sums() -> None:
    query, key, value = heads()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.int8_attention(query, key, value, None, 0.25)
    assert torch.equal(y, ops.int8_attention(query.bfloat16(), key, value, None, 0.25))


def test_a_gradient_is_refused() -> None:
    query, key, value = heads()
    y = ops.int8_attention(query.requires_grad_(), key, value, None, 0.25)
    with pytest.raises(OctavoError, match="gradient through int8 attention was asked for, which is for inference"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 7, 16)}, r"key and value: .* with 3 a multiple of KV"),
        ({"key": torch.zeros(2, 2, 11, 15)}, r"key and value: shapes are \[2, 2, 11, 15\]"),
        ({"value": torch.zeros(2, 2, 10, 16)}, r"key and value: .*\[2, 2, 10, 16\], expected \[2, KV, S, 16\]"),
        ({"key": torch.zeros(1, 2, 11, 16)}, r"key and value: shapes are \[1, 2, 11, 16\]"),
        ({"query": torch.zeros(2, 7, 16)}, r"query: shape is \[2, 7, 16\], expected \[batch, heads"),
        ({"value": torch.zeros(2, 2, 11, 16, dtype=torch.int8)}, "dtype is torch.int8, expected bf16, fp16 or fp32"),
        ({"mask": torch.zeros(7, 11)}, r"mask: shape is \[7, 11\], expected \[2, 4, 7, 11\] or 1 in place"),
        ({"mask": torch.zeros(2, 2, 7, 11)}, r"mask: shape is \[2, 2, 7, 11\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_that_do_not_go_together_are_refused(change: dict[str, Tensor], message: str, device: str) -> None:
    operands: dict[str, Any] = {**dict(zip(("query", "key", "value"), heads(), strict=True)), "mask": None, **change}
    on_device = {name: x if x is None else x.to(device) for name, x in operands.items()}
    call = ops.int8_attention if device == "cpu" else torch.ops.octavo.int8_attention
    with pytest.raises(QuantizeError, match=message):
        call(**on_device, scaling=0.25)


def codes_of_heads() -> dict[str, Tensor]:
    query, key, value = heads()
    (k, k_scale), (v, v_scale) = ops.quantize_per_token(key), attention.value_codes(value)
    return {"query": query, "key": k, "key_scale": k_scale, "value": v, "value_scale": v_scale}


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_attention_of_codes_is_that_of_what_they_stand_for(dtype: torch.dtype) -> None:
    operands = codes_of_heads()
    query = operands.pop("query").to(dtype)
    key, value = (operands[name].double() * operands[f"{name}_scale"] for name in ("key", "value"))
    for mask, is_causal in ((None, False), (causal(7, 11), False), (None, True)):
        allowed = torch.ones(7, 11, dtype=torch.bool).tril() if is_causal else mask
        y = torch.ops.octavo_reference.float_attention_of_codes(query, *operands.values(), mask, 0.25, is_causal)
        expected = exact(query, key, value, allowed, 0.25)
        assert y.dtype == dtype and y.is_contiguous()
        unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-6}[dtype]
        torch.testing.assert_close(y.double(), expected, rtol=unit, atol=1e-6)


def test_a_gradient_through_codes_is_refused() -> None:
    operands = codes_of_heads()
    operands["query"].requires_grad_()
    y = ops.float_attention_of_codes(**operands, mask=None, scaling=0.25)
    with pytest.raises(OctavoError, match="gradient through octavo's float attention was asked for"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 7, 16)}, r"key and value: .* with 3 a multiple of KV"),
        ({"key": torch.zeros(2, 2, 11, 16)}, "key: dtype is torch.float32, expected int8"),
        ({"value": torch.zeros(2, 2, 10, 16, dtype=torch.int8)}, r"key and value: .*\[2, 2, 10, 16\], expected"),
        ({"key_scale": torch.ones(2, 2, 11)}, r"key_scale: is torch.float32 \[2, 2, 11\], expected fp32 \[2, 2, 11"),
        ({"value_scale": torch.ones(2, 2, 11, 1).half()}, r"value_scale: is torch.float16 .*one for each token"),
        ({"mask": torch.zeros(7, 11)}, r"mask: shape is \[7, 11\], expected \[2, 4, 7, 11\] or 1 in place"),
    ],
)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_codes_that_do_not_go_together_are_refused(change: dict[str, Tensor], message: str, kind: str) -> None:
    operands = {**codes_of_heads(), "mask": None, **change}
    with pytest.raises(QuantizeError, match=message):
        getattr(ops, f"{kind}_attention_of_codes")(**operands, scaling=0.25)


def test_more_tokens_than_int32_can_sum_are_refused() -> None:
    query, many = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8).expand(1, 1, 131072, 8)
    for call in (ops.int8_attention, attention.int8_attention):
        with pytest.raises(QuantizeError, match=r"key: has 131072 tokens, expected up to 131071.*use float attention"):
            call(query, many, many, None, 1.0)
