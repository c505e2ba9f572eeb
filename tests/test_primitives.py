"""The arithmetic, against float64 and facts derived by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.errors import QuantizeError
from octavo.primitives import (
    GRANULARITIES,
    Granularity,
    Range,
    amax,
    choose_scale,
    dequantize,
    quantize,
    quantize_weight,
)
from tests.cuda_division import CudaDivision

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STORED = [torch.float32, torch.bfloat16, torch.float16]


def groups_of(granularity: Granularity) -> int | None:
    return 4 if granularity == "per_group" else None


def spread(scale: Tensor, like: Tensor) -> Tensor:
    """The scale of each element, by repetition: independent of how the library aligns the two."""
    if scale.dim() == 2 and like.dim() == 2 and scale.shape[1] > 1:
        return scale.repeat_interleave(like.shape[1] // scale.shape[1], dim=1)
    if scale.dim() == 2 and like.dim() > 2:
        scale = scale.reshape(-1, *[1] * (like.dim() - 1))
    return scale.expand(like.shape)


# -- facts derived by hand ---------------------------------------------------------------------------------------------


def test_a_row_worked_out_by_hand() -> None:
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5, 2.5, -126.6]])  # amax 127: the scale is exactly 1
    scale = choose_scale(x, "per_channel")
    assert scale.tolist() == [[1.0]]
    # Halves go to the even neighbour: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -63.5 -> -64.
    assert quantize(x, scale).tolist() == [[127, -64, 0, 2, 2, -127]]


def test_the_largest_code_is_127_and_never_255() -> None:
    """A published walkthrough has q_max = 2**n_bits - 1, which wraps around in int8."""
    x = torch.linspace(-1, 1, 255)[None]
    codes = quantize(x, choose_scale(x, "per_channel"))
    assert codes.tolist() == [list(range(-127, 128))]


def test_per_channel_reduces_over_the_inputs() -> None:
    """The same walkthrough reduces an nn.Linear weight [N, K] over N."""
    weight = torch.tensor([[1.0, 2.0, -4.0], [0.25, -0.5, 0.1]])
    assert choose_scale(weight, "per_channel").tolist() == [
        [torch.tensor(4.0).div(127).item()],
        [torch.tensor(0.5).div(127).item()],
    ]


@pytest.mark.parametrize(
    ("granularity", "shape", "scale_shape"),
    [
        ("per_tensor", (6, 8), (1,)),
        ("per_tensor", (2, 3, 8), (1,)),
        ("per_channel", (6, 8), (6, 1)),
        ("per_channel", (6, 2, 3, 3), (6, 1)),
        ("per_channel", (6,), (6, 1)),
        ("per_group", (6, 8), (6, 2)),
        ("per_token", (6, 8), (6, 1)),
        ("per_token", (2, 3, 8), (2, 3, 1)),
        ("per_token", (8,), (1,)),
        ("per_channel", (0, 8), (0, 1)),
        ("per_channel", (6, 0), (6, 1)),
        ("per_channel", (6, 1), (6, 1)),
        ("per_token", (0, 8), (0, 1)),
        ("per_tensor", (0,), (1,)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(
    granularity: Granularity, shape: tuple[int, ...], scale_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, dtype=dtype)
    before = x.clone()
    scale = choose_scale(x, granularity, group_size=groups_of(granularity))
    codes = quantize(x, scale)
    assert (scale.shape, scale.dtype) == (scale_shape, torch.float32)
    assert (codes.shape, codes.dtype) == (x.shape, torch.int8)
    back = dequantize(codes, scale, dtype)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    assert torch.equal(x, before), "the caller's tensor was changed"
    assert amax(x, granularity, group_size=groups_of(granularity)).shape == scale_shape


# -- properties ----------------------------------------------------------------------------------------------------


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[N, K] of any float dtype, rows of very different sizes, some of zeros, some not contiguous."""
    n, groups = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    limit = math.log2(torch.finfo(dtype).max if dtype != torch.float64 else 1e38)
    exponents = draw(st.lists(st.integers(-20, min(40, int(limit) - 4)), min_size=n, max_size=n))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(n, 4 * groups, dtype=torch.float64).clamp(-8, 8) * torch.tensor(
        [2.0**e for e in exponents], dtype=torch.float64
    ).reshape(n, 1)
    if n and draw(st.booleans()):
        x[draw(st.integers(0, n - 1))] = 0
    x = x.to(dtype)
    return x.T.contiguous().T if draw(st.booleans()) else x


@given(matrices(), st.sampled_from(GRANULARITIES))
def test_every_code_is_the_nearest(x: Tensor, granularity: Granularity) -> None:
    scale = choose_scale(x, granularity, group_size=groups_of(granularity))
    codes = quantize(x, scale)
    exact = x.double() / spread(scale, x).double()
    # The division is in fp32: where x stands half way between two codes to the last bits of fp32, either is right.
    assert ((codes.double() - exact.clamp(-127, 127)).abs() <= 0.5 * (1 + 2**-15)).all()
    assert not (codes == -128).any()


