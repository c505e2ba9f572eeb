"""Quantize an input once for all layers that read it: q/k/v, and gate/up, are fed the same tensor.

Which layers share is not configured. The codes of the last quantized tensor are kept, and a layer gets them if its
input is that very tensor, unchanged: the same object with the same version counter, on the same CUDA stream (another
stream would not wait until the codes are written). The version counter does not notice writes that bypass torch (a
numpy buffer that is refilled for each call). So no layer gets the same codes twice: when a layer asks again, its input
is quantized anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SharedInput"]

Quantized = tuple[Tensor, Tensor]
"""Codes int8 and scale fp32 of an input."""


class SharedInput:
    """The codes of the tensor that was quantized last, as long as that tensor lives. One for each int8 model.

    Nothing is shared while a model is compiled or traced (in a graph, `integrations/equal_calls.py` joins equal calls);
    while a CUDA graph is recorded, whose replays would reuse the codes of the first input; and for tensors of inference
    mode, which have no version counter.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[Any, ...], set[int], Quantized] | None = None

    def quantized(
        self, x: Tensor, key: Callable[[], object], layer: object, quantize: Callable[[Tensor], Quantized]
    ) -> Quantized:
        """`quantize(x)`, or the result of an equal call by another layer for the same tensor.

        key: returns how x is quantized; equal keys mean equal codes. It is called only where codes may be shared, since
        it may wait for the device, which is not allowed while a CUDA graph is recorded. layer: the layer that asks.
        """
        if torch.compiler.is_compiling() or x.is_inference() or _is_recorded(x):
            return quantize(x)
        wanted = (x._version, x.shape, key(), _stream(x))
        last = self._last
        if last is not None and last[0]() is x and last[1] == wanted and id(layer) not in last[2]:
            last[2].add(id(layer))
            return last[3]
        codes = quantize(x)
        self._last = (weakref.ref(x, self._forget), wanted, {id(layer)}, codes)
        return codes

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}


def _is_recorded(x: Tensor) -> bool:
    traced = torch._C._get_tracing_state() is not None
    return traced or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _stream(x: Tensor) -> int | None:
    """The CUDA stream on which a kernel for x would run, as a number: cheaper than torch's Stream object."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else None
