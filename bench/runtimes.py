"""The same language model under octavo and under its peers, each to be run in a process of its own.

`start` runs in that process, and leaves the model there for `octavo.cli.bench_worker` to time. Every library also takes
the output head; none but octavo the embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import octavo
from octavo.cli import bench_worker
from octavo.cli.verb import keep_cache
from octavo.integrations.language_model import cache_name, load_causal

__all__ = [
    "BF16", "FP32", "QUANTO", "RUNTIMES", "TORCHAO", "TORCHAO_COMPILED", "TORCHAO_DYNAMIC", "W8A8", "W8A8_ATTENTION",
    "W8A16", "W8A16_ATTENTION", "W8A16_COMPILED", "start",
]  # fmt: skip

BF16, FP32, W8A16, W8A8 = "transformers bf16", "transformers fp32", "octavo w8a16", "octavo w8a8"
W8A16_ATTENTION, W8A8_ATTENTION = "octavo w8a16, attention int8", "octavo w8a8, attention int8"
W8A16_COMPILED = "octavo w8a16, compiled whole"
TORCHAO, TORCHAO_COMPILED = "torchao Int8WeightOnly", "torchao Int8WeightOnly, compiled"
TORCHAO_DYNAMIC, QUANTO = "torchao Int8DynamicActivation, compiled", "optimum-quanto qint8"


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A library that runs the model.

    quantize: changes the bf16 model in place.
    compiled: by `torch.compile` with its defaults. whole: as `octavo generate --compile` does, with a static cache.
        Otherwise eager.
    plain: the weights are tensors whose bytes can be counted.
    """

    quantize: Callable[[Any], object]
    compiled: bool = False
    whole: bool = False
    plain: bool = False


def _octavo(scheme: str, attention: str = "float") -> Callable[[Any], object]:
    def run(model: Any) -> None:
        octavo.quantize(model, scheme, include=["Embedding", "OutputHead"], attention=attention)
        keep_cache(model, None)  # as the command line does

    return run


def _torchao(config: str) -> Callable[[Any], object]:
    def run(model: Any) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())

    return run


def _quanto(model: Any) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)


RUNTIMES = {
    BF16: Runtime(lambda model: None, plain=True),
    FP32: Runtime(lambda model: model.float(), plain=True),
    W8A16: Runtime(_octavo("w8a16"), plain=True),
    W8A16_ATTENTION: Runtime(_octavo("w8a16", attention="int8"), plain=True),
    W8A8: Runtime(_octavo("w8a8"), plain=True),
    W8A8_ATTENTION: Runtime(_octavo("w8a8", attention="int8"), plain=True),
    W8A16_COMPILED: Runtime(_octavo("w8a16"), whole=True, plain=True),
    TORCHAO: Runtime(_torchao("Int8WeightOnlyConfig")),
    TORCHAO_COMPILED: Runtime(_torchao("Int8WeightOnlyConfig"), compiled=True),
    TORCHAO_DYNAMIC: Runtime(_torchao("Int8DynamicActivationInt8WeightConfig"), compiled=True),
    QUANTO: Runtime(_quanto),
}


def start(
    name: str, path: str, threads: int, prompt: Sequence[int], following: Sequence[int], new_tokens: int
) -> tuple[int | None, Tensor]:
    """Load the bf16 model at `path`, make it that of RUNTIMES[name] and run it once, which compiles and warms up.

    new_tokens: that will be decoded at most, for a static cache.

    Returns: bytes of weights that one token of decode reads, where they can be counted, and the `logits`.
    """
    runtime = RUNTIMES[name]
    torch.set_num_threads(threads)
    model = load_causal(path)
    runtime.quantize(model)
    if runtime.compiled:
        model.forward = torch.compile(model.forward)
    bench_worker.hold(model)
    if runtime.whole:
        bench_worker.compile_model(list(prompt), new_tokens)
    token_bytes = bench_worker.bytes_per_token(model) if runtime.plain else None
    return token_bytes, logits(model, prompt, following)


def logits(model: Any, prompt: Sequence[int], following: Sequence[int]) -> Tensor:
    """After the prompt, and after each token that follows, fed one by one as decode does: fp32 [1 + T, V]."""
    cache = cache_name(model) or "past_key_values"
    with torch.no_grad():
        output = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        found = [output.logits[0, -1].float()]
        for token in following:
            past = {cache: getattr(output, cache)}
            output = model(input_ids=torch.tensor([[token]]), use_cache=True, **past)
            found.append(output.logits[0, -1].float())
    return torch.stack(found)
