"""One model in a process of its own, timed by `octavo bench`: so the process's peak memory is that of this model alone.

The functions here run in that process, one after the other. `load` puts the model into a global, which the rest use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cli import memory
from octavo.cli.machine import describe_machine
from octavo.cli.terminal import Terminal
from octavo.cli.verb import keep_cache
from octavo.modules import QuantEmbedding, QuantModule, TiedQuantEmbedding, TiedQuantLinear
from octavo.ops import backends

__all__ = [
    "Loaded", "Round", "bytes_per_token", "bytes_per_token_of", "compile_model", "held", "hold", "load", "open_stream",
    "peak_memory", "predictions", "prepare", "served_by", "stream_bytes_per_s", "time_round",
]  # fmt: skip

_state: dict[str, Any] = {}
"""The model of this process, under "model"; compiled, under "compiled". Or, in a process without one, "stream"."""

_open_until_exit = contextlib.ExitStack()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What is known of a model once it is loaded.

    seconds: from the files to a model that can run.
    weight_bytes: all weights in memory.
    token_bytes: bytes of weights read to decode one token; None if that depends on the token (a mixture of experts).
    positions: how many tokens its context holds; None if the model does not say.
    cache: how the KV cache is kept, "float" or "int8".
    served_by: the backends of those ops of octavo that the model calls; empty for a float model.
    """

    seconds: float
    weight_bytes: int
    token_bytes: int | None
    vocabulary: int
    positions: int | None
    device: str
    cache: str
    served_by: tuple[str, ...]
    machine: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Round:
    """One measurement. first_token_s: seconds from the prompt to the first token. decode_s: for all tokens after it."""

    first_token_s: float
    decode_s: float


def prepare(debug: bool) -> None:
    """Called first in the process: make interrupts end it silently, and libraries keep quiet unless `debug`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by the parent when it started this process
    _open_until_exit.enter_context(Terminal(debug=debug).quiet())


def load(path: str, device: str, threads: int | None, cache: str | None = None) -> Loaded:
    """Load the model of this process, and describe it. cache: as in `keep_cache`."""
    # Imported here, because transformers must not be imported before `prepare` has made it quiet.
    from octavo.integrations.language_model import load_causal, positions_of

    if threads is not None:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    model = load_causal(path, device=device)
    _synchronize(device)
    seconds = time.perf_counter() - start
    hold(model)
    kept = keep_cache(model, cache)
    return Loaded(
        seconds,
        weight_bytes=sum(tensor.nbytes for tensor in _distinct(_weights(model))),
        token_bytes=bytes_per_token_of(model),
        vocabulary=model.config.get_text_config().vocab_size,
        positions=positions_of(model),
        device=device,
        cache=kept,
        served_by=served_by(model, device, kept),
        machine=describe_machine(),
    )


def served_by(model: Any, device: str, cache: str = "float") -> tuple[str, ...]:
    """The backends that serve, on `device`, the ops of octavo that `model` calls with a cache of that kind."""
    from octavo.integrations.attention import attention_of

    called = {op for module in model.modules() if isinstance(module, QuantModule) for op in module.op_names}
    kind = attention_of(model)
    if cache == "int8":
        called.add(f"{kind}_attention_of_codes")
    elif kind == "int8":
        called.add("int8_attention")
    return tuple(sorted({row.backend for row in backends() if row.device == device and row.op in called}))


def compile_model(ids: list[int], new_tokens: int) -> float:
    """Compile the model of this process for that many tokens, in and out. Returns: seconds spent."""
    from octavo.integrations.compiled import CompiledModel

    start = time.perf_counter()
    _state["compiled"] = compiled = CompiledModel(held(), len(ids) + new_tokens)
    compiled.compile(torch.tensor([ids], device=held().device))
    return time.perf_counter() - start


def open_stream(device: str, threads: int | None) -> None:
    """Let this process measure memory bandwidth, in place of a model."""
    if threads is not None:
        torch.set_num_threads(threads)
    _state["stream"] = memory.MemoryStream(device)


def stream_bytes_per_s() -> float:
    """Bytes per second of one pass over the memory."""
    return float(_state["stream"].bytes_per_s())


def hold(model: Any) -> None:
    """Make `model` that of this process."""
    _state["model"] = model


def held() -> Any:
    """The model of this process."""
    return _state["model"]


def bytes_per_token_of(model: Any) -> int | None:
    """`bytes_per_token`; None if that depends on the token (a mixture of experts)."""
    mixture = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return None if mixture else bytes_per_token(model)


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights read to decode one token: all of them, but only one row of a table that serves lookups alone."""
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
        yield from module.codes_and_scale()
    elif isinstance(module, QuantModule):
        for codes, scale in module.codes().values():
            yield from (codes, scale)


def _distinct(tensors: Iterator[Tensor]) -> list[Tensor]:
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


def predictions(ids: list[int]) -> list[int]:
    """The most likely next token at each position of the prompt; the first of equally likely ones."""
    model = held()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    return [int(token) for token in logits[0].argmax(-1)]


def time_round(ids: list[int], new_tokens: int) -> Round:
    """Feed the prompt, then decode greedily, one token at a time.

    Uses the compiled functions if the model was compiled, and otherwise the cache that the model makes itself.
    """
    model = held()
    prompt = torch.tensor([ids], device=model.device)
    prefill, decode = _compiled_steps() if "compiled" in _state else _eager_steps(model)
    device = model.device.type
    with torch.no_grad():
        _synchronize(device)
        start = time.perf_counter()
        token = prefill(prompt)
        _synchronize(device)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = decode(token)
        _synchronize(device)
        end = time.perf_counter()
    return Round(first - start, end - first)


Step = Callable[[Tensor], Tensor]
"""Tokens [1, T] -> the next one, [1, 1]."""


def _compiled_steps() -> tuple[Step, Step]:
    compiled = _state["compiled"]
    return compiled.prefill, compiled.decode


def _eager_steps(model: Any) -> tuple[Step, Step]:
    from octavo.integrations.language_model import cache_name, last_logits_only

    only_last = last_logits_only(model)  # as `generate` asks for
    argument = cache_name(model) or "past_key_values"
    cache: Any = None

    def prefill(prompt: Tensor) -> Tensor:
        return step(prompt, **only_last)

    def step(tokens: Tensor, **options: Any) -> Tensor:
        nonlocal cache
        past = {} if cache is None else {argument: cache}
        output = model(input_ids=tokens, **past, use_cache=True, **options)
        cache = getattr(output, argument)
        return output.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

    return prefill, step


def peak_memory() -> int:
    """Peak memory of this model's process, in bytes."""
    return memory.peak_memory(held().device.type)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
