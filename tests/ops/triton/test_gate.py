"""act(gate) * up in one kernel, next to torch's two ops in float64, rounded where they round."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.ops.gates import GATES
from octavo.ops.triton import direct

# numpy, which interprets, says what GPUs do not: that e^-z and g^2 may be inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def fused(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = direct.gated(gate, up, GATES[activation].a, GATES[activation].b)
    assert y is not None and y.shape == gate.shape and y.dtype == gate.dtype
    return y


def assert_right(gate: Tensor, up: Tensor, activation: str) -> None:
    exact = GATES[activation].formula(gate.double()) * up.double()
    tolerance = 2 * torch.finfo(gate.dtype).eps + 30 * torch.finfo(torch.float32).eps
    # float64's 1 + tanh(u) loses what is far below 1, and fp32's g^3 is off by as much as e^-z tells apart.
    absolute = 1e-6 * up.double().abs().max().item()
    torch.testing.assert_close(fused(gate, up, activation).double(), exact, rtol=tolerance, atol=absolute)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(1,), (7,), (1, 64), (3, 1), (2, 5, 33), (9, 128), (2, 3, 4096)]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(sorted(GATES)),
    size=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_the_formula(device: str, shape: tuple[int, ...], dtype: torch.dtype, activation: str, size: float) -> None:
    gate, up = ((torch.randn(shape, device=device) * by).to(dtype) for by in (size, 1.0))
    assert_right(gate, up, activation)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("activation", GATES)
def test_it_rounds_where_torch_does(activation: str, dtype: torch.dtype, device: str) -> None:
    gate, up = (torch.randn(64, 256, device=device).to(dtype) for _ in range(2))
    y, formula = fused(gate, up, activation), GATES[activation].formula
    assert (y == formula(gate) * up).float().mean() > 0.99
    assert (y == (formula(gate.float()) * up.float()).to(dtype)).float().mean() < 0.9


@pytest.mark.parametrize("activation", GATES)
def test_the_ends_of_the_range(activation: str, device: str) -> None:
    ends = torch.tensor([float("inf"), 3e38, 200.0, 0.0, -0.0, -200.0, -3e38, float("nan")], device=device)
    y = fused(ends, torch.ones_like(ends), activation)
    assert y[0].isposinf() and y[-1].isnan()
    assert y[1:3].tolist() == ends[1:3].tolist() and not y[3:7].any()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_models(dtype: torch.dtype, activation: str) -> None:
    gate, up = (torch.randn(300, 11008, device="cuda").to(dtype) for _ in range(2))
    for _ in range(2):  # started anew, and from what is kept
        assert_right(gate, up, activation)
