"""The Triton kernels of int8 attention against float64, against 64-bit integers, and against what they stand in for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import QuantizeError
from octavo.ops import attention as composition
from octavo.ops import quantize_per_token
from octavo.ops.triton import attention
from octavo.ops.triton.attention import int8_attention
from tests.ops.simulated_attention import fake_int8_attention
from tests.ops.test_attention import as_cached, assert_same_codes, causal, exact, heads, in_integers, sqnr_db


def computed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None,
    *, device: str,
) -> Tensor:  # fmt: skip
    on_device = (None if x is None else x.to(device) for x in (query, key, value, mask))
    return int8_attention(*on_device, scaling, softcap).cpu()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "parts"), [(1, 5), (40, 1)])
def test_the_sums_are_those_of_integers(
    rows: int, parts: int, masked: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(attention, "_PROGRAMS", 2 * parts)
    query, key, value = heads(batch=1, rows=rows, tokens=1300, size=24, value=20)
    mask = causal(rows, 1300) & (torch.arange(1300) > 600) if masked else None  # whole parts of the keys are hidden
    y = computed(query, key, value, mask, 0.2, softcap, device=device)
    assert_same_codes(y, torch.from_numpy(in_integers(query, key, value, mask, 0.2, softcap)))


def test_codes_have_the_bits_of_what_they_were(device: str) -> None:
    query, key, value = (x.to(device) for x in heads(rows=3, tokens=70, size=24, value=20))
    keys, values = torch.ops.octavo.quantize_per_token(key), composition.value_codes(value)
    rows = torch.cat([keys[0], keys[0]], -1)[..., :24]  # as they lie in a cache, further apart
    y = attention.int8_attention_of_codes(query, rows, keys[1], *values, None, 0.2, None)
    assert torch.equal(y, int8_attention(query, key, value, None, 0.2))


def in_room(key: Tensor, value: Tensor) -> list[Tensor]:
    """Codes and scales as a cache keeps them, with tokens behind them that nobody may read."""
    spoilt = torch.full_like(key[:, :, :5], 100.0), torch.full_like(value[:, :, :5], torch.inf)
    keys, values = (torch.cat(pair, 2) for pair in zip((key, value), spoilt, strict=True))
    cached = as_cached(*quantize_per_token(keys), *composition.value_codes(values))
    return [x[:, :, : key.shape[2]] for x in cached]


def assert_same_bits(y: Tensor, expected: Tensor, device: str) -> None:
    """On a GPU nearly: where strides differ a compiler may lay rows out anew, and sum in another order."""
    assert torch.equal(y, expected) if device == "cpu" else assert_same_codes(y, expected) is None


@pytest.mark.parametrize(
    ("shared", "rows", "tokens", "size", "width", "parts", "softcap"),
    [
        (1, 1, 130, 64, 64, 3, None),
        (4, 1, 257, 24, 20, 2, 1.5),
        (3, 5, 96, 6, 6, 1, None),
        (2, 8, 70, 130, 33, 2, None),
        (2, 9, 77, 24, 20, 1, 1.5),
    ],
)
def test_a_cache_is_read_as_it_lies(
    shared: int, rows: int, tokens: int, size: int, width: int, parts: int, softcap: float | None,
    monkeypatch: pytest.MonkeyPatch, device: str,
) -> None:  # fmt: skip
    """Up to 16 rows of a key head, and more, for which keys and values are laid out anew."""
    monkeypatch.setattr(attention, "_PROGRAMS", 4 * parts)
    monkeypatch.setattr(attention, "_LEAST_KEYS", 1)
    query, key, value = heads(2, 2, shared, rows, tokens, size, width)
    value[:, :, 3] = 0
    mask = causal(rows, tokens) & (torch.arange(tokens) > 40)
    cached = in_room(key.to(device), value.to(device))
    dense = [x.contiguous() for x in cached]
    for operand in (None, mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        rest = (None if operand is None else operand.to(device), 0.2, softcap)
        y, same = (
            attention.int8_attention_of_codes(query.to(device), *codes, *rest).cpu() for codes in (cached, dense)
        )
        assert_same_bits(y, same, device)
        expected = composition.int8_attention_of_codes(query, *(x.cpu() for x in dense), operand, 0.2, softcap)
        assert_same_codes(y, expected)


def test_few_rows_compute_what_they_do_among_many(device: str) -> None:
    """Of many rows values are transposed beforehand."""
    query, key, value = (x.to(device) for x in heads(2, 2, 2, 20, 200, 40, 24))
    many = int8_attention(query, key, value, None, 0.2).cpu()
    few = int8_attention(query[:, :, :3], key, value, None, 0.2).cpu()
    assert_same_bits(few, many[:, :, :3], device)


def test_of_a_cache_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[object, ...]] = []
    monkeypatch.setattr(attention, "launch", lambda kernel, grid, *args, **meta: launched.append(args))
    query, key, value = heads(1, 2, 4, 4, 512, 24, 24)
    k, k_scale, v, v_scale = in_room(key, value)
    attention.int8_attention_of_codes(query, k, k_scale, v, v_scale, None, 0.2, None)
    statistics, products, _ = ([id(one) for one in args] for args in launched)
    assert {id(k), id(k_scale), id(v_scale)} < set(statistics)
    assert {id(k), id(k_scale), id(v_scale), id(v)} < set(products)


def test_what_32_bits_do_not_reach_is_copied() -> None:
    tokens_first = torch.empty_strided((1, 1, 3, 8), (8, 8, 2**30, 1), device="meta", dtype=torch.int8)
    assert attention.as_it_lies(tokens_first).is_contiguous()
    assert attention.as_it_lies(tokens_first[:, :, :1]).stride(2) == 2**30
    assert attention.as_it_lies(tokens_first.new_empty(1, 1, 8, 3).mT).is_contiguous()


@given(
    batch=st.integers(0, 2),
    kv=st.integers(1, 2),
    shared=st.integers(1, 3),
    rows=st.integers(0, 6),
    tokens=st.integers(1, 9),
    size=st.integers(1, 20),
    value=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    broadcast=st.tuples(*[st.booleans()] * 4),
    kind=st.sampled_from(["none", "bool", "float", "bf16"]),
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
    query, key, values = (x.to(dtype) for x in heads(batch, kv, shared, rows, tokens, size, value))
    full = (batch, kv * shared, rows, tokens)
    mask = torch.randn([1 if one else n for one, n in zip(broadcast, full, strict=True)])
    operand = {"none": None, "bool": mask > -0.5, "float": mask, "bf16": mask.bfloat16()}[kind]
    y = computed(query, key, values, operand, size**-0.5, device=device)
    expected = exact(query, key, values, operand, size**-0.5)
    assert y.dtype == dtype and y.shape == (batch, kv * shared, rows, value) and y.is_contiguous()
    largest = values.double().abs().max() if values.numel() else torch.tensor(0.0)
    assert ((y.double() - expected).abs() <= 0.06 * largest).all()
    simulated = fake_int8_attention(query, key, values, operand, size**-0.5)
    assert ((y.double() - simulated.double()).abs() <= 0.02 * largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tile", "shape", "mask_stride"),
    [
        (attention._FEW, {"shared": 4, "rows": 4, "tokens": 70, "size": 40, "value": 33}, None),
        (attention._MANY, {"shared": 1, "rows": 70, "tokens": 80, "size": 64, "value": 128}, 80),
        (attention._MANY_UNALIGNED, {"shared": 3, "rows": 23, "tokens": 45, "size": 16, "value": 64}, 45),
        (attention._WIDE, {"shared": 2, "rows": 9, "tokens": 40, "size": 130, "value": 20}, 40),
        (attention._WIDE, {"shared": 2, "rows": 9, "tokens": 40, "size": 20, "value": 130}, 40),
    ],
)
def test_every_tile(
    tile: attention.Tile, shape: dict[str, int], mask_stride: int | None, dtype: torch.dtype, device: str
) -> None:
    query, key, value = (x.to(dtype) for x in heads(**shape))
    mask = None if mask_stride is None else causal(shape["rows"], shape["tokens"])
    stacked, width = shape["shared"] * shape["rows"], max(shape["size"], shape["value"])
    assert attention._tile_of(stacked, width, mask) == tile
    y = computed(query, key, value, mask, 0.2, device=device)
    reference = composition.int8_attention(query.float(), key.float(), value.float(), mask, 0.2)
    if dtype == torch.float32:
        assert_same_codes(y, reference)
    assert sqnr_db(y, exact(query, key, value, mask, 0.2)) > 30


@pytest.mark.parametrize("tokens", [1, 64, 65, 640])
def test_parts_of_the_keys_are_put_together(tokens: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """However many there are, and with keys in each that a row may not attend to, up to all."""
    query, key, value = heads(batch=1, kv=2, shared=2, rows=3, tokens=tokens)
    mask = torch.rand(1, 4, 3, tokens) < 0.5
    mask[:, 1, :, : tokens // 2], mask[:, 2, 1] = False, False
    whole = computed(query, key, value, mask, 0.5, device=device)
    assert (whole[:, 2, 1] == 0).all()
    for parts in (2, 10):
        monkeypatch.setattr(attention, "_PROGRAMS", 2 * parts)
        monkeypatch.setattr(attention, "_LEAST_KEYS", 1)
        assert_same_codes(computed(query, key, value, mask, 0.5, device=device), whole)


def test_sums_are_cut_before_they_leave_int32(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """More keys than a sum of 127 * 127 has room for; the parts' sums do not fit int32 either."""
    tokens = 140_000
    monkeypatch.setattr(attention, "_PROGRAMS", 1)
    monkeypatch.setattr(attention, "_FEW", attention.Tile(16, 4096, 4, 1))
    query, key = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, tokens, 32)
    value = torch.ones(1, 1, tokens, 1)
    y = computed(query, key, value, None, 1.0, device=device)
    torch.testing.assert_close(y, torch.ones(1, 1, 1, 1), rtol=1e-4, atol=0)


