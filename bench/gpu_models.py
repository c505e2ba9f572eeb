"""Language models of random weights on a GPU: octavo's int8 next to bf16, gpt-fast's formulas and torchao.

Each runtime has a process, and makes the same bf16 model there. First all run eagerly, in turns; then decode and
prefill are compiled whole, with a static cache (`octavo.integrations.compiled`), and they take turns again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers

import octavo
from bench import goals
from bench.goals import Goal
from bench.gpt_fast import use_gpt_fast
from bench.gpu import need_gpu
from bench.layer_error import layer_error, run_by_layers
from bench.own_process import Worker, own_process
from octavo.cli import bench_worker
from octavo.tables import Table, human_bytes, human_percent

__all__ = ["HOW", "LLAMA", "MIXTRAL", "measure", "tables"]

BF16, W8A16, W8A8, GPT_FAST, TORCHAO = (
    "bf16",
    "octavo w8a16",
    "octavo w8a8",
    "gpt-fast's int8",
    "torchao Int8WeightOnly",
)
LLAMA, MIXTRAL = "Llama-2-7B shape", "Mixtral shape, 16 layers"
HOW = """
Random weights in bf16; each runtime has a process, and they take turns, eagerly first, then compiled whole by
`torch.compile` with a static cache and CUDA graphs, all in the same way. Decode is greedy, at batch 1, from the first
token on, as gpt-fast measures it; prefill is the time from the prompt to the first token. Error: how far the layers are
from those of the bf16 model when they are fed what those are (`bench/layer_error.py`), for the prompt and for a token;
in runs of before that, of the logits after the prompt.
"""
ROUNDS = 3
WRONG = {"layers": (0.05, 0.1), "logits": (0.3, 0.5)}
"""Error from which on a runtime computes something else, with int8 weights and with int8 inputs. Of the layers, of this
shape, 0.015 and 0.023 are usual. Of the logits, which were compared at first, 1.4 if they have nothing to do with each
other, of the 7B shape 0.19 to 0.23 and 0.30; of a mixture they tell nothing, for its routers choose other experts."""
DECODED = 64
"""Tokens, the first of which is the prompt."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A shape of model, and what is measured of it.

    at_once: how many processes may hold the bf16 model besides their own at a time.
    prompt: tokens of a prefill; short for a mixture of experts, because gpt-fast gathers the experts of each token.
    decoding, prefilling: the runtimes for which decode or prefill is compiled.
    """

    make: Callable[[], Any]
    prompt: int
    runtimes: tuple[str, ...]
    at_once: int
    decoding: tuple[str, ...]
    prefilling: tuple[str, ...]
    decode: tuple[Goal, ...]
    prefill: tuple[Goal, ...] = ()
    memory: tuple[Goal, ...] = ()


def compiled(runtime: str) -> str:
    return f"{runtime}, compiled"


MODELS = {
    LLAMA: Model(
        lambda: transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
            max_position_embeddings=4096,
        ),
        2048,
        (BF16, W8A16, W8A8, GPT_FAST, TORCHAO),
        5,
        (BF16, W8A16, GPT_FAST, TORCHAO),
        (BF16, W8A8),
        (
            Goal("decode, w8a16 compiled", compiled(W8A16), (compiled(BF16),), 1.6),
            Goal("decode, w8a16 compiled", compiled(W8A16), (compiled(GPT_FAST),), 1.0),
            Goal("decode, w8a16 compiled", compiled(W8A16), (compiled(TORCHAO),), 1.0),
            Goal("decode, w8a16 eager", W8A16, (BF16,), 1.1),
            Goal("decode, w8a16 eager", W8A16, (TORCHAO,), 1.5),
        ),
        (
            Goal("prefill, w8a8 eager", W8A8, (BF16,), 1.56, 1.7),
            Goal("prefill, w8a8 compiled", compiled(W8A8), (compiled(BF16),)),
        ),
        tuple(
            Goal("peak memory, times less", ours, (rival,), 1.818, 1.923)  # 0.55 and 0.52 of it
            for ours, rival in ((W8A16, BF16), (W8A8, BF16), (compiled(W8A16), compiled(BF16)))
        ),
    ),
    MIXTRAL: Model(
        lambda: transformers.MixtralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2,
        ),
        8,
        (BF16, W8A16, GPT_FAST),
        1,
        (BF16, W8A16, GPT_FAST),
        (),
        (
            Goal("decode, w8a16 compiled", compiled(W8A16), (compiled(BF16),), 1.6),
            Goal("decode, w8a16 compiled", compiled(W8A16), (compiled(GPT_FAST),), 1.2),
        ),
    ),
}  # fmt: skip


def measure(name: str) -> Iterator[dict[str, Any]]:
    """Measure the model of that name. Yields the eager results first, then all. Raises: as `need_gpu`."""
    need_gpu()
    for found in _compare(name, MODELS[name], "cuda"):
        yield {name: found}


def _compare(name: str, model: Model, device: str) -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    ids = [chance.randrange(model.make().vocab_size) for _ in range(model.prompt)]
    decode, prefill = Part("decode_s", ids[:1], DECODED), Part("first_token_s", ids, 1)
    runs: dict[str, Any] = {}
    missing: dict[str, str] = {}
    passes: list[float] = []
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(own_process())
        stream(bench_worker.open_stream, device, None)

        def so_far() -> dict[str, Any]:
            passes.extend(stream(bench_worker.stream_bytes_per_s) for _ in range(ROUNDS))
            speed = statistics.median(passes)
            return {"runtimes": runs, "missing": missing, "memory_bytes_per_s": speed, "error_of": "layers"}

        starting = [
            Job(runtime, stack.enter_context(own_process()), (start, runtime, name, ids, device))
            for runtime in model.runtimes
        ]
        eager = _make_ready(starting, model.at_once, runs, missing)
        for part in (decode, prefill):
            _race(eager, part, runs)
        yield so_far()

        for part, runtimes in ((decode, model.decoding), (prefill, model.prefilling)):
            jobs = [
                Job(compiled(job.label), job.worker, (compile_whole, part)) for job in eager if job.label in runtimes
            ]
            _race(_make_ready(jobs, len(jobs), runs, missing), part, runs)
            yield so_far()


@dataclasses.dataclass(frozen=True)
class Job:
    """A function and its arguments that prepare a worker to be timed as the runtime `label`."""

    label: str
    worker: Worker
    call: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of generation that is timed by itself. key: of `Round`. ids: the prompt. tokens: how many are
    generated."""

    key: str
    ids: list[int]
    tokens: int


