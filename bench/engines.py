"""The same model in int8 under octavo in plain transformers, under vLLM's engine and under llama.cpp's."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import octavo
from bench import llama_cpp
from bench.own_process import own_process
from bench.quantize import llama
from bench.record import Skipped
from bench.speed import NEW, PROMPT, VOCABULARY, take_turns
from octavo.cli import bench_worker
from octavo.cli.bench_worker import Round
from octavo.integrations.language_model import load_causal
from octavo.tables import Table

TITLE = "A model in int8 under other engines"
HOW = """
A Llama of 1.07 billion parameters with random weights, its head tied to the embedding. "The checkpoint" is what
`octavo.save` writes after `octavo.quantize(model, "w8a8", attention="int8")`, head and embedding in bf16; the folder is
loaded by `octavo.load` for plain transformers, and by vLLM's CPU build, which keeps attention in bf16: as it is by
default, compiled, with AMD's zentorch where that is installed. "All of it": `include=["Embedding", "OutputHead"]`, next
to llama.cpp, built for this processor, with weights in Q8_0 (int8 in blocks of 32; it makes int8 of inputs, too). Each
in a process of its own, in turns, batch 1; medians of the rounds. In each turn each runs twice, and the second run
counts. Prefill is the time from the prompt to the first token. Error: of the logprobs of the token after the prompt,
against the bf16 model's in transformers, as a share of their spread.
"""
REPEATS = 5
BF16 = "transformers, bf16, eager"
Start = Callable[[str, int, Sequence[int]], Tensor]
"""A path, threads, and the prompt -> the logprobs of the token after it, fp32 [V]; the model stays in the process."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """package: the one that it needs. model: which file or folder made by `_write` it runs."""

    package: str
    model: str
    start: Start
    time_round: Callable[[Sequence[int], int], Round]


def measure() -> dict[str, Any]:
    present = {name: engine for name, engine in ENGINES.items() if importlib.util.find_spec(engine.package)}
    if all(engine.package == "transformers" for engine in present.values()):
        raise Skipped("neither vllm nor llama_cpp is installed")
    ids = [random.Random(0).randrange(VOCABULARY) for _ in range(PROMPT)]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        _write(Path(folder), {engine.model for engine in present.values()})
        rounds, expected = {}, None
        for name, engine in present.items():
            worker = stack.enter_context(own_process())
            begin = time.perf_counter()
            logprobs = worker(engine.start, f"{folder}/{engine.model}", torch.get_num_threads(), ids)
            expected = logprobs if expected is None else expected
            error = float((logprobs - expected).norm() / (expected - expected.mean()).norm())
            found[name] = {
                "ready_s": time.perf_counter() - begin, "error": error, "first_token_s": [], "decode_s": []
            }  # fmt: skip
            rounds[name] = partial(worker, engine.time_round, ids, NEW)
            print(f"  {name}: ready after {found[name]['ready_s']:.0f} s", file=sys.stderr, flush=True)
        take_turns(found, rounds, REPEATS)
    return {
        "runs": found,
        "missing": {name: engine.package for name, engine in ENGINES.items() if name not in present},
        "zentorch": importlib.util.find_spec("zentorch") is not None,
    }


def _write(folder: Path, wanted: set[str]) -> None:
    model = llama()
    model.save_pretrained(folder / "bf16")
    if "q8_0.gguf" in wanted:
        llama_cpp.write(model, folder / "q8_0.gguf")
    octavo.quantize(model, "w8a8", attention="int8")
    octavo.save(model, folder / "int8")
    recipe = octavo.Recipe.of("w8a8", include=["Embedding", "OutputHead"], attention="int8")
    octavo.quantize_checkpoint(folder / "bf16", folder / "all-int8", recipe)


# -- in a process of its own ------------------------------------------------------------------------------------------

Generate = Callable[[Sequence[int], int], Any]
"""Tokens of the prompt, and how many to write -> vLLM's completion."""
_engine: list[Generate] = []


def start_transformers(path: str, threads: int, ids: Sequence[int]) -> Tensor:
    torch.set_num_threads(threads)
    model = load_causal(path)
    bench_worker.hold(model)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float(), -1)


def start_vllm(path: str, threads: int, ids: Sequence[int]) -> Tensor:
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
    """As `bench_worker.time_round`: the time for one token, and how much longer all of them take."""
    (generate,) = _engine
    seconds = []
    for new in (1, new_tokens):
        begin = time.perf_counter()
        generate(ids, new)
        seconds.append(time.perf_counter() - begin)
    return Round(seconds[0], seconds[1] - seconds[0])


ENGINES = {
    BF16: Engine("transformers", "bf16", start_transformers, bench_worker.time_round),
    "vLLM, bf16, compiled": Engine("vllm", "bf16", start_vllm, time_vllm),
    "vLLM, the checkpoint, compiled": Engine("vllm", "int8", start_vllm, time_vllm),
    "octavo, the checkpoint, eager": Engine("transformers", "int8", start_transformers, bench_worker.time_round),
    "llama.cpp, Q8_0": Engine("llama_cpp", "q8_0.gguf", llama_cpp.start, llama_cpp.time_round),
    "octavo, all of it, eager": Engine("transformers", "all-int8", start_transformers, bench_worker.time_round),
}

# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    runs = found["runs"]
    prefill, decode = (
        {name: statistics.median(run[key]) for name, run in runs.items()} for key in ("first_token_s", "decode_s")
    )
    rows = [
        (
            name,
            f"{PROMPT / prefill[name]:.0f} ({prefill[BF16] / prefill[name]:.2f}x)",
            f"{1 / decode[name]:.1f} ({decode[BF16] / decode[name]:.2f}x)",
            f"{run['ready_s']:.0f} s",
            f"{run['error']:.3f}",
        )
        for name, run in runs.items()
    ]
    rows += [
        (name, f"not measured: {package} is not installed", "-", "-", "-") for name, package in found["missing"].items()
    ]
    kernels = "with zentorch" if found["zentorch"] else "without zentorch"
    title = f"vLLM {kernels}; {PROMPT} tokens in, {NEW} out; medians of {REPEATS} rounds; in brackets: times as fast"
    columns = ("runtime", "prefill, tokens/s", "decode, tokens/s", "ready after", "error of the logprobs")
    return [Table(title, columns, tuple(rows), "lrrrr")]
