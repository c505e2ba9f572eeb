"""Attention by octavo's kernels, in int8 and in bf16, next to torch's own: alone, and within a language model."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import octavo
from bench import goals, language, runtimes
from bench.goals import Goal, human_time
from bench.record import kernels_of
from bench.speed import FOLLOWING, NEW, PROMPT, SMOLLM2, VOCABULARY
from octavo import ops
from octavo.cli import bench_worker
from octavo.cli.op_speed import ROTATION_BYTES, Way, Weights, race, rotation
from octavo.cli.verb import keep_cache
from octavo.integrations.int8_cache import Int8Layer
from octavo.integrations.int8_states import Int8States
from octavo.integrations.language_model import load_causal
from octavo.tables import Table

TITLE = "Attention"
HOW = """
`scaled_dot_product_attention` of torch in bf16 (causal, with the heads that share a key as they are) next to
`int8_attention` with the mask that transformers hands to it (bf16, its lowest number where a query may not
attend), and to `float_attention` in bf16 (causal), in turns in one process, medians of the rounds, batch 1.
int8_attention starts from bf16 too: finding all scales and codes, those of the whole cache for each token of
decode, is within its time. Prefill has its operands as projections leave them, heads after tokens; decode has a
cache of keys and values as transformers keeps it, or (`..._of_codes`) as an `Int8Cache` does, another one for each
call, so that it comes from memory. Results are held to float64 before they are timed. The model: prefill is the
time from the prompt to the first token, decode greedy, rounds in turns; error: of the logits against bf16's, as in
the section on running.
"""
SHAPES = {"SmolLM2, 9 heads of 64, 3 of keys": (9, 3, 64), "32 of 64, 8": (32, 8, 64), "32 of 128, 8": (32, 8, 128)}
SIZES = ((512, 512), (2048, 2048), (1, 512), (1, 4096))
"""Queries and tokens."""
ROUNDS = 7
WARM_UP_CALLS = 5

SDPA, INT8, FLOAT = "torch, bf16", "int8_attention", "float_attention"
INT8_OF_CODES, FLOAT_OF_CODES = "int8_attention_of_codes", "float_attention_of_codes"
OURS = {"prefill": (INT8, FLOAT), "decode": (INT8, FLOAT, INT8_OF_CODES, FLOAT_OF_CODES)}

MODELS = {
    "bf16": lambda model: None,
    "w8a8, attention in float": functools.partial(octavo.quantize, scheme="w8a8"),
    "w8a8, attention in int8": functools.partial(octavo.quantize, scheme="w8a8", attention="int8"),
}
"""Those with attention in int8 keep an `Int8Cache`."""


def measure() -> dict[str, Any]:
    checkpoint = language.checkpoint()
    return {
        "kernels": kernels_of("int8_attention"),
        "ops": {
            name: {f"{rows}x{tokens}": _race(*shape, rows, tokens) for rows, tokens in SIZES}
            for name, shape in SHAPES.items()
        },
        "model": _models(str(checkpoint)),
    }


def _race(heads: int, kv: int, size: int, rows: int, tokens: int) -> dict[str, float]:
    chance = torch.Generator().manual_seed(0)

    def projected(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, tokens, heads, size, generator=chance).bfloat16().transpose(1, 2)

    query, key, value = projected(heads, rows), projected(kv, tokens), projected(kv, tokens)
    mask = torch.full((rows, tokens), torch.finfo(torch.bfloat16).min).triu(1 + tokens - rows)[None, None].bfloat16()
    scaling = size**-0.5

    def sdpa(key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=rows > 1, enable_gqa=True)

    def int8(key: Tensor, value: Tensor) -> Tensor:
        return ops.int8_attention(query, key, value, mask, scaling)

    def in_float(key: Tensor, value: Tensor) -> Tensor:
        return ops.float_attention(query, key, value, None, scaling, is_causal=rows > 1)

    def int8_of_codes(key: Int8States, value: Int8States) -> Tensor:
        return ops.int8_attention_of_codes(query, key.codes, key.scale, value.codes, value.scale, mask, scaling)

    def float_of_codes(key: Int8States, value: Int8States) -> Tensor:
        return ops.float_attention_of_codes(query, key.codes, key.scale, value.codes, value.scale, None, scaling)

    expected = _in_double(query, key, value, mask, scaling)

    def operands() -> Weights:
        return rotation(key, value) if rows == 1 else itertools.repeat((key, value))

    ways = [
        Way(SDPA, _warm(sdpa), operands(), _near(expected, 0.01)),
        Way(INT8, _warm(int8), operands(), _near(expected, 0.05)),
        Way(FLOAT, _warm(in_float), operands(), _near(expected, 0.01)),
    ]
    if rows == 1:
        ways += [
            Way(INT8_OF_CODES, _warm(int8_of_codes), _caches(key, value), _near(expected, 0.05)),
            Way(FLOAT_OF_CODES, _warm(float_of_codes), _caches(key, value), _near(expected, 0.02)),
        ]
    return race(ways)


def _caches(key: Tensor, value: Tensor) -> Weights:
    """Yield int8 caches of these in turn, enough of them to fill `ROTATION_BYTES`."""
    count = ROTATION_BYTES // (key.numel() + value.numel()) + 1
    return itertools.cycle([Int8Layer().update(key, value) for _ in range(count)])


def _warm(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call`, but its first call runs several times, until torch's threads have settled and caches are warm."""
    calls = iter([WARM_UP_CALLS])

    def run(*args: Tensor) -> Tensor:
        for _ in range(next(calls, 0)):
            call(*args)
        return call(*args)

    return run


