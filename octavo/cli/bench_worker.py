"""One model in one process, to be timed by `octavo bench`: its peak memory is nobody else's.

The functions here run in that process, one after the other; the model that `load` loaded stays there for the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cli.machine import describe_machine
from octavo.cli.terminal import Terminal
from octavo.modules import QuantEmbedding, QuantModule, TiedQuantEmbedding, TiedQuantLinear
from octavo.ops import backends

__all__ = [
    "Loaded", "Round", "bytes_per_token", "held", "hold", "load", "peak_memory", "predictions", "prepare", "time_round",
]  # fmt: skip

_state: dict[str, Any] = {}
"""The model of this process, under "model"."""

_open_until_exit = contextlib.ExitStack()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What is known of a model once it is loaded.

    seconds: from the files to a model that can run. weight_bytes: all that it holds in memory. token_bytes: of weights
    read for one token of decode, or None if that depends on the token (a mixture of experts). positions: how many
    tokens it can hold, None if it does not say. served_by: backends of octavo's ops in it; empty for a float model.
    """

    seconds: float
    weight_bytes: int
    token_bytes: int | None
    vocabulary: int
    positions: int | None
    device: str
    served_by: tuple[str, ...]
    machine: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Round:
    """One measurement. first_token_s: from the prompt to the first token. decode_s: for all tokens after it."""

    first_token_s: float
    decode_s: float


def prepare(debug: bool) -> None:
    """Called first in the process: an interrupt ends it without a word, and libraries keep quiet unless `debug`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_until_exit.enter_context(Terminal(debug=debug).quiet())


def load(path: str, device: str, threads: int | None) -> Loaded:
    """Load the model of this process, and describe it."""
    # Here, and not above: transformers is imported once `prepare` keeps it quiet.
    from octavo.integrations.generation import load_causal

    if threads is not None:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    model = load_causal(path, device=device)
    _synchronize(device)
    seconds = time.perf_counter() - start
    hold(model)
    text_config = model.config.get_text_config()
    is_int8 = any(isinstance(module, QuantModule) for module in model.modules())
    return Loaded(
        seconds,
        weight_bytes=sum(tensor.nbytes for tensor in _distinct(_weights(model))),
        token_bytes=None if getattr(text_config, "num_experts_per_tok", None) else bytes_per_token(model),
        vocabulary=text_config.vocab_size,
        positions=getattr(text_config, "max_position_embeddings", None),
        device=device,
        served_by=tuple(sorted({row.backend for row in backends() if row.device == device})) if is_int8 else (),
        machine=describe_machine(),
    )


def hold(model: Any) -> None:
    """Make `model` that of this process."""
    _state["model"] = model


def held() -> Any:
    """The model of this process."""
    return _state["model"]


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that one token of decode reads: all of them, but of a table that is only looked up, one row."""
    tables = (nn.Embedding, QuantEmbedding, TiedQuantEmbedding)
    read = _distinct(
        tensor for module in model.modules() if not isinstance(module, tables) for tensor in _own_weights(module)
    )
    whole = {tensor.data_ptr() for tensor in read}
    looked_up = _distinct(
        tensor for module in model.modules() if isinstance(module, tables) for tensor in _own_weights(module)
    )
    rows = sum(tensor[0].nbytes for tensor in looked_up if tensor.data_ptr() not in whole and len(tensor))
    return sum(tensor.nbytes for tensor in read) + rows


def _weights(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from _own_weights(module)


def _own_weights(module: nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    if isinstance(module, TiedQuantEmbedding | TiedQuantLinear):
        yield from (module.weight, module.weight_scale)
    elif isinstance(module, QuantModule):
        for codes, scale in module.codes().values():
            yield from (codes, scale)


def _distinct(tensors: Iterator[Tensor]) -> list[Tensor]:
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


def predictions(ids: list[int]) -> list[int]:
    """The token that the model finds likeliest after each position of the prompt."""
    model = held()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    return [int(token) for token in logits[0].argmax(-1)]


def time_round(ids: list[int], new_tokens: int) -> Round:
    """Feed the prompt, then decode greedily, one token at a time, with the cache that the model makes."""
    model = held()
    # What `generate` does: of a prompt only the last position's logits are wanted.
    has_option = "logits_to_keep" in inspect.signature(model.forward).parameters
    only_last = {"logits_to_keep": 1} if has_option else {}
    prompt = torch.tensor([ids], device=model.device)
    device = model.device.type
    with torch.no_grad():
        _synchronize(device)
        start = time.perf_counter()
        output = model(input_ids=prompt, use_cache=True, **only_last)
        token = output.logits[:, -1:].argmax(-1)
        _synchronize(device)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        _synchronize(device)
        end = time.perf_counter()
    return Round(first - start, end - first)


def peak_memory() -> int:
    """Bytes of memory that this process has held at most: of the GPU if the model is there, otherwise resident."""
    if held().device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux adds to ru_maxrss what the process was before it became this program: a copy of its parent.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
