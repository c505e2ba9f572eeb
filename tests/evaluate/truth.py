"""What the tests of this folder share: models with known outputs, and a log softmax in numpy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def fixed(*outputs: Any) -> Callable[..., Any]:
    """A model that answers the n-th call with the n-th output."""
    answers = iter(outputs)
    return lambda *args, **kwargs: next(answers)


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - math.log(np.exp(shifted).sum())
