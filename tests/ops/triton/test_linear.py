"""w8a16_linear of the Triton kernels against float64: every path, at the borders of its tiles."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import QuantizeError
from octavo.ops import reference
from octavo.ops.triton import linear, vector
from octavo.ops.triton.linear import w8a16_linear, w8a16_linears
from tests.ops.rounding import assert_off_by, linear_in_double
from tests.ops.triton.hopper import as_on_hopper, launched

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(n: int, k: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Codes up to both ends, scales of differing sizes."""
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return codes, torch.rand(n, groups) * 2.0 ** torch.randint(-12, -4, (n, groups))


def check(device: str, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Sums of tensor cores are cut off, which is twice of what rounding costs."""
    y = w8a16_linear(x.to(device), codes.to(device), scale.to(device), None if bias is None else bias.to(device))
    expected, terms = linear_in_double(x, codes, scale, bias)
    assert y.dtype == x.dtype
    assert_off_by(y.cpu(), expected, (x.shape[-1] + 6) * 2.0**-23 * terms)


@settings(max_examples=30)
@given(
    lead=st.sampled_from([(), (0,), (1,), (3,), (17,), (2, 1), (2, 3, 3), (4, 0, 2)]),
    n=st.sampled_from([1, 2, 7, 65]),
    k=st.sampled_from([0, 1, 3, 31, 64, 100]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
)
def test_result(
    device: str, lead: tuple[int, ...], n: int, k: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    check(device, torch.randn(*lead, k).to(dtype), *weight(n, k), bias)


@settings(max_examples=30)
@given(
    m=st.sampled_from([0, 1, 2, 16, 65]),
    n=st.sampled_from([1, 3, 66]),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([1, 3, 8, 16, 24, 32, 48, 128]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_per_group(device: str, m: int, n: int, groups: int, group_size: int, dtype: torch.dtype, bias: bool) -> None:
    k = groups * group_size
    check(device, torch.randn(m, k).to(dtype), *weight(n, k, groups), torch.randn(n) if bias else None)


@pytest.mark.parametrize(
    ("m", "dtype"),
    [*((m, torch.bfloat16) for m in (1, 15, 16, 17, 32, 33, 64, 65)), (5, torch.float32), (65, torch.float16)],
)
def test_borders_of_tiles(device: str, m: int, dtype: torch.dtype) -> None:
    """Each tile of the table of few rows, K split and not, a last step that is partly there."""
    k = 1000
    check(device, torch.randn(m, k).to(dtype), *weight(66, k), torch.randn(66))
    assert linear.plan(m, 66, k, linear.FEW_ROWS, linear.MANY_ROWS).parts > 1


@triton.jit
def _store_what_is_read(y_ptr, m, k, M: tl.constexpr, K: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, K)
    tl.store(y_ptr + rows[:, None] * K + columns[None, :], linear.is_read(rows, columns, m, k, M) + (rows * 0)[:, None])


@pytest.mark.parametrize("m", [1, 4, 16])
def test_the_least_tile_reads_the_rows_that_are_there(device: str, m: int) -> None:
    for tile, rows in ((linear.FEW_ROWS[0].m, m), (linear.FEW_ROWS[1].m, linear.FEW_ROWS[1].m)):
        read = torch.zeros(tile, 64, dtype=torch.int32, device=device)
        _store_what_is_read[1,](read, m, 40, M=tile, K=64)
        expected = torch.zeros_like(read)
        expected[:rows, :40] = 1
        assert torch.equal(read, expected)


@pytest.mark.parametrize("tile", linear.MANY_ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tiles(device: str, tile: linear.Tile, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """That shapes take them which are too large for the interpreter; here they have no other choice."""
    monkeypatch.setattr(linear, "MANY_ROWS", (tile,))
    for parts in (0, 120):
        monkeypatch.setattr(linear, "ENOUGH_PROGRAMS", parts)
        check(device, torch.randn(131, 150).to(dtype), *weight(131, 150), torch.randn(131))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1024, 4096), (16, 4096, 4096), (64, 28672, 4096), (512, 4096, 4096), (8192, 4096, 14336)]
)
def test_plan_covers_the_product(m: int, n: int, k: int) -> None:
    tile, tiles, parts, steps = linear.plan(m, n, k, linear.FEW_ROWS, linear.MANY_ROWS)
    assert tiles == -(-m // tile.m) * -(-n // tile.n)
    assert (parts - 1) * steps * tile.k < k <= parts * steps * tile.k
    assert tiles * parts >= linear.ENOUGH_PROGRAMS or steps <= 4


@given(m=st.integers(1, 5000), n=st.integers(1, 200000), k=st.integers(0, 30000), step=st.sampled_from([16, 64, 256]))
def test_every_plan_covers_k_once(m: int, n: int, k: int, step: int) -> None:
    tile, _, parts, steps = linear.plan(m, n, k, linear.FEW_ROWS, linear.MANY_ROWS, step)
    assert 1 <= parts <= linear.MOST_PARTS and tile.k <= step
    assert (parts - 1) * steps * tile.k < max(k, 1) <= parts * steps * tile.k


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(device: str, m: int, dtype: torch.dtype) -> None:
    codes, scale = (t.to(device) for t in weight(33, 48))
    wide = torch.randn(m, 96).to(dtype).to(device)
    for x in (wide[:, ::2], wide[:, 16:64], wide[:, :48].unsqueeze(1), wide[:1, :48].expand(m, 48)):
        y = w8a16_linear(x, codes, scale, None)
        assert torch.equal(y, w8a16_linear(x.contiguous(), codes, scale, None)) and y.is_contiguous()
    x = wide[:, :48]
    expected = w8a16_linear(x, codes, scale, None)
    padded = torch.empty(33, 64, dtype=torch.int8, device=device)
    padded[:, :48] = codes
    assert torch.equal(w8a16_linear(x, padded[:, :48], scale, None), expected)
    assert torch.equal(w8a16_linear(x, codes.T.contiguous().T, scale, None), expected)
    doubled = torch.stack((scale, scale), 1).flatten(1)
    assert torch.equal(w8a16_linear(x, codes, doubled[:, ::2], None), expected)
    bias = torch.randn(66, device=device)[::2]
    assert torch.equal(w8a16_linear(x, codes, scale, bias), w8a16_linear(x, codes, scale, bias.contiguous()))


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 32])
def test_the_scale_comes_before_the_rounding(device: str, m: int, groups: int) -> None:
    """512 * 127 * 32 is beyond fp16: a sum that is rounded before it is scaled would be inf."""
    codes, scale = torch.full((1, 32), 127, dtype=torch.int8), torch.full((1, groups), 2.0**-14)
    y = w8a16_linear(torch.full((m, 32), 512.0).half().to(device), codes.to(device), scale.to(device), None)
    assert y.tolist() == [[127.0]] * m


@pytest.mark.parametrize("m", [1, 2])
def test_the_bias_comes_before_the_rounding(device: str, m: int) -> None:
    codes, scale, bias = torch.tensor([[127, 1]], dtype=torch.int8), torch.tensor([[2.0**-7]]), torch.tensor([-1.0])
    x = torch.tensor([[1.0, 0.25]], dtype=torch.bfloat16).expand(m, 2)
    y = w8a16_linear(x.to(device), codes.to(device), scale.to(device), bias.to(device))
    assert y.tolist() == [[-(2.0**-7) + 2.0**-9]] * m


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(device: str, m: int, dtype: torch.dtype) -> None:
    codes, scale = torch.tensor([[1, 2], [-3, 4]], dtype=torch.int8), torch.ones(2, 1)
    x = torch.ones(m, 2, dtype=dtype)
    x[0, 1] = float("inf")
    assert w8a16_linear(x.to(device), codes.to(device), scale.to(device), None).tolist()[0] == [float("inf")] * 2
    x[0, 1] = float("nan")
    y = w8a16_linear(x.to(device), codes.to(device), scale.to(device), None)
    assert y[0].isnan().all()
    assert y[1:].tolist() == [[3.0, 1.0]] * (m - 1)


@pytest.mark.parametrize("m", [1, 2])
def test_fp32_keeps_all_its_bits(device: str, m: int) -> None:
    """One code and one element: nothing is added up, so that the product is rounded once, to fp32."""
    x = torch.randn(m, 1) * 2.0 ** torch.randint(-60, 60, (m, 1))
    codes, scale = torch.tensor([[1], [-128], [64]], dtype=torch.int8), torch.ones(3, 1)
    y = w8a16_linear(x.to(device), codes.to(device), scale.to(device), None).cpu()
    assert torch.equal(y, x * codes.T.float())


def test_fp64_is_summed_in_fp64(device: str) -> None:
    codes, scale = weight(5, 40)
    x = torch.randn(3, 40, dtype=torch.float64)
    y = w8a16_linear(x.to(device), codes.to(device), scale.to(device), None).cpu()
    torch.testing.assert_close(y, x @ (codes.double() * scale.double()).T, rtol=1e-12, atol=1e-12)


def test_no_inputs_at_all(device: str) -> None:
    """K = 0: what is left is the bias."""
    codes, scale = torch.empty(5, 0, dtype=torch.int8, device=device), torch.ones(5, 1, device=device)
    bias = torch.randn(5, device=device)
    assert torch.equal(w8a16_linear(torch.empty(2, 0, device=device), codes, scale, bias), bias.expand(2, 5))


def test_wrong_inputs(device: str) -> None:
    codes, scale = (t.to(device) for t in weight(4, 6))
    with pytest.raises(QuantizeError, match=r"x: shape is \[2, 5\], expected \[\.\.\., 6\]"):
        w8a16_linear(torch.randn(2, 5, device=device), codes, scale, None)
    with pytest.raises(QuantizeError, match=r"x: dtype is torch.int8"):
        w8a16_linear(torch.zeros(2, 6, dtype=torch.int8, device=device), codes, scale, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(256, 64, 128), (257, 65, 144), (300, 130, 1000)])
def test_the_copy_engine(
    device: str, m: int, n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, channels and columns past the end of a tile. Rows of 1000 codes do not begin at multiples of 16 bytes."""
    as_on_hopper(device, monkeypatch)
    names = launched(linear, monkeypatch)
    check(device, torch.randn(m, k).to(dtype), *weight(n, k), torch.randn(n))
    assert ("_copied_product" in names) == (k % 16 == 0)


def test_the_copy_engine_is_for_16_bits_and_one_scale_a_channel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_hopper(device, monkeypatch)
    names = launched(linear, monkeypatch)
    check(device, torch.randn(256, 64), *weight(8, 64))
    check(device, torch.randn(256, 64).bfloat16(), *weight(8, 64, groups=2))
    assert "_copied_product" not in names


@settings(max_examples=20)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 4, 7, 66]), min_size=1, max_size=4),
    lead=st.sampled_from([(), (1,), (1, 1), (2,), (0,)]),
    k=st.sampled_from([0, 1, 31, 64, 1100]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    bias=st.booleans(),
)
def test_layers_side_by_side(
    device: str, sizes: list[int], lead: tuple[int, ...], k: int, dtype: torch.dtype, bias: bool
) -> None:
    x = torch.randn(*lead, k).to(dtype)
    layers = [(*weight(n, k), torch.randn(n) if bias else None) for n in sizes]
    y = linears(device, x, layers)
    assert y.dtype == dtype and y.shape == (*lead, sum(sizes))
    for part, layer in zip(y.cpu().split(sizes, -1), layers, strict=True):
        expected, terms = linear_in_double(x, *layer)
        assert_off_by(part.contiguous(), expected, (k + 6) * torch.finfo(torch.float32).eps * terms)


