"""How fast a language model runs in float and in int8, octavo's and others'."""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError
from functools import partial
from typing import Any

import torch

from bench import goals, language, runtimes
from bench.goals import Goal
from bench.own_process import Worker, own_process
from bench.quantize import llama
from bench.record import kernels_of
from bench.runtimes import (
    BF16,
    FP32,
    QUANTO,
    RUNTIMES,
    TORCHAO,
    TORCHAO_COMPILED,
    TORCHAO_DYNAMIC,
    W8A8,
    W8A8_ATTENTION,
    W8A16,
    W8A16_ATTENTION,
    W8A16_COMPILED,
)
from octavo.cli import bench_worker
from octavo.cli.bench_worker import Round
from octavo.tables import Table, human_bytes

TITLE = "Running: prefill and decode"
HOW = """
Each runtime loads the same bf16 checkpoint in a process of its own, and they take turns, batch 1; medians of the
rounds, which are fewer for what has had a minute. In each turn a runtime runs twice, and the second run counts:
the first wakes up what slept while others had theirs. Prefill is the time from the prompt to the first token, decode
greedy, one token after the other. Octavo's models have the key-value cache that the command line gives them, a
`FloatCache`, or with int8 attention an `Int8Cache`; all others have transformers' own, and so had octavo's in what was
measured before 2026-11-29. Everything is eager, unless "compiled" (by `torch.compile` as it is called by default) or
"compiled whole" (`octavo bench --compile`: static cache, prefill and decode in a graph each). All int8 includes the
output head; in octavo w8a8 that is weight-only, for it is tied to the embedding. "Attention int8" is SmoothQuant's:
both products of attention in int8 too, by octavo's own kernel. Everywhere else attention is in bf16, torch's or, in
octavo's models, that of `octavo.integrations.float_attention`, which takes the place of torch's as they are quantized.
Error: of the logits after the prompt and after each of some tokens fed one by one, against the bf16 model's, as a
share of their norm; a runtime with 0.3 or more computes something else, and its speed is no goal's rival.
"""
PROMPT, NEW, REPEATS = 512, 16, 4
VOCABULARY = 49152
"""Of both models."""
FOLLOWING = 4
"""Tokens fed one by one before the first round: after the third, `torch.compile` meets no shape that is new to it."""
ENOUGH = 60.0
"""Seconds of rounds after which a runtime has no further ones."""
PATIENCE = 600.0
"""Seconds that all the compiled runtimes together have until they are ready."""
WRONG = 0.3

SMOLLM2, LLAMA = "SmolLM2-135M-Instruct", "Llama shape, 1.07 B, random"
COMPARED = {
    LLAMA: tuple(RUNTIMES),
    # To compile others' once more would take minutes.
    SMOLLM2: (BF16, FP32, W8A16, W8A16_ATTENTION, W8A8, W8A8_ATTENTION, W8A16_COMPILED, TORCHAO, QUANTO),
}
PREFILL_GOALS = {
    LLAMA: (
        *(
            goal
            for ours in (W8A8, W8A8_ATTENTION)
            for goal in (
                Goal("prefill, w8a8", ours, (BF16,), 1.8, 3),
                Goal("prefill, w8a8", ours, (TORCHAO_DYNAMIC,), 1.4),
            )
        ),
        *(Goal("prefill, w8a16", ours, (BF16,), 1.15, 1.5) for ours in (W8A16, W8A16_ATTENTION)),
    ),
    SMOLLM2: (Goal("prefill, w8a8", W8A8, (BF16,)), Goal("prefill, w8a8", W8A8_ATTENTION, (BF16,))),
}
DECODE_GOALS = {
    LLAMA: (
        *(
            goal
            for ours in (W8A16, W8A16_ATTENTION)
            for goal in (
                Goal("decode, w8a16", ours, (BF16,), 1.8),
                Goal("decode, w8a16", ours, (TORCHAO_COMPILED,), 1.25),
                Goal("decode, w8a16", ours, (QUANTO,), 1.5),
            )
        ),
        Goal("decode, w8a8", W8A8_ATTENTION, (BF16,)),
    ),
    SMOLLM2: (Goal("decode, w8a16", W8A16, (BF16,), 1.2, 1.6),),
}


def measure() -> dict[str, Any]:
    smollm2 = language.checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        return {
            "kernels": kernels_of("w8a16_linear"),
            "models": {LLAMA: _compare(LLAMA, folder), SMOLLM2: _compare(SMOLLM2, str(smollm2))},
        }


