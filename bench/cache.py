"""Long contexts: what a key-value cache in int8 costs, what it takes, and how fast a token is behind many."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

import octavo
from bench import language
from bench.each_type import build, in_processes, model_types
from bench.record import kernels_of
from bench.speed import LLAMA, SMOLLM2, llama
from octavo import ops
from octavo.integrations.float_attention import use_float_attention
from octavo.integrations.float_cache import FloatCache
from octavo.integrations.hub import load_tokenizer
from octavo.integrations.int8_cache import Int8Cache
from octavo.integrations.language_model import cache_name, load_causal, token_ids
from octavo.ops.attention import value_codes
from octavo.tables import Table, human_bytes

TITLE = "Long contexts, and a cache in int8"
HOW = """
One token behind many: caches are filled with random keys and values for the tokens before (what they say changes no
time), then tokens are decoded greedily by each way in turns, in one process, batch 1; medians. "transformers bf16" is
the float model as it is loaded, the others the same model from `octavo.quantize(model, "w8a16")`: with the cache that
transformers makes, with `FloatCache`, with transformers' `QuantizedCache` in fp8, and with `Int8Cache`; the first and
the last of these with attention in int8, too. Error: of the logits of the first such token against those of the same
weights with keys and values in bf16. Quality: perplexity of SmolLM2 in bf16, whose attention sees every key and value
but as int8, next to the same without a cache. Every causal language model of transformers, small, with random weights,
in fp32: 14 tokens of two texts, eight at once and then one by one; with a `FloatCache` the logits must be the bits of
those with transformers' own cache, with an `Int8Cache` those with its own of keys and values that were quantized and
dequantized.
"""
TOKENS = (512, 2048, 8000)
ROUNDS, NEW = 7, 4
JUDGED, WINDOW = 16384, 2048

BF16, OWN = "transformers bf16", "w8a16"
WAYS: dict[str, tuple[str | None, Callable[[Any], Cache]]] = {
    BF16: (None, lambda config: DynamicCache(config=config)),
    OWN: ("float", lambda config: DynamicCache(config=config)),
    "w8a16, FloatCache": ("float", FloatCache),
    "w8a16, cache in fp8": ("float", lambda config: QuantizedCache("fp8", config)),
    "w8a16, Int8Cache": ("float", Int8Cache),
    "w8a16, attention int8": ("int8", lambda config: DynamicCache(config=config)),
    "w8a16, attention int8, Int8Cache": ("int8", Int8Cache),
}
"""Attention of the quantized model, or None for the float one; and its cache."""


def measure() -> dict[str, Any]:
    checkpoint = str(language.checkpoint())
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        models = {SMOLLM2: _speeds(checkpoint), LLAMA: _speeds(folder)}
    causal = [each for each in model_types() if each[1] == "MODEL_FOR_CAUSAL_LM_MAPPING"]
    return {
        "kernels": kernels_of("float_attention_of_codes"),
        "models": models,
        "quality": _quality(checkpoint),
        "types": in_processes(judge, causal),
    }


def _speeds(path: str) -> dict[str, dict[str, dict[str, Any]]]:
    models: dict[str | None, Any] = {attention: load_causal(path) for attention in (None, "float", "int8")}
    for attention in ("float", "int8"):
        octavo.quantize(models[attention], "w8a16", include=["Embedding", "OutputHead"], attention=attention)
    return {str(tokens): _behind(tokens, models) for tokens in TOKENS}


def _behind(tokens: int, models: dict[str | None, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    steps = {}
    expected = None
    for name, (attention, make) in WAYS.items():
        model = models[attention]
        cache = make(model.config)
        _fill(cache, model, tokens)
        steps[name] = _Step(model, cache)
        logits = steps[name].take()
        if name == OWN:
            expected = logits
        error = None if expected is None else _error(logits, expected)
        found[name] = {"seconds": [], "bytes": _bytes_of(cache), "error": error}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(NEW):
                step.take()
            found[name]["seconds"].append((time.perf_counter() - begin) / NEW)
    return found


class _Step:
    """The next token of a model with a cache, and so on."""

    def __init__(self, model: Any, cache: Cache) -> None:
        self.model, self.options = model, {str(cache_name(model)): cache}
        self.token = torch.tensor([[17]])

    @torch.no_grad()
    def take(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.token, use_cache=True, **self.options).logits[:, -1]
        self.token = logits.argmax(-1, keepdim=True)
        return logits


def _fill(cache: Cache, model: Any, tokens: int) -> None:
    config, chance = model.config, torch.Generator().manual_seed(0)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, tokens, size)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, generator=chance).to(model.dtype) for _ in range(2))
        cache.update(key, value, layer)


def _bytes_of(cache: Any) -> int:
    return sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (
            (layer._quantized_keys[0], layer._quantized_values[0])
            if hasattr(layer, "_quantized_keys")
            else (layer.keys, layer.values)
        )
    )


def _error(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).double().norm() / expected.double().norm())


def _quality(path: str) -> dict[str, float]:
    text, _ = language.known_text()
    model, tokenizer = load_causal(path), load_tokenizer(path)
    use_float_attention(model)
    ids = token_ids(tokenizer, text, limit=JUDGED, window=WINDOW)
    name = str(cache_name(model))

    def with_int8(ids: Tensor) -> Any:
        return model(input_ids=ids, use_cache=True, **{name: Int8Cache(model.config)})

    return {
        "float": octavo.perplexity(model, ids, window=WINDOW),
        "int8": octavo.perplexity(with_int8, ids, window=WINDOW),
    }


# -- every type -----------------------------------------------------------------------------------------------------


def judge(name: str, mapping: str) -> dict[str, Any]:
    """For one model type: "right" (True or False), or "refused" with the reason why it has no int8 cache."""
    found: dict[str, Any] = {"type": name, "class": None, "errors": {}}
    model, inputs = build(name, mapping)
    if model is None or inputs is None or cache_name(model) is None:
        return found
    found["class"] = type(model).__name__
    use_float_attention(model)
    ids = torch.randint(5, 500, (2, 14))
    try:
        exact = _in_pieces(model, ids, DynamicCache(config=model.config))
        rounded = _in_pieces(model, ids, _rounding_cache(model.config))
    except Exception as error:
        found["errors"]["transformers"] = repr(error)[:300]  # it has a cache of its own, or none in pieces
        return found
    try:
        found["float"] = torch.equal(_in_pieces(model, ids, FloatCache(model.config)), exact)
    except octavo.OctavoError as error:
        found["refused"] = str(error)
        return found
    except Exception as error:
        found["errors"]["float"] = repr(error)[:300]
    try:
        int8 = _in_pieces(model, ids, Int8Cache(model.config))
    except octavo.OctavoError as error:
        found["refused"] = str(error)
        return found
    except Exception as error:
        found["errors"]["int8"] = repr(error)[:300]
        return found
    # Sums in another order may take a number that lies half way between two codes to the other.
    found["lost"] = _error(rounded, exact)
    found["right"] = bool((int8 - rounded).norm() <= 0.1 * (rounded - exact).norm() + 1e-6 * exact.norm())
    return found


@torch.no_grad()
def _in_pieces(model: Any, ids: Tensor, cache: Any) -> Tensor:
    options = {"use_cache": True, str(cache_name(model)): cache}
    return torch.cat([model(input_ids=piece, **options).logits for piece in ids.split([8, *[1] * 6], 1)], 1)


def _rounding_cache(config: Any) -> Cache:
    """A float cache of keys and values that were quantized and dequantized."""
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        layer.update = partial(_update_rounded, layer.update)
    return cache


def _update_rounded(update: Callable[..., Any], key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    pairs = ops.quantize_per_token(key), value_codes(value)
    return update(*((codes * scale).to(key.dtype) for codes, scale in pairs), *args, **kwargs)


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    quality = found["quality"]
    change = quality["int8"] / quality["float"] - 1
    rows = (("in bf16", f"{quality['float']:.4f}", ""), ("int8", f"{quality['int8']:.4f}", f"{change:+.3%}"))
    judged = f"{SMOLLM2}, {JUDGED} tokens in windows of {WINDOW}"
    return [
        *(_table(name, one, found["kernels"]) for name, one in found["models"].items()),
        Table(judged, ("keys and values", "perplexity", "change"), rows, "lrr"),
        *_of_types(found["types"]),
    ]


def _of_types(types: list[dict[str, Any]]) -> list[Table]:
    asked = [one for one in types if "right" in one]
    wrong = [(one["type"], "other logits") for one in asked if not one["right"]]
    wrong += [(one["type"], "other bits with a FloatCache") for one in types if one.get("float") is False]
    for kind in ("float", "int8"):
        wrong += [(one["type"], one["errors"][kind]) for one in types if kind in one["errors"]]
    refused = [one["type"] for one in types if "refused" in one]
    rows = (
        ("model types", str(len(types))),
        (
            "that keep transformers' cache and could be run",
            str(len(asked) + len(refused) + sum("int8" in one["errors"] for one in types)),
        ),
        ("with a FloatCache, the same bits", str(sum(bool(one.get("float")) for one in types))),
        ("with an Int8Cache, logits of the same keys and values", str(sum(one["right"] for one in asked))),
        ("refused, with the reason", f"{len(refused)}: {', '.join(refused)}"),
    )
    tables = [Table("Every causal language model", ("", ""), rows, "ll")]
    return [*tables, Table("Where something went wrong", ("type", "what"), tuple(wrong), "ll")] if wrong else tables


def _table(model: str, found: dict[str, dict[str, dict[str, Any]]], kernels: str) -> Table:
    def cell(tokens: str, name: str) -> str:
        own, rival = (statistics.median(found[tokens][each]["seconds"]) for each in (name, BF16))
        return f"{1 / own:.1f} ({rival / own:.2f}x)"

    rows = []
    for name in WAYS:
        longest = found[str(TOKENS[-1])][name]
        error = "" if longest["error"] is None else f"{longest['error']:.4f}"
        rows.append((name, *(cell(tokens, name) for tokens in found), human_bytes(longest["bytes"]), error))
    columns = ("", *(f"behind {tokens}, tokens/s" for tokens in found), f"cache of {TOKENS[-1]}", "error")
    title = f"{model}; kernels: {kernels}; in brackets: times as fast as bf16"
    return Table(title, columns, tuple(rows), "l" + "r" * (len(columns) - 1))
