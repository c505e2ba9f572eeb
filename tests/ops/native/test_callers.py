"""The number of threads, the batch and the mode of the caller change no result."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo import ops
from tests.ops.native.kernels import WITH_KERNELS, assert_rounds_to, codes, linear_in_double

pytestmark = WITH_KERNELS


def every_op(seed: int = 0, m: int = 40) -> list[Tensor]:
    """The results of all native ops on one input, of a size that is worth several threads."""
    random = torch.Generator().manual_seed(seed)
    n, k = 300, 1100
    x = torch.randn(m, k, generator=random).bfloat16()
    weight = torch.randint(-128, 128, (2, n, k), dtype=torch.int8, generator=random)
    scale = torch.rand(2, n, 1, generator=random)
    groups, ends = torch.rand(n, 11, generator=random), torch.tensor([m // 3, m], dtype=torch.int32)
    found, found_scale = ops.quantize_per_token(x)
    return [
        ops.w8a16_linear(x, weight[0], scale[0]),
        ops.w8a16_linear(x.float(), weight[0], groups),
        ops.w8a8_linear(found, found_scale, weight[0], scale[0], None, torch.bfloat16),
        ops.w8a16_conv(
            x[None], weight[0].flatten()[: 64 * m * 3].view(64, m, 3), scale[0, :64], None, [1], [1], [1], 1
        ),
        *_convolved(random),
        ops.w8a16_experts_linear(x, ends, weight, scale),
        ops.w8a8_experts_linear(found, found_scale, ends, weight, scale, None, torch.float32),
        found,
        found_scale,
        *ops.quantize_per_tensor(x),
        ops.quantize_static(x, torch.tensor([0.01])),
        *ops.quantize_weight(x),
        ops.w8a16_embedding(torch.arange(m), weight[0], scale[0], torch.bfloat16),
        ops.int8_attention(*_attention_operands(m, random), 0.1),
        ops.float_attention(*_attention_operands(m, random), 0.1),
        ops.float_attention(*_attention_operands(2, random), 0.1),
        torch.ops.octavo.rms_norm(x, weight[0, 0].bfloat16(), 1e-6, True),
        torch.ops.octavo.gated(x, x, 1.0, 0.0),
        *_recurrent(m, random),
    ]


def _recurrent(batch: int, random: torch.Generator) -> list[Tensor]:
    p, h = torch.randn(2, batch, 3 * 500, generator=random), torch.randn(batch, 500, generator=random)
    weight = torch.randint(-128, 128, (3 * 500, 500), dtype=torch.int8, generator=random)
    operands = p, weight, torch.full((3 * 500, 1), 1e-4), None, h, None, 1
    return [torch.ops.octavo.recurrent(*operands, int8_inputs, False) for int8_inputs in (False, True)]


def _convolved(random: torch.Generator) -> list[Tensor]:
    """One plane of few columns, many planes, and places between strides."""
    image = torch.randn(1, 40, 30, 70, generator=random).bfloat16()
    weight, scale = torch.randint(-128, 128, (40, 40, 4, 4), dtype=torch.int8, generator=random), torch.ones(40, 1)
    ones, none = [1, 1], [0, 0]
    return [
        ops.w8a16_conv(image, weight[:3], scale[:3], None, ones, ones, ones, 1),
        ops.w8a16_conv(image.flatten(2), weight[:3, :, 0], scale[:3], None, [1], [1], [1], 1),
        ops.w8a16_conv(image, weight[:, :1].contiguous(), scale, None, [2, 2], ones, ones, 40),
        ops.w8a16_conv_transpose(image, weight, scale, None, [2, 2], ones, ones, none, 1),
    ]


def _attention_operands(rows: int, random: torch.Generator) -> tuple[Tensor, ...]:
    query, key, value = (
        torch.randn(1, heads, tokens, 80, generator=random).bfloat16()
        for heads, tokens in ((6, rows), (2, 700), (2, 700))
    )
    return query, key, value, torch.ones(1, 1, rows, 700, dtype=torch.bool).tril(700 - rows)


def assert_same_bits(these: list[Tensor], those: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(these, those, strict=True)] == [True] * len(those)


def test_the_number_of_threads_changes_no_bit(isa: str) -> None:
    torch.set_num_threads(1)
    alone = every_op()
    torch.set_num_threads(2)
    assert_same_bits(every_op(), alone)


@pytest.mark.parametrize("n", [5, 70])
def test_nor_does_it_where_rows_are_shared_for_want_of_columns(isa: str, n: int) -> None:
    m, k = 700, 300
    x, x8, weight, scale = torch.randn(m, k).bfloat16(), codes(m, k), codes(n, k), torch.rand(n, 1)
    image = x.T.reshape(1, k, m)

    def layers() -> list[Tensor]:
        return [
            ops.w8a16_linear(x, weight, scale),
            ops.w8a16_linear(x.float(), weight, scale.expand(n, 3).contiguous()),
            ops.w8a8_linear(x8, torch.ones(1), weight, scale, None, torch.bfloat16),
            ops.w8a16_conv(image, weight[..., None], scale, None, [1], [0], [1], 1),
        ]

    torch.set_num_threads(1)
    alone = layers()
    expected, error = linear_in_double(x, weight, scale, None, 4 + k**0.5)
    assert_rounds_to(alone[0], expected, error)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(layers(), alone)


@pytest.mark.parametrize("m", [512, 750])
def test_nor_does_it_where_threads_have_rows_of_their_own(isa: str, m: int) -> None:
    """As where a layer is read twice or three times, each time for as many rows as stay in cache."""
    n, k = 96, 4096
    x, weight, scale = torch.randn(m, k).bfloat16(), codes(n, k), torch.rand(n, 1)
    x8, x_scale = ops.quantize_per_token(x)

    def layers() -> list[Tensor]:
        return [
            ops.w8a16_linear(x, weight, scale),
            ops.w8a16_linear(x.float(), weight, scale),
            ops.w8a8_linear(x8, x_scale, weight, scale, None, torch.bfloat16),
        ]

    torch.set_num_threads(1)
    alone = layers()
    exact = (x8.double() @ weight.double().T * x_scale.double() * scale.double().T).bfloat16()
    torch.testing.assert_close(alone[2], exact, rtol=2**-7, atol=0)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(layers(), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nor_does_it_where_a_part_has_one_tile_of_rows_and_the_layer_many(isa: str, dtype: torch.dtype) -> None:
    """K is summed in pieces then, or it is not: for groups so small that dot products serve many rows, too."""
    x, weight, scale = torch.randn(289, 4096).to(dtype), codes(32, 4096), torch.rand(32, 1024)
    torch.set_num_threads(1)
    alone = ops.w8a16_linear(x, weight, scale)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(ops.w8a16_linear(x, weight, scale), alone)


@pytest.mark.parametrize("m", [100, 600])
def test_a_row_does_not_depend_on_the_batch(isa: str, m: int) -> None:
    """Codes, and sums of codes, to the bit. A fp32 sum to within rounding: many rows sum K in pieces, few do not."""
    x, weight, scale = torch.randn(m, 2100).bfloat16(), codes(40, 2100), torch.rand(40, 1)
    found, found_scale = ops.quantize_per_token(x)
    y8 = ops.w8a8_linear(found, found_scale, weight, scale, None, torch.float32)
    y = ops.w8a16_linear(x.float(), weight, scale)
    _, error = linear_in_double(x, weight, scale, None, 2 * 2100**0.5)
    for i in (0, 1, m // 2, m - 1):
        one, one_scale = ops.quantize_per_token(x[i : i + 1])
        assert torch.equal(one[0], found[i]) and torch.equal(one_scale[0], found_scale[i])
        assert torch.equal(ops.w8a8_linear(one, one_scale, weight, scale, None, torch.float32)[0], y8[i])
        alone = ops.w8a16_linear(x[i : i + 1].float(), weight, scale)
        assert ((alone[0].double() - y[i].double()).abs() <= error[i]).all()


def test_several_python_threads_at_once(isa: str) -> None:
    torch.set_num_threads(1)
    sizes = [(seed, m) for seed in range(4) for m in (1, 7, 40)]
    expected = [every_op(*size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        for mine, other in zip(pool.map(lambda size: every_op(*size), sizes * 2), expected * 2, strict=True):
            assert_same_bits(mine, other)


def test_inference_mode(isa: str) -> None:
    expected = every_op()
    with torch.inference_mode():
        assert_same_bits(every_op(), expected)


@pytest.mark.slow
def test_compiled(isa: str) -> None:
    x, weight, scale = torch.randn(40, 1100), codes(300, 1100), torch.rand(300, 1)

    def layers(x: Tensor) -> tuple[Tensor, Tensor]:
        found, found_scale = ops.quantize_per_token(x)
        y8 = ops.w8a8_linear(found, found_scale, weight, scale, None, x.dtype)
        return ops.w8a16_linear(x, weight, scale).relu(), y8 * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        compiled: Any = torch.compile(layers, fullgraph=True)
        for m in (40, 3):
            assert_same_bits(list(compiled(x[:m])), list(layers(x[:m])))
