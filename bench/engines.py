"""One int8 checkpoint, run by octavo in plain transformers and by vLLM's engine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import octavo
from bench.own_process import own_process
from bench.quantize import llama
from bench.record import Skipped
from bench.speed import NEW, PROMPT, VOCABULARY, take_turns
from octavo.cli import bench_worker
from octavo.cli.bench_worker import Round
from octavo.integrations.generation import load_causal
from octavo.tables import Table

TITLE = "An int8 checkpoint in vLLM"
HOW = """
A Llama of 1.07 billion parameters with random weights, quantized by `octavo.quantize(model, "w8a8", attention="int8")`
and saved by `octavo.save`; its head is tied to the embedding and stays bf16. The folder is loaded by `octavo.load` for
plain transformers, and by vLLM's CPU build, which keeps attention in bf16: as it is by default, compiled, with AMD's
zentorch where that is installed. Each in a process of its own, in turns, batch 1; medians of the rounds. In each turn
each runs twice, and the second run counts. Prefill is the time from the prompt to the first token. Error: of the
logprobs of the token after the prompt, against the bf16 model's in transformers, as a share of their spread.
"""
REPEATS = 5
BF16 = "transformers, bf16, eager"


def measure() -> dict[str, Any]:
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vllm is not installed")
    ids = [random.Random(0).randrange(VOCABULARY) for _ in range(PROMPT)]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = llama()
        model.save_pretrained(f"{folder}/bf16")
        octavo.quantize(model, "w8a8", attention="int8")
        octavo.save(model, f"{folder}/int8")
        del model
        rounds, expected = {}, None
        for name, start, path in (
            (BF16, start_transformers, "bf16"),
            ("vLLM, bf16, compiled", start_vllm, "bf16"),
            ("vLLM, the int8 checkpoint, compiled", start_vllm, "int8"),
            ("octavo, the int8 checkpoint, eager", start_transformers, "int8"),
        ):
            worker = stack.enter_context(own_process())
            begin = time.perf_counter()
            logprobs = worker(start, f"{folder}/{path}", torch.get_num_threads(), ids)
            expected = logprobs if expected is None else expected
            error = float((logprobs - expected).norm() / (expected - expected.mean()).norm())
            found[name] = {
                "ready_s": time.perf_counter() - begin, "error": error, "first_token_s": [], "decode_s": []
            }  # fmt: skip
            time_round = time_vllm if start is start_vllm else bench_worker.time_round
            rounds[name] = partial(worker, time_round, ids, NEW)
        take_turns(found, rounds, REPEATS)
    return {"runs": found, "zentorch": importlib.util.find_spec("zentorch") is not None}


# -- in a process of its own ------------------------------------------------------------------------------------------

Generate = Callable[[Sequence[int], int], Any]
"""Tokens of the prompt, and how many to write -> vLLM's completion."""
_engine: list[Generate] = []


def start_transformers(path: str, threads: int, ids: Sequence[int]) -> Tensor:
    """Hold the model, and return the logprobs of the token after `ids`, fp32 [V]."""
    torch.set_num_threads(threads)
    model = load_causal(path)
    bench_worker.hold(model)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float(), -1)


def start_vllm(path: str, threads: int, ids: Sequence[int]) -> Tensor:
    """As `start_transformers`, in vLLM."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    import vllm

    model = vllm.LLM(
        path, dtype="bfloat16", max_model_len=1024, max_num_seqs=1, enable_prefix_caching=False,
        skip_tokenizer_init=True, max_logprobs=-1,
    )  # fmt: skip

    def generate(tokens: Sequence[int], new: int, logprobs: int | None = None) -> Any:
        wanted = vllm.SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        (request,) = model.generate([{"prompt_token_ids": list(tokens)}], wanted, use_tqdm=False)
        return request.outputs[0]

    _engine.append(generate)
    (row,) = generate(ids, 1, logprobs=-1).logprobs
    return torch.tensor([row[token].logprob for token in range(len(row))])


def time_vllm(ids: Sequence[int], new_tokens: int) -> Round:
    """As `bench_worker.time_round`: what it takes for one token, and what for the others more than that."""
    (generate,) = _engine
    seconds = []
    for new in (1, new_tokens):
        begin = time.perf_counter()
        generate(ids, new)
        seconds.append(time.perf_counter() - begin)
    return Round(seconds[0], seconds[1] - seconds[0])


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    runs = found["runs"]
    prefill, decode = (
        {name: statistics.median(run[key]) for name, run in runs.items()} for key in ("first_token_s", "decode_s")
    )
    rows = tuple(
        (
            name,
            f"{PROMPT / prefill[name]:.0f} ({prefill[BF16] / prefill[name]:.2f}x)",
            f"{1 / decode[name]:.1f} ({decode[BF16] / decode[name]:.2f}x)",
            f"{run['ready_s']:.0f} s",
            f"{run['error']:.3f}",
        )
        for name, run in runs.items()
    )
    kernels = "with zentorch" if found["zentorch"] else "without zentorch"
    title = f"vLLM {kernels}; {PROMPT} tokens in, {NEW} out; medians of {REPEATS} rounds; in brackets: times as fast"
    columns = ("runtime", "prefill, tokens/s", "decode, tokens/s", "ready after", "error of the logprobs")
    return [Table(title, columns, rows, "lrrrr")]
