"""w8a8_linear of the Triton kernels against exact arithmetic: every path, at the borders of its tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import QuantizeError
from octavo.ops.triton import int8_linear, vector
from octavo.ops.triton.int8_linear import w8a8_linear, w8a8_linears
from octavo.ops.triton.linear import Tile, plan
from tests.ops.rounding import assert_off_by
from tests.ops.triton.hopper import as_on_hopper, launched

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def check(
    device: str, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    """fp32 rounds the sum, the two scales' product, their product and the sum with the bias, once each."""
    operands = [t.to(device) for t in (x, x_scale, weight, scale)]
    y = w8a8_linear(*operands, None if bias is None else bias.to(device), dtype).cpu()
    product = (x.long() @ weight.long().T).double() * (x_scale.double() * scale.double().flatten())
    expected = product if bias is None else product + bias.double()
    assert y.dtype == dtype
    assert_off_by(y, expected, (product.abs() + expected.abs()) * 2.0**-22)


@settings(max_examples=30)
@given(
    lead=st.sampled_from([(), (0,), (1,), (3,), (17,), (2, 1), (2, 3, 3), (4, 0, 2)]),
    n=st.sampled_from([1, 2, 7, 65]),
    k=st.sampled_from([0, 1, 3, 31, 64, 100]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, *DTYPES]),
    per_token=st.booleans(),
)
def test_result(
    device: str, lead: tuple[int, ...], n: int, k: int, dtype: torch.dtype, bias_dtype: torch.dtype | None,
    per_token: bool,
) -> None:  # fmt: skip
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    x_scale = torch.rand(*lead, 1) if per_token else torch.rand(1)
    check(device, codes(*lead, k), x_scale, codes(n, k), torch.rand(n, 1) * 2**-10, bias, dtype)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("m", [1, 15, 16, 17, 32, 33, 64, 65])
def test_borders_of_tiles(device: str, m: int, per_token: bool) -> None:
    """Each tile of the table of few rows, with K in parts, and a last step that is partly there."""
    k = 1000
    x_scale = torch.rand(m, 1) if per_token else torch.rand(1)
    bias = torch.randn(66)
    check(device, codes(m, k), x_scale, codes(66, k), torch.rand(66, 1) * 2**-12, bias, torch.bfloat16)
    assert plan(m, 66, k, int8_linear.FEW_ROWS, int8_linear.MANY_ROWS).parts > 1


@pytest.mark.parametrize("tile", int8_linear.MANY_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tiles(device: str, tile: Tile, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "MANY_ROWS", (tile,))
    check(device, codes(131, 150), torch.rand(131, 1), codes(131, 150), torch.rand(131, 1), torch.randn(131), dtype)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(65, 3, 16), (128, 128, 128), (131, 131, 144), (300, 140, 4000)])
