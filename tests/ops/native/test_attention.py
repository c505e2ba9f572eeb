"""Attention in int8 is its definition in float64, and float attention the formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.ops import dispatch, native
from octavo.ops.attention import value_codes
from tests.ops.native.kernels import FLOATS, WITH_KERNELS, assert_rounds_to
from tests.ops.native.run_python import run_python
from tests.ops.test_attention import as_cached, exact

pytestmark = WITH_KERNELS


def attention_in_double(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The definition at the head of octavo/ops/attention.py in float64, and what it may be off by in fp32: where a
    probability lies next to half way between two codes, it may get either."""
    shared = query.shape[1] // key.shape[1]
    (q, sq), (k, sk), (v, sv) = (
        [part.double().repeat_interleave(times, 1) for part in torch.ops.octavo_reference.quantize_per_token(x)]
        for x, times in ((query, 1), (key, shared), (value, shared))
    )
    scores = q @ k.mT * sq * sk.mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(nowhere, 0) * sv.mT
    step = weights.amax(-1, keepdim=True) / 127 if weights.shape[-1] else weights.new_ones((*weights.shape[:-1], 1))
    step = torch.where(step == 0, 1.0, step)
    p = (weights / step).round()
    to_half = 0.5 - (weights / step - p).abs()
    either = (to_half < 2e-3).double()
    return p @ v * step, (either @ v.abs() + 1e-4 * (p @ v.abs())) * step


