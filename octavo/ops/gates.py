"""The activations of gated MLPs that kernels support. Each is g * sigmoid(z) with z = g (a + b g^2).

    silu        g / (1 + e^-g)                                     a = 1
    gelu_tanh   g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))  a = sqrt(8 / pi), b = 0.044715 a

because (1 + tanh(u)) / 2 = sigmoid(2 u).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

__all__ = ["GATES", "Gate"]


class Gate(NamedTuple):
    """One activation. formula: torch's op for it. a, b: the coefficients of z."""

    formula: Callable[[Tensor], Tensor]
    a: float
    b: float = 0.0


_A = math.sqrt(8 / math.pi)

GATES = {
    "silu": Gate(F.silu, 1.0),
    "gelu_tanh": Gate(partial(F.gelu, approximate="tanh"), _A, 0.044715 * _A),
}
