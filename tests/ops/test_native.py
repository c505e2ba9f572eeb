"""Native kernels of every instruction set that this machine has, against float64 arithmetic.

What quantizes is held to `primitives.py` bit by bit, sums of codes to exact integers, everything else to the rounding
errors of fp32 sums.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops, primitives
from octavo.errors import QuantizeError
from octavo.ops import native
from octavo.ops.gates import GATES
from tests.ops.test_attention import exact
from tests.ops.test_conv import CONV, CONV_TRANSPOSE, in_double, torch_layout

ROOT = Path(__file__).parents[2]
FORCED = os.environ.get("OCTAVO_ISA", "")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MANY = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 9, 13, 25, 33, 37, 64, 81, 100, 193, 513, 1100])
ODD = st.sampled_from([1, 2, 3, 5, 31, 32, 33, 67])
LONG = st.sampled_from([0, 1, 2, 7, 15, 17, 33, 63, 64, 65, 100, 129, 1030, 2100])


def instruction_sets() -> list[str]:
    if all(row.backend == "reference" for row in ops.backends()):
        return []
    found = []
    for name in ("scalar", "avx2", "avx512", "amx"):
        try:
            native.select(name)
        except QuantizeError:
            continue
        found.append(name)
    native.select(FORCED)
    return found


ISAS = instruction_sets()
pytestmark = pytest.mark.skipif(not ISAS, reason="octavo is installed without its native kernels")


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that serve meanwhile."""
    assert native.select(request.param).isa == request.param
    yield request.param
    native.select(FORCED)


def codes(*shape: int, extreme: bool = False) -> Tensor:
    """Random codes, -128 and 127 alone if `extreme`: where 16 bits or a byte without sign are too few, it shows."""
    if extreme:
        return torch.where(torch.rand(shape) < 0.5, -128, 127).to(torch.int8)
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def strided(x: Tensor, how: str) -> Tensor:
    """The same values, with gaps between them, or transposed in memory."""
    if how == "gaps":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    return x.T.contiguous().T if how == "transposed" and x.dim() == 2 else x


def assert_rounds_to(y: Tensor, expected: Tensor, error: Tensor) -> None:
    """y is `expected` [float64] to within `error` and the rounding of its dtype."""
    limits = torch.finfo(y.dtype)
    allowed = error + expected.abs() * limits.eps + limits.smallest_normal * limits.eps
    wrong = ~((y.double() - expected).abs() <= allowed)
    assert not wrong.any(), f"{y[wrong][:4]} is not {expected[wrong][:4]} to within {allowed[wrong][:4]}"


def linear_in_double(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, steps: float
) -> tuple[Tensor, Tensor]:
    """A linear layer in float64, and what a fp32 sum that is rounded about `steps` times may be off by."""
    wide = (
        weight.double().unflatten(-1, (weight_scale.shape[-1], -1)) * weight_scale.double().unsqueeze(-1)
        if weight.numel()
        else weight.double().unsqueeze(-1)
    ).flatten(-2)
    y = x.double() @ wide.T
    added = torch.zeros(()).double() if bias is None else bias.double()
    error = 2.0**-24 * (steps * (x.double().abs() @ wide.abs().T) + 4 * y.abs() + 2 * added.abs())
    return y + added, error


# -- linear layers ---------------------------------------------------------------------------------------------------


