"""The linear layers of a stack of experts against float64, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.errors import OctavoError, QuantizeError
from octavo.ops import reference
from octavo.primitives import quantize_weight
from tests.ops.rounding import assert_off_by

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

rows_of_experts = st.lists(st.sampled_from([0, 0, 1, 2, 17]), min_size=1, max_size=5)


def stack(experts: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [E, N, K] and scales fp32 [E, N, 1]."""
    codes, scale = quantize_weight(torch.randn(experts * n, k))
    return codes.view(experts, n, k), scale.view(experts, n, 1)


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def exact(x: Tensor, counts: list[int], codes: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the sizes of what is summed: what its rounding is in proportion to."""
    y = torch.zeros(len(x), codes.shape[1], dtype=torch.float64)
    terms, start = y.clone(), 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        w, b = codes[e].double() * scale[e].double(), 0 if bias is None else bias[e].double()
        y[rows] = x[rows].double() @ w.T + b
        terms[rows] = x[rows].double().abs() @ w.abs().T + abs(b)
        start += count
    return y, terms


def assert_rounded_once(y: Tensor, expected: Tensor, terms: Tensor, k: int) -> None:
    """y is `expected` but for what k sums in fp32 (fp64 for fp64) cost, and one rounding."""
    assert_off_by(y, expected, (k + 4) * (2.0**-53 if y.dtype == torch.float64 else 2.0**-24) * terms)


def check_w8a16(
    op: Callable[..., Tensor], counts: list[int], unrouted: int, n: int, k: int, dtype: torch.dtype,
    bias_dtype: torch.dtype | None, transposed: bool,
) -> None:  # fmt: skip
    """`op(x, ends, codes, scale, bias)` on random operands. transposed: in memory, x."""
    codes, scale = stack(len(counts), n, k)
    bias = None if bias_dtype is None else torch.randn(len(counts), n).to(bias_dtype)
    rows = sum(counts) + unrouted
    x = (torch.randn(k, rows).T if transposed else torch.randn(rows, k)).to(dtype)
    before = x.clone()
    y = op(x, ends_of(counts), codes, scale, bias)
    assert y.dtype == dtype and y.shape == (rows, n) and y.is_contiguous()
    assert_rounded_once(y, *exact(x, counts, codes, scale, bias), k)
    assert not y[sum(counts) :].any(), "a row past the last end belongs to no expert"
    assert torch.equal(x, before)


@given(
    counts=rows_of_experts,
    unrouted=st.sampled_from([0, 1, 3]),
    n=st.sampled_from([1, 2, 7, 65]),
    k=st.sampled_from([1, 3, 31, 64]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
    transposed=st.booleans(),
)
def test_w8a16(
    counts: list[int],
    unrouted: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    transposed: bool,
) -> None:
    check_w8a16(ops.w8a16_experts_linear, counts, unrouted, n, k, dtype, bias_dtype, transposed)


@given(
    counts=rows_of_experts,
    unrouted=st.sampled_from([0, 2]),
    n=st.sampled_from([1, 5, 32]),
    k=st.sampled_from([1, 3, 64]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_w8a8(counts: list[int], unrouted: int, n: int, k: int, dtype: torch.dtype, with_bias: bool) -> None:
    codes, scale = stack(len(counts), n, k)
    bias = torch.randn(len(counts), n).to(dtype) if with_bias else None
    rows = sum(counts) + unrouted
    x, x_scale = ops.quantize_per_token(torch.randn(rows, k))
    y = ops.w8a8_experts_linear(x, x_scale, ends_of(counts), codes, scale, bias, dtype)
    assert y.dtype == dtype and y.shape == (rows, n)
    assert_rounded_once(y, *exact(x.double() * x_scale.double(), counts, codes, scale, bias), k)
    assert not y[sum(counts) :].any()


@pytest.mark.parametrize("served_by", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (7,), (1, 7)])
def test_one_scale_for_all_rows_or_one_each_however_they_lie(served_by: ModuleType, shape: tuple[int, ...]) -> None:
    (codes, scale), counts = stack(3, 8, 16), [4, 0, 3]
    x, x_scale = torch.randint(-127, 128, (7, 16), dtype=torch.int8), torch.rand(shape)
    y = served_by.w8a8_experts_linear(x, x_scale, ends_of(counts), codes, scale, None, torch.float32)
    assert_rounded_once(y, *exact(x.double() * x_scale.double().view(-1, 1), counts, codes, scale, None), 4)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_each_expert_is_the_linear_op_on_its_rows(dtype: torch.dtype) -> None:
    """A token's answer does not depend on who else was routed."""
    codes, scale = stack(3, 8, 16)
    x, counts = torch.randn(9, 16).to(dtype), [4, 0, 5]
    y = ops.w8a16_experts_linear(x, ends_of(counts), codes, scale)
    torch.testing.assert_close(y[:4], ops.w8a16_linear(x[:4], codes[0], scale[0]), rtol=0, atol=0)
    torch.testing.assert_close(y[4:], ops.w8a16_linear(x[4:], codes[2], scale[2]), rtol=0, atol=0)


def test_experts_without_rows_are_not_touched() -> None:
    """NaN in their scale would show."""
    codes, scale = stack(3, 4, 8)
    scale[1] = torch.nan
    x, x_scale = ops.quantize_per_token(torch.randn(5, 8))
    ends = ends_of([2, 0, 3])
    assert ops.w8a16_experts_linear(torch.randn(5, 8), ends, codes, scale).isfinite().all()
    assert ops.w8a8_experts_linear(x, x_scale, ends, codes, scale, None, torch.float32).isfinite().all()


@pytest.mark.parametrize("wanted", ["w8a16", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients(wanted: str, dtype: torch.dtype) -> None:
    """To the input, as through the dequantized weights, and to each expert's bias."""
    counts, (codes, scale) = [3, 0, 2], stack(3, 6, 8)
    ends, weight = ends_of(counts), codes.double() * scale.double()
    x = torch.randn(7, 8).to(dtype).requires_grad_()
    bias = torch.randn(3, 6).to(dtype).requires_grad_()
    if wanted == "w8a16":
        y = ops.w8a16_experts_linear(x, ends, codes, scale, bias)
    else:
        y = ops.w8a8_experts_linear(*ops.quantize_per_token(x), ends, codes, scale, bias, dtype)
        y = ops.straight_through(y, x, codes, scale, ends)
    grad = torch.randn(7, 6).to(dtype)
    y.backward(grad)
    g = grad.double()
    dx = torch.cat([g[:3] @ weight[0], g[3:5] @ weight[2], torch.zeros(2, 8, dtype=torch.float64)])
    db = torch.stack([g[:3].sum(0), torch.zeros(6, dtype=torch.float64), g[3:5].sum(0)])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 2**-7, "atol": 1e-4}
    assert x.grad is not None and bias.grad is not None
    assert x.grad.dtype == bias.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), dx, **tolerance)
    torch.testing.assert_close(bias.grad.double(), db, **tolerance)


