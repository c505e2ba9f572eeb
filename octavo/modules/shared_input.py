"""Quantized once, read by many: q/k/v, and gate/up, are fed the same tensor, and share one quantization of it.

Who shares is not configured: a layer asks for the codes of the very tensor that it was given, and gets those that the
layer before it had computed if that was the same tensor, unchanged since: same object, same version counter; and if it
runs on the same stream of a GPU, for another one would not wait until the codes are written. Versions do not count what
is written behind torch's back (a buffer of numpy's that is filled anew for each call), so no layer is served the same
codes twice: when the first layer asks again, all begin anew.
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

    A lookup is skipped while a model is compiled or traced, for a graph has no such identity (a compiler may join equal
    calls; `integrations/equal_calls.py` makes Inductor do so), while a CUDA graph is recorded, whose replays would go
    on with the codes of the first input, and for tensors of inference mode, which do not count their versions.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[Any, ...], set[int], Quantized] | None = None

    def quantized(
        self, x: Tensor, key: Callable[[], object], layer: object, quantize: Callable[[Tensor], Quantized]
    ) -> Quantized:
        """`quantize(x)`, or what an equal call of another layer for the same tensor returned.

        key: says how it is quantized; equal keys mean equal codes. Asked only where something may be shared: to say it
        may be to wait for the device, which a CUDA graph that is recorded cannot. layer: who asks.
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
    """The stream on which a kernel for x is started now; without an object of torch's for it, which costs more."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else None