def _make_ready(jobs: list[Job], at_once: int, runs: dict[str, Any], missing: dict[str, str]) -> list[Job]:
    """Run the jobs; store their results in `runs`, and reasons of failures in `missing`. Returns: those that
    succeeded."""
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        futures = [(job, pool.submit(job.worker, *job.call)) for job in jobs]
    ready = []
    for job, future in futures:
        try:
            returned = future.result()
        except Exception as error:
            if job.label.removesuffix(compiled("")) in (BF16, W8A16, W8A8):
                raise
            missing[job.label] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            runs.setdefault(job.label, {"peak_bytes": {}}).update(returned)
            ready.append(job)
        print(f"  {job.label}: {missing.get(job.label, 'ready')}", file=sys.stderr, flush=True)
    return ready


def _race(jobs: list[Job], part: Part, runs: dict[str, Any]) -> None:
    """Time them in turns. Adds to `runs` the seconds per prompt or token of each round, and the peak memory."""
    steps = max(1, part.tokens - 1)
    for job in jobs:
        runs[job.label][part.key] = []
    for round_ in range(ROUNDS + 1):
        for job in jobs:
            seconds = getattr(job.worker(bench_worker.time_round, part.ids, part.tokens), part.key)
            if round_:  # the first warms up
                runs[job.label][part.key].append(seconds / steps)
    for job in jobs:
        run = runs[job.label]
        run["peak_bytes"][part.key] = job.worker(bench_worker.peak_memory)
        milliseconds = statistics.median(run[part.key]) * 1e3
        print(f"  {job.label}, {part.key}: {milliseconds:.2f} ms", file=sys.stderr, flush=True)


# -- in a runtime's process -----------------------------------------------------------------------------------------


def start(runtime: str, name: str, ids: list[int], device: str) -> dict[str, Any]:
    """Make the model of this process and run it. Returns: the bytes that a token reads, and the layers' error."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name].make(), dtype=torch.bfloat16).eval()
    fed = [run_by_layers(model, of) for of in (ids, ids[:1])]
    read = None
    if runtime in (W8A16, W8A8):
        octavo.quantize(model, "w8a16" if runtime == W8A16 else "w8a8", include=["Embedding", "OutputHead"])
    elif runtime == GPT_FAST:
        use_gpt_fast(model)
    elif runtime == TORCHAO:
        from torchao import quantization

        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if runtime in (BF16, W8A16, W8A8):  # the others' are w8a16's
        read = _read_by_a_token(model)
    bench_worker.hold(model)
    error = max(
        layer_error(run_by_layers(model, of, given), given) for of, given in zip((ids, ids[:1]), fed, strict=True)
    )
    del fed
    _forget_peak(device)
    return {"token_bytes": read, "error": error}


def compile_whole(part: Part) -> dict[str, Any]:
    """Compile decode, or prefill alone. Returns: the seconds that it took."""
    decoding = part.key == "decode_s"
    seconds = bench_worker.compile_model(part.ids, part.tokens if decoding else 0)
    _forget_peak(bench_worker.held().device.type)
    return {f"compile_{part.key}": seconds}


def _read_by_a_token(model: Any) -> int:
    """Bytes of weights; of a mixture's experts, only those that one token is routed to."""
    config = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    experts = sum(
        tensor.nbytes
        for module in model.modules()
        if type(module).__name__ in ("MixtralExperts", "QuantExperts")
        for tensor in (*module.parameters(), *module.buffers())
    )
    return round(bench_worker.bytes_per_token(model) - experts * (1 - share))