def test_masks_of_every_form_say_the_same(device: str) -> None:
    query, key, value = heads()
    allowed = causal(7, 11) & (torch.arange(11) > 1)
    expected = computed(query, key, value, allowed, 0.25, device=device)
    infinite = torch.zeros(1, 1, 7, 11).masked_fill(~allowed, -torch.inf)
    for mask in (
        allowed.expand(2, 4, 7, 11),
        allowed.mT.contiguous().mT,
        torch.cat([allowed, allowed], -1)[..., :11],
        infinite,
        infinite.clamp(min=torch.finfo(torch.float32).min),
        infinite.bfloat16().clamp(min=torch.finfo(torch.bfloat16).min),
        infinite.half().clamp(min=torch.finfo(torch.float16).min),
    ):
        y = computed(query, key, value, mask, 0.25, device=device)
        if device == "cpu":
            assert torch.equal(y, expected)
        else:  # for each dtype of a mask a compiler lays the rows out anew, and sums in another order
            assert_same_codes(y, expected)


def test_a_row_that_may_attend_to_nothing_is_zero(device: str) -> None:
    query, key, value = heads()
    allowed = causal(7, 11).clone()
    rest = computed(query, key, value, allowed, 0.25, device=device)
    allowed[:, :, 3] = False
    for mask in (allowed, torch.zeros(1, 1, 7, 11).masked_fill(~allowed, -torch.inf)):
        y = computed(query, key, value, mask, 0.25, device=device)
        assert (y[:, :, 3] == 0).all()
        assert torch.equal(y[:, :, [0, 1, 2, 4, 5, 6]], rest[:, :, [0, 1, 2, 4, 5, 6]])


