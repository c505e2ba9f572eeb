"""The Triton kernels of experts against float64, expert by expert, on every path and tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo.errors import QuantizeError
from octavo.ops import reference
from octavo.ops.triton import experts
from octavo.ops.triton.experts import w8a8_experts_linear, w8a16_experts_linear
from tests.ops.test_experts_linear import assert_rounded_once, check_w8a16, ends_of, exact, stack
from tests.ops.triton.hopper import launched

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# With many experts that have no rows a program takes one row, without them a tile of rows.
routing = st.tuples(
    st.lists(st.sampled_from([0, 0, 1, 2, 17]), min_size=1, max_size=5), st.sampled_from([0, 90])
).map(lambda drawn: drawn[0] + [0] * drawn[1] + drawn[0][:1])  # fmt: skip

TILES = {
    "16 rows": [7, 0, 9, 1],
    "32 rows": [0, 33, 15],
    "64 rows": [65, 48],
    "128 rows": [131],
    "more groups than one": [1] * 20,
}
"""Rows of the experts for which each tile is chosen, a full one and one more where there is room."""


def w8a16(x: Tensor, counts: list[int], codes: Tensor, scale: Tensor, bias: Tensor | None, device: str) -> Tensor:
    x, ends, codes, scale = (part.to(device) for part in (x, ends_of(counts), codes, scale))
    return w8a16_experts_linear(x, ends, codes, scale, None if bias is None else bias.to(device)).cpu()


def w8a8(
    x: Tensor, x_scale: Tensor, counts: list[int], codes: Tensor, scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, device: str,
) -> Tensor:  # fmt: skip
    x, x_scale, ends, codes, scale = (part.to(device) for part in (x, x_scale, ends_of(counts), codes, scale))
    bias = None if bias is None else bias.to(device)
    return w8a8_experts_linear(x, x_scale, ends, codes, scale, bias, dtype).cpu()


@given(
    counts=routing,
    unrouted=st.sampled_from([0, 1, 19]),
    n=st.sampled_from([1, 7, 65]),
    k=st.sampled_from([0, 1, 31, 64, 144]),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]),
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
    device: str,
) -> None:
    def op(x: Tensor, ends: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return w8a16(x, counts, codes, scale, bias, device)

    check_w8a16(op, counts, unrouted, n, k, dtype, bias_dtype, transposed)


@settings(max_examples=25)
@given(
    counts=routing,
    unrouted=st.sampled_from([0, 19]),
    n=st.sampled_from([1, 7, 65]),
    k=st.sampled_from([0, 1, 31, 64, 144]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_w8a8(
    counts: list[int], unrouted: int, n: int, k: int, dtype: torch.dtype, with_bias: bool, device: str
) -> None:
    codes, scale = stack(len(counts), n, k)
    bias = torch.randn(len(counts), n).to(dtype) if with_bias else None
    rows = sum(counts) + unrouted
    x, x_scale = reference.quantize_per_token(torch.randn(rows, k))
    y = w8a8(x, x_scale, counts, codes, scale, bias, dtype, device)
    assert y.dtype == dtype and y.shape == (rows, n) and y.is_contiguous()
    assert_rounded_once(y, *exact(x.double() * x_scale.double(), counts, codes, scale, bias), 4)  # the sums are exact
    assert not y[sum(counts) :].any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("rows", TILES)
def test_every_tile(rows: str, dtype: torch.dtype, device: str) -> None:
    counts, n, k = TILES[rows], 129, 144
    tile = experts._tile_of(dtype, sum(counts) + 2, len(counts), k)
    assert not experts._hardly_two_share(sum(counts) + 2, len(counts))
    if rows[0] != "m":
        assert tile.m == min(int(rows.split()[0]), experts._FP32[-1].m if dtype == torch.float32 else 128)
    codes, scale = stack(len(counts), n, k)
    bias, x = torch.randn(len(counts), n), torch.randn(sum(counts) + 2, k)
    if dtype == torch.int8:
        x, x_scale = reference.quantize_per_token(x)
        y = w8a8(x, x_scale, counts, codes, scale, bias, torch.float32, device)
        assert_rounded_once(y, *exact(x.double() * x_scale.double(), counts, codes, scale, bias), 4)
    else:
        x = x.to(dtype)
        y = w8a16(x, counts, codes, scale, bias, device)
        assert_rounded_once(y, *exact(x, counts, codes, scale, bias), k)
    assert not y[-2:].any()


@pytest.mark.parametrize("shape", [(1,), (1, 1), (-1,), (1, -1)])
@pytest.mark.parametrize("counts", [[1, 0, 0, 0, 0, 0, 0, 1], [30, 0, 20]])
def test_one_scale_for_all_rows_or_one_each_however_they_lie(
    shape: tuple[int, ...], counts: list[int], device: str
) -> None:
    """The kernels walk from one to the next: they read past a single one, and across a row of them."""
    codes, scale = stack(len(counts), 7, 16)
    x = torch.randint(-127, 128, (sum(counts), 16), dtype=torch.int8)
    x_scale = torch.rand(sum(counts) if -1 in shape else 1).view(shape)
    y = w8a8(x, x_scale, counts, codes, scale, None, torch.float32, device)
    assert_rounded_once(y, *exact(x.double() * x_scale.double().view(-1, 1), counts, codes, scale, None), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize(("n", "k"), [(25, 2100), (50, 1030), (33, 270), (3, 1)])
def test_every_piece_of_one_row(
    n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Rows of more than a program takes at a time, and of less, by fewer warps."""
    kernels = launched(experts, monkeypatch)
    counts = [0, 1, *[0] * 6, 2, *[0] * 6, 1]
    codes, scale = stack(len(counts), n, k)
    x = torch.randn(sum(counts), k)
    if dtype == torch.int8:
        x, x_scale = reference.quantize_per_token(x)
        y = w8a8(x, x_scale, counts, codes, scale, None, torch.float32, device)
        assert_rounded_once(y, *exact(x.double() * x_scale.double(), counts, codes, scale, None), 4)
    else:
        y = w8a16(x.to(dtype), counts, codes, scale, None, device)
        assert_rounded_once(y, *exact(x.to(dtype), counts, codes, scale, None), k)
    assert kernels == ["_vector_kernel"]