@pytest.mark.parametrize("groups", [[2, 2, 2], [8, 8, 8], [1, 2, 1]])
def test_layers_side_by_side_in_groups(device: str, groups: list[int]) -> None:
    """Of 32 and of 8 columns; those of differing groups are not for one launch."""
    x = torch.randn(1, 64)
    layers = [(*weight(9, 64, count), None) for count in groups]
    for part, layer in zip(linears(device, x, layers).cpu().split(9, -1), layers, strict=True):
        expected, terms = linear_in_double(x, *layer)
        assert_off_by(part.contiguous(), expected, 70 * 2.0**-23 * terms)


def test_layers_side_by_side_with_strides(device: str) -> None:
    x, wide, scale = torch.randn(1, 96)[:, ::2].to(device), *(t.to(device) for t in weight(9, 96))
    layers = [(codes, scale, None) for codes in (wide[:, :48], wide[:, ::2], wide[::3, 48:])]
    layers[2] = (layers[2][0], scale[::3], None)
    expected = torch.cat([w8a16_linear(x, *layer) for layer in layers], -1)
    assert torch.equal(linears(device, x, layers), expected)


def test_layers_side_by_side_are_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = launched(vector, monkeypatch)
    linears(device, torch.randn(1, 1, 40), [(*weight(9, 40), None)] * 3)
    assert names == ["_matrix_vectors"]


def linears(device: str, x: Tensor, layers: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    there = ([None if one is None else one.to(device) for one in column] for column in zip(*layers, strict=True))
    return w8a16_linears(x.to(device), *there)


def test_the_reference_puts_layers_side_by_side() -> None:
    x, layers = torch.randn(2, 3, 40), [(*weight(n, 40), torch.randn(n)) for n in (5, 6)]
    y = reference.w8a16_linears(x, *map(list, zip(*layers, strict=True)))
    assert torch.equal(y, torch.cat([torch.ops.octavo.w8a16_linear(x, *layer) for layer in layers], -1))