def test_the_lowest_number_everywhere_averages_as_float_attention_does(device: str) -> None:
    query, key, value = heads()
    mask = torch.full((1, 1, 1, 11), torch.finfo(torch.float32).min)
    y = computed(query, key, value, mask, 0.25, device=device)
    torch.testing.assert_close(y, value.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(y), atol=0.02, rtol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in which kernels are interpreted
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("parts", [1, 2])
def test_nan_goes_where_it_does_in_the_definition(
    number: float, parts: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """In a query to its row; in a key or a value, to whoever reads its head and may see it, or multiplies it by 0."""
    monkeypatch.setattr(attention, "_PROGRAMS", 4 * parts)
    monkeypatch.setattr(attention, "_LEAST_KEYS", 1)
    mask = torch.ones(1, 1, 5, 100, dtype=torch.bool)
    mask[:, :, 2, :70] = False
    for operand in range(3):
        operands = list(heads(rows=5, tokens=100))
        operands[operand][0, 1, 3, 2] = number
        y = computed(*operands, mask, 0.25, device=device)
        expected = composition.int8_attention(*operands, mask, 0.25)
        assert y.isnan().any() and torch.equal(y.isnan(), expected.isnan())
        assert_same_codes(y.nan_to_num(1), expected.nan_to_num(1))


def test_values_of_every_size(device: str) -> None:
    query, key, value = heads()
    for factor in (1e-30, 1e30):
        y = computed(query, key, value * factor, None, 0.25, device=device)
        assert sqnr_db(y, exact(query, key, value * factor, None, 0.25)) > 30
    assert (computed(query, key, value * 1e-38, None, 0.25, device=device).abs() < 1e-36).all()
    assert (computed(query, key, value * 0, None, 0.25, device=device) == 0).all()
    value *= 1e-3
    value[:, :, :3] = 0  # their scale takes no step from the rest
    assert sqnr_db(computed(query, key, value, None, 0.25, device=device), exact(query, key, value, None, 0.25)) > 30


def test_strides_change_no_bit(device: str) -> None:
    query, key, value = (x.to(device) for x in heads())
    expected = int8_attention(query, key, value, None, 0.25)
    projected = query.transpose(1, 2).contiguous().transpose(1, 2)
    other = (projected, key.mT.contiguous().mT, torch.cat([value, value], -1)[..., :16])
    assert torch.equal(int8_attention(*other, None, 0.25), expected)


def test_no_tokens_give_zeros(device: str) -> None:
    query, key, value = heads(tokens=0)
    assert torch.equal(computed(query, key, value, None, 0.25, device=device), torch.zeros(2, 4, 7, 16))


def test_float64_is_the_composition(device: str) -> None:
    query, key, value = heads()
    mask = torch.randn(1, 1, 7, 11, dtype=torch.float64)
    for operands in ((query.double(), key.double(), value.double(), None), (query, key, value, mask)):
        y = computed(*operands, 0.25, device=device)
        assert_same_codes(y, composition.int8_attention(*operands, 0.25))


def test_the_host_reads_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, ...]] = []
    monkeypatch.setattr(attention, "launch", lambda kernel, grid, *args, **meta: launched.append(grid))
    query, key, value = (x.to("meta") for x in heads(rows=1, tokens=512))
    assert int8_attention(query, key, value, None, 0.25).shape == query.shape
    assert launched == [(8,), (8,), (8,)], "1 tile of rows, 4 groups, 2 parts; 8 rows"


def test_shapes_that_do_not_go_together_are_refused() -> None:
    query, key, value = heads()
    with pytest.raises(QuantizeError, match="mask: shape is"):
        int8_attention(query, key, value, torch.zeros(7, 11), 0.25)
