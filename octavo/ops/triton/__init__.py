"""The Triton kernels: they answer the ops on CUDA devices in place of the reference.

Each file here is one kind of op: its kernels, at the top a table of tile sizes with reasons, and for each op a function
of the same name and arguments, which checks its arguments, chooses a tile by shape and launches a kernel. Only these
files import triton, and they are imported when one of their ops is first called on a CUDA device: nothing is compiled
or probed before. `launch.py` has what is common to all launches; `direct.py` repeats a launch with less overhead.

Nothing is tuned at run time. The tile depends only on the shape, so that results are the same in every run, and no
timing happens inside a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

import torch

from octavo.ops.schemas import library, reference_of

__all__ = ["DIRECT", "LEAST_CAPABILITY", "OPS", "load", "version", "why_not_here"]

LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability of supported GPUs. For older ones `tl.dot` of codes does not compile (Triton 3.9 for
7.5)."""


def _when_called(fetch: Callable[[], Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls what `fetch()` returns, fetched at the first call; `otherwise` if this machine's GPUs are
    not supported."""
    body: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal body
        if body is None:
            body = fetch() if why_not_here() is None else otherwise
        return body(*args)

    return call


def _declined(*_: Any) -> None:
    return None


OPS: dict[str, Callable[[], Any]] = {
    "w8a16_linear": lambda: import_module("octavo.ops.triton.linear").w8a16_linear,
    "w8a16_linears": lambda: import_module("octavo.ops.triton.linear").w8a16_linears,
    "w8a8_linear": lambda: import_module("octavo.ops.triton.int8_linear").w8a8_linear,
    "w8a8_linears": lambda: import_module("octavo.ops.triton.int8_linear").w8a8_linears,
    "w8a16_experts_linear": lambda: import_module("octavo.ops.triton.experts").w8a16_experts_linear,
    "w8a8_experts_linear": lambda: import_module("octavo.ops.triton.experts").w8a8_experts_linear,
    "w8a16_embedding": lambda: import_module("octavo.ops.triton.embedding").w8a16_embedding,
    "quantize_per_token": lambda: import_module("octavo.ops.triton.quantize").quantize_per_token,
    "quantize_per_tensor": lambda: import_module("octavo.ops.triton.quantize").quantize_per_tensor,
    "quantize_static": lambda: import_module("octavo.ops.triton.quantize").quantize_static,
    "quantize_weight": lambda: import_module("octavo.ops.triton.quantize").quantize_weight,
    "quantize_states": lambda: import_module("octavo.ops.triton.quantize").quantize_states,
    "int8_attention": lambda: import_module("octavo.ops.triton.attention").int8_attention,
    "float_attention_of_codes": lambda: import_module("octavo.ops.triton.codes_attention").float_attention_of_codes,
    "int8_attention_of_codes": lambda: import_module("octavo.ops.triton.attention").int8_attention_of_codes,
}
"""Name of an op -> a function that imports and returns its implementation."""


DIRECT: dict[str, Callable[..., Any]] = {
    "w8a16_linear": _when_called(lambda: import_module("octavo.ops.triton.direct").w8a16_linear, _declined),
    "w8a8_linear": _when_called(lambda: import_module("octavo.ops.triton.direct").w8a8_linear, _declined),
    "quantize_per_token": _when_called(lambda: import_module("octavo.ops.triton.direct").quantize_per_token, _declined),
    "rms_norm": _when_called(lambda: import_module("octavo.ops.triton.direct").rms_norm, _declined),
    "gated": _when_called(lambda: import_module("octavo.ops.triton.direct").gated, _declined),
    "rotary": _when_called(lambda: import_module("octavo.ops.triton.direct").rotary, _declined),
}
"""Functions for calls without torch's dispatcher, see direct.py: for the most frequent ops, and for RMS norms, gates
and rotary embeddings, which are no ops of the table. They return None for operands that they do not support."""


def load() -> str | None:
    """Register the kernels for CUDA devices. Returns: why that is impossible, or None. (Whether this machine's GPUs are
    supported is for `why_not_here` to say.)"""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    for op, fetch in OPS.items():
        library.impl(op, _when_called(functools.partial(_fastest, fetch, DIRECT.get(op)), reference_of(op)), "CUDA")
    return None


def _fastest(fetch: Callable[[], Any], direct: Callable[..., Any] | None) -> Callable[..., Any]:
    """The implementation that `fetch` returns, preceded by `direct`, where that does not decline: it saves Triton's
    look-up of the compiled kernel, also for calls from compiled models."""
    function: Callable[..., Any] = fetch()
    if direct is None:
        return function

    def call(*args: Any) -> Any:
        result = direct(*args)
        return function(*args) if result is None else result

    return call


@functools.cache
def why_not_here() -> str | None:
    """Why the kernels do not support this machine's GPUs (there is at least one); None if they do."""
    least = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if least >= LEAST_CAPABILITY:
        return None
    wanted, found = (".".join(map(str, one)) for one in (LEAST_CAPABILITY, least))
    return f"the kernels need GPUs of compute capability {wanted}, one here has {found}"


def version() -> str:
    """The version of the installed triton."""
    return metadata.version("triton")