def _in_double(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    return torch.stack(
        [
            (query[0, h].double() @ key[0, h // shared].double().T * scaling + mask[0, 0].double()).softmax(-1)
            @ value[0, h // shared].double()
            for h in range(query.shape[1])
        ]
    )[None]


def _near(expected: Tensor, share: float) -> Callable[[Tensor], bool]:
    return lambda y: bool((y.double() - expected).norm() <= share * expected.norm())


def _models(path: str) -> dict[str, dict[str, Any]]:
    chance = random.Random(0)
    ids = [chance.randrange(VOCABULARY) for _ in range(PROMPT + FOLLOWING)]
    prompt, following = ids[:PROMPT], ids[PROMPT:]
    models, found = {}, {}
    expected = None
    for name, change in MODELS.items():
        models[name] = load_causal(path)
        change(models[name])
        keep_cache(models[name], None)
        logits = runtimes.logits(models[name], prompt, following)
        expected = logits if expected is None else expected
        error = float((logits - expected).double().norm() / expected.double().norm())
        found[name] = {"error": error, "first_token_s": [], "decode_s": []}
    for _ in range(ROUNDS):
        for name, model in models.items():
            bench_worker.hold(model)
            one = bench_worker.time_round(prompt, NEW)
            found[name]["first_token_s"].append(one.first_token_s)
            found[name]["decode_s"].append(one.decode_s / (NEW - 1))
    return found


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    rows = [
        (f"{name}; T = {size[0]}, S = {size[1]}", *goals.row(Goal(phase, ours, (SDPA,), 1.0), seconds, human_time))
        for name, one in found["ops"].items()
        for size, seconds in _by_size(one)
        for phase in ("decode" if size[0] == 1 else "prefill",)
        for ours in OURS[phase]
    ]
    return [
        Table(f"Attention alone; kernels: {found['kernels']}", ("heads", *goals.COLUMNS), tuple(rows), "llllrrrrl"),
        _model_table(found["model"]),
    ]


def _by_size(one: dict[str, dict[str, float]]) -> Iterator[tuple[tuple[int, int], dict[str, float]]]:
    for size in SIZES:
        yield size, one[f"{size[0]}x{size[1]}"]


def _model_table(found: dict[str, dict[str, Any]]) -> Table:
    def median(name: str, key: str) -> float:
        return statistics.median(found[name][key])

    def cell(name: str, key: str, tokens: int) -> str:
        next_to = median("bf16", key) / median(name, key)
        return f"{tokens / median(name, key):.{0 if tokens > 1 else 1}f} ({next_to:.2f}x)"

    rows = tuple(
        (name, cell(name, "first_token_s", PROMPT), cell(name, "decode_s", 1), f"{one['error']:.3f}")
        for name, one in found.items()
    )
    title = f"{SMOLLM2}: {PROMPT} tokens in, {NEW} out; medians of {ROUNDS} rounds; in brackets: times as fast as bf16"
    return Table(title, ("model", "prefill, tokens/s", "decode, tokens/s", "error of the logits"), rows, "lrrr")
