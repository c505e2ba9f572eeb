"""What a model returned, as a tensor to be judged; and tensors widened to float64 piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from octavo.errors import EvaluateError

__all__ = ["CHUNK_ELEMENTS", "Model", "chunks", "first_floating", "float64", "main_output"]

Model = Callable[..., Any]

CHUNK_ELEMENTS = 1 << 16
"""Outputs are converted to float64 in pieces of this many elements (512 KiB), which stay in the cache. A float64 copy
of all logits over a large vocabulary would also dominate peak memory. Measured on [512, 49152] logits, 2 cores:
`compare` takes 0.2 to 0.3 s for them in pieces of 2**16, 0.5 to 0.6 s in pieces of 2**22."""


def main_output(output: Any, who: str) -> tuple[Tensor, bool]:
    """The tensor of a model's output that is judged, and whether it is logits: see `compare`.

    who: what the error calls the model. Raises: EvaluateError if there is no floating-point tensor.
    """
    found: Any = None
    is_logits = True
    if isinstance(output, Tensor):
        found = output
    elif isinstance(getattr(output, "logits", None), Tensor):
        found = output.logits
    elif isinstance(getattr(output, "last_hidden_state", None), Tensor):
        found, is_logits = output.last_hidden_state, False
    elif isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        found = output["logits"]
    elif isinstance(output, Mapping):
        name = next((name for name, value in output.items() if is_floating(value)), "")
        found, is_logits = output.get(name), "logits" in str(name)
    elif isinstance(output, tuple | list):
        found = first_floating(output)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise EvaluateError(
            f"{who} returned {got}, expected a floating-point tensor, an object with .logits or .last_hidden_state, or "
            "a dict or tuple with such a tensor; wrap the model in a function that returns the tensor to judge"
        )
    return found, is_logits


def is_floating(value: Any) -> bool:
    # A 0-d tensor in a dict or tuple is a loss, which comes before the output.
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def first_floating(output: Any) -> Tensor | None:
    """A layer's output tensor: itself, or the first of its tuple, list or dict."""
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    return next((value for value in values if is_floating(value)), None)


def chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching pieces of `x` and `y` along dim 0, of CHUNK_ELEMENTS of `x` or one row at most; none if it is empty."""
    step = max(1, CHUNK_ELEMENTS // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x) if x.numel() else 0, step):
        yield x[start : start + step], y[start : start + step]


def float64(x: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (x.cpu() if x.device.type == "mps" else x).double()
