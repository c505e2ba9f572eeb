"""w8a16_conv and w8a16_conv_transpose against float64, in every geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from octavo import ops
from octavo.errors import OctavoError, QuantizeError
from octavo.primitives import quantize_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def in_double(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double().reshape(-1, *[1] * (codes.dim() - 1))


def torch_layout(weight: Tensor, groups: int) -> Tensor:
    """[N, C/groups, *k] -> [C, N/groups, *k], group by group."""
    return torch.cat([part.transpose(0, 1) for part in weight.chunk(groups)])


def assert_rounded_once(y: Tensor, expected: Tensor, terms: Tensor, count: int) -> None:
    """Half a unit in the last place of the output, and what summing `count` terms in fp32 costs at most."""
    unit = torch.finfo(y.dtype)
    sums = 2.0**-53 if y.dtype == torch.float64 else 2.0**-24
    rounding = expected.abs() * unit.eps / 2 + unit.smallest_normal * unit.eps
    # Winograd and Fourier convolutions are allowed to be a little worse than a plain sum.
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= rounding * (1 + 2.0**-20) + 4 * (count + 4) * sums * terms).all()


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))

    def sizes(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))

    return {
        "batch": draw(st.sampled_from([0, 1, 2])),
        "channels": groups * draw(st.integers(1, 2)),
        "filters": groups * draw(st.integers(1, 3)),
        "groups": groups,
        "size": sizes(7, 9),
        "kernel": sizes(1, 3),
        "stride": sizes(1, 3),
        "padding": sizes(0, 2),
        "dilation": sizes(1, 3),
        "dtype": draw(st.sampled_from(DTYPES)),
        "bias": draw(st.booleans()),
    }


@given(geometries())
def test_conv(g: dict[str, Any]) -> None:
    codes, scale = quantize_weight(torch.randn(g["filters"], g["channels"] // g["groups"], *g["kernel"]))
    x = torch.randn(g["batch"], g["channels"], *g["size"]).to(g["dtype"])
    bias = torch.randn(g["filters"]) if g["bias"] else None
    geometry = g["stride"], g["padding"], g["dilation"], g["groups"]
    y = ops.w8a16_conv(x, codes, scale, bias, *geometry)
    assert y.dtype == g["dtype"]

    conv, w = CONV[len(g["size"])], in_double(codes, scale)
    expected = conv(x.double(), w, None if bias is None else bias.double(), *geometry)
    terms = conv(x.double().abs(), w.abs(), None if bias is None else bias.double().abs(), *geometry)
    assert_rounded_once(y, expected, terms, w[0].numel())


@given(geometries(), st.integers(0, 1))
def test_conv_transpose(g: dict[str, Any], extra: int) -> None:
    codes, scale = quantize_weight(torch.randn(g["filters"], g["channels"] // g["groups"], *g["kernel"]))
    x = torch.randn(g["batch"], g["channels"], *g["size"]).to(g["dtype"])
    bias = torch.randn(g["filters"]) if g["bias"] else None
    # torch's own condition: smaller than the stride or the dilation.
    output_padding = [min(extra, max(s, d) - 1) for s, d in zip(g["stride"], g["dilation"], strict=True)]
    y = ops.w8a16_conv_transpose(
        x, codes, scale, bias, g["stride"], g["padding"], g["dilation"], output_padding, g["groups"]
    )
    assert y.dtype == g["dtype"]

    conv, w = CONV_TRANSPOSE[len(g["size"])], torch_layout(in_double(codes, scale), g["groups"])
    geometry = g["stride"], g["padding"], output_padding, g["groups"], g["dilation"]
    expected = conv(x.double(), w, None if bias is None else bias.double(), *geometry)
    terms = conv(x.double().abs(), w.abs(), None if bias is None else bias.double().abs(), *geometry)
    assert_rounded_once(y, expected, terms, codes[0].numel())


@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise(dtype: torch.dtype) -> None:
    codes, scale = quantize_weight(torch.randn(6, 1, 3, 3))
    x = torch.randn(2, 6, 8, 8).to(dtype)
    y = ops.w8a16_conv(x, codes, scale, None, [1, 1], [1, 1], [1, 1], 6)
    expected = F.conv2d(x.double(), in_double(codes, scale), None, 1, 1, 1, 6)
    terms = F.conv2d(x.double().abs(), in_double(codes, scale).abs(), None, 1, 1, 1, 6)
    assert_rounded_once(y, expected, terms, 9)


def arguments(transpose: bool) -> list[Any]:
    return [[1, 1], [0, 0], [1, 1], *([[0, 0]] if transpose else []), 1]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_images_give_contiguous_results(transpose: bool, dtype: torch.dtype) -> None:
    """What the fake kernel promises to the compiler."""
    op = ops.w8a16_conv_transpose if transpose else ops.w8a16_conv
    codes, scale = quantize_weight(torch.randn(4, 3, 2, 2))
    x = torch.randn(2, 3, 5, 5).to(dtype)
    y = op(x.to(memory_format=torch.channels_last), codes, scale, None, *arguments(transpose))
    assert y.is_contiguous()
    torch.testing.assert_close(y, op(x, codes, scale, None, *arguments(transpose)), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_scale_comes_before_the_rounding(transpose: bool) -> None:
    op = ops.w8a16_conv_transpose if transpose else ops.w8a16_conv
    codes, scale = quantize_weight(torch.full((1, 1, 1, 1), 0.1, dtype=torch.float16))
    x = torch.full((1, 1, 1, 1), 600.0)
    assert op(x.half(), codes, scale, None, *arguments(transpose)).item() == 60
    with torch.autocast("cpu", torch.float16):
        inside = op(x, codes, scale, None, *arguments(transpose))
    assert (inside.item(), inside.dtype) == (60, torch.float16)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_numerical_gradients(transpose: bool, groups: int) -> None:
    codes, scale = quantize_weight(torch.randn(4, 2, 2, 2))
    x = torch.randn(2, 2 * groups, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, bias: Tensor) -> Tensor:
        if transpose:
            return ops.w8a16_conv_transpose(x, codes, scale, bias, [2, 1], [1, 0], [1, 2], [1, 0], groups)
        return ops.w8a16_conv(x, codes, scale, bias, [2, 1], [1, 0], [1, 2], groups)

    assert torch.autograd.gradcheck(f, (x, bias))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_what_they_are_for(transpose: bool, dtype: torch.dtype) -> None:
    op = ops.w8a16_conv_transpose if transpose else ops.w8a16_conv
    codes, scale = quantize_weight(torch.randn(4, 3, 2, 2))
    x = torch.randn(2, 3, 5, 5).to(dtype).requires_grad_()
    bias = torch.randn(4, requires_grad=True)
    y = op(x, codes, scale, bias, *arguments(transpose))
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert (dx.dtype, dx.shape) == (dtype, x.shape)
    assert dbias.tolist() == [y[:, 0].numel()] * 4


@pytest.mark.parametrize("transpose", [False, True])
def test_no_gradient_of_the_weight(transpose: bool) -> None:
    op = ops.w8a16_conv_transpose if transpose else ops.w8a16_conv
    codes, scale = quantize_weight(torch.randn(4, 3, 2, 2))
    with pytest.raises(OctavoError, match="int8 codes are frozen"):
        op(torch.randn(2, 3, 5, 5), codes, scale.requires_grad_(), None, *arguments(transpose))


@pytest.mark.parametrize("transpose", [False, True])
def test_codes_as_input_are_refused(transpose: bool) -> None:
    """CLIP's `pixels.to(self.patch_embedding.weight.dtype)` would make the image int8."""
    op = ops.w8a16_conv_transpose if transpose else ops.w8a16_conv
    codes, scale = quantize_weight(torch.randn(4, 3, 2, 2))
    with pytest.raises(QuantizeError, match=r"x: dtype is torch.int8, .*put that layer on the ignore list"):
        op(torch.zeros(1, 3, 5, 5, dtype=torch.int8), codes, scale, None, *arguments(transpose))
