"""Quantization by the Triton kernels: weights have the bits of `primitives.py`, activations those of the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import primitives
from octavo.errors import QuantizeError
from octavo.ops import attention
from octavo.ops.schemas import reference_of
from octavo.ops.triton import quantize
from octavo.ops.triton.quantize import (
    quantize_per_tensor,
    quantize_per_token,
    quantize_states,
    quantize_static,
    quantize_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEADS = [(), (0,), (1,), (3,), (33,), (2, 1), (2, 3, 5), (4, 0, 2)]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN


def expected(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, as torch computes it on CPUs."""
    scale = largest.float() / 127
    scale[scale == 0] = 1.0
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def amax(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    (codes, scale), (wanted_codes, wanted_scale) = found, wanted
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and codes.is_contiguous()
    assert torch.equal(scale.cpu(), wanted_scale)
    assert torch.equal(codes.cpu(), wanted_codes)


@given(
    lead=st.sampled_from(LEADS),
    k=st.sampled_from([0, 1, 3, 64, 100, 520]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-24, 10),
    seed=st.integers(0, 100),
)
def test_activations(device: str, lead: tuple[int, ...], k: int, dtype: torch.dtype, exponent: int, seed: int) -> None:
    x = (torch.randn(*lead, k, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).to(dtype)
    assert_same(quantize_per_token(x.to(device)), expected(x, amax(x)))
    largest = x.abs().amax().reshape(1) if x.numel() else torch.zeros(1)
    assert_same(quantize_per_tensor(x.to(device)), expected(x, largest))
    scale = torch.rand(1) * 2.0**exponent + 2.0**-30
    assert torch.equal(
        quantize_static(x.to(device), scale.to(device)).cpu(),
        (x.float() / scale).round().clamp(-127, 127).to(torch.int8),
    )


def test_an_infinity_leaves_codes_of_zero_under_an_infinite_scale(device: str) -> None:
    """inf / inf is NaN, whose code is 0 as that of the rest is: whatever the row is multiplied by becomes NaN."""
    x = torch.randn(3, 70)
    x[1, 5], x[2, 6] = torch.inf, -torch.inf
    codes, scale = (part.cpu() for part in quantize_per_token(x.to(device)))
    assert scale.isinf().flatten().tolist() == [False, True, True]
    assert codes[0].any() and not codes[1:].any()


def test_halves_are_rounded_to_even(device: str) -> None:
    """Every half from -127.5 to 127.5 of a scale that is a power of two, so that they are met exactly."""
    x = torch.arange(-255, 256, 2) / 2 * 2.0**-3
    codes = quantize_static(x.to(device), torch.tensor([2.0**-3], device=device)).cpu()
    assert torch.equal(codes.double(), (x.double() * 8).round().clamp(-127, 127))
    assert codes[127].item() == 0 and codes[129].item() == 2


@pytest.mark.parametrize("exponent", [*range(-149, 128, 9), -148, -127, -126, -125, -65, -64, -63, 63, 64, 65, 127])
def test_next_to_halves(device: str, exponent: int) -> None:
    """Quotients a few steps of fp32 around every half, for scales of every size, denormal ones too."""
    halves = torch.arange(-257, 258, 2) / 2
    for mantissa in (1.0, 1.0 + 2**-23, 1.5, 1.9999998807907104, *(1 + torch.rand(4)).tolist()):
        scale = torch.tensor([mantissa]).ldexp(torch.tensor(exponent))
        tie = (halves.double() * scale.double()).float().view(torch.int32)
        x = (tie + torch.arange(-3, 4, dtype=torch.int32)[:, None]).view(torch.float32)
        codes = quantize_static(x.to(device), scale.to(device)).cpu()
        wanted = (x / scale).nan_to_num(0.0, torch.inf, -torch.inf).round().clamp(-127, 127)
        assert torch.equal(codes.float(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_by_itself(device: str, dtype: torch.dtype) -> None:
    """The quotients lie next to a half for some of 30 000 values: a division that is not rounded right would show."""
    x = torch.randn(300, 100).mul(2.0 ** torch.randint(-10, 10, (300, 1))).to(dtype)
    assert_same(quantize_per_token(x.to(device)), expected(x, amax(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [40, 100, 4096])
def test_rows_whose_scales_are_far_apart(device: str, k: int, dtype: torch.dtype) -> None:
    """One program has rows of short ones whose scales need a power of two next to such whose scales do not, and NaN."""
    magnitudes = torch.tensor([1.0, 1e-40, 1e30, 127.0, 0.0, 3e-17, 2e21, 2.0**-57, 1e-3], dtype=torch.float64)
    top = torch.finfo(dtype).max
    for first in range(len(magnitudes)):
        x = (torch.randn(9, k).double() * magnitudes.roll(first)[:, None]).clamp(-top, top).to(dtype)
        assert_same(quantize_per_token(x.to(device)), expected(x, amax(x)))
        for bad in (torch.nan, torch.inf):
            broken = x.clone()
            broken[4, 7] = bad
            codes, scale = (part.cpu() for part in quantize_per_token(broken.to(device)))
            assert not scale[4].isfinite()
            rest = [row for row in range(9) if row != 4]
            assert_same((codes[rest], scale[rest]), expected(x[rest], amax(x[rest])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_largest_value_is_127(device: str, dtype: torch.dtype) -> None:
    """The quotient may be above by what rounding took off the scale: of all numbers of 16 bits but zero."""
    every = torch.arange(1, 0x7F80 if dtype == torch.bfloat16 else 0x7C00, dtype=torch.int16).view(dtype)
    x = torch.stack((every, -every), 1)
    codes, scale = quantize_per_token(x.to(device))
    wanted, wanted_scale = expected(x, amax(x))
    normal = wanted_scale.flatten() > 1e-37
    assert torch.equal(scale.cpu(), wanted_scale) and torch.equal(codes.cpu(), wanted)
    assert (codes.cpu()[normal] == torch.tensor([127, -127])).all()


@pytest.mark.parametrize("k", [8192, 8193, 14335, 14336, 16384, 16389])
def test_long_rows(device: str, k: int) -> None:
    x = torch.randn(2, k)
    x[0, -1], x[1, 0] = 40.0, -50.0  # the largest at either end
    assert_same(quantize_per_token(x.to(device)), expected(x, amax(x)))


@pytest.mark.parametrize("programs", [1, 2, 512])
def test_the_largest_of_a_tensor_is_anywhere(device: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "PARTIAL_PROGRAMS", programs)
    x = torch.randn(5, quantize.PIECE)
    for at in (0, 2 * quantize.PIECE + 7, x.numel() - 1):
        loud = x.clone()
        loud.view(-1)[at] = -100.0
        assert_same(quantize_per_tensor(loud.to(device)), expected(loud, torch.full((1,), 100.0)))


@given(
    n=st.sampled_from([1, 3, 65]),
    k=st.sampled_from([1, 2, 100, 256]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-140, 100),
    seed=st.integers(0, 100),
)
def test_weights(device: str, n: int, k: int, dtype: torch.dtype, exponent: int, seed: int) -> None:
    """Down to the smallest numbers of each dtype, where a rounded scale would clip."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(0, 9, (n, 1), generator=generator)
    x = torch.randn(n, k, generator=generator).double() * 2.0**exponent * 2.0**spread
    weight = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    assert_same(quantize_weight(weight.to(device)), primitives.quantize_weight(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_every_largest_value(device: str, dtype: torch.dtype) -> None:
    """All 32 thousand numbers of 16 bits that are not negative and finite."""
    every = torch.arange(0, 0x7F80 if dtype == torch.bfloat16 else 0x7C00, dtype=torch.int16).view(dtype).reshape(-1, 1)
    assert_same(quantize_weight(every.to(device)), primitives.quantize_weight(every))


@settings(max_examples=20)
@given(bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), dtype=st.sampled_from(DTYPES))
def test_what_is_not_finite_makes_its_scale_so(device: str, bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(dtype)
    x[1, 2] = bad
    for function in (quantize_per_token, quantize_weight):
        codes, scale = (t.cpu() for t in function(x.to(device)))
        assert not scale[1].isfinite()
        assert bool(scale[1].isnan()) == (bad != bad)
        finite = expected if function is quantize_per_token else lambda rows, _: primitives.quantize_weight(rows)
        assert_same((codes[[0, 2]], scale[[0, 2]]), finite(x[[0, 2]], amax(x[[0, 2]])))
    assert not quantize_per_tensor(x.to(device))[1].isfinite()


def test_strides_do_not_matter(device: str) -> None:
    base = torch.randn(10, 6, 8).to(device)
    for x in (base.permute(2, 1, 0), base[:, ::2], base[..., ::2], base[:, :1].expand(10, 6, 8), base[0].T):
        before = x.clone()
        for function in (quantize_per_token, quantize_per_tensor):
            assert_same(function(x), tuple(t.cpu() for t in function(x.contiguous())))
        scale = torch.ones(1, device=device)
        codes = quantize_static(x, scale)
        assert codes.is_contiguous() and torch.equal(codes, quantize_static(x.contiguous(), scale))
        assert torch.equal(x, before)
    assert_same(quantize_weight(base[0].T), tuple(t.cpu() for t in quantize_weight(base[0].T.contiguous())))


def kept(x: Tensor, are_values: bool, device: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of x [B, KV, T, D] where a cache keeps them, between two tokens that nothing is written to."""
    batch, heads, tokens, size = x.shape
    packed = torch.full((batch, heads, tokens + 2, (size + 3) // 4 * 4 + 8), 99, dtype=torch.int8, device=device)
    scales = packed[..., -8:].view(torch.float32).fill_(9)
    values = torch.full((batch, heads, tokens + 2, size), 99, dtype=torch.int8, device=device)
    codes, scale = (values, scales[..., 1:]) if are_values else (packed[..., :size], scales[..., :1])
    quantize_states(x, codes[:, :, 1:-1], scale[:, :, 1:-1], are_values)
    assert (codes[:, :, [0, -1]] == 99).all() and (scale[:, :, [0, -1]] == 9).all()
    assert (scales[..., :1] if are_values else scales[..., 1:]).eq(9).all(), "the scale next to it"
    return codes[:, :, 1:-1].cpu(), scale[:, :, 1:-1].cpu()


LAYOUTS = {
    "contiguous": lambda x: x,
    "of a projection": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "of a fused projection": lambda x: (
        torch.cat((x, x), 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]]
    ),
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@given(
    batch=st.integers(0, 2),
    heads=st.integers(0, 3),
    tokens=st.integers(0, 5),
    size=st.sampled_from([0, 1, 3, 6, 16, 77, 128]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    are_values=st.booleans(),
    exponent=st.integers(-24, 10),
    seed=st.integers(0, 100),
)
def test_states_to_where_they_are_kept(
    batch: int,
    heads: int,
    tokens: int,
    size: int,
    dtype: torch.dtype,
    layout: str,
    are_values: bool,
    exponent: int,
    seed: int,
    device: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, tokens, size, generator=generator).mul(2.0**exponent).to(dtype)
    x[torch.rand(batch, heads, tokens, generator=generator) < 0.2] = 0
    x = LAYOUTS[layout](x.to(device))
    codes, scale = expected(x.cpu(), amax(x.cpu()))
    if are_values:
        scale[amax(x.cpu()).float() / 127 == 0] = 0
    found_codes, found_scale = kept(x, are_values, device)
    assert torch.equal(found_scale, scale) and torch.equal(found_codes, codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("are_values", [False, True])
def test_many_states(device: str, are_values: bool, dtype: torch.dtype) -> None:
    """More than one program, and as many programs as end within a head; the largest magnitudes that have no scale of
    their own, and the least that have one; a scale that is 1 of numbers that are not 0."""
    x = torch.randn(2, 3, 37, 64).mul(2.0 ** torch.randint(-10, 10, (2, 3, 37, 1))).to(dtype)
    x[0, 0, 3], x[1, 2, 36] = 0, 127.0
    if dtype in (torch.float32, torch.bfloat16):
        x[0, 1, 5], x[0, 1, 6] = 2.0**-140, 2.0**-133 if dtype == torch.bfloat16 else 2.0**-149
    codes, scale = expected(x, amax(x))
    if are_values:
        scale[(codes == 0).all(-1, keepdim=True) & (scale == 1)] = 0
    found_codes, found_scale = kept(x.to(device), are_values, device)
    assert torch.equal(found_scale, scale) and torch.equal(found_codes, codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("are_values", [False, True])
def test_states_that_are_not_finite(device: str, are_values: bool, dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 9, 24).to(dtype)
    x[0, 0, 2, 3], x[0, 1, 4, 0], x[0, 1, 8, 23] = torch.nan, torch.inf, -torch.inf
    found_codes, found_scale = kept(x.to(device), are_values, device)
    codes, scale = (part.cpu() for part in quantize_per_token(x.to(device)))
    assert found_scale[0, 0, 2].isnan() and found_scale[0, 1, [4, 8]].isinf().all()
    assert torch.equal(found_scale.nan_to_num(0.0), scale.nan_to_num(0.0))
    assert torch.equal(found_codes, codes)


def test_states_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, ...]] = []
    monkeypatch.setattr(quantize, "launch", lambda kernel, grid, *args, **meta: launched.append(grid))
    x = torch.empty(2, 40, 8, 128, device="meta").transpose(1, 2)
    for are_values in (False, True):
        quantize_states(x, x.to(torch.int8), x[..., :1].float(), are_values)
    assert launched == [(80,), (80,)], "640 rows, 8 to a program"


def test_states_of_other_shapes_are_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are longer than what is held whole, rows without heads, and codes that are not for what is given."""
    monkeypatch.setattr(quantize, "launch", None)
    for x in (torch.randn(1, 2, 2, quantize.LONGEST_ROW + 1, device=device), torch.randn(3, 8, device=device)):
        codes, scale = torch.empty_like(x, dtype=torch.int8), torch.empty_like(x[..., :1])
        quantize_states(x, codes, scale, False)
        assert_same((codes, scale), expected(x.cpu(), amax(x.cpu())))
    x = torch.randn(1, 2, 3, 8, device=device)
    with pytest.raises(RuntimeError, match="must match the size"):
        quantize_states(x, torch.empty(1, 2, 4, 8, dtype=torch.int8, device=device), x[..., :1].clone(), True)
    with pytest.raises(QuantizeError, match=r"x: dtype is torch\.int64"):
        quantize_states(x.long(), x.to(torch.int8), x[..., :1].clone(), True)


def test_states_are_answered_on_cuda_devices() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("octavo::quantize_states", "CUDA")
    assert reference_of("quantize_states") is attention.quantize_states


def test_wrong_inputs(device: str) -> None:
    for function in (quantize_per_token, quantize_per_tensor):
        with pytest.raises(QuantizeError, match=r"x: dtype is torch\.int64, expected"):
            function(torch.arange(3, device=device))
        with pytest.raises(QuantizeError, match="x: is a 0-d tensor"):
            function(torch.tensor(1.0, device=device))
