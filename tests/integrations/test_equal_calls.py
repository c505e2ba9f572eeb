"""Equal calls are joined, and nothing that only looks equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import octavo
from octavo import ops
from octavo.integrations.equal_calls import EqualCalls


def joined(function: Callable[..., Any], *args: Tensor) -> tuple[torch.fx.GraphModule, Callable[[str], int]]:
    module = make_fx(function)(*args)
    EqualCalls()(module.graph)
    module.recompile()
    return module, lambda name: sum(name in str(node.target) for node in module.graph.nodes)


class Block(nn.Module):
    """Three layers that are fed the same tensor, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x) + self.v(x))


def test_layers_that_share_an_input_share_its_codes() -> None:
    model, x = Block(), torch.randn(3, 8)
    octavo.quantize(model, "w8a8")
    with torch.inference_mode():  # in which modules do not share codes by themselves
        module, count = joined(model, x)
        assert torch.equal(module(x), model(x))
    assert count("w8a8_linear") == 4 and count("quantize_per_token") == 2


def test_what_differs_stays_apart() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        (a, s), (b, t) = ops.quantize_per_token(x), ops.quantize_per_token(y)
        return a * s + b * t + (x + 1) + (x + 1.5), x.float().to(torch.float64), x.float().to(torch.float32)

    x, y = torch.randn(3, 8), torch.randn(3, 8)
    module, count = joined(function, x, y)
    for got, expected in zip(module(x, y), function(x, y), strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype
    assert count("quantize_per_token") == 2


def test_random_numbers_are_drawn_each_time() -> None:
    module, _ = joined(lambda x: torch.rand_like(x) - torch.rand_like(x), torch.zeros(50))
    assert module(torch.zeros(50)).abs().max() > 0


def test_results_that_are_returned_are_two_tensors() -> None:
    module, _ = joined(lambda x: (x + 1, x + 1), torch.zeros(3))
    one, two = module(torch.zeros(3))
    one.add_(1)
    assert two.tolist() == [1, 1, 1]
