"""Convolutions and transposed ones of any geometry, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.ops import dispatch, native
from tests.ops.native.kernels import FLOATS, WITH_KERNELS, assert_rounds_to, codes, strided
from tests.ops.test_conv import CONV, CONV_TRANSPOSE, in_double, torch_layout

pytestmark = WITH_KERNELS


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
    monkeypatch.setattr(dispatch, "native_kernels", found)
    row = next(row for row in ops.backends() if row.op == op and row.device == "cpu")
    assert row.backend == (isa if found.convolves else "reference")
    assert ("shorter than a stride" in row.why) == (found.convolves and op == "w8a16_conv_transpose")
