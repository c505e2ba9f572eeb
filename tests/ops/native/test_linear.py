"""Linear layers and experts: sums of codes are exact, others right to the rounding of fp32 sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from octavo import ops
from octavo.errors import QuantizeError
from tests.ops.native.kernels import (
    FLOATS,
    LONG,
    MANY,
    ODD,
    WITH_KERNELS,
    assert_rounds_to,
    codes,
    linear_in_double,
    strided,
)

pytestmark = WITH_KERNELS


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


@given(
    shape=st.sampled_from([(100,), (1, 100), (0, 100), (7, 64), (2, 3, 33), (1, 2048), (4, 2048), (5, 0)]),
    n=ODD,
    dtype=st.sampled_from(FLOATS),
    bias_dtype=st.sampled_from([None, *FLOATS]),
    static=st.booleans(),
    how=st.sampled_from(["dense", "gaps", "transposed"]),
    seed=st.integers(0, 99),
)
def test_quantized_and_multiplied_at_once(
    isa: str, shape: tuple[int, ...], n: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, static: bool,
    how: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x, weight, weight_scale = torch.randn(shape).to(dtype), codes(n, shape[-1]), torch.rand(n, 1) / 128
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    input_scale = torch.tensor([0.02]) if static else None
    if input_scale is None:
        of_x, x_scale = ops.quantize_per_token(x)
    else:
        of_x, x_scale = ops.quantize_static(x, input_scale), input_scale
    expected = ops.w8a8_linear(of_x, x_scale, weight, weight_scale, bias, dtype)
    with torch.no_grad():
        y = ops.w8a8_linear_at_once(strided(x, how), input_scale, weight, weight_scale, bias)
    assert y is not None and y.dtype == dtype and torch.equal(y, expected)


def test_what_is_not_quantized_and_multiplied_at_once(isa: str) -> None:
    weight, weight_scale = codes(5, 8), torch.rand(5, 1)

    def at_once(x: torch.Tensor) -> torch.Tensor | None:
        return ops.w8a8_linear_at_once(x, None, weight, weight_scale, None)

    assert at_once(torch.randn(2, 8)) is None, "a gradient may be wanted"
    with torch.no_grad():
        assert at_once(torch.randn(2, 8)) is not None
        assert at_once(torch.randn(2000, 8)) is None, "layers that read so much share its codes"
        assert at_once(torch.randn(2, 8).double()) is None
        assert at_once(torch.tensor(1.0)) is None
        with pytest.raises(QuantizeError, match="expected"):
            at_once(torch.randn(2, 7))


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
@pytest.mark.parametrize("m", [3, 20, 60])
def test_what_is_not_finite_stays_in_its_row(isa: str, bad: float, dtype: torch.dtype, m: int) -> None:
    x = torch.randn(m, 70).to(dtype)
    x[1, 69] = bad
    weight, weight_scale = codes(37, 70).clamp(min=1), torch.rand(37, 1)
    y = ops.w8a16_linear(x, weight, weight_scale)
    assert torch.equal(y[1].double(), torch.full((37,), bad).double()) or (bad != bad and bool(y[1].isnan().all()))
    y8 = ops.w8a8_linear(*ops.quantize_per_token(x), weight, weight_scale, None, dtype)
    assert y8[1].isnan().all()
    others = [i for i in range(m) if i != 1]
    assert y[others].isfinite().all() and y8[others].isfinite().all()


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 4, 20, 60])
def test_an_outlier_leaves_the_others_of_its_row(isa: str, dtype: torch.dtype, groups: int, m: int) -> None:
    """4096 times as large as they are, where codes are 0: AMX makes fixed-point numbers of a row."""
    x, weight, weight_scale = torch.randn(m, 640).to(dtype), codes(37, 640), torch.rand(37, groups)
    x[:, 77], weight[:, 77] = 4096, 0
    y = ops.w8a16_linear(x, weight, weight_scale)
    expected, error_of_sums = linear_in_double(x, weight, weight_scale, None, 4 + 640**0.5)
    parts, _ = linear_in_double(x.abs(), weight.abs(), weight_scale, None, 0)
    assert_rounds_to(y, expected, error_of_sums + parts * 2.0 ** (-18 if dtype == torch.float32 else -10))


def test_experts_lay_out_as_many_rows_at_a_time_as_stay_in_cache(isa: str) -> None:
    """x of 32 MB is not there twice."""
    x, weight, scale = torch.randn(8192, 1024), codes(2, 32, 1024), torch.rand(2, 32, 1)
    ends = torch.tensor([100, 8192], dtype=torch.int32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = ops.w8a16_experts_linear(x, ends, weight, scale)
    allocated = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert allocated and max(allocated) <= 5 << 20
    assert torch.equal(y[100:], ops.w8a16_linear(x[100:], weight[1], scale[1]))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch does not say what failed behind its stable ABI")
def test_memory_that_is_not_there_is_told_in_torchs_words() -> None:
    """Who halves a batch then (accelerate's `find_executable_batch_size`) goes by them. 2^48 bytes are more than any
    process may address."""
    x, weight = torch.zeros(1 << 23, 1), torch.zeros(1 << 23, 1, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        ops.w8a16_linear(x, weight, torch.ones(1 << 23, 1))