def test_the_copy_engine(
    device: str, m: int, n: int, k: int, dtype: torch.dtype, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, channels and columns past the end of a tile."""
    as_on_hopper(device, monkeypatch)
    names = launched(int8_linear, monkeypatch)
    x_scale = torch.rand(m, 1) if per_token else torch.rand(1)
    check(device, codes(m, k), x_scale, codes(n, k), torch.rand(n, 1) * 2**-12, torch.randn(n), dtype)
    assert names == ["_copied_product"]


def test_a_program_that_is_alone_has_fewer_warps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_hopper(device, monkeypatch)
    chosen = []
    monkeypatch.setattr(int8_linear, "launch", lambda *args, **meta: chosen.append((meta["num_warps"], args[1])))
    weight, scale = torch.empty(4096, 64, dtype=torch.int8), torch.empty(4096, 1)
    for m in (512, 2048):
        w8a8_linear(torch.empty(m, 64, dtype=torch.int8), torch.empty(1), weight, scale, None, torch.bfloat16)
    assert chosen == [(4, (4 * 32,)), (8, (16 * 32,))]


def test_the_copy_engine_takes_rows_at_multiples_of_16(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_hopper(device, monkeypatch)
    names = launched(int8_linear, monkeypatch)
    x, weight = codes(80, 100).to(device), codes(40, 200).to(device)
    for one in (weight[:, :100], weight[:, 1:97], weight[:, 8:104]):
        k = one.shape[1]
        y = w8a8_linear(
            x[:, :k], torch.ones(1, device=device), one, torch.ones(40, 1, device=device), None, torch.float32
        )
        assert torch.equal(y.cpu().double(), x[:, :k].cpu().double() @ one.cpu().double().T)
    assert "_copied_product" not in names


@pytest.mark.parametrize("m", [1, 2])
def test_the_largest_sum_does_not_overflow(device: str, m: int) -> None:
    """K = 131071 is the longest: 2**31 - 2**14, beyond what fp32 holds exactly."""
    x = torch.full((m, 131_071), -128, dtype=torch.int8)
    scale = torch.ones(1, 1)
    check(device, x, torch.ones(1), x[:1], scale, None, torch.float32)
    longer = torch.zeros(m, 131_072, dtype=torch.int8, device=device)
    with pytest.raises(QuantizeError, match="weight: has rows of 131072 codes, expected up to 131071"):
        w8a8_linear(longer, scale.to(device), longer[:1], scale.to(device), None, torch.float32)


@pytest.mark.parametrize("m", [1, 5])
def test_strides_do_not_matter(device: str, m: int) -> None:
    wide, weight = codes(m, 96).to(device), codes(33, 48).to(device)
    x_scale, scale = torch.rand(m, 1).to(device), torch.rand(33, 1).to(device)
    for x in (wide[:, ::2], wide[:, 16:64], wide[:1, :48].expand(m, 48), wide.T[:48].T):
        y = w8a8_linear(x, x_scale, weight, scale, None, torch.bfloat16)
        assert torch.equal(y, w8a8_linear(x.contiguous(), x_scale, weight, scale, None, torch.bfloat16))
    x = wide[:, :48].contiguous()
    expected = w8a8_linear(x, x_scale, weight, scale, None, torch.float32)
    assert torch.equal(w8a8_linear(x, x_scale, weight.T.contiguous().T, scale, None, torch.float32), expected)
    spread = torch.stack((scale, scale), 1).flatten(1)[:, ::2], torch.stack((x_scale, x_scale), 1).flatten(1)[:, ::2]
    assert torch.equal(w8a8_linear(x, spread[1], weight, spread[0], None, torch.float32), expected)


@pytest.mark.parametrize("m", [1, 3])
def test_a_scale_that_is_nan_reaches_its_row_only(device: str, m: int) -> None:
    x_scale = torch.ones(m, 1)
    x_scale[0] = float("nan")
    y = w8a8_linear(
        codes(m, 8).to(device), x_scale.to(device), codes(4, 8).to(device), torch.ones(4, 1).to(device), None,
        torch.float16,
    )  # fmt: skip
    assert y[0].isnan().all() and y[1:].isfinite().all()


def test_fp64_is_scaled_in_fp64(device: str) -> None:
    x, weight, x_scale, scale = codes(3, 40), codes(5, 40), torch.rand(3, 1), torch.rand(5, 1)
    y = w8a8_linear(x.to(device), x_scale.to(device), weight.to(device), scale.to(device), None, torch.float64).cpu()
    assert torch.equal(y, (x.double() @ weight.double().T) * (x_scale.double() * scale.double().T))


def test_wrong_inputs(device: str) -> None:
    weight, scale = codes(4, 8).to(device), torch.ones(4, 1, device=device)
    with pytest.raises(QuantizeError, match=r"x: is torch.float32 \[2, 8\], expected int8 \[..., 8\]"):
        w8a8_linear(torch.randn(2, 8, device=device), torch.ones(1), weight, scale, None, torch.float32)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 4, 7, 66]), min_size=1, max_size=4),
    lead=st.sampled_from([(), (1,), (1, 1), (2,), (0,)]),
    k=st.sampled_from([0, 1, 31, 64, 1100]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    bias=st.booleans(),
    per_token=st.booleans(),
)
def test_layers_side_by_side(
    device: str, sizes: list[int], lead: tuple[int, ...], k: int, dtype: torch.dtype, bias: bool, per_token: bool
) -> None:
    x, x_scale = codes(*lead, k), torch.rand(*lead, 1) if per_token else torch.rand(1)
    layers = [(codes(n, k), torch.rand(n, 1) * 2**-10, torch.randn(n) if bias else None) for n in sizes]
    columns = ([None if one is None else one.to(device) for one in column] for column in zip(*layers, strict=True))
    y = w8a8_linears(x.to(device), x_scale.to(device), *columns, dtype).cpu()
    assert y.dtype == dtype and y.shape == (*lead, sum(sizes))
    for part, (weight, scale, offset) in zip(y.split(sizes, -1), layers, strict=True):
        product = (x.long() @ weight.long().T).double() * (x_scale.double() * scale.double().flatten())
        expected = product if offset is None else product + offset.double()
        assert_off_by(part.contiguous(), expected, (product.abs() + expected.abs()) * 2.0**-22)


def test_layers_side_by_side_are_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = launched(vector, monkeypatch)
    weights, scales = [codes(9, 40).to(device) for _ in range(3)], [torch.ones(9, 1, device=device)] * 3
    w8a8_linears(codes(1, 1, 40).to(device), torch.ones(1, device=device), weights, scales, [None] * 3, torch.float32)
    assert names == ["_matrix_vectors"]