def as_transformers_hands_it(x: Tensor) -> Tensor:
    """[B, heads, T, D] that lies in memory as [B, T, heads, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def a_mask(kind: str, batch: int, heads: int, rows: int, tokens: int, seed: int) -> Tensor | None:
    """Of one form or another; some rows of the random ones allow nothing."""
    if kind == "none":
        return None
    every = (batch, heads, rows, tokens)
    shape = [size if seed >> i & 1 else 1 for i, size in enumerate(every)]
    if "bias" in kind:
        return torch.randn(shape).to(torch.float16 if seed & 1 else torch.bfloat16)
    allowed = torch.rand(shape) < (0.05, 0.5, 0.95)[seed % 3]
    if "causal" in kind:
        allowed = torch.ones(1, 1, rows, tokens, dtype=torch.bool).tril(tokens - rows)
    elif "window" in kind:
        allowed = torch.ones(1, 1, rows, tokens, dtype=torch.bool).tril(tokens - rows).triu(tokens - rows - 20)
    elif "padding" in kind:
        allowed = (torch.arange(tokens) >= tokens // 2).expand(batch, 1, 1, tokens)
    if "finite" in kind or "infinite" in kind:
        dtype = FLOATS[seed % 3]
        lowest = kind.startswith("lowest")
        if lowest and dtype == torch.float16:  # next to which a score loses its last bits: in no row is it alone
            allowed = allowed | (torch.arange(tokens) == 0)
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(
            ~allowed, torch.finfo(dtype).min if lowest else -torch.inf
        )
    return allowed.mT.contiguous().mT if seed & 8 else allowed


MASKS = ["none", "bias"] + [
    f"{how} {which}"
    for how in ("boolean", "lowest-finite", "infinite")
    for which in ("random", "causal", "window", "padding")
]


SIZES_OF_ATTENTION = {
    "batch": st.integers(1, 2),
    "kv": st.integers(1, 3),
    "shared": st.sampled_from([1, 2, 3, 4, 7, 13]),
    "rows": st.sampled_from([0, 1, 2, 3, 5, 12, 13, 33]),
    "tokens": st.sampled_from([0, 1, 2, 3, 15, 17, 31, 32, 33, 64, 65, 128, 129, 130, 300]),
    "size": st.sampled_from([1, 2, 3, 5, 16, 33, 64, 65, 128, 200]),
    "value": st.sampled_from([1, 3, 16, 17, 32, 33, 64, 65, 130]),
}


@settings(max_examples=300)
@given(
    **SIZES_OF_ATTENTION,
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    kind=st.sampled_from(MASKS),
    softcap=st.sampled_from([None, None, 30.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_attention(
    isa: str, batch: int, kv: int, shared: int, rows: int, tokens: int, size: int, value: int,
    dtypes: tuple[torch.dtype, ...], kind: str, softcap: float | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    heads = kv * shared
    shapes = ((batch, heads, rows, size), (batch, kv, tokens, size), (batch, kv, tokens, value))
    query, key, values = (torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    mask = a_mask(kind, batch, heads, rows, tokens, seed)
    y = ops.int8_attention(*map(as_transformers_hands_it, (query, key, values)), mask, size**-0.5, softcap)
    expected, error = attention_in_double(query, key, values, mask, size**-0.5, softcap)
    assert y.dtype == query.dtype and y.shape == expected.shape and y.is_contiguous()
    assert_rounds_to(y, expected, error)
    assert torch.equal(ops.int8_attention(query, key, values, mask, size**-0.5, softcap), y)


@pytest.mark.parametrize(("of_key", "of_value"), [(1e-20, 1e30), (1e-37, 1e-30), (1e18, 1e-36), (1.0, 1e-36)])
def test_attention_of_extreme_scales(isa: str, of_key: float, of_value: float) -> None:
    query, key, value = torch.randn(1, 4, 9, 40) / of_key, torch.randn(1, 2, 70, 40) * of_key, torch.randn(1, 2, 70, 30)
    mask = a_mask("lowest-finite causal", 1, 4, 9, 70, 0)
    y = ops.int8_attention(query, key, value * of_value, mask, 0.2, None)
    expected, error = attention_in_double(query, key, value * of_value, mask, 0.2, None)
    assert_rounds_to(y, expected, error)


@pytest.mark.parametrize("kind", ["boolean causal", "lowest-finite causal", "infinite window", "infinite padding"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "value", "mask"])
@pytest.mark.parametrize("rows", [4, 40])
def test_what_is_not_finite_reaches_attention_as_in_the_reference(
    isa: str, rows: int, where: str, bad: float, kind: str
) -> None:
    """In particular from tokens that the mask forbids, which may else be passed over."""
    operands = {
        "query": torch.randn(1, 4, rows, 16),
        "key": torch.randn(1, 2, 100, 16),
        "value": torch.randn(1, 2, 100, 16),
    }
    mask = a_mask(kind, 1, 4, rows, 100, 0)
    assert mask is not None
    if where == "mask" and mask.dtype == torch.bool:
        return
    operands["mask"] = mask.clone() if where == "mask" else mask
    for token in (0, 39, 99):
        changed = {name: x.clone() for name, x in operands.items()}
        changed[where][0, -1, min(token, operands[where].shape[2] - 1), 3 if where != "mask" else token] = bad
        y = ops.int8_attention(**changed, scaling=0.25)
        expected = torch.ops.octavo_reference.int8_attention(**changed, scaling=0.25)
        assert expected.isnan().any() or where == "mask" or kind == "boolean causal"
        assert torch.equal(y.isnan(), expected.isnan())


def test_a_row_of_attention_does_not_depend_on_the_others(isa: str) -> None:
    """To the bit, whichever rows share a block, and whatever is passed over for all of them."""
    query, key, value = torch.randn(1, 6, 40, 32), torch.randn(1, 2, 200, 32), torch.randn(1, 2, 200, 48)
    mask = a_mask("lowest-finite causal", 1, 6, 40, 200, 0)
    assert mask is not None
    whole = ops.int8_attention(query, key, value, mask, 0.2)
    for first, last in ((0, 1), (5, 18), (39, 40)):
        part = ops.int8_attention(query[:, :, first:last], key, value, mask[:, :, first:last], 0.2)
        assert torch.equal(part, whole[:, :, first:last])
    for kind in MASKS:  # of few rows and of many
        mask = a_mask(kind, 1, 6, 40, 200, 6)
        whole = ops.int8_attention(query, key, value, mask, 0.2)
        for row in (0, 7, 39):
            one = None if mask is None else mask[:, :, row % mask.shape[2]].unsqueeze(2)
            y = ops.int8_attention(query[:, :, row : row + 1], key, value, one, 0.2)
            assert torch.equal(y, whole[:, :, row : row + 1]), kind
    everything = a_mask("lowest-finite causal", 1, 6, 40, 200, 0)
    assert everything is not None
    whole, everything = ops.int8_attention(query, key, value, everything, 0.2), everything.clone()
    everything[:, :, 3] = torch.finfo(everything.dtype).min  # a row that shares its attention among all
    others = [i for i in range(40) if i != 3]
    assert torch.equal(ops.int8_attention(query, key, value, everything, 0.2)[:, :, others], whole[:, :, others])


def test_attention_without_heads(isa: str) -> None:
    query, key = torch.randn(2, 0, 1, 8), torch.randn(2, 0, 5, 8)
    cached = as_cached(*ops.quantize_per_token(key), *value_codes(key))
    assert ops.int8_attention(query, key, key, None, 0.25).shape == query.shape
    assert ops.int8_attention_of_codes(query, *cached, None, 0.25).shape == query.shape
    with torch.no_grad():
        assert ops.float_attention(query, key, key, None, 0.25).shape == query.shape
        assert ops.float_attention_of_codes(query, *cached, None, 0.25).shape == query.shape


@settings(max_examples=200)
@given(
    **SIZES_OF_ATTENTION,
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    kind=st.sampled_from(MASKS),
    softcap=st.sampled_from([None, None, 30.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_int8_attention_of_codes_has_the_bits_of_what_they_were(
    isa: str, batch: int, kv: int, shared: int, rows: int, tokens: int, size: int, value: int,
    dtypes: tuple[torch.dtype, ...], kind: str, softcap: float | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    shapes = ((batch, kv * shared, rows, size), (batch, kv, tokens, size), (batch, kv, tokens, value))
    query, key, values = (torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    values[:, :, : seed % 3] = 0
    mask = a_mask(kind, batch, kv * shared, rows, tokens, seed)
    cached = as_cached(*ops.quantize_per_token(key), *value_codes(values))
    y = ops.int8_attention_of_codes(query, *cached, mask, size**-0.5, softcap)
    assert torch.equal(y, ops.int8_attention(query, key, values, mask, size**-0.5, softcap))


@settings(max_examples=300)
@given(
    **SIZES_OF_ATTENTION,
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(["none", "is_causal", *(kind for kind in MASKS if "boolean" in kind)]),
    seed=st.integers(0, 99),
)
def test_float_attention_of_codes(
    isa: str, batch: int, kv: int, shared: int, rows: int, tokens: int, size: int, value: int, dtype: torch.dtype,
    kind: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    query = torch.randn(batch, kv * shared, rows, size).to(dtype)
    keys = ops.quantize_per_token(torch.randn(batch, kv, tokens, size))
    values = value_codes(torch.randn(batch, kv, tokens, value) * torch.rand(batch, kv, tokens, 1) ** 4)
    is_causal = kind == "is_causal"
    mask = None if is_causal else a_mask(kind, batch, kv * shared, rows, tokens, seed)
    operands = (*as_cached(*keys, *values), mask, size**-0.5)
    y = ops.float_attention_of_codes(as_transformers_hands_it(query), *operands, is_causal=is_causal)
    allowed = torch.ones(rows, tokens, dtype=torch.bool).tril() if is_causal else mask
    key, (codes, scale) = keys[0].double() * keys[1], values
    expected, parts = (exact(query, key, v.double() * scale, allowed, size**-0.5) for v in (codes, codes.abs()))
    error = parts * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-18)
    if dtype != torch.float32 and expected.numel() and tokens:
        # Half a step of fixed-point numbers of 16 bits: of the query, and of probabilities times scales.
        step = 2.0**-16 * query.double().abs().amax(-1, keepdim=True) * key.abs().sum(-1).max() * size**-0.5
        error = error + parts * 2 * step + 2.0**-16 * scale.max() * codes.double().abs().sum(2).amax()
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    assert_rounds_to(y, expected, error)
    if native.select(isa).attends:  # else torch's kernels choose by strides
        assert torch.equal(ops.float_attention_of_codes(query, *operands, is_causal=is_causal), y)


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (1, 600), (40, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_error_of_attention_of_codes_is_that_of_its_dtype(
    isa: str, dtype: torch.dtype, rows: int, size: int
) -> None:
    """On average; where keys are all at the ends of their codes, sums are the largest that there are."""
    query, key, value = (torch.randn(2, heads, tokens, size) for heads, tokens in ((6, rows), (2, 700), (2, 700)))
    for keys in (ops.quantize_per_token(key), (key.sign().mul(127).to(torch.int8), torch.full((2, 2, 700, 1), 1e-2))):
        values = value_codes(value)
        y = ops.float_attention_of_codes(query.to(dtype), *keys, *values, None, size**-0.5)
        numbers = (codes.double() * scale for codes, scale in (keys, values))
        expected = exact(query.to(dtype), *numbers, None, size**-0.5)
        error = (y.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


def test_an_attention_sink_leaves_steps_for_the_rest(isa: str) -> None:
    """0.9 of the probability and next to no value: fixed-point numbers are of what reaches the result."""
    query, key, value = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 400, 32), torch.randn(1, 1, 400, 32)
    query[..., 0], key[..., 0], key[:, :, 0, 0] = 10, 0, 5
    value[:, :, 0] *= 1e-3
    keys, values = ops.quantize_per_token(key), value_codes(value)
    expected = exact(query.bfloat16(), keys[0].double() * keys[1], values[0].double() * values[1], None, 32**-0.5)
    y = ops.float_attention_of_codes(query.bfloat16(), *keys, *values, None, 32**-0.5)
    assert (y.double() - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("scales", [(1e-28, 1e25), (1e20, 1e-36), (1e-28, 1.0)])
def test_attention_of_codes_of_extreme_scales(isa: str, scales: tuple[float, float]) -> None:
    of_key, of_value = scales
    query = torch.randn(1, 4, 2, 40) / of_key
    keys, values = ops.quantize_per_token(torch.randn(1, 2, 70, 40)), value_codes(torch.randn(1, 2, 70, 30))
    keys, values = (keys[0], keys[1] * of_key), (values[0], values[1] * of_value)
    for dtype in (torch.float32, torch.bfloat16):
        y = ops.float_attention_of_codes(query.to(dtype), *keys, *values, None, 0.2)
        expected = exact(query.to(dtype), *(codes.double() * scale for codes, scale in (keys, values)), None, 0.2)
        assert (y.double() - expected).norm() < 5e-3 * expected.norm()


def test_what_is_not_finite_reaches_attention_of_codes(isa: str) -> None:
    for dtype in FLOATS:
        query = torch.randn(1, 4, 2, 16).to(dtype)
        keys, values = ops.quantize_per_token(torch.randn(1, 2, 200, 16)), value_codes(torch.randn(1, 2, 200, 16))
        clean = ops.float_attention_of_codes(query, *keys, *values, None, 0.25)
        for bad in (float("nan"), float("inf")):
            spoilt = query.clone()
            spoilt[0, 1, 1, 3] = bad
            y = ops.float_attention_of_codes(spoilt, *keys, *values, None, 0.25)
            assert y[0, 1, 1].isnan().all()
            y[0, 1, 1] = clean[0, 1, 1]
            assert torch.equal(y, clean)
            for of_key in (True, False):
                scale = (keys if of_key else values)[1].clone()
                scale[0, 1, 150] = float("nan") if of_key else bad  # a score of -inf says that there is no weight
                changed = ((keys[0], scale), values) if of_key else (keys, (values[0], scale))
                y = ops.float_attention_of_codes(query, *changed[0], *changed[1], None, 0.25)
                assert not y[:, 2:].isfinite().any() and torch.equal(y[:, :2], clean[:, :2])


@pytest.mark.parametrize("are_values", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("size", [1, 6, 64, 130])
def test_states_are_quantized_to_where_they_are_kept(isa: str, size: int, dtype: torch.dtype, are_values: bool) -> None:
    x = torch.randn(2, 9, 3, size).to(dtype).transpose(1, 2)
    x[0, 1, 4] = 0
    nothing = torch.zeros(2, 3, 20, size, dtype=torch.int8), torch.zeros(2, 3, 20, 1)
    cached = as_cached(*nothing, *nothing)
    codes, scale = cached[2:] if are_values else cached[:2]
    ops.quantize_states(x, codes[:, :, 5:14], scale[:, :, 5:14], are_values=are_values)
    expected = value_codes(x) if are_values else ops.quantize_per_token(x)
    assert torch.equal(codes[:, :, 5:14], expected[0]) and torch.equal(scale[:, :, 5:14], expected[1])
    assert scale[0, 1, 9] == (0 if are_values else 1)
    assert not any(part.any() for kept in (codes, scale) for part in (kept[:, :, :5], kept[:, :, 14:]))


def test_backends_tells_where_attention_has_no_kernel_of_its_own(isa: str) -> None:
    attends = native.select(isa).attends
    done = run_python(
        "import octavo; print([(row.backend, row.why) for row in octavo.backends() if row.op == 'int8_attention'])",
        OCTAVO_ISA=isa,
    )
    composed = f"[('reference', 'composed of other ops, which {isa} kernels serve')]"
    assert done.stdout.strip() == (f"[('{isa}', 'forced by OCTAVO_ISA')]" if attends else composed)


@pytest.fixture(scope="module")
def served_dtypes(isa: str) -> tuple[torch.dtype, ...]:
    """The dtypes in which float attention has kernels of its own, for any number of rows or for few."""
    dtypes = tuple(dtype for dtype, most in native.select(isa).attends_in.items() if most)
    if not dtypes:
        pytest.skip(f"float attention is torch's where {isa} kernels serve")
    return dtypes


@settings(max_examples=300)
@given(
    **SIZES_OF_ATTENTION,
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(["none", "is_causal", *(kind for kind in MASKS if "boolean" in kind)]),
    seed=st.integers(0, 99),
)
def test_float_attention(
    served_dtypes: tuple[torch.dtype, ...], batch: int, kv: int, shared: int, rows: int, tokens: int, size: int,
    value: int, dtype: torch.dtype, kind: str, seed: int,
) -> None:  # fmt: skip
    assume(dtype in served_dtypes)
    torch.manual_seed(seed)
    shapes = ((batch, kv * shared, rows, size), (batch, kv, tokens, size), (batch, kv, tokens, value))
    query, key, values = (torch.randn(shape).to(dtype) for shape in shapes)
    is_causal = kind == "is_causal"
    mask = None if is_causal else a_mask(kind, batch, kv * shared, rows, tokens, seed)
    y = ops.float_attention(*map(as_transformers_hands_it, (query, key, values)), mask, size**-0.5, is_causal=is_causal)
    allowed = torch.ones(rows, tokens, dtype=torch.bool).tril() if is_causal else mask
    expected, parts = (exact(query, key, v, allowed, size**-0.5) for v in (values, values.abs()))
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    assert_rounds_to(y, expected, parts * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-18))
    assert torch.equal(ops.float_attention(query, key, values, mask, size**-0.5, is_causal=is_causal), y)


@pytest.mark.parametrize("kind", ["boolean causal", "boolean random"])
@pytest.mark.parametrize("tokens", [1025, 4200])
def test_attention_of_many_tokens(isa: str, served_dtypes: tuple[torch.dtype, ...], tokens: int, kind: str) -> None:
    """Which float attention meets in parts: some rows may attend to one of these only, or to none at all."""
    torch.manual_seed(tokens)
    rows = 90
    for dtype in served_dtypes:
        query, key, value = (
            torch.randn(1, heads, count, 24).to(dtype) for heads, count in ((4, rows), (2, tokens), (2, tokens))
        )
        key[:, :, tokens // 3] *= 3
        mask = a_mask(kind, 1, 4, rows, tokens, 7)
        assert mask is not None
        mask = mask.expand(1, 4, rows, tokens).clone()
        mask[:, :, 5] = False
        mask[:, :, 6] = torch.arange(tokens) > 1030
        mask[:, :, 7] = torch.arange(tokens) < 30
        y = ops.float_attention(query, key, value, mask, 0.2)
        expected, parts = (exact(query, key, v, mask, 0.2) for v in (value, value.abs()))
        assert_rounds_to(y, expected, parts * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-17))
        assert not y[:, :, 5].any()
        y = ops.int8_attention(query, key, value, mask, 0.2)
        assert_rounds_to(y, *attention_in_double(query, key, value, mask, 0.2, None))


def test_float_attention_of_what_is_not_finite(isa: str, served_dtypes: tuple[torch.dtype, ...]) -> None:
    """A query gives NaN if it, a key or a value that it may attend to has NaN or inf; others are as they were."""
    rows = 2 * 200  # of a key head; where torch serves so many, an inf spoils the queries of a block
    dtypes = [dtype for dtype in served_dtypes if native.select(isa).attends_in[dtype] >= rows]
    assert dtypes
    for dtype in dtypes:
        query, key, value = (torch.randn(1, heads, 200, 16).to(dtype) for heads in (2, 1, 1))
        clean = ops.float_attention(query, key, value, None, 0.25, is_causal=True)
        for bad in (float("nan"), float("inf")):
            spoilt = [x.clone() for x in (query, key, value)]
            spoilt[0][0, 1, 70, 3] = bad
            y = ops.float_attention(spoilt[0], key, value, None, 0.25, is_causal=True)
            assert y[0, 1, 70].isnan().all()
            y[0, 1, 70] = clean[0, 1, 70]
            assert torch.equal(y, clean)
            spoilt[1][0, 0, 160, 3] = bad
            y = ops.float_attention(query, spoilt[1], value, None, 0.25, is_causal=True)
            assert torch.equal(y[:, :, :160], clean[:, :, :160]) and y[:, :, 160].isnan().all() == (bad != bad)
            spoilt[2][0, 0, 160, 3] = bad
            y = ops.float_attention(query, key, spoilt[2], None, 0.25, is_causal=True)
            assert not y[:, :, 160:, 3].isfinite().any() and torch.equal(y[:, :, :150], clean[:, :, :150])
            assert torch.equal(y[:, :, :, 4:], clean[:, :, :, 4:])


@pytest.mark.parametrize("rows", [1, 50])
def test_large_scores_do_not_overflow_in_float_attention(served_dtypes: tuple[torch.dtype, ...], rows: int) -> None:
    """Of 1e4 and more, both ends of the exponential: nothing but the largest counts, in whichever part it is met."""
    for dtype in served_dtypes:
        query, key, value = (torch.randn(1, 2, tokens, 64).to(dtype) for tokens in (rows, 700, 700))
        query = query.sign() * 100
        expected, parts = (exact(query, key, v, None, 1.0) for v in (value, value.abs()))
        y = ops.float_attention(query, key, value, None, 1.0)
        score = 100 * key.abs().double().sum(-1).max()
        assert_rounds_to(y, expected, parts * (2.0**-8 + 64 * 2.0**-23 * score))


def test_backends_tells_in_which_dtypes_float_attention_is_torch_s(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.select(isa)
    monkeypatch.setattr(dispatch, "native_kernels", found)
    row = next(row for row in ops.backends() if row.op == "float_attention" and row.device == "cpu")
    served = any(found.attends_in.values())
    for dtype in FLOATS if served else []:
        assert (f" {str(dtype)[6:]}" in row.why) == (found.attends_in[dtype] < native.ANY_NUMBER)
    assert row.backend == (isa if served else "reference")
    some = {torch.float32: native.ANY_NUMBER, torch.bfloat16: 12, torch.float16: 0}
    monkeypatch.setattr(dispatch, "native_kernels", dataclasses.replace(found, attends_in=some))
    row = next(row for row in ops.backends() if row.op == "float_attention" and row.device == "cpu")
    assert row.backend == isa
    assert row.why.endswith("; torch's own in bfloat16 from 13 rows of a key head on; torch's own in float16")
