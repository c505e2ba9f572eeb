"""What is a norm, and which norms scale by 1 + weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from octavo.smoothing.norms import is_norm, scales_by_one_plus


class OwnNorm(nn.Module):
    """An RMS norm of a class that torch does not have. shift: 1 for one that scales by 1 + weight."""

    def __init__(self, size: int, shift: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.weight + self.shift)


def test_what_is_a_norm() -> None:
    assert is_norm(OwnNorm(8))
    assert is_norm(nn.LayerNorm(8))
    assert is_norm(nn.RMSNorm(8))
    assert not is_norm(nn.BatchNorm1d(8))
    assert not is_norm(nn.GroupNorm(2, 8))
    assert not is_norm(nn.Linear(8, 8))
    assert not is_norm(nn.Sequential(nn.LayerNorm(8)))


@pytest.mark.parametrize("shift", [0, 1])
def test_scaling_by_one_plus_the_weight_is_seen(shift: int) -> None:
    norm = OwnNorm(8, shift)
    before = norm.weight.detach().clone()
    assert scales_by_one_plus(norm, norm.weight) == bool(shift)
    assert torch.equal(norm.weight, before)


def test_a_bias_is_no_scale() -> None:
    norm = nn.LayerNorm(8)
    nn.init.ones_(norm.bias)
    assert not scales_by_one_plus(norm, norm.weight)
