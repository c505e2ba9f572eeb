"""Int8 keys and values are numbers to every operation but those that take codes."""

from __future__ import annotations

import pytest
import torch

from octavo import ops
from octavo.integrations.int8_states import Int8States


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operations_get_code_times_scale(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(dtype)
    codes, scale = ops.quantize_per_token(x)
    states, numbers = Int8States(codes, scale, dtype), (codes.double() * scale.double()).to(dtype)
    assert states.shape == x.shape and states.dtype == dtype and states.device == x.device
    assert torch.equal(states.dequantized(), numbers)
    for result, expected in (
        (states * 2, numbers * 2),
        (states.mT @ states, numbers.mT @ numbers),
        (states.repeat_interleave(2, 1), numbers.repeat_interleave(2, 1)),
        (torch.cat([states, x], 2), torch.cat([numbers, x], 2)),
        (states[:, :, -2:], numbers[:, :, -2:]),
    ):
        assert type(result) is torch.Tensor and torch.equal(result, expected)
