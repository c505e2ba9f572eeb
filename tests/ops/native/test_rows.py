"""What quantizes is held to primitives.py bit by bit; lookups, norms and gates to float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops, primitives
from octavo.ops import eager
from octavo.ops.gates import GATES
from tests.ops.native.kernels import FLOATS, WITH_KERNELS, assert_rounds_to, codes, strided

pytestmark = WITH_KERNELS


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


# -- norms -----------------------------------------------------------------------------------------------------------


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


# -- rotary embeddings ------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 2, 5]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    half=st.sampled_from([0, 1, 7, 8, 15, 16, 17, 32, 64]),
    one=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    how=st.sampled_from(["heads side by side", "tokens side by side", "parts of more", "gaps"]),
)
def test_rotary(
    isa: str, batch: int, tokens: int, heads: tuple[int, int], half: int, one: bool, dtype: torch.dtype, how: str
) -> None:
    q, k = (lying(torch.randn(batch, count, tokens, 2 * half).to(dtype), how) for count in heads)
    cos, sin = (torch.randn(1 if one else batch, tokens, 2 * half).to(dtype) for _ in range(2))
    with torch.no_grad():
        turned = ops.rotary(q, k, strided(cos, how), sin)
    assert turned is not None
    for x, y in zip((q, k), turned, strict=True):
        first, second = x.chunk(2, -1)
        expected = x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
        assert y.dtype == dtype and torch.equal(y, expected)
        if how == "heads side by side" and min(batch, tokens) > 1:
            assert y.stride() == expected.stride()


def lying(x: Tensor, how: str) -> Tensor:
    """The same values [B, H, T, D], laid out as models, and others, do."""
    if how == "heads side by side":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.cat([x, x], -1)[..., : x.shape[3]] if how == "parts of more" else strided(x, how)


def test_rotary_is_left_to_the_formula_where_somebody_listens_or_operands_differ(isa: str) -> None:
    q, k, cos = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 3, 8)
    assert ops.rotary(q, k, cos, cos) is None, "a gradient may be wanted"
    with torch.no_grad():
        assert ops.rotary(q, k, cos, cos) is not None
        for operands in (
            (q.double(), k.double(), cos.double(), cos.double()),
            (q, k.half(), cos, cos), (q, k, cos.half(), cos), (q, k[:1], cos, cos), (q, k[:, :, :2], cos, cos),
            (q, k, cos[:, :2], cos[:, :2]), (q, k, cos[..., :4], cos[..., :4]), (q, k, cos.expand(2, 2, 3, 8), cos),
            (q[0], k[0], cos, cos), (q[..., :7], k[..., :7], cos[..., :7], cos[..., :7]),
        ):  # fmt: skip
            assert ops.rotary(*operands) is None


# -- gates -----------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(eager, "_gated", lambda *args: called.append(True) or torch.ops.octavo.gated(*args))
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