def test_a_gradient_can_be_compiled() -> None:
    codes, scale = stack(2, 4, 8)
    ends = ends_of([2, 1])

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        codes_of_x, x_scale = ops.quantize_per_token(x)
        y = ops.w8a8_experts_linear(codes_of_x, x_scale, ends, codes, scale, bias, x.dtype)
        y = ops.straight_through(y, x, codes, scale, ends)
        return (y + ops.w8a16_experts_linear(x, ends, codes, scale, bias)).square().sum()

    def gradients(f: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(2, 4, requires_grad=True)
        return torch.autograd.grad(f(x, bias), (x, bias))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", ["w8a16", "w8a8"])
def test_a_directional_derivative_by_reverse_mode(wanted: str) -> None:
    """Two times backwards, as `torch.autograd.functional.jvp` goes: what the error about forward mode points to."""
    codes, scale = stack(3, 6, 8)
    ends, v = ends_of([3, 0, 2]), torch.randn(7, 8)

    def experts(x: Tensor) -> Tensor:
        if wanted == "w8a16":
            return ops.w8a16_experts_linear(x, ends, codes, scale, None)
        y = ops.w8a8_experts_linear(*ops.quantize_per_token(x), ends, codes, scale, None, x.dtype)
        return ops.straight_through(y, x, codes, scale, ends)

    _, derivative = torch.autograd.functional.jvp(experts, torch.randn(7, 8), v)
    weight = codes.double() * scale.double()
    truth = [v[:3].double() @ weight[0].T, v[3:5].double() @ weight[2].T, torch.zeros(2, 6, dtype=torch.float64)]
    torch.testing.assert_close(derivative.double(), torch.cat(truth), rtol=1e-5, atol=1e-5)


def test_a_gradient_of_codes_or_scales_is_refused() -> None:
    codes, scale = stack(2, 4, 8)
    ends, x = ends_of([1, 1]), torch.randn(2, 8)
    with pytest.raises(OctavoError, match="weight_scale"):
        ops.w8a16_experts_linear(x, ends, codes, scale.requires_grad_())
    with pytest.raises(OctavoError, match="scales are frozen"):
        ops.w8a8_experts_linear(*ops.quantize_per_token(x), ends, codes, scale, None, x.dtype)


def test_wrong_inputs_are_errors() -> None:
    codes, scale = stack(2, 4, 8)
    ends = ends_of([1, 1])
    with pytest.raises(QuantizeError, match=r"shape is \[2, 7\], expected \[..., 8\]"):
        ops.w8a16_experts_linear(torch.randn(2, 7), ends, codes, scale)
    with pytest.raises(QuantizeError, match="expected int8"):
        ops.w8a8_experts_linear(torch.randn(2, 8), torch.ones(2, 1), ends, codes, scale, None, torch.float32)


def test_autocast_and_grad_of_nothing() -> None:
    codes, scale = stack(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.w8a16_experts_linear(torch.randn(0, 8, requires_grad=True), ends_of([0, 0]), codes, scale)
    assert y.shape == (0, 4) and y.dtype == torch.bfloat16
    y.sum().backward()
