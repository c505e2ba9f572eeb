"""act(gate) * up on GPUs in one kernel, where torch has two: the activations of `octavo/ops/gates.py`.

It serves eager models only (`direct.py`): when a model is compiled, torch fuses the formula with its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.triton.launch import Started, ceil_div, launch

__all__ = ["start_gated"]

ELEMENTS = 1024
"""Of a program: 8 to a thread, which are 16 bytes of a 16-bit type."""


def start_gated(gate: Tensor, up: Tensor, y: Tensor, a: float, b: float) -> Started:
    """Launch the kernel. gate, up: of one shape and dtype, contiguous."""
    numbers = (gate.numel(), a, b, ELEMENTS)
    count = ceil_div(gate.numel(), ELEMENTS)
    return Started(launch(_gated, (count,), gate, up, y, *numbers, num_warps=4), (count,), numbers)


@triton.jit
def _gated(gate_ptr, up_ptr, y_ptr, count, A: tl.constexpr, B: tl.constexpr, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = at < count
    gate = tl.load(gate_ptr + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=there, other=0.0).to(tl.float32)
    z = gate * A if B == 0 else gate * (A + B * gate * gate)  # of which 0 times infinity would be NaN
    acted = (gate * tl.sigmoid(z)).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, (acted * up).to(y_ptr.dtype.element_ty), mask=there)
