"""Float linear layers are right to the rounding of fp32 sums, and torch's wherever the kernels are not for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from octavo import ops
from octavo.ops import dispatch, native
from tests.ops.native.kernels import (
    FLOATS,
    ISAS,
    LONG,
    MANY,
    ODD,
    WITH_KERNELS,
    assert_rounds_to,
    linear_in_double,
    strided,
)

pytestmark = WITH_KERNELS


@pytest.fixture(scope="module", params=[isa for isa in ISAS if isa in ("avx2", "avx512")])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those of the instruction sets that multiply floats."""
    before, dispatch.native_kernels = dispatch.native_kernels, native.select(request.param)
    yield request.param
    dispatch.native_kernels = before
    native.select(before.isa or "")


class Quantized(Tensor):
    """As other libraries make of a weight."""


def in_double(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return linear_in_double(x, weight, torch.ones(len(weight), 1), bias, 4 + weight.shape[1] ** 0.5)


@given(
    m=MANY,
    n=ODD,
    k=LONG,
    dtype=st.sampled_from(FLOATS),
    has_bias=st.booleans(),
    how=st.sampled_from(["dense", "gaps", "transposed"]),
    x_exponent=st.integers(-8, 4),
    exponent=st.integers(-8, 2),
    seed=st.integers(0, 99),
)
@example(m=1, n=67, k=2100, dtype=torch.float16, has_bias=True, how="dense", x_exponent=0, exponent=0, seed=0)
@example(m=24, n=67, k=2100, dtype=torch.bfloat16, has_bias=True, how="dense", x_exponent=0, exponent=0, seed=0)
@example(m=64, n=67, k=2100, dtype=torch.float32, has_bias=True, how="dense", x_exponent=0, exponent=0, seed=0)
def test_the_product(
    isa: str, m: int, n: int, k: int, dtype: torch.dtype, has_bias: bool, how: str, x_exponent: int, exponent: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x, weight = (torch.randn(m, k) * 2.0**x_exponent).to(dtype), (torch.randn(n, k) * 2.0**exponent).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    before = x.clone()
    y = torch.ops.octavo.float_linear(strided(x, how), strided(weight, how), bias)
    assert y.dtype == dtype and y.shape == (m, n) and y.is_contiguous()
    expected, error = in_double(x, weight, bias)
    assert_rounds_to(y, expected, error)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_number_of_dimensions(isa: str, dtype: torch.dtype) -> None:
    weight = torch.randn(33, 100).to(dtype)
    for shape in [(100,), (1, 100), (2, 3, 100), (2, 0, 100), (1, 2, 1, 2, 100)]:
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            y = ops.float_linear(x, weight, None)
        assert y is not None and y.shape == (*shape[:-1], 33)
        assert_rounds_to(y.view(-1, 33), *in_double(x.view(-1, 100), weight, None))


@pytest.mark.parametrize("m", [1, 5, 24])
def test_the_smallest_numbers_of_fp16(isa: str, m: int) -> None:
    x, weight = torch.randn(m, 100).half(), (torch.randint(-1000, 1000, (9, 100)) * 2.0**-24).half()
    assert 0 < weight.abs().max() < torch.finfo(torch.float16).smallest_normal
    assert_rounds_to(torch.ops.octavo.float_linear(x, weight, None), *in_double(x, weight, None))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [2, 9])
def test_what_is_not_finite_stays_in_its_row_and_column(isa: str, m: int, dtype: torch.dtype) -> None:
    x, weight = torch.rand(m, 70).to(dtype) + 1, torch.rand(40, 70).to(dtype) + 1
    x[1, 69], weight[33, 3], weight[34, 68] = float("inf"), float("nan"), float("-inf")
    y = torch.ops.octavo.float_linear(x, weight, None)
    assert y[:, 33].isnan().all() and y[0, 34] == float("-inf") and y[1, 34].isnan()
    others = [n for n in range(40) if n not in (33, 34)]
    assert (y[1, others] == float("inf")).all() and y[0, others].isfinite().all()


def test_the_kernel_serves_few_rows(isa: str) -> None:
    for dtype, most in native.select(isa).multiplies_in.items():
        assert most > 0
        weight, bias = torch.randn(5, 8).to(dtype), torch.randn(5).to(dtype)
        with torch.no_grad():
            assert ops.float_linear(torch.randn(min(most, 4096), 8).to(dtype), weight, bias) is not None
            if most < 4096:
                assert ops.float_linear(torch.randn(most + 1, 8).to(dtype), weight, bias) is None


def test_the_rest_is_torchs(isa: str) -> None:
    x, weight, bias = torch.randn(2, 8), torch.randn(5, 8), torch.randn(5)
    assert ops.float_linear(x, weight, bias) is None, "a gradient may be wanted"
    with torch.no_grad():
        assert ops.float_linear(x, weight, bias) is not None
        assert ops.float_linear(x.double(), weight.double(), bias.double()) is None
        assert ops.float_linear(x.bfloat16(), weight, bias) is None
        assert ops.float_linear(x, weight, bias.bfloat16()) is None
        assert ops.float_linear(x[:, :7], weight, bias) is None
        assert ops.float_linear(x, weight, bias[:4]) is None
        assert ops.float_linear(torch.tensor(1.0), weight, bias) is None
        assert ops.float_linear(x, weight.T.contiguous().T, bias) is None, "the weight would be copied each time"
        assert ops.float_linear(x, weight.as_subclass(Quantized), bias) is None, "it is for its own class to say"
        assert ops.float_linear(x.to("meta"), weight.to("meta"), None) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.float_linear(x, weight, bias) is None
        asked: list[Tensor | None] = []
        torch.func.vmap(lambda row: asked.append(ops.float_linear(row, weight, bias)) or row)(x)
        assert asked == [None]


def test_wrong_operands_are_refused(isa: str) -> None:
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    call = torch.ops.octavo.float_linear
    for wrong in [
        (x.half(), weight, None), (x[:, :7], weight, None), (x, weight[0], None), (torch.tensor(1.0), weight, None),
        (x, weight, torch.randn(4)), (x, weight, torch.randn(5).half()), (x, weight, torch.randn(1, 5)),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=r"(weight must be|x must have|bias must be)"):
            call(*wrong)


def test_what_has_no_faster_kernel_is_torchs_in_the_op_too(isa: str) -> None:
    """As a graph calls it, that was compiled for any number of rows."""
    weight, bias = torch.randn(50, 70), torch.randn(50)
    for x in (torch.randn(3, 500, 70), torch.randn(2, 70).double()):
        of_type = (weight.to(x.dtype), bias.to(x.dtype))
        for added in (of_type[1], None):
            assert torch.equal(torch.ops.octavo.float_linear(x, of_type[0], added), F.linear(x, of_type[0], added))


@pytest.mark.skipif("scalar" not in ISAS, reason="there are no kernels")
def test_an_instruction_set_without_them() -> None:
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    before, dispatch.native_kernels = dispatch.native_kernels, native.select("scalar")
    try:
        assert not any(dispatch.native_kernels.multiplies_in.values())
        assert torch.equal(torch.ops.octavo.float_linear(x, weight, None), F.linear(x, weight))
        with torch.no_grad():
            assert ops.float_linear(x, weight, None) is None
    finally:
        dispatch.native_kernels = before
        native.select(before.isa or "")