def _compare(model: str, path: str) -> dict[str, Any]:
    """The runtimes in turns. Returns: what was found of each, and why others were not measured."""
    chance = random.Random(0)
    ids = [chance.randrange(VOCABULARY) for _ in range(PROMPT + FOLLOWING)]
    prompt, following = ids[:PROMPT], ids[PROMPT:]
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    expected = None
    patience = PATIENCE
    with contextlib.ExitStack() as stack:
        for name in COMPARED[model]:
            worker = stack.enter_context(own_process())
            limit = patience if RUNTIMES[name].compiled or RUNTIMES[name].whole else None
            begin = time.perf_counter()
            try:
                token_bytes, logits = worker(
                    runtimes.start, name, path, torch.get_num_threads(), prompt, following, NEW, limit=limit
                )
            except Exception as error:
                if name in (BF16, W8A16, W8A16_ATTENTION, W8A8, W8A8_ATTENTION):
                    raise
                missing[name] = _in_words(error)
            else:
                expected = logits if expected is None else expected
                error = float((logits - expected).double().norm() / expected.double().norm())
                found[name] = {"token_bytes": token_bytes, "error": error, "first_token_s": [], "decode_s": []}
                workers[name] = worker
            took = time.perf_counter() - begin
            patience -= took if limit else 0
            print(f"  {model}, {name}: {missing.get(name, 'ready')} after {took:.0f} s", file=sys.stderr, flush=True)
        take_turns(
            found,
            {name: partial(worker, bench_worker.time_round, prompt, NEW) for name, worker in workers.items()},
            REPEATS,
        )
    return {"runtimes": found, "missing": missing}


def take_turns(found: dict[str, dict[str, Any]], rounds: Mapping[str, Callable[[], Round]], repeats: int) -> None:
    """Run each of `rounds` twice in its turn, and add what the second took to `found`, in seconds (a token)."""
    took = dict.fromkeys(rounds, 0.0)
    for _ in range(repeats):
        for name, run in rounds.items():
            if took[name] > ENOUGH:
                continue
            begin = time.perf_counter()
            run()
            one = run()
            took[name] += time.perf_counter() - begin
            found[name]["first_token_s"].append(one.first_token_s)
            found[name]["decode_s"].append(one.decode_s / (NEW - 1))


def _in_words(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not measured: the package {error.name} is not installed"
    if isinstance(error, TimeoutError):
        return f"not measured: not compiled in time (all together have {PATIENCE} s)"
    return f"not measured: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for model, one in found["models"].items():
        for of_model, key, show in (
            (PREFILL_GOALS, "first_token_s", lambda seconds: f"{PROMPT / seconds:.0f} tokens/s"),
            (DECODE_GOALS, "decode_s", lambda seconds: f"{1 / seconds:.1f} tokens/s"),
        ):
            right = {name: statistics.median(run[key]) for name, run in one["runtimes"].items() if run["error"] < WRONG}
            rows += [(model, *goals.row(goal, right, show)) for goal in of_model[model]]
    return [
        Table(
            f"What must be reached; octavo's kernels: {found['kernels']}",
            ("model", *goals.COLUMNS),
            tuple(rows),
            "llllrrrrl",
        ),
        *(_runtimes(model, one) for model, one in found["models"].items()),
    ]


def _runtimes(model: str, one: dict[str, Any]) -> Table:
    found = one["runtimes"]
    rows = [(name, *_cells(run, found.get(BF16, run))) for name, run in found.items()]
    rows += [(name, why, "-", "-", "-") for name, why in one["missing"].items()]
    title = f"{model}: {PROMPT} tokens in, {NEW} out; medians of up to {REPEATS}; in brackets: times as fast as bf16"
    columns = ("runtime", "prefill, tokens/s", "decode, tokens/s", "weights read in decode", "error of the logits")
    return Table(title, columns, tuple(rows), "lrrrr")


def _cells(run: dict[str, Any], baseline: dict[str, Any]) -> tuple[str, str, str, str]:
    wrong = run["error"] >= WRONG
    prefill, decode = (statistics.median(run[key]) for key in ("first_token_s", "decode_s"))
    next_to = [
        statistics.median(baseline[key]) / time for key, time in (("first_token_s", prefill), ("decode_s", decode))
    ]
    return (
        f"{PROMPT / prefill:.0f} ({next_to[0]:.2f}x)",
        f"{1 / decode:.1f} ({next_to[1]:.2f}x)",
        f"{human_bytes(int(run['token_bytes'] / decode))}/s" if run["token_bytes"] else "-",
        f"{run['error']:.3f}{', wrong' if wrong else ''}",
    )