@given(matrices(), st.sampled_from(GRANULARITIES))
def test_the_error_is_at_most_half_a_step(x: Tensor, granularity: Granularity) -> None:
    scale = choose_scale(x, granularity, group_size=groups_of(granularity))
    steps = spread(scale, x).double()
    error = (dequantize(quantize(x, scale), scale, torch.float64) - x.double()).abs()
    assert (error <= steps / 2 * (1 + 2**-15)).all()


@given(matrices(), st.sampled_from(GRANULARITIES))
def test_the_scale_is_one_that_the_dtype_holds_and_as_small_as_can_be(x: Tensor, granularity: Granularity) -> None:
    scale = choose_scale(x, granularity, group_size=groups_of(granularity))
    stored = torch.float32 if x.dtype == torch.float64 else x.dtype
    assert torch.equal(scale.to(stored).float(), scale)
    assert (scale > 0).all()
    largest = amax(x, granularity, group_size=groups_of(granularity))
    zero = largest == 0
    assert (scale[zero] == 1).all()
    codes = quantize(x, scale)
    assert (codes[(spread(zero.float(), x) == 1)] == 0).all()
    # One step of the dtype's precision at most: 2**-8 of bf16, 2**-11 of fp16.
    relative = (scale.double() * 127 / largest.double() - 1).abs()[~zero & (largest > 1e-2)]
    assert (relative <= torch.finfo(stored).eps).all()


@given(matrices(), st.sampled_from([None, 1, 2, 4]))
def test_in_one_pass_the_bits_are_the_same(x: Tensor, group_size: int | None) -> None:
    granularity: Granularity = "per_group" if group_size else "per_channel"
    codes, scale = quantize_weight(x, granularity, group_size=group_size)
    expected = choose_scale(x, granularity, group_size=group_size)
    assert torch.equal(scale, expected)
    assert torch.equal(codes, quantize(x, expected))
    assert codes.is_contiguous()


@pytest.mark.parametrize("granularity", ["per_channel", "per_group", "per_tensor"])
def test_codes_are_contiguous_whatever_the_strides(granularity: Granularity) -> None:
    """Kernels read codes as they lie: others would be copied at every call."""
    codes, _ = quantize_weight(torch.randn(8, 6).T, granularity, group_size=groups_of(granularity))
    assert codes.is_contiguous()


# Blocks are of 524 rows, of which the last is not full, and of one row that is longer than a block should be.
@pytest.mark.parametrize("shape", [(1100, 1000), (2, 600_000)])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group", "per_tensor"])
def test_in_one_pass_over_more_rows_than_a_block(granularity: Granularity, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.bfloat16)
    weight[0, 0] = 7.0  # the largest: all blocks have its scale per tensor
    codes, scale = quantize_weight(weight, granularity, group_size=groups_of(granularity))
    assert torch.equal(scale, choose_scale(weight, granularity, group_size=groups_of(granularity)))
    assert torch.equal(codes, quantize(weight, scale))


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (4, 1, 3), (7, 2, 1, 1, 2)])
def test_convolution_weights_have_one_scale_a_filter(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    codes, scale = quantize_weight(weight)
    assert codes.shape == weight.shape
    for filter_codes, filter_scale, original in zip(codes, scale, weight, strict=True):
        assert filter_scale.item() == original.abs().max().div(127).item()
        assert torch.equal(filter_codes, (original / filter_scale).round().to(torch.int8))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 2), (3, 0, 2), (0,)])
def test_weights_without_elements_have_codes(shape: tuple[int, ...]) -> None:
    codes, scale = quantize_weight(torch.empty(shape))
    assert codes.shape == shape
    assert scale.tolist() == [[1.0]] * shape[0]
    assert dequantize(codes, scale).shape == shape


@pytest.mark.parametrize("granularity", ["per_channel", "per_group", "per_tensor"])
def test_on_meta_there_are_shapes(granularity: Granularity) -> None:
    weight = torch.empty(6, 8, dtype=torch.bfloat16, device="meta")
    codes, scale = quantize_weight(weight, granularity, group_size=groups_of(granularity))
    real = quantize_weight(torch.randn(6, 8), granularity, group_size=groups_of(granularity))
    assert codes.is_meta and scale.is_meta
    assert [(t.shape, t.dtype) for t in (codes, scale)] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize("value_range", ["narrow", "full"])
