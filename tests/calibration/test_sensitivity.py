"""The error measure, against float64 arithmetic written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from octavo.calibration.sensitivity import OUTPUTS, evenly, output_error, rounded_input
from octavo.recipe import InputArgs, Scheme, WeightArgs
from octavo.report import sqnr_db


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    step = largest.double() / 127
    return (x.double() / step).round().clamp(-127, 127) * step


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w8a8-static", "o1", "o2", "o3"])
def test_error_of_each_scheme(name: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(40, 24) * torch.rand(40, 1).add(0.1).pow(-1), torch.randn(10, 24)
    scheme, largest = Scheme(name), torch.tensor(7.0)
    if scheme.input is None:
        xq = x.double()
    elif not scheme.input.dynamic:
        xq = rounded(x, largest)
    else:
        xq = rounded(x, x.abs().amax(-1, keepdim=True) if scheme.input.granularity == "per_token" else x.abs().max())
    wq = rounded(w, w.abs().amax(-1, keepdim=True) if scheme.weight.granularity == "per_channel" else w.abs().max())
    y = x.double() @ w.double().T
    expected = ((xq @ wq.T - y).square().sum(-1) / y.square().sum(-1)).mean().item()
    found = output_error(w, x @ w.T, rounded_input(x, scheme, largest), scheme)
    assert found == pytest.approx(expected, rel=1e-3)


def test_every_token_counts_alike() -> None:
    """One huge token hides nothing: under a scale per tensor all others are lost, and the error says so."""
    torch.manual_seed(0)
    x, w = torch.randn(100, 16), torch.randn(8, 16)
    x[0] *= 1e4
    scheme = Scheme("w8a8", WeightArgs(), InputArgs("per_tensor"))
    y = x @ w.T
    error = output_error(w, y, rounded_input(x, scheme, x.abs().max()), scheme)
    assert error > 0.9
    energy = (rounded_input(x, scheme, x.abs().max()) @ w.T - y).square().sum() / y.square().sum()
    assert energy < 1e-3


def test_edges() -> None:
    w = torch.randn(4, 8)
    assert output_error(w, torch.zeros(3, 4), torch.zeros(3, 8), Scheme("w8a8")) == 0
    assert sqnr_db(0.0) == math.inf and sqnr_db(0.01) == pytest.approx(20)
    assert torch.equal(rounded_input(torch.zeros(2, 8), Scheme("w8a8"), torch.tensor(0.0)), torch.zeros(2, 8))
    assert len(evenly(torch.randn(OUTPUTS * 3 + 1, 2))) <= OUTPUTS
    assert len(evenly(w)) == 4
