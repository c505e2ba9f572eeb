"""Activations to int8, and the product of two int8 matrices, against exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from octavo import ops
from octavo.errors import OctavoError, QuantizeError
from octavo.ops import reference
from octavo.primitives import quantize_weight
from tests.cuda_division import CudaDivision

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (0,), (1,), (3,), (33,), (2, 1), (2, 3, 5), (4, 0, 2)]


def assert_are_codes_of(codes: Tensor, scale: Tensor, x: Tensor) -> None:
    """Every code stands for its value to within half a step, and the largest of each scale is +-127."""
    assert codes.dtype == torch.int8 and codes.shape == x.shape and codes.is_contiguous()
    step = scale.double()
    error = (codes.double() * step - x.double()).abs()
    assert bool((error <= step * (0.5 + 1e-5)).all())
    assert not codes.numel() or int(codes.int().abs().max()) <= 127


@given(
    lead=st.sampled_from(SHAPES),
    k=st.sampled_from([1, 3, 64, 100]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 4),
    seed=st.integers(0, 100),
)
def test_dynamic_codes(lead: tuple[int, ...], k: int, dtype: torch.dtype, exponent: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(*lead, k) * 2.0**exponent).to(dtype)
    before = x.clone()
    codes, scale = ops.quantize_per_token(x)
    assert_are_codes_of(codes, scale, x)
    assert scale.dtype == torch.float32 and scale.shape == (*lead, 1)
    torch.testing.assert_close(scale.double() * 127, x.double().abs().amax(-1, keepdim=True), rtol=1e-6, atol=0)
    codes, scale = ops.quantize_per_tensor(x)
    assert_are_codes_of(codes, scale, x)
    assert scale.shape == (1,)
    if x.numel():
        torch.testing.assert_close(scale.double() * 127, x.double().abs().max().reshape(1), rtol=1e-6, atol=0)
    assert torch.equal(x, before)


def test_scales_are_the_same_where_a_division_by_a_number_is_not_exact() -> None:
    x = torch.randn(2000, 3)
    expected, of_all = reference.quantize_per_token(x), reference.quantize_per_tensor(x)
    with CudaDivision():
        codes, scale = reference.quantize_per_token(x)
        assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
        assert torch.equal(reference.quantize_per_tensor(x)[1], of_all[1])


def test_zeros_have_scale_one_and_codes_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    codes, scale = ops.quantize_per_token(x)
    assert codes.tolist() == [[0, 0], [64, -127]]  # 63.5 is rounded to even
    assert scale[0] == 1
    assert ops.quantize_per_tensor(torch.zeros(2, 3))[1].tolist() == [1.0]


def test_static_codes_are_clamped() -> None:
    x = torch.tensor([0.0, 0.25, 0.75, -1.26, 1.27, 5.0, -5.0])
    codes = ops.quantize_static(x, torch.tensor([0.01]))
    assert codes.tolist() == [0, 25, 75, -126, 127, 127, -127]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_output(bad: float) -> None:
    """As in the float model, and only in its own row where the scale is the row's."""
    x = torch.randn(3, 8)
    x[1, 2] = bad
    codes, scale = quantize_weight(torch.randn(4, 8))
    y = ops.w8a8_linear(*ops.quantize_per_token(x), codes, scale, None, torch.float32)
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()