def test_scales_are_the_same_where_a_division_by_a_number_is_not_exact(value_range: Range) -> None:
    x = torch.randn(2000, 3)
    expected = choose_scale(x, "per_channel", value_range=value_range)
    with CudaDivision():
        assert not torch.equal(x / 127.0, x / torch.full_like(x, 127.0))
        assert torch.equal(choose_scale(x, "per_channel", value_range=value_range), expected)


def test_the_default_dtype_has_no_say() -> None:
    torch.set_default_dtype(torch.bfloat16)
    for x in (torch.randn(3, 4), torch.zeros(3, 4), torch.randn(3, 0), torch.randn(3, 4, device="meta")):
        codes, scale = quantize_weight(x)
        assert (codes.dtype, scale.dtype, amax(x, "per_channel").dtype) == (torch.int8, torch.float32, torch.float32)


# -- the ends of the number line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("steps", [1, 2, 63, 64, 127, 128, 190, 191, 255])
def test_rows_of_subnormal_numbers(dtype: torch.dtype, steps: int) -> None:
    """amax / 127 rounds to zero, or to half of itself, in the smallest numbers of a dtype."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal number
    x = (torch.tensor([[steps, -steps, steps // 2, 0]], dtype=torch.float64) * tiny).to(dtype)
    assert x[0, 0] > 0
    scale = choose_scale(x, "per_channel")
    assert torch.equal(scale.to(dtype).float(), scale) and scale.item() > 0
    assert abs(scale.item() - steps * tiny / 127) < tiny  # one of the two numbers of the dtype that are next to it
    back = dequantize(quantize(x, scale), scale, torch.float64)
    assert ((back - x.double()).abs() <= scale.double() / 2).all()


@pytest.mark.parametrize("dtype", STORED)
def test_the_largest_numbers(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, largest / 3]], dtype=dtype)
    scale = choose_scale(x, "per_channel")
    assert torch.isfinite(scale).all()
    assert quantize(x, scale)[0, :2].tolist() == [127, -127]
    assert quantize_weight(x)[0][0, :2].tolist() == [127, -127]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("of", [quantize_weight, ops.quantize_weight], ids=["primitives", "ops"])
def test_a_weight_beyond_fp32_is_told_from_inf(of: Any, granularity: Granularity) -> None:
    weight = torch.ones(4, 8, dtype=torch.float64)
    weight[2, 5] = -1e300
    wanted = r"^head\.weight: holds inf in fp32, .*up to 1e\+300 in torch\.float64\), expected at most 3\.4e\+38"
    with pytest.raises(QuantizeError, match=wanted):
        of(weight, granularity, group_size=groups_of(granularity), name="head.weight")
    weight[2, 5] = math.inf
    with pytest.raises(QuantizeError, match=r"^head\.weight: holds inf, expected finite values only"):
        of(weight, granularity, group_size=groups_of(granularity), name="head.weight")
    weight[2, 5] = math.nan
    with pytest.raises(QuantizeError, match=r"^head\.weight: holds NaN, expected finite values only"):
        of(weight, granularity, group_size=groups_of(granularity), name="head.weight")


def test_beyond_fp32_is_an_error() -> None:
    with pytest.raises(QuantizeError, match=r"head\.weight: holds inf"):
        choose_scale(torch.tensor([[1e300]], dtype=torch.float64), "per_channel", name="head.weight")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused_by_name(bad: float, granularity: Granularity, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, dtype=dtype)
    x[2, 5] = bad
    word = "NaN" if math.isnan(bad) else "inf"
    with pytest.raises(QuantizeError, match=rf"blocks\.3\.weight: holds {word}"):
        choose_scale(x, granularity, group_size=groups_of(granularity), name="blocks.3.weight")
    if granularity in ("per_channel", "per_group"):
        for function in (quantize_weight, ops.quantize_weight):
            with pytest.raises(QuantizeError, match=rf"blocks\.3\.weight: holds {word}"):
                function(x, granularity, group_size=groups_of(granularity), name="blocks.3.weight")


def test_nan_is_found_in_a_later_block_of_rows() -> None:
    weight = torch.randn(1100, 1000)
    weight[1099, 999] = math.nan
    with pytest.raises(QuantizeError, match="w: holds NaN"):
        quantize_weight(weight, name="w")


# -- gpt-fast's convention -----------------------------------------------------------------------------------------


def gpt_fast(x: Tensor) -> tuple[Tensor, Tensor]:
    """`dynamically_quantize_per_channel(x, -128, 127, torch.int8)`, derived anew from its description: the span of 255
    codes covers twice the largest magnitude, scales are not below the fp32 epsilon, codes are clamped to int8."""
    magnitude = torch.maximum(-x.min(dim=1).values.clamp(max=0), x.max(dim=1).values.clamp(min=0))
    scales = (magnitude / ((127 - -128) / 2)).clamp(min=2.0**-23)
    return torch.clamp(torch.round(x / scales[:, None]), -128, 127).to(torch.int8), scales


@given(matrices())
def test_the_full_range_is_that_of_gpt_fast_bit_for_bit(x: Tensor) -> None:
    codes, scales = gpt_fast(x.float())
    ours, scale = quantize_weight(x, value_range="full")
    assert torch.equal(scale.squeeze(1), scales)
    assert torch.equal(ours, codes)
    assert torch.equal(quantize(x, scale, value_range="full"), codes)


def test_the_full_range_uses_minus_128() -> None:
    codes, scale = quantize_weight(torch.tensor([[-127.5, 127.5, 0.5, 1.5]]), value_range="full")
    assert scale.item() == 1
    assert codes.tolist() == [[-128, 127, 0, 2]]


def test_zeros_in_the_full_range() -> None:
    codes, scale = quantize_weight(torch.zeros(2, 3), value_range="full")
    assert not codes.any()
    assert scale.tolist() == [[2**-23], [2**-23]]


# -- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "granularity", "group_size", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), "per_channel", None, "w: dtype is torch.int32, expected a floating"),
        (torch.zeros(2, 8), "per_group", None, "w: group_size=None .* per_group needs a divisor of K=8"),
        (torch.zeros(2, 8), "per_channel", 4, "w: group_size is 4 with granularity 'per_channel'"),
        (torch.zeros(2, 96), "per_group", 64, r"group_size=64 does not fit .* divisor of K=96, such as \[96, 48, 32\]"),
        (torch.zeros(2, 8), "per_group", 0, "group_size=0"),
        (torch.zeros(2, 0), "per_group", 4, "group_size=4 does not fit .* needs a divisor of K=0$"),
        (torch.zeros(2, 8, 3), "per_group", 4, r"group_size=4 does not fit a weight of shape \[2, 8, 3\]"),
        (torch.zeros(2, 8), "per_row", None, "unknown granularity 'per_row', expected one of"),
        (torch.tensor(1.0), "per_channel", None, "0-d tensor"),
    ],
)
def test_wrong_arguments(x: Tensor, granularity: Granularity, group_size: int | None, message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        choose_scale(x, granularity, group_size=group_size, name="w")


@pytest.mark.parametrize("function", [quantize, dequantize])
def test_a_scale_of_another_shape(function: object) -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(QuantizeError, match=r"codes?|x: a scale of shape \[5, 1\] does not fit shape \[4, 6\]"):
        function(x, torch.ones(5, 1))  # type: ignore[operator]
    with pytest.raises(QuantizeError, match="does not fit"):
        function(x, torch.ones(4, 4))  # type: ignore[operator]
    with pytest.raises(QuantizeError, match="does not fit"):
        function(x, torch.ones(4, 0))  # type: ignore[operator]


def test_dequantize_rounds_once() -> None:
    codes = torch.tensor([[101, -77]], dtype=torch.int8)
    scale = torch.tensor([[0.123456789]])
    for dtype in DTYPES:
        exact = codes.double() * scale.double()
        assert torch.equal(dequantize(codes, scale, dtype), exact.float().to(dtype))


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        (shape, granularity)
        for shape in [(8,), (4, 8), (2, 3, 8), (0, 8)]
        for granularity in ("per_channel", "per_tensor")
    ]
    + [((4, 8), "per_group")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_gives_the_same_bits(shape: tuple[int, ...], granularity: Granularity, dtype: torch.dtype) -> None:
    weight, group_size = torch.randn(shape).to(dtype), groups_of(granularity)
    codes, scale = quantize_weight(weight, granularity, group_size=group_size)
    found, own = ops.quantize_weight(weight, granularity, group_size=group_size)
    assert torch.equal(found, codes) and torch.equal(own, scale)
    told, of_told = ops.quantize_weight(weight.to("meta"), granularity, group_size=group_size)
    assert told.is_meta and of_told.is_meta and (told.shape, of_told.shape) == (codes.shape, scale.shape)


@pytest.mark.parametrize("function", [quantize_weight, ops.quantize_weight])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_a_weight_that_is_not_as_promised_is_refused_however_it_is_shaped(
    shape: tuple[int, ...], function: Any
) -> None:
    whole, weight = torch.ones(shape, dtype=torch.int32), torch.ones(shape)
    with pytest.raises(QuantizeError, match=r"^w: dtype is torch\.int32, expected a floating point tensor"):
        function(whole, name="w")
    with pytest.raises(QuantizeError, match=r"^w: group_size is 2 with granularity 'per_channel'"):
        function(weight, group_size=2, name="w")
    if len(shape) != 2:
        with pytest.raises(QuantizeError, match=r"^w: group_size=2 does not fit a weight of shape"):
            function(weight, "per_group", group_size=2, name="w")
