"""w8a16_linear against float64, wherever a layer may stand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.errors import OctavoError, QuantizeError
from octavo.primitives import dequantize, quantize_weight
from tests.ops.rounding import assert_off_by, linear_in_double

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weight(n: int, k: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    return quantize_weight(torch.randn(n, k), "per_group" if group_size else "per_channel", group_size=group_size)


def exact(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale in float64."""
    return codes.double() * scale.double().repeat_interleave(codes.shape[1] // max(scale.shape[1], 1), dim=1)


def assert_rounded_once(y: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Half a unit in the last place of the output, and what summing in fp32 (fp64 for fp64) costs at most."""
    expected, terms = linear_in_double(x, codes, scale, bias)
    sums = 2.0**-53 if y.dtype == torch.float64 else 2.0**-24
    assert y.dtype == x.dtype
    assert_off_by(y, expected, (x.shape[-1] + 4) * sums * terms)


@given(
    lead=st.sampled_from([(), (0,), (1,), (3,), (33,), (2, 1), (2, 3, 5), (4, 0, 2)]),
    n=st.sampled_from([1, 2, 7, 65]),
    k=st.sampled_from([1, 3, 31, 64, 100]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 100),
)
def test_result(
    lead: tuple[int, ...], n: int, k: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, seed: int
) -> None:
    torch.manual_seed(seed)
    codes, scale = weight(n, k)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    x = torch.randn(*lead, k).to(dtype)
    before = x.clone()
    y = ops.w8a16_linear(x, codes, scale, bias)
    assert_rounded_once(y, x, codes, scale, bias)
    assert torch.equal(x, before)


@given(
    m=st.integers(0, 5),
    n=st.integers(1, 9),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 8, 24]),
    dtype=st.sampled_from(DTYPES),
)
def test_per_group(m: int, n: int, groups: int, group_size: int, dtype: torch.dtype) -> None:
    k = groups * group_size
    codes, scale = weight(n, k, group_size)
    x = torch.randn(m, k).to(dtype)
    y = ops.w8a16_linear(x, codes, scale)
    # code * scale is rounded to fp32 in the sum: one more rounding of each term.
    w = exact(codes, scale)
    slack = (k + 8) * 2.0**-24 * (x.double().abs() @ w.abs().T)
    unit = torch.finfo(dtype)
    bound = (x.double() @ w.T).abs() * unit.eps / 2 + unit.smallest_normal * unit.eps + slack
    assert ((y.double() - x.double() @ w.T).abs() <= bound * (1 + 2.0**-10)).all()
    assert y.dtype == dtype


def test_more_rows_than_a_block() -> None:
    codes, scale = weight(1100, 1000)
    x = torch.randn(3, 1000)
    assert_rounded_once(ops.w8a16_linear(x, codes, scale), x, codes, scale, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    codes, scale = weight(6, 10)
    base = torch.randn(10, 4, 3).to(dtype)
    for x in (base.permute(2, 1, 0), base.permute(1, 2, 0), torch.randn(3, 20).to(dtype)[:, ::2]):
        y = ops.w8a16_linear(x, codes, scale)
        assert torch.equal(y, ops.w8a16_linear(x.contiguous(), codes, scale))
        assert y.is_contiguous()
    expanded = torch.randn(1, 10).to(dtype).expand(5, 10)
    assert_rounded_once(ops.w8a16_linear(expanded, codes, scale), expanded, codes, scale, None)
    # Codes and scales may be slices of larger ones (attention's packed projections are).
    part, part_scale = codes[2:4], scale[2:4]
    assert_rounded_once(ops.w8a16_linear(expanded, part, part_scale), expanded, part, part_scale, None)


def test_no_inputs_at_all() -> None:
    """K = 0: what is left is the bias."""
    codes, scale = torch.empty(5, 0, dtype=torch.int8), torch.ones(5, 1)
    bias = torch.randn(5)
    assert torch.equal(ops.w8a16_linear(torch.empty(2, 0), codes, scale, bias), bias.expand(2, 5))
    assert ops.w8a16_linear(torch.empty(2, 0), codes, scale).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("group_size", [None, 1])
def test_the_scale_comes_before_the_rounding(group_size: int | None) -> None:
    """600 * 127 is beyond fp16: a formula that rounds the product before scaling it gives inf."""
    tenth = torch.full((1, 1), 0.1, dtype=torch.float16)
    codes, scale = quantize_weight(tenth, "per_group" if group_size else "per_channel", group_size=group_size)
    x = torch.full((1, 1), 600.0)
    assert ops.w8a16_linear(x.half(), codes, scale).item() == 60
    with torch.autocast("cpu", torch.float16):
        assert ops.w8a16_linear(x, codes, scale).item() == 60


def test_the_bias_comes_before_the_rounding() -> None:
    """1 + 2**-9 and a bias of -1 in bf16: rounded first, nothing would be left."""
    codes, scale = torch.tensor([[127, 1]], dtype=torch.int8), torch.tensor([[1 / 127]])
    y = ops.w8a16_linear(torch.tensor([[1.0, 0.25]], dtype=torch.bfloat16), codes, scale, torch.tensor([-1.0]))
    assert y.item() == pytest.approx(0.25 / 127, rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 8])
def test_autocast(dtype: torch.dtype, group_size: int | None) -> None:
    codes, scale = weight(5, 64, group_size)
    x, bias = torch.randn(3, 64), torch.randn(5)
    outside = ops.w8a16_linear(x.to(dtype), codes, scale, bias)
    with torch.autocast("cpu", dtype):
        inside = ops.w8a16_linear(x, codes, scale, bias)
        wide = ops.w8a16_linear(x.double(), codes, scale, bias)
    assert inside.dtype == dtype
    assert torch.equal(inside, outside)
    assert wide.dtype == torch.float64, "autocast leaves float64 alone, as torch does"


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_to_input_and_bias(lead: tuple[int, ...], group_size: int | None, dtype: torch.dtype) -> None:
    codes, scale = weight(5, 12, group_size)
    x = torch.randn(*lead, 12, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(5, dtype=dtype, requires_grad=True)
    y = ops.w8a16_linear(x, codes, scale, bias)
    upstream = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    dx, dbias = torch.autograd.grad(y, (x, bias), upstream)

    wide_x, wide_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    wide_y = torch.nn.functional.linear(wide_x, exact(codes, scale), wide_bias)
    expected = torch.autograd.grad(wide_y, (wide_x, wide_bias), upstream.double())
    for ours, theirs in zip((dx, dbias), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), theirs, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-5 if dtype != torch.float64 else 1e-6
        )


@pytest.mark.parametrize("group_size", [None, 3])
def test_numerical_gradients(group_size: int | None) -> None:
    codes, scale = weight(4, 6, group_size)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, bias: Tensor) -> Tensor:
        return ops.w8a16_linear(x, codes, scale, bias)

    assert torch.autograd.gradcheck(f, (x, bias))
    assert torch.autograd.gradgradcheck(f, (x, bias))


def test_gradients_of_fp64_are_of_fp64() -> None:
    codes, scale = weight(2, 3)
    x = torch.zeros(4, 3, dtype=torch.float64)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    upstream = torch.full((4, 2), 1 + 2.0**-40, dtype=torch.float64)
    (dbias,) = torch.autograd.grad(ops.w8a16_linear(x, codes, scale, bias), bias, upstream)
    assert dbias.tolist() == [4 * (1 + 2.0**-40)] * 2


def test_a_gradient_inside_autocast_is_as_good_as_outside() -> None:
    codes, scale = weight(64, 5)
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.w8a16_linear(x, codes, scale)
        (inside,) = torch.autograd.grad(y.float().sum(), x, retain_graph=True)
    (outside,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.equal(inside, outside)


def test_no_gradient_of_the_weight() -> None:
    codes, scale = weight(4, 6)
    with pytest.raises(OctavoError, match="int8 codes are frozen: train an adapter"):
        ops.w8a16_linear(torch.randn(2, 6), codes, scale.requires_grad_())
    with torch.no_grad():  # nobody asks for it here
        ops.w8a16_linear(torch.randn(2, 6), codes, scale)


# -- wrong use --------------------------------------------------------------------------------------------------------


def test_wrong_inputs() -> None:
    codes, scale = weight(4, 6)
    with pytest.raises(QuantizeError, match=r"x: shape is \[2, 5\], expected \[\.\.\., 6\] for .* \[4, 6\]"):
        ops.w8a16_linear(torch.randn(2, 5), codes, scale)
    with pytest.raises(QuantizeError, match=r"x: shape is \[\], expected"):
        ops.w8a16_linear(torch.tensor(1.0), codes, scale)
    with pytest.raises(QuantizeError, match=r"x: dtype is torch.int8, .*casts its input to `layer.weight.dtype`"):
        ops.w8a16_linear(torch.zeros(2, 6, dtype=torch.int8), codes, scale)


def test_the_dequantized_weight_gives_the_same() -> None:
    codes, scale = weight(30, 64)
    x = torch.randn(4, 64, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, dequantize(codes, scale, torch.float64))
    torch.testing.assert_close(ops.w8a16_linear(x, codes, scale), expected, rtol=1e-6, atol=1e-6)