@given(
    m=MANY,
    n=ODD,
    k=LONG,
    dtype=st.sampled_from(FLOATS),
    bias_dtype=st.sampled_from([None, *FLOATS]),
    how=st.sampled_from(["dense", "gaps", "transposed"]),
    x_exponent=st.integers(-8, 4),
    scale_exponent=st.sampled_from([-8, -4, 0]),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_w8a16_linear(
    isa: str, m: int, n: int, k: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, how: str, x_exponent: int,
    scale_exponent: int, extreme: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x = (torch.randn(m, k) * 2.0**x_exponent).to(dtype)
    weight, weight_scale = codes(n, k, extreme=extreme), torch.rand(n, 1) * 2.0**scale_exponent / 128
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    before = x.clone()
    y = ops.w8a16_linear(strided(x, how), strided(weight, how), weight_scale, bias)
    expected, error = linear_in_double(x, weight, weight_scale, bias, 4 + k**0.5)
    assert y.dtype == dtype and y.shape == (m, n) and y.is_contiguous()
    assert_rounds_to(y, expected, error)
    assert torch.equal(x, before)


@given(
    m=st.sampled_from([1, 2, 3, 7, 26, 64, 513]),
    n=ODD,
    groups=st.sampled_from([2, 3, 5, 12]),
    size=st.sampled_from([1, 2, 7, 16, 31, 32, 64, 128, 130]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
@example(m=40, n=33, groups=33, size=128, dtype=torch.bfloat16, seed=0)  # groups that end where pieces of K do
@example(m=40, n=33, groups=5, size=1030, dtype=torch.bfloat16, seed=0)  # and that do not
@example(m=40, n=33, groups=5, size=1031, dtype=torch.float32, seed=0)
def test_groups(isa: str, m: int, n: int, groups: int, size: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(m, groups * size).to(dtype), codes(n, groups * size)
    weight_scale = torch.rand(n, groups) / 128
    expected, error = linear_in_double(x, weight, weight_scale, None, 4 + (groups * size) ** 0.5)
    assert_rounds_to(ops.w8a16_linear(x, weight, weight_scale), expected, error)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("of_x", "of_weight"), [(1e30, 1e-30), (1e-30, 1e30), (1e-35, 1e33), (1e30, 1e-40)])
def test_extreme_scales(isa: str, m: int, dtype: torch.dtype, of_x: float, of_weight: float) -> None:
    x, weight, weight_scale = (torch.randn(m, 100) * of_x).to(dtype), codes(5, 100), torch.full((5, 1), of_weight)
    expected, error = linear_in_double(x, weight, weight_scale, None, 14)
    assert_rounds_to(ops.w8a16_linear(x, weight, weight_scale), expected, error)
    # int8: the scales multiply each other, so only their product has to be a number.
    x8, x_scale = codes(m, 100), torch.full((m, 1), of_x)
    expected = x8.double() @ weight.double().T * (x_scale.double() * weight_scale.double().T)
    y = ops.w8a8_linear(x8, x_scale, weight, weight_scale, None, torch.float32)
    assert_rounds_to(y, expected, expected.abs() * 2.0**-22)


@given(
    m=MANY,
    n=ODD,
    k=LONG,
    dtype=st.sampled_from(FLOATS),
    bias_dtype=st.sampled_from([None, *FLOATS]),
    per_token=st.booleans(),
    how=st.sampled_from(["dense", "gaps", "transposed"]),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_w8a8_linear(
    isa: str, m: int, n: int, k: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, per_token: bool, how: str,
    extreme: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x, weight = codes(m, k, extreme=extreme), codes(n, k, extreme=extreme)
    x_scale, weight_scale = torch.rand(m if per_token else 1, 1) / 128, torch.rand(n, 1) / 128
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    x_scale = x_scale if per_token else x_scale.reshape(1)
    y = ops.w8a8_linear(strided(x, how), x_scale, strided(weight, how), weight_scale, bias, dtype)
    expected = (x.double() @ weight.double().T) * (x_scale.double() * weight_scale.double().T)
    added = torch.zeros(()).double() if bias is None else bias.double()
    assert y.dtype == dtype and y.shape == (m, n) and y.is_contiguous()
    assert_rounds_to(y, expected + added, 2.0**-22 * (expected.abs() + added.abs()))


def test_rows_that_are_packed_part_by_part(isa: str) -> None:
    """More than fit the caches: each part has its own scales and its own rows of y."""
    m, n, k = 2300, 33, 2100
    weight, weight_scale, bias = codes(n, k), torch.rand(n, 1) / 128, torch.randn(n)
    x, x8, x_scale = torch.randn(m, k).bfloat16(), codes(m, k), torch.rand(m, 1) / 128
    expected, error = linear_in_double(x, weight, weight_scale, bias, 4 + k**0.5)
    assert_rounds_to(ops.w8a16_linear(x, weight, weight_scale, bias), expected, error)
    grouped_scale = torch.rand(n, 3) / 128
    expected, error = linear_in_double(x, weight, grouped_scale, None, 4 + k**0.5)
    assert_rounds_to(ops.w8a16_linear(x, weight, grouped_scale), expected, error)
    expected, error = linear_in_double(x8 * x_scale.double(), weight, weight_scale, bias, 4)
    assert_rounds_to(ops.w8a8_linear(x8, x_scale, weight, weight_scale, bias, torch.float32), expected, error)


@pytest.mark.parametrize("m", [1, 7, 40])
@pytest.mark.parametrize("k", [1, 64, 1023, 8191, 131071])
@pytest.mark.parametrize("of_x", [-128, 127])
@pytest.mark.parametrize("of_weight", [-128, 127])
def test_the_largest_sums_are_exact(isa: str, m: int, k: int, of_x: int, of_weight: int) -> None:
    x, weight = torch.full((m, k), of_x, dtype=torch.int8), torch.full((3, k), of_weight, dtype=torch.int8)
    one = torch.ones(1)
    y = ops.w8a8_linear(x, one, weight, one.expand(3, 1), None, torch.float32)
    assert torch.equal(y, torch.full((m, 3), float(of_x * of_weight * k)))  # rounded to fp32 once


def test_rows_whose_sums_do_not_fit_are_refused(isa: str) -> None:
    x = torch.zeros(2, 131072, dtype=torch.int8)
    with pytest.raises(QuantizeError, match="rows of 131072 codes, expected up to 131071"):
        ops.w8a8_linear(x, torch.ones(1), x, torch.ones(2, 1), None, torch.float32)


@given(
    rows=st.lists(st.sampled_from([0, 1, 2, 5, 40]), min_size=1, max_size=5),
    rest=st.sampled_from([0, 3]),
    n=ODD,
    k=st.sampled_from([1, 7, 64, 1030]),
    dtype=st.sampled_from(FLOATS),
    has_bias=st.booleans(),
)
def test_experts(isa: str, rows: list[int], rest: int, n: int, k: int, dtype: torch.dtype, has_bias: bool) -> None:
    e, s = len(rows), sum(rows) + rest
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    weight, weight_scale = codes(e, n, k), torch.rand(e, n, 1) / 128
    bias = torch.randn(e, n) if has_bias else None
    x, x8, x_scale = torch.randn(s, k).to(dtype), codes(s, k), torch.rand(s, 1) / 128
    y = ops.w8a16_experts_linear(x, ends, weight, weight_scale, bias)
    y8 = ops.w8a8_experts_linear(x8, x_scale, ends, weight, weight_scale, bias, dtype)
    start = 0
    for i, end in enumerate(ends.tolist()):
        part, of_expert = slice(start, end), None if bias is None else bias[i]
        expected, error = linear_in_double(x[part], weight[i], weight_scale[i], of_expert, 4 + k**0.5)
        assert_rounds_to(y[part], expected, error)
        expected, error = linear_in_double(x8[part] * x_scale[part].double(), weight[i], weight_scale[i], of_expert, 4)
        assert_rounds_to(y8[part], expected, error)
        start = end
    assert not y[start:].any() and not y8[start:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [3, 60])
def test_what_is_not_finite_stays_in_its_row(isa: str, bad: float, dtype: torch.dtype, m: int) -> None:
    x = torch.randn(m, 70).to(dtype)
    x[1, 69] = bad
    weight, weight_scale = codes(5, 70).clamp(min=1), torch.rand(5, 1)
    y = ops.w8a16_linear(x, weight, weight_scale)
    assert torch.equal(y[1].double(), torch.full((5,), bad).double()) or (bad != bad and bool(y[1].isnan().all()))
    y8 = ops.w8a8_linear(*ops.quantize_per_token(x), weight, weight_scale, None, dtype)
    assert y8[1].isnan().all()
    others = [i for i in range(m) if i != 1]
    assert y[others].isfinite().all() and y8[others].isfinite().all()


# -- convolutions ----------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Windows along each dimension, and what lies in between; images that are exactly as large, or a little larger."""
    dims = draw(st.integers(1, 3))

    def each(*values: int) -> list[int]:
        return draw(st.lists(st.sampled_from(values), min_size=dims, max_size=dims))

    return {
        "windows": each(*((1, 2, 7, 13, 14, 25, 60, 130), (1, 2, 7, 13, 14, 30), (1, 3, 13))[dims - 1]),
        "kernel": each(1, 1, 2, 3, 5),
        "stride": each(1, 1, 2, 3),
        "padding": each(0, 0, 1, 2),
        "dilation": each(1, 1, 2),
        "left_over": each(0, 1),
        "batch": draw(st.sampled_from([1, 2, 3])),
        "groups": draw(st.sampled_from([1, 1, 2, 3])),
        "channels": draw(st.sampled_from([1, 1, 2, 3, 16])),
        "filters": draw(st.sampled_from([1, 1, 2, 7, 15, 16, 31, 32, 33, 70, 300])),
        "dtype": draw(st.sampled_from([torch.bfloat16, *FLOATS])),
        "bias": draw(st.sampled_from([None, *FLOATS])),
        "layout": draw(st.sampled_from(["dense", "gaps", "channels last"])),
    }


def assert_convolved(
    y: Tensor, convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, wide: Tensor, bias: Tensor | None, k: int
) -> None:
    """wide: the weight in float64, as `convolve` takes it. k: products in a sum."""
    expected, terms = convolve(x.double(), wide), convolve(x.double().abs(), wide.abs())
    added = (torch.zeros(1) if bias is None else bias).double().view(-1, *[1] * (x.dim() - 2))
    error = 2.0**-24 * ((4 + k**0.5) * terms + 4 * expected.abs() + 2 * added.abs())
    assert_rounds_to(y, expected + added, error)


@settings(max_examples=200)
@given(convolutions(), st.booleans())
def test_convolution(isa: str, g: dict[str, Any], extreme: bool) -> None:
    dims, groups = len(g["windows"]), g["groups"]
    needs = zip(g["windows"], g["kernel"], g["stride"], g["padding"], g["dilation"], g["left_over"], strict=True)
    size = [(w - 1) * s + d * (k - 1) + 1 - 2 * p + left % s for w, k, s, p, d, left in needs]
    assume(all(length > 0 for length in size))
    x = torch.randn(g["batch"], g["channels"] * groups, *size).to(g["dtype"])
    weight = codes(g["filters"] * groups, g["channels"], *g["kernel"], extreme=extreme)
    weight_scale = torch.rand(len(weight), 1) / 128
    bias = None if g["bias"] is None else torch.randn(len(weight)).to(g["bias"])
    given_x = strided(x, "gaps") if g["layout"] == "gaps" else x
    if g["layout"] == "channels last":
        given_x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    geometry = g["stride"], g["padding"], g["dilation"], groups
    y = ops.w8a16_conv(given_x, weight, weight_scale, bias, *geometry)
    assert y.dtype == g["dtype"] and list(y.shape[2:]) == g["windows"] and y.is_contiguous()
    wide = in_double(weight, weight_scale)
    assert_convolved(y, lambda x, w: CONV[dims](x, w, None, *geometry), x, wide, bias, weight[0].numel())


@pytest.mark.parametrize(
    ("channels", "size", "filters", "groups", "stride"),
    [
        (700, [9, 9], 40, 1, 1),
        (3, [60, 60], 300, 1, 1),
        (700, [9, 9], 5, 1, 2),
        (90, [40, 300], 3, 1, 1),
        (90, [50, 200], 7, 1, 2),
        (2, [700, 700], 2, 2, 3),
        (200, [5000], 3, 1, 1),
        (2, [200_000], 2, 2, 2),
        (64, [4, 30, 40], 3, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_convolution_of_long_windows_and_of_many(
    isa: str, dtype: torch.dtype, channels: int, size: list[int], filters: int, groups: int, stride: int
) -> None:
    """More than are laid out at a time, of more elements than a panel of the weight holds."""
    dims = len(size)
    weight, scale = codes(filters, channels // groups, *[3] * dims), torch.rand(1)
    x = torch.randn(1, channels, *size).to(dtype)
    geometry = [stride] * dims, [1] * dims, [1] * dims, groups
    y = ops.w8a16_conv(x, weight, scale.expand(filters, 1).contiguous(), None, *geometry)
    expected = CONV[dims](x.double(), weight.double(), None, *geometry) * scale.double()
    terms = CONV[dims](x.double().abs(), weight.double().abs(), None, *geometry) * scale.double()
    assert_rounds_to(y, expected, 2.0**-24 * (4 * weight[0].numel() ** 0.5 * terms + 2 * expected.abs()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("filters", "groups"), [(40, 1), (5, 1), (6, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_stays_in_its_windows(
    isa: str, dtype: torch.dtype, stride: int, filters: int, groups: int, bad: float
) -> None:
    """Also where elements are multiplied in pairs, and one of a pair is of no window."""
    x = torch.randn(2, 3, 20, 20).to(dtype)
    x[1, 2, 6, 8] = bad
    weight, geometry = codes(filters, 3 // groups, 3, 3).clamp(min=1), ([stride] * 2, [1, 1], [1, 1])
    y = ops.w8a16_conv(x, weight, torch.ones(filters, 1), None, *geometry, groups)
    reached = torch.zeros(2, filters, 20, 20, dtype=torch.bool)
    reached[1, -filters // groups :, 5:8, 7:10] = True
    assert torch.equal(~y.isfinite(), reached[:, :, ::stride, ::stride])


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.integers(1, 3))

    def each(*values: int) -> list[int]:
        return draw(st.lists(st.sampled_from(values), min_size=dims, max_size=dims))

    return {
        "size": each(*((1, 2, 7, 13, 60, 130), (1, 2, 7, 30), (1, 3, 7))[dims - 1]),
        "kernel": each(1, 2, 3, 4, 5, 16),
        "stride": each(1, 2, 2, 3, 8),
        "padding": each(0, 0, 1, 2, 4),
        "dilation": each(1, 1, 1, 2),
        "extra": each(0, 1),
        "batch": draw(st.sampled_from([1, 2])),
        "groups": draw(st.sampled_from([1, 1, 2, 3])),
        "channels": draw(st.sampled_from([1, 2, 3, 16])),
        "filters": draw(st.sampled_from([1, 1, 2, 7, 16, 33])),
        "dtype": draw(st.sampled_from([torch.bfloat16, *FLOATS])),
        "bias": draw(st.sampled_from([None, *FLOATS])),
        "layout": draw(st.sampled_from(["dense", "gaps"])),
    }


@settings(max_examples=200)
@given(transposed_convolutions(), st.booleans())
def test_transposed_convolution(isa: str, g: dict[str, Any], extreme: bool) -> None:
    dims, groups = len(g["size"]), g["groups"]
    extra = [min(e, max(s, d) - 1) for e, s, d in zip(g["extra"], g["stride"], g["dilation"], strict=True)]
    needs = zip(g["size"], g["kernel"], g["stride"], g["padding"], g["dilation"], extra, strict=True)
    size = [(length - 1) * s - 2 * p + d * (k - 1) + more + 1 for length, k, s, p, d, more in needs]
    assume(all(length > 0 for length in size) and math.prod(size) < 100_000)
    x = torch.randn(g["batch"], g["channels"] * groups, *g["size"]).to(g["dtype"])
    weight = codes(g["filters"] * groups, g["channels"], *g["kernel"], extreme=extreme)
    weight_scale = torch.rand(len(weight), 1) / 128
    bias = None if g["bias"] is None else torch.randn(len(weight)).to(g["bias"])
    given_x = strided(x, "gaps") if g["layout"] == "gaps" else x
    y = ops.w8a16_conv_transpose(
        given_x, weight, weight_scale, bias, g["stride"], g["padding"], g["dilation"], extra, groups
    )
    assert y.dtype == g["dtype"] and list(y.shape[2:]) == size and y.is_contiguous()
    geometry = g["stride"], g["padding"], extra, groups, g["dilation"]
    wide = torch_layout(in_double(weight, weight_scale), groups)
    assert_convolved(y, lambda x, w: CONV_TRANSPOSE[dims](x, w, None, *geometry), x, wide, bias, weight[0].numel())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("filters", [40, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_reaches_its_own_places(isa: str, dtype: torch.dtype, filters: int, bad: float) -> None:
    """Transposed: the filter has no element for some of the places between strides."""
    x = torch.randn(1, 3, 10, 10).to(dtype)
    x[0, 1, 4, 5] = bad
    weight = codes(filters, 3, 3, 3).clamp(min=1)
    y = ops.w8a16_conv_transpose(x, weight, torch.ones(filters, 1), None, [2, 4], [0, 0], [1, 1], [0, 0], 1)
    reached = torch.zeros(y.shape, dtype=torch.bool)
    reached[:, :, 8:11, 20:23] = True
    assert torch.equal(~y.isfinite(), reached)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [0, 1]}, "stride"),
        ({"padding": [-1, 0]}, "padding"),
        ({"output_padding": [2, 0]}, "output padding"),
        ({"x": torch.zeros(1, 4, 9, 9).bfloat16()}, "channels"),
        ({"padding": [20, 20]}, "output size"),
        ({"bias": torch.zeros(3)}, "size of tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_transposed_convolutions_are_errors(isa: str, change: dict[str, Any], message: str) -> None:
    """Torch's own, in its words."""
    right: dict[str, Any] = {"x": torch.zeros(1, 3, 9, 9).bfloat16(), "bias": None, "stride": [2, 2]}
    args = {**right, "padding": [0, 0], "output_padding": [0, 0], **change}
    with pytest.raises(RuntimeError, match=message):
        ops.w8a16_conv_transpose(
            args["x"], codes(4, 3, 3, 3), torch.ones(4, 1), args["bias"], args["stride"], args["padding"], [1, 1],
            args["output_padding"], 1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [0, 1]}, "stride"),
        ({"padding": [-1, 0]}, "padding"),
        ({"x": torch.zeros(1, 3, 1, 9).bfloat16()}, "Kernel size"),
        ({"x": torch.zeros(1, 4, 9, 9).bfloat16()}, "channels"),
        ({"groups": 2}, "weight"),
        ({"bias": torch.zeros(3)}, "size of tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_convolutions_are_errors(isa: str, change: dict[str, Any], message: str) -> None:
    """Torch's own, in its words."""
    right: dict[str, Any] = {"x": torch.zeros(1, 3, 9, 9).bfloat16(), "bias": None, "stride": [1, 1], "padding": [0, 0]}
    args = {**right, "groups": 1, **change}
    with pytest.raises(RuntimeError, match=message):
        ops.w8a16_conv(
            args["x"], codes(4, 3, 3, 3), torch.ones(4, 1), args["bias"], args["stride"], args["padding"], [1, 1],
            args["groups"],
        )  # fmt: skip


@pytest.mark.parametrize("op", ["w8a16_conv", "w8a16_conv_transpose"])
def test_backends_tells_which_convolutions_have_kernels(isa: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.select(isa)
    monkeypatch.setattr(ops, "_native", found)
    row = next(row for row in ops.backends() if row.op == op and row.device == "cpu")
    assert row.backend == (isa if found.convolves else "reference")
    assert ("shorter than a stride" in row.why) == (found.convolves and op == "w8a16_conv_transpose")


# -- rows ------------------------------------------------------------------------------------------------------------

EXPONENTS = {torch.float32: (-149, 126), torch.bfloat16: (-133, 126), torch.float16: (-24, 14)}


@given(
    m=st.sampled_from([0, 1, 2, 7, 100]),
    k=st.sampled_from([0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 1000]),
    dtype=st.sampled_from(FLOATS),
    size=st.floats(0, 1),
    spread=st.sampled_from([0, 3, 12]),
    how=st.sampled_from(["dense", "gaps", "transposed"]),
    seed=st.integers(0, 99),
)
@example(m=7, k=64, dtype=torch.float32, size=0, spread=3, how="dense", seed=0)
@example(m=7, k=64, dtype=torch.bfloat16, size=1, spread=0, how="dense", seed=0)
def test_quantization_is_that_of_primitives(
    isa: str, m: int, k: int, dtype: torch.dtype, size: float, spread: int, how: str, seed: int
) -> None:
    torch.manual_seed(seed)
    low, high = EXPONENTS[dtype]
    exponent = low + size * (high - low) - spread * torch.rand(m, k).double()
    dense = (torch.randn(m, k).clamp(-1.9, 1.9).double() * 2.0**exponent).to(dtype)
    x = strided(dense, how)
    for name in ("quantize_per_token", "quantize_per_tensor"):
        for mine, other in zip(getattr(ops, name)(x), getattr(torch.ops.octavo_reference, name)(dense), strict=True):
            assert torch.equal(mine, other) and mine.is_contiguous()
    found, scale = ops.quantize_per_token(x)
    assert torch.equal(found, primitives.quantize(dense, scale))
    step = scale.amax().reshape(1) / 3 if m else torch.ones(1)  # a third of the values is clamped
    assert torch.equal(ops.quantize_static(x, step), primitives.quantize(dense, step))
    assert torch.equal(ops.quantize_static(x, step), torch.ops.octavo_reference.quantize_static(dense, step))
    for mine, other in zip(ops.quantize_weight(x), primitives.quantize_weight(dense), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("step", [2.0**-5, 0.0123, 1 / 3, 1.7e-4])
def test_ties_and_their_neighbours(isa: str, dtype: torch.dtype, step: float) -> None:
    """Halfway between two codes, and one number to either side of it: where a rounding error would decide."""
    scale = torch.tensor([step])
    halfway = (torch.arange(-128, 128) + 0.5).float() * scale
    exact = halfway.to(dtype)
    way = torch.full_like(exact, torch.inf)
    x = torch.cat([exact, exact.nextafter(way), exact.nextafter(-way), halfway.nextafter(way.float()).to(dtype)])
    expected = primitives.quantize(x, scale)
    assert torch.equal(ops.quantize_static(x, scale), expected)
    row = torch.cat([x, (scale * 127).to(dtype)])
    found, own = ops.quantize_per_token(row)
    assert torch.equal(found, primitives.quantize(row, own))
    if dtype == torch.float32 and step == 2.0**-5:  # exact ties: to the even code
        assert expected[126:130].tolist() == [-2, 0, 0, 2]


@given(count=st.sampled_from([0, 1, 50]), h=st.sampled_from([1, 7, 8, 16, 33, 1000]), dtype=st.sampled_from(FLOATS))
def test_embedding(isa: str, count: int, h: int, dtype: torch.dtype) -> None:
    table, scale = codes(77, h), torch.rand(77, 1) * 2.0 ** torch.randint(-20, 6, (77, 1))
    indices = torch.randint(0, 77, (2, count))
    y = ops.w8a16_embedding(indices, table, scale, dtype)
    expected = table[indices].double() * scale[indices].double()
    assert_rounds_to(y, expected, torch.zeros(()).double())
    assert torch.equal(y, torch.ops.octavo_reference.w8a16_embedding(indices, table, scale, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_smallest_numbers_are_rounded_like_others(isa: str, dtype: torch.dtype) -> None:
    scale = torch.finfo(dtype).smallest_normal * torch.tensor([2.0**-3, 2.0**-6, 1.0]).view(3, 1)
    table = codes(3, 100)
    y = ops.w8a16_embedding(torch.arange(3), table, scale, dtype)
    assert torch.equal(y, (table.double() * scale.double()).to(dtype)) and (y.abs() < scale[2] / 2).any()


# -- norms ------------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(0, 5),
    k=st.sampled_from([1, 2, 7, 15, 16, 17, 31, 33, 100, 576, 2100]),
    dtype=st.sampled_from(FLOATS),
    round_first=st.booleans(),
    eps=st.sampled_from([0.0, 1e-6, 1e-2]),
    how=st.sampled_from(["as it lies", "gaps", "transposed"]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_rms_norm(
    isa: str, rows: int, k: int, dtype: torch.dtype, round_first: bool, eps: float, how: str, size: float
) -> None:
    x, weight = (torch.randn(rows, k) * size).to(dtype), torch.randn(k).to(dtype)
    with torch.no_grad():
        y = ops.rms_norm(strided(x, how), weight, eps, round_first=round_first)
    assert y is not None and y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    unrounded = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    expected = unrounded * weight.double()
    error = expected.abs() * 1e-5
    if round_first:  # it may lie next to half way between two
        error = error + (unrounded.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny) * weight.double().abs()
    assert_rounds_to(y, expected, error)


def test_rms_norm_of_zeros_and_of_what_is_not_finite(isa: str) -> None:
    x = torch.zeros(4, 50)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    with torch.no_grad():
        y = ops.rms_norm(x, torch.ones(50), 1e-6, round_first=True)
        assert y is not None
    assert not y[0].any() and not y[3].any() and y[1].isnan().all()
    assert y[2, 3].isnan() and not y[2, :3].any()


def test_rms_norm_is_left_to_the_formula_where_somebody_listens(isa: str) -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    assert ops.rms_norm(x, weight, 1e-6, round_first=True) is None, "a gradient may be wanted"
    with torch.no_grad():
        assert ops.rms_norm(x.double(), weight.double(), 1e-6, round_first=True) is None
        assert ops.rms_norm(x, weight.bfloat16(), 1e-6, round_first=True) is None
        asked: list[Tensor | None] = []
        torch.func.vmap(lambda row: asked.append(ops.rms_norm(row, weight, 1e-6, round_first=True)) or row)(x)
        assert asked == [None]
        assert ops.rms_norm(x, weight, 1e-6, round_first=True) is not None


# -- gates ------------------------------------------------------------------------------------------------------------


def gated_in_double(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(gate) * up in float64, and what fp32 and rounding act(gate) may make of it: e^-z is off by as much more as z
    is large, where it counts."""
    g = gate.double()
    # (1 + tanh(u)) / 2, where it is small, is lost in the 1; this is not.
    z = g if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    acted = g / (1 + torch.exp(-z))
    steps = 2.0**-24 * (8 + 4 * z.abs().clamp(max=120))
    dtype = torch.finfo(gate.dtype)
    error = acted.abs() * (steps + dtype.eps * (gate.dtype != torch.float32)) + dtype.tiny
    return acted * up.double(), error * up.double().abs()


@given(
    shape=st.sampled_from([(0, 5), (1, 1), (1, 16), (3, 7), (2, 3, 33), (5, 100), (1, 1, 576), (4, 2100)]),
    dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from(sorted(GATES)),
    how=st.sampled_from(["as it lies", "gaps", "transposed", "halves", "heads first"]),
    size=st.sampled_from([1e-3, 1.0, 8.0, 100.0]),
)
def test_gated(isa: str, shape: tuple[int, ...], dtype: torch.dtype, activation: str, how: str, size: float) -> None:
    gate, up = ((torch.randn(shape) * by).to(dtype) for by in (size, 1.0))
    laid = (strided(gate, how), strided(up, how))
    if how == "halves":
        laid = torch.cat([gate, up], -1).chunk(2, -1)
    elif how == "heads first":
        laid = (gate.transpose(0, -2).contiguous().transpose(0, -2), up)
    with torch.no_grad():
        y = torch.ops.octavo.gated(*laid, GATES[activation].a, GATES[activation].b)
    assert y.dtype == dtype and y.shape == gate.shape and y.is_contiguous()
    assert_rounds_to(y, *gated_in_double(gate, up, activation))


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gated_at_the_ends(isa: str, dtype: torch.dtype, activation: str) -> None:
    largest = torch.finfo(dtype).max
    ends = torch.tensor([float("inf"), largest, 200.0, 0.0, -0.0, -200.0, -largest, float("nan")], dtype=dtype)
    y = torch.ops.octavo.gated(ends, torch.ones_like(ends), GATES[activation].a, GATES[activation].b)
    assert torch.equal(y[:3], ends[:3]) and y[-1].isnan() and not y[3:7].any()


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("activation", GATES)
def test_gated_rounds_where_torch_does(isa: str, activation: str, dtype: torch.dtype) -> None:
    gate, up = torch.randn(64, 256).to(dtype), torch.randn(64, 256).to(dtype)
    with torch.no_grad():
        y = ops.gated(gate, up, activation)
    formula = GATES[activation].formula
    assert (y == formula(gate) * up).float().mean() > 0.999
    assert (y == (formula(gate.float()) * up.float()).to(dtype)).float().mean() < 0.9


def test_gated_is_left_to_the_formula_where_somebody_listens(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(ops, "_gated", lambda *args: called.append(True) or torch.ops.octavo.gated(*args))
    gate, up = torch.randn(2, 8192), torch.randn(2, 8192)
    expected = torch.nn.functional.silu(gate) * up
    assert torch.equal(ops.gated(gate, up, "silu"), expected), "a gradient may be wanted"
    with torch.no_grad():
        for g, u in ((gate.double(), up.double()), (gate, up.bfloat16()), (gate, up[:1])):
            torch.testing.assert_close(ops.gated(g, u, "silu"), torch.nn.functional.silu(g) * u)
        torch.func.vmap(lambda g, u: ops.gated(g, u, "silu"))(gate, up)
        ops.gated(gate[:, :100], up[:, :100], "silu")
        assert not called
        torch.testing.assert_close(ops.gated(gate, up, "silu"), expected)
    assert called == [True]


# -- attention -------------------------------------------------------------------------------------------------------


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
def test_what_is_not_finite_reaches_attention_as_in_the_reference(isa: str, where: str, bad: float, kind: str) -> None:
    """In particular from tokens that the mask forbids, which may else be passed over."""
    operands = {
        "query": torch.randn(1, 4, 40, 16),
        "key": torch.randn(1, 2, 100, 16),
        "value": torch.randn(1, 2, 100, 16),
    }
    mask = a_mask(kind, 1, 4, 40, 100, 0)
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
    everything = mask.clone()
    everything[:, :, 3] = torch.finfo(everything.dtype).min  # a row that shares its attention among all
    others = [i for i in range(40) if i != 3]
    assert torch.equal(ops.int8_attention(query, key, value, everything, 0.2)[:, :, others], whole[:, :, others])


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
    """The dtypes in which float attention has kernels of its own."""
    dtypes = native.select(isa).attends_in
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


def test_float_attention_of_what_is_not_finite(served_dtypes: tuple[torch.dtype, ...]) -> None:
    """A query gives NaN if it, a key or a value that it may attend to has NaN or inf; others are as they were."""
    for dtype in served_dtypes:
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
    monkeypatch.setattr(ops, "_native", found)
    row = next(row for row in ops.backends() if row.op == "float_attention" and row.device == "cpu")
    for dtype in FLOATS if found.attends_in else []:
        assert (str(dtype)[6:] in row.why) == (dtype not in found.attends_in)
    assert row.backend == (isa if found.attends_in else "reference")
    monkeypatch.setattr(ops, "_native", dataclasses.replace(found, attends_in=(torch.float32,)))
    row = next(row for row in ops.backends() if row.op == "float_attention" and row.device == "cpu")
    assert row.backend == isa and row.why.endswith("; torch's own in bfloat16, float16")


# -- whoever calls ---------------------------------------------------------------------------------------------------


def every_op(seed: int = 0, m: int = 40) -> list[Tensor]:
    """The results of all native ops on one input, of a size that is worth several threads."""
    random = torch.Generator().manual_seed(seed)
    n, k = 300, 1100
    x = torch.randn(m, k, generator=random).bfloat16()
    weight = torch.randint(-128, 128, (2, n, k), dtype=torch.int8, generator=random)
    scale = torch.rand(2, n, 1, generator=random)
    groups, ends = torch.rand(n, 11, generator=random), torch.tensor([m // 3, m], dtype=torch.int32)
    found, found_scale = ops.quantize_per_token(x)
    return [
        ops.w8a16_linear(x, weight[0], scale[0]),
        ops.w8a16_linear(x.float(), weight[0], groups),
        ops.w8a8_linear(found, found_scale, weight[0], scale[0], None, torch.bfloat16),
        ops.w8a16_conv(
            x[None], weight[0].flatten()[: 64 * m * 3].view(64, m, 3), scale[0, :64], None, [1], [1], [1], 1
        ),
        *_convolved(random),
        ops.w8a16_experts_linear(x, ends, weight, scale),
        ops.w8a8_experts_linear(found, found_scale, ends, weight, scale, None, torch.float32),
        found,
        found_scale,
        *ops.quantize_per_tensor(x),
        ops.quantize_static(x, torch.tensor([0.01])),
        *ops.quantize_weight(x),
        ops.w8a16_embedding(torch.arange(m), weight[0], scale[0], torch.bfloat16),
        ops.int8_attention(*_attention_operands(m, random), 0.1),
        ops.float_attention(*_attention_operands(m, random), 0.1),
        ops.float_attention(*_attention_operands(2, random), 0.1),
        torch.ops.octavo.rms_norm(x, weight[0, 0].bfloat16(), 1e-6, True),
        torch.ops.octavo.gated(x, x, 1.0, 0.0),
    ]


def _convolved(random: torch.Generator) -> list[Tensor]:
    """One plane of few columns, many planes, and places between strides."""
    image = torch.randn(1, 40, 30, 70, generator=random).bfloat16()
    weight, scale = torch.randint(-128, 128, (40, 40, 4, 4), dtype=torch.int8, generator=random), torch.ones(40, 1)
    ones, none = [1, 1], [0, 0]
    return [
        ops.w8a16_conv(image, weight[:3], scale[:3], None, ones, ones, ones, 1),
        ops.w8a16_conv(image.flatten(2), weight[:3, :, 0], scale[:3], None, [1], [1], [1], 1),
        ops.w8a16_conv(image, weight[:, :1].contiguous(), scale, None, [2, 2], ones, ones, 40),
        ops.w8a16_conv_transpose(image, weight, scale, None, [2, 2], ones, ones, none, 1),
    ]


def _attention_operands(rows: int, random: torch.Generator) -> tuple[Tensor, ...]:
    query, key, value = (
        torch.randn(1, heads, tokens, 80, generator=random).bfloat16()
        for heads, tokens in ((6, rows), (2, 700), (2, 700))
    )
    return query, key, value, torch.ones(1, 1, rows, 700, dtype=torch.bool).tril(700 - rows)


def assert_same_bits(these: list[Tensor], those: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(these, those, strict=True)] == [True] * len(those)


def test_the_number_of_threads_changes_no_bit(isa: str) -> None:
    torch.set_num_threads(1)
    alone = every_op()
    torch.set_num_threads(2)
    assert_same_bits(every_op(), alone)


@pytest.mark.parametrize("n", [5, 70])
def test_nor_does_it_where_rows_are_shared_for_want_of_columns(isa: str, n: int) -> None:
    m, k = 700, 300
    x, x8, weight, scale = torch.randn(m, k).bfloat16(), codes(m, k), codes(n, k), torch.rand(n, 1)
    image = x.T.reshape(1, k, m)

    def layers() -> list[Tensor]:
        return [
            ops.w8a16_linear(x, weight, scale),
            ops.w8a16_linear(x.float(), weight, scale.expand(n, 3).contiguous()),
            ops.w8a8_linear(x8, torch.ones(1), weight, scale, None, torch.bfloat16),
            ops.w8a16_conv(image, weight[..., None], scale, None, [1], [0], [1], 1),
        ]

    torch.set_num_threads(1)
    alone = layers()
    expected, error = linear_in_double(x, weight, scale, None, 4 + k**0.5)
    assert_rounds_to(alone[0], expected, error)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(layers(), alone)


@pytest.mark.parametrize("m", [100, 600])
def test_a_row_does_not_depend_on_the_batch(isa: str, m: int) -> None:
    """Codes, and sums of codes, to the bit. A fp32 sum to within rounding: many rows sum K in pieces, few do not."""
    x, weight, scale = torch.randn(m, 2100).bfloat16(), codes(40, 2100), torch.rand(40, 1)
    found, found_scale = ops.quantize_per_token(x)
    y8 = ops.w8a8_linear(found, found_scale, weight, scale, None, torch.float32)
    y = ops.w8a16_linear(x.float(), weight, scale)
    _, error = linear_in_double(x, weight, scale, None, 2 * 2100**0.5)
    for i in (0, 1, m // 2, m - 1):
        one, one_scale = ops.quantize_per_token(x[i : i + 1])
        assert torch.equal(one[0], found[i]) and torch.equal(one_scale[0], found_scale[i])
        assert torch.equal(ops.w8a8_linear(one, one_scale, weight, scale, None, torch.float32)[0], y8[i])
        alone = ops.w8a16_linear(x[i : i + 1].float(), weight, scale)
        assert ((alone[0].double() - y[i].double()).abs() <= error[i]).all()


def test_several_python_threads_at_once(isa: str) -> None:
    torch.set_num_threads(1)
    sizes = [(seed, m) for seed in range(4) for m in (1, 7, 40)]
    expected = [every_op(*size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        for mine, other in zip(pool.map(lambda size: every_op(*size), sizes * 2), expected * 2, strict=True):
            assert_same_bits(mine, other)


def test_inference_mode(isa: str) -> None:
    expected = every_op()
    with torch.inference_mode():
        assert_same_bits(every_op(), expected)


@pytest.mark.slow
def test_compiled(isa: str) -> None:
    x, weight, scale = torch.randn(40, 1100), codes(300, 1100), torch.rand(300, 1)

    def layers(x: Tensor) -> tuple[Tensor, Tensor]:
        found, found_scale = ops.quantize_per_token(x)
        y8 = ops.w8a8_linear(found, found_scale, weight, scale, None, x.dtype)
        return ops.w8a16_linear(x, weight, scale).relu(), y8 * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        compiled: Any = torch.compile(layers, fullgraph=True)
        for m in (40, 3):
            assert_same_bits(list(compiled(x[:m])), list(layers(x[:m])))


# -- processes -------------------------------------------------------------------------------------------------------


def run_python(program: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork(isa: str) -> None:
    program = """
import os, torch
from octavo import ops
torch.set_num_threads(2)
weight, scale = torch.randint(-128, 128, (600, 1100), dtype=torch.int8), torch.rand(600, 1)
x = torch.randn(40, 1100)
before = ops.w8a16_linear(x, weight, scale)
child = os.fork()
if not child:
    torch.set_num_threads(1)  # as the workers of a DataLoader do: OpenMP's threads do not survive a fork
    os._exit(0 if torch.equal(ops.w8a16_linear(x, weight, scale), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ops.w8a16_linear(x, weight, scale), before)
"""
    done = run_python(program, OCTAVO_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_the_number_of_threads_is_obeyed() -> None:
    program = """
import statistics, time, torch
from octavo import ops
weight, scale, x = torch.zeros(4096, 4096, dtype=torch.int8), torch.ones(4096, 1), torch.randn(16, 4096).bfloat16()
for threads in (1, 2):
    torch.set_num_threads(threads)
    ops.w8a16_linear(x, weight, scale)
    shares = []
    for _ in range(25):
        all_threads, this_thread = time.process_time(), time.thread_time()
        ops.w8a16_linear(x, weight, scale)
        shares.append((time.process_time() - all_threads) / (time.thread_time() - this_thread))
    print(statistics.median(shares))
"""
    done = run_python(program, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr
    one, two = (float(line) for line in done.stdout.split())
    assert one < 1.1 and 1.5 < two < 2.5


def test_an_instruction_set_that_nobody_knows() -> None:
    serving = native.select(FORCED).isa
    with pytest.raises(QuantizeError, match=r"OCTAVO_ISA is 'mmx', expected one of: .*scalar"):
        native.select("mmx")
    assert native.select(FORCED).isa == serving
    done = run_python("import octavo.ops", OCTAVO_ISA="mmx")
    assert done.returncode and "OCTAVO_ISA is 'mmx', expected one of:" in done.stderr


def test_an_instruction_set_that_this_machine_lacks() -> None:
    lacking = [name for name in ("amx", "avx512", "avx2") if name not in ISAS]
    if not lacking:
        pytest.skip("this machine has them all")
    with pytest.raises(QuantizeError, match=rf"OCTAVO_ISA is '{lacking[0]}', (but .*(lacks|denied)|expected one of)"):
        native.select(lacking[0])


def test_without_the_library(tmp_path: Path) -> None:
    """One warning, and the reference answers."""
    shutil.copytree(ROOT / "octavo", tmp_path / "octavo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch
    from octavo import ops
    weight, x = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.ones(2, 3)
    assert ops.w8a16_linear(x, weight, torch.ones(1, 1)).tolist() == [[2.0], [2.0]]
mine = [str(one.message) for one in seen if "octavo" in str(one.message)]
assert len(mine) == 1 and "without its native kernels" in mine[0] and "OCTAVO_BACKEND=reference" in mine[0], mine
rows = [row for row in ops.backends() if row.op == "w8a16_linear" and row.device == "cpu"]
assert [row.backend for row in rows] == ["reference"] and "liboctavo.so is missing" in rows[0].why, rows
"""
    done = run_python(program, tmp_path)
    assert done.returncode == 0, done.stderr
