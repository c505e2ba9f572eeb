"""Int8 keys and values are numbers to every operation but those that take codes."""

from __future__ import annotations

import pytest
import torch

from octavo import ops
from octavo.errors import OctavoError
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


def test_what_writes_to_them_is_refused() -> None:
    states = Int8States(*ops.quantize_per_token(torch.randn(1, 2, 6, 4)), torch.float32)
    with pytest.raises(OctavoError, match=r"mul_.*writes to keys or values"):
        states *= 2
    assert torch.equal(torch.empty(1, 2, 6, 4).copy_(states), states.dequantized())