@pytest.mark.parametrize("counts", [[0, 1] * 9, [3, 0, 20, 1, 0, 40]])
def test_experts_are_counted_in_steps(counts: list[int], monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """More experts than one step looks at; a step may end anywhere in the stack."""
    codes, scale = stack(len(counts), 5, 16)
    x = torch.randn(sum(counts) + 3, 16)
    for step in (1, 2, 4):
        monkeypatch.setattr(experts, "_BLOCK_E", step)
        y = w8a16(x, counts, codes, scale, None, device)
        assert_rounded_once(y, *exact(x, counts, codes, scale, None), 16)


@pytest.mark.parametrize("counts", [[1, 0, 0, 0, 0, 0, 0, 1], [30, 0, 20]])
def test_experts_without_rows_are_not_touched(counts: list[int], device: str) -> None:
    """NaN in their scale would show, and in what stands for rows of no expert."""
    codes, scale = stack(len(counts), 4, 8)
    scale[1] = torch.nan
    x, x_scale = reference.quantize_per_token(torch.randn(sum(counts) + 2, 8))
    x_scale[sum(counts) :] = torch.nan
    assert w8a16(torch.randn(sum(counts), 8), counts, codes, scale, None, device).isfinite().all()
    assert w8a8(x, x_scale, counts, codes, scale, None, torch.float32, device).isfinite().all()


def assert_same_sums(y: Tensor, expected: Tensor) -> None:
    """Equal bits; on a GPU up to the order of the sums, which follows from the layout that a compiler chose."""
    if torch.cuda.is_available():
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize("counts", [[1, 0, 0, 0, 0, 0, 0, 1], [2, 0, 20]])
def test_strides_change_no_bit(counts: list[int], device: str) -> None:
    rows, count = sum(counts), len(counts)
    codes, scale = stack(count, 6, 40)
    x, bias = torch.randn(rows, 40).to(device), torch.randn(count, 6).to(device)
    codes, scale, ends = codes.to(device), scale.to(device), ends_of(counts).to(device)
    x_codes, x_scale = reference.quantize_per_token(x)

    def strided(part: Tensor, dim: int) -> Tensor:
        """The same numbers in memory that holds others between them, or in another order."""
        return torch.cat([part, part], dim).narrow(dim, 0, part.shape[dim])

    expected = w8a16_experts_linear(x, ends, codes, scale, bias)
    int8_expected = w8a8_experts_linear(x_codes, x_scale, ends, codes, scale, bias, torch.bfloat16)
    for weight in (strided(codes, 1), strided(codes, 2), codes.mT.contiguous().mT):
        for one, other in ((strided(x, 1), strided(bias, 1)), (x.T.contiguous().T, bias.T.contiguous().T)):
            y = w8a16_experts_linear(one, strided(ends, 0), weight, strided(scale, 1), other)
            assert_same_sums(y, expected)
        y = w8a8_experts_linear(
            strided(x_codes, 1), strided(x_scale, 1), ends, weight, scale.mT.contiguous().mT, bias, torch.bfloat16
        )
        assert torch.equal(y, int8_expected)


@pytest.mark.parametrize("rows", [2, 40])
def test_int8_sums_are_exact(rows: int, device: str) -> None:
    """Far beyond 2 ** 24, where fp32 no longer counts."""
    codes, x = torch.full((1, 2, 3000), -128, dtype=torch.int8), torch.full((rows, 3000), 127, dtype=torch.int8)
    codes[0, 1, ::7], x[:, ::5] = 127, -3
    one = torch.ones(rows, 1)
    y = w8a8(x, one, [rows], codes, torch.ones(1, 2, 1), None, torch.float32, device)
    assert torch.equal(y, (x.long() @ codes[0].long().T).float())


@pytest.mark.parametrize("counts", [[0, 0, 0, 1], [0, 0, 9, 4]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_stack_beyond_two_gigabytes(counts: list[int], dtype: torch.dtype, device: str) -> None:
    """Its later experts lie where 32 bits do not reach; memory that nobody writes costs nothing."""
    memory = torch.empty(3 * 2**30 + 4096, dtype=torch.int8, device=device)
    codes = memory.as_strided((4, 3, 16), (2**30, 16, 1))
    filled, scale = stack(4, 3, 16)
    codes[2:] = filled[2:].to(device)
    x = torch.randn(sum(counts), 16)
    if dtype == torch.int8:
        x, x_scale = reference.quantize_per_token(x)
        y = w8a8(x, x_scale, counts, codes, scale, None, torch.float32, device)
        x = x.double() * x_scale.double()
    else:
        x = x.to(dtype)
        y = w8a16(x, counts, codes, scale, None, device)
    assert_rounded_once(y, *exact(x, counts, filled, scale, None), 16)


@pytest.mark.parametrize("rows", [2, 50])
def test_the_host_reads_no_value(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the device `meta` has none: all that the device is not asked to do works on it."""
    launched: list[tuple[int, ...]] = []
    monkeypatch.setattr(experts, "launch", lambda kernel, grid, *args, **meta: launched.append(grid))
    codes, scale = (part.to("meta") for part in stack(8, 4, 16))
    x, ends = torch.empty(rows, 16, device="meta"), torch.empty(8, dtype=torch.int32, device="meta")
    assert w8a16_experts_linear(x, ends, codes, scale, None).shape == (rows, 4)
    y = w8a8_experts_linear(x.to(torch.int8), x[:, :1], ends, codes, scale, None, torch.float16)
    assert y.shape == (rows, 4) and y.dtype == torch.float16
    assert launched == ([(2,)] * 2 if rows == 2 else [((50 + 15 * 9) // 16,)] * 2)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_a_layer_of_experts_reads_no_value(scheme: str) -> None:
    """Nor does `QuantExperts` on its way to the op, in either way of routing, or a CUDA graph could not hold it."""
    pytest.importorskip("transformers")
    from tests.test_experts import gpt_oss_experts, int8, mixtral_experts, routing

    for layer in (mixtral_experts(), gpt_oss_experts()):
        quantized, inputs = int8(layer, scheme), routing(7, 2)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            y = quantized(*(fake.from_tensor(part) for part in inputs))
        assert y.shape == inputs[0].shape


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_a_cuda_graph_follows_the_routing(scheme: str, tokens: int) -> None:
    pytest.importorskip("transformers")
    from tests.test_experts import int8, mixtral_experts, routing

    layer = int8(mixtral_experts(), scheme).to("cuda")
    inputs = [part.to("cuda") for part in routing(tokens, 2)]
    layer(*inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*inputs)
    for _ in range(3):
        for part, new in zip(inputs, routing(tokens, 2), strict=True):
            part.copy_(new)
        graph.replay()
        assert torch.equal(y, layer(*inputs))


def test_float64_is_the_reference(device: str) -> None:
    codes, scale = stack(2, 3, 8)
    x, ends = torch.randn(5, 8, dtype=torch.float64), ends_of([2, 2])
    x_codes, x_scale = reference.quantize_per_token(x)
    y = w8a16(x, [2, 2], codes, scale, None, device)
    assert_same_sums(y, reference.w8a16_experts_linear(x, ends, codes, scale, None))
    args = (codes, scale, None, torch.float64)
    assert torch.equal(
        w8a8(x_codes, x_scale, [2, 2], *args, device), reference.w8a8_experts_linear(x_codes, x_scale, ends, *args)
    )


def test_nothing_to_compute(device: str) -> None:
    for rows, counts, n in ((0, [0, 0], 3), (4, [2, 2], 0), (3, [0, 0], 2)):
        codes, scale = stack(2, max(n, 1), 8)
        y = w8a16(torch.randn(rows, 8), counts, codes[:, :n], scale[:, :n], None, device)
        assert torch.equal(y, torch.zeros(rows, n))


def test_wrong_inputs_are_errors() -> None:
    codes, scale = stack(2, 4, 8)
    ends = ends_of([1, 1])
    with pytest.raises(QuantizeError, match=r"shape is \[2, 7\], expected \[..., 8\]"):
        w8a16_experts_linear(torch.randn(2, 7), ends, codes, scale, None)
    with pytest.raises(QuantizeError, match="expected int8"):
        w8a8_experts_linear(torch.randn(2, 8), torch.ones(2, 1), ends, codes, scale, None, torch.float32)
