"""Layers that read the same row are joined on GPUs, compute what they did, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from octavo import ops
from octavo.integrations.side_by_side import SideBySide

Sizes = Sequence[tuple[int, int]]
"""N of each layer, and how many groups K has there."""

K = 32


def layers(sizes: Sizes, bias: bool) -> list[Tensor | None]:
    operands: list[Tensor | None] = []
    for n, groups in sizes:
        codes, scale = torch.randint(-127, 128, (n, K), dtype=torch.int8), torch.rand(n, groups)
        operands += [codes, scale, torch.randn(n) if bias else None]
    return operands


def model(x: Tensor, *operands: Tensor | None) -> list[Tensor]:
    """A layer for each three operands; its output is doubled, as what is returned should be a result."""
    return [ops.w8a16_linear(x, *operands[i : i + 3]) * 2 for i in range(0, len(operands), 3)]


def joined(function: Callable[..., Any], *args: Tensor | None, device: str = "cuda") -> torch.fx.GraphModule:
    """The graph for a device that need not be there; any other can run it, too."""
    with FakeTensorMode():
        there = [None if one is None else torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device)
                 for one in args]  # fmt: skip
        module = make_fx(function)(*there)
    SideBySide()(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def calls(module: torch.fx.GraphModule) -> list[str]:
    return [node.target._opname for node in module.graph.nodes if "octavo" in str(node.target)]


def check(x: Tensor, sizes: Sizes, expected: list[str], bias: bool = False, device: str = "cuda") -> None:
    operands = layers(sizes, bias)
    module = joined(model, x, *operands, device=device)
    assert calls(module) == expected
    for got, wanted in zip(module(x, *operands), model(x, *operands), strict=True):
        assert torch.equal(got, wanted) and got.shape == wanted.shape


def test_layers_of_a_row() -> None:
    check(torch.randn(1, 1, K), [(5, 1), (7, 1), (3, 1)], ["w8a16_linears"])
    check(torch.randn(K), [(5, 1), (7, 1)], ["w8a16_linears"], bias=True)


def test_layers_in_other_groups_are_apart() -> None:
    check(
        torch.randn(1, K), [(5, 1), (7, 2), (3, 1), (4, 2), (6, 4)], ["w8a16_linears", "w8a16_linears", "w8a16_linear"]
    )


def test_layers_of_a_row_of_codes() -> None:
    """Those of one quantization of it, that end in one dtype."""

    def function(x: Tensor, *operands: Tensor | None) -> list[Tensor]:
        codes, scale = x.to(torch.int8), x.float().amax(-1, keepdim=True)
        types = (torch.float32, torch.float32, torch.float16, torch.float32)
        scales = (scale, scale, scale, scale * 2)
        return [
            ops.w8a8_linear(codes, x_scale, *operands[3 * i : 3 * i + 3], dtype) * 2
            for i, (x_scale, dtype) in enumerate(zip(scales, types, strict=True))
        ]

    x, operands = torch.randint(-127, 128, (1, K)).float(), layers([(5, 1), (7, 1), (3, 1), (4, 1)], bias=True)
    module = joined(function, x, *operands)
    assert calls(module) == ["w8a8_linears", "w8a8_linear", "w8a8_linear"]
    for got, wanted in zip(module(x, *operands), function(x, *operands), strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype


def test_one_layer_stays() -> None:
    check(torch.randn(1, K), [(5, 1)], ["w8a16_linear"])


def test_several_rows_stay() -> None:
    check(torch.randn(2, K), [(5, 1), (7, 1)], ["w8a16_linear"] * 2)


def test_cpus_are_left_alone() -> None:
    check(torch.randn(1, K), [(5, 1), (7, 1)], ["w8a16_linear"] * 2, device="cpu")


def test_weights_that_are_computed_stay() -> None:
    """They need not be there yet where the first layer is."""

    def function(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        y = ops.w8a16_linear(x, codes, scale)
        return ops.w8a16_linear(x, codes * y.argmax().to(torch.int8), scale)

    codes, scale, _ = layers([(5, 1)], bias=False)
    assert calls(joined(function, torch.randn(1, K), codes, scale)) == ["w8a16_linear"] * 2


def test_results_feed_each_other() -> None:
    """A chain of layers in which every other two read the same row."""

    def function(x: Tensor, *operands: Tensor | None) -> Tensor:
        for _ in range(2):
            a, b = model(x, *operands)
            x = x + a * b
        return x

    x, operands = torch.randn(1, K), layers([(K, 1), (K, 1)], bias=False)
    module = joined(function, x, *operands)
    assert calls(module) == ["w8a16_linears"] * 2
    assert torch.equal(module(x, *operands), function(x, *operands))