def _forget_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for name, one in found.items():
        right = {label: run for label, run in one["runtimes"].items() if _error(one, label) < _wrong(one, label)}
        for several, key, show in (
            (MODELS[name].decode, "decode_s", lambda seconds: f"{1 / seconds:.1f} tokens/s"),
            (MODELS[name].prefill, "first_token_s", lambda seconds: f"{seconds * 1e3:.1f} ms"),
        ):
            seconds = {label: statistics.median(run[key]) for label, run in right.items() if key in run}
            rows += [(name, *goals.row(goal, seconds, show)) for goal in several]
        for goal in MODELS[name].memory:
            peaks = _peaks({label: run for label, run in right.items() if label in (goal.ours, *goal.rivals)})
            rows.append((name, *goals.row(goal, peaks, lambda peak: human_bytes(int(peak)))))
    return [
        Table("Models: what must be reached", ("model", *goals.COLUMNS), tuple(rows), "llllrrrrl"),
        *(_runtimes(name, one) for name, one in found.items()),
    ]


def _error(one: dict[str, Any], label: str) -> float:
    """The layers' error. For a compiled runtime, that of the same model run eagerly."""
    return float(one["runtimes"][label.removesuffix(compiled(""))]["error"])


def _wrong(one: dict[str, Any], label: str) -> float:
    return WRONG[_error_of(one)][label.startswith(W8A8)]


def _error_of(one: dict[str, Any]) -> str:
    return str(one.get("error_of", "logits"))


def _peaks(runs: dict[str, Any]) -> dict[str, float]:
    """Bytes of a prefill if all ran one, else of decoding: who only decodes holds no activations of a prompt."""
    for part in ("first_token_s", "decode_s"):
        if all(part in run["peak_bytes"] for run in runs.values()):
            return {label: float(run["peak_bytes"][part]) for label, run in runs.items()}
    return {}


def _runtimes(name: str, one: dict[str, Any]) -> Table:
    runs, speed = one["runtimes"], one["memory_bytes_per_s"]
    rows = []
    for label, run in runs.items():
        plain = label.removesuffix(compiled(""))
        bf16 = runs[label.replace(plain, BF16)]
        bytes_read = runs[plain]["token_bytes"] or runs[W8A16]["token_bytes"]
        compile_s = [seconds for key, seconds in run.items() if key.startswith("compile_")]
        row = [label, "-", "-", "-", "-"]
        if "first_token_s" in run:
            prefill = statistics.median(run["first_token_s"])
            row[1] = f"{prefill * 1e3:.1f} ms ({statistics.median(bf16['first_token_s']) / prefill:.2f}x)"
        if "decode_s" in run:
            decode = statistics.median(run["decode_s"])
            row[2] = f"{1 / decode:.1f} ({statistics.median(bf16['decode_s']) / decode:.2f}x)"
            row[3] = f"{human_bytes(int(bytes_read / decode))}/s"
            row[4] = human_percent(bytes_read / decode / speed)
        peaks = _peaks({label: run, label.replace(plain, BF16): bf16})
        peak = f"{human_bytes(int(peaks[label]))} ({peaks[label] / peaks[label.replace(plain, BF16)]:.2f}x)"
        compiling = f"{sum(compile_s):.0f} s" if compile_s else "-"
        rows.append((*row, peak, compiling, f"{_error(one, label):.3f}"))
    rows += [(label, why, *("-" for _ in range(6))) for label, why in one["missing"].items()]
    columns = (
        "runtime", "prefill", "decode, tokens/s", "weights read", "of a copy's speed", "peak memory", "compile time",
        f"error of the {_error_of(one)}",
    )  # fmt: skip
    title = (
        f"{name}: prefill of {MODELS[name].prompt} tokens, decode of {DECODED}, batch 1; medians of {ROUNDS} rounds; "
        f"in brackets: next to bf16. A copy on the GPU: {human_bytes(int(speed))}/s, read and written"
    )
    return Table(title, columns, tuple(rows), "lrrrrrrr")