@given(
    m=st.sampled_from([0, 1, 2, 16, 17, 40]),
    n=st.sampled_from([1, 3, 8, 64, 65]),
    k=st.sampled_from([1, 7, 64, 1024, 1025, 2500]),
    seed=st.integers(0, 50),
)
def test_the_product_of_codes_is_exact(m: int, n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, w = torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.randint(-127, 128, (n, k), dtype=torch.int8)
    expected = x.long() @ w.long().T
    assert torch.equal(reference.int8_matmul(x, w).long(), expected)
    # What an accelerator without such a product, or that refuses this shape, does.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_HAS_INT_MM", ())
        assert torch.equal(reference.int8_matmul(x, w).long(), expected)


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["with a product of int8 matrices", "without"])
def test_the_largest_sum_does_not_overflow(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_HAS_INT_MM", devices)
    k = 70_000
    x = torch.full((1, k), 127, dtype=torch.int8)
    assert reference.int8_matmul(x, x).item() == 127 * 127 * k  # beyond what fp32 holds exactly


@given(
    lead=st.sampled_from(SHAPES),
    n=st.sampled_from([1, 7, 65]),
    k=st.sampled_from([1, 31, 100]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
    per_token=st.booleans(),
)
def test_linear(
    lead: tuple[int, ...], n: int, k: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, per_token: bool
) -> None:
    torch.manual_seed(n * k)
    codes, scale = quantize_weight(torch.randn(n, k))
    x, x_scale = (ops.quantize_per_token if per_token else ops.quantize_per_tensor)(torch.randn(*lead, k))
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    y = ops.w8a8_linear(x, x_scale, codes, scale, bias, dtype)
    expected = (x.double() * x_scale.double()) @ (codes.double() * scale.double()).T
    if bias is not None:
        expected = expected + bias.double()
    assert y.dtype == dtype and y.shape == (*lead, n)
    # fp32 rounds the integer sum, the two scales' product, their product and the sum with the bias: once each.
    unit = 2.0**-50 if dtype == torch.float64 else 2.0**-24
    terms = (x.double() * x_scale.double()).abs() @ (codes.double() * scale.double()).abs().T
    bound = expected.abs() * torch.finfo(dtype).eps / 2 + (terms + expected.abs() + 1) * unit * 4
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_wrong_inputs_are_refused() -> None:
    codes, scale = quantize_weight(torch.randn(4, 8))
    with pytest.raises(QuantizeError, match=r"x: is torch.float32 \[2, 8\], expected int8 \[..., 8\]"):
        ops.w8a8_linear(torch.randn(2, 8), torch.ones(1), codes, scale, None, torch.float32)
    with pytest.raises(QuantizeError, match=r"x: shape is \[2, 7\], expected \[..., 8\] for an int8 weight"):
        ops.w8a8_linear(torch.zeros(2, 7, dtype=torch.int8), torch.ones(1), codes, scale, None, torch.float32)
    x = torch.zeros(2, 3, 8, dtype=torch.int8)
    for x_scale in (torch.ones(3, 1), torch.ones(2, 3, 1).bfloat16()):  # too few of them; another dtype
        with pytest.raises(QuantizeError, match=r"x_scale: is .*, expected fp32 \[2, 3, 1\], or \[1\]"):
            ops.w8a8_linear(x, x_scale, codes, scale, None, torch.float32)
    for quantize in (ops.quantize_per_token, ops.quantize_per_tensor):
        with pytest.raises(QuantizeError, match=r"x: dtype is torch\.int64, expected"):
            quantize(torch.arange(3))
        with pytest.raises(QuantizeError, match="x: is a 0-d tensor"):
            quantize(torch.tensor(1.0))


def test_straight_through_gives_the_gradient_of_the_dequantized_layer() -> None:
    codes, scale = quantize_weight(torch.randn(5, 8))
    x = torch.randn(3, 8, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    y = ops.w8a8_linear(*ops.quantize_per_token(x), codes, scale, bias, torch.float32)
    y = ops.straight_through(y, x, codes, scale)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ (codes * scale))
    torch.testing.assert_close(bias.grad, weights.sum(0))


def test_a_gradient_of_a_scale_is_refused() -> None:
    codes, scale = quantize_weight(torch.randn(5, 8))
    x, x_scale = ops.quantize_per_token(torch.randn(3, 8))
    with pytest.raises(OctavoError, match="requires_grad is set on x_scale or weight_scale"):
        ops.w8a8_linear(x, x_scale, codes, scale.requires_grad_(), None, torch.float32)


# -- inside a compiler ------------------------------------------------------------------------------------------------

QUANTIZERS: list[Callable[[Tensor], Any]] = [
    ops.quantize_per_token,
    ops.quantize_per_tensor,
    lambda x: ops.quantize_static(x, torch.ones(1, device=x.device)),
]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quantize", QUANTIZERS, ids=["per_token", "per_tensor", "static"])
def test_a_compiler_for_cuda_sees_the_formula(
    quantize: Callable[[Tensor], Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_opaque() -> bool:
        with FakeTensorMode():
            graph = make_fx(quantize)(torch.empty(3, 8, device=device))
        return any("octavo" in str(node.target) for node in graph.graph.nodes)

    assert is_opaque()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert is_opaque() == (device == "cpu")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert is_opaque()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, when inductor is imported
def test_the_formula_is_fused_with_what_makes_x() -> None:
    """As it would be on a GPU: one kernel from the input of a norm to codes, which are right to half a step."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    x = torch.randn(5, 300) * torch.logspace(-3, 3, 5).unsqueeze(1)
    with torch.no_grad():
        compiled = torch.compile(lambda x: reference.quantize_per_token(norm(x)), fullgraph=True)
        (codes, scale), (source,) = run_and_get_code(compiled, x)
    assert source.count("async_compile.cpp_pybinding(") == 1 and "octavo" not in source
    assert_are_codes_of(codes, scale, norm(x.double()))
    torch.testing.assert_close(scale.double() * 127, norm(x.double()).abs().amax(-1, keepdim=True), rtol=1e-5, atol=0)
