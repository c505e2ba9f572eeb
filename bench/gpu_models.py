"""Language models of random weights on a GPU: octavo's int8 next to bf16, gpt-fast's formulas and torchao.

Each runtime has a process, and makes the same bf16 model there. First all run eagerly, in turns; then each is compiled
whole, with a static cache (`octavo.integrations.compiled`), and they take turns again.
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
`torch.compile` with a static cache and CUDA graphs, all in the same way. Prefill is the time from the prompt to the
first token, decode greedy, at batch 1. Error: of the logits after the prompt, against the bf16 model's, as a share of
their norm.
"""
NEW, ROUNDS = 32, 3
WRONG = 0.3
"""Error of the logits, as a share of their norm, from which on a runtime computes something else."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A shape and what is measured of it. at_once: how many processes may hold the bf16 model besides their own.

    gpt-fast gathers the experts of each token of the prompt, so that the prompt of a mixture is short.
    """

    make: Callable[[], Any]
    prompt: int
    runtimes: tuple[str, ...]
    at_once: int
    decode: tuple[Goal, ...]
    prefill: tuple[Goal, ...] = ()


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
        3,
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
    ),
    MIXTRAL: Model(
        lambda: transformers.MixtralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2,
        ),
        8,
        (BF16, W8A16, GPT_FAST),
        1,
        (
            Goal("decode, w8a16 compiled", compiled(W8A16), (compiled(BF16),), 1.6),
            Goal("decode, w8a16 compiled", compiled(W8A16), (compiled(GPT_FAST),), 1.2),
        ),
    ),
}  # fmt: skip


def measure(name: str) -> Iterator[dict[str, Any]]:
    """Of the model of that name: first what was measured of it eagerly, then all. Raises: as `need_gpu`."""
    need_gpu()
    for found in _compare(name, MODELS[name], "cuda"):
        yield {name: found}


def _compare(name: str, model: Model, device: str) -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    ids = [chance.randrange(model.make().vocab_size) for _ in range(model.prompt)]
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    passes: list[float] = []
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(own_process())
        stream(bench_worker.open_stream, device, None)
        workers = {runtime: stack.enter_context(own_process()) for runtime in model.runtimes}
        calls: dict[str, tuple[Any, ...]] = {runtime: (start, runtime, name, ids, device) for runtime in workers}
        _phase(workers, calls, model, ids, found, missing)
        passes += [stream(bench_worker.stream_bytes_per_s) for _ in range(ROUNDS)]
        expected = found[BF16]["logits"]
        for one in found.values():
            one["error"] = _relative_error(one.pop("logits"), expected)
        yield {"runtimes": found, "missing": missing, "memory_bytes_per_s": statistics.median(passes)}
        workers = {compiled(runtime): worker for runtime, worker in workers.items() if runtime in found}
        _phase(workers, dict.fromkeys(workers, (compile_whole, ids)), model, ids, found, missing)
        passes += [stream(bench_worker.stream_bytes_per_s) for _ in range(ROUNDS)]
        yield {"runtimes": found, "missing": missing, "memory_bytes_per_s": statistics.median(passes)}


def _relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def _phase(
    workers: dict[str, Worker],
    calls: dict[str, tuple[Any, ...]],
    model: Model,
    ids: list[int],
    found: dict[str, Any],
    missing: dict[str, str],
) -> None:
    """Make the workers ready by their calls, and time them in turns. Adds to `found`, or to `missing` why not."""
    with ThreadPoolExecutor(model.at_once) as pool:
        ready = {label: pool.submit(worker, *calls[label]) for label, worker in workers.items()}
    racing = {}
    for label, future in ready.items():
        try:
            found[label] = {**future.result(), "first_token_s": [], "decode_s": []}
            racing[label] = workers[label]
        except Exception as error:
            if label.removesuffix(compiled("")) in (BF16, W8A16, W8A8):
                raise
            missing[label] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"  {label}: {missing.get(label, 'ready')}", file=sys.stderr, flush=True)
    for round_ in range(ROUNDS + 1):
        for label, worker in racing.items():
            one = worker(bench_worker.time_round, ids, NEW)
            if round_:  # the first warms up
                found[label]["first_token_s"].append(one.first_token_s)
                found[label]["decode_s"].append(one.decode_s / (NEW - 1))
    for label, worker in racing.items():
        one = found[label]
        one["peak_bytes"] = worker(bench_worker.peak_memory)
        prefill, decode = (statistics.median(one[key]) for key in ("first_token_s", "decode_s"))
        print(f"  {label}: {prefill * 1e3:.1f} ms, {1 / decode:.1f} tokens/s", file=sys.stderr, flush=True)


# -- in a runtime's process -----------------------------------------------------------------------------------------


def start(runtime: str, name: str, ids: list[int], device: str) -> dict[str, Any]:
    """Make the model of this process and run it once. Returns: what a token reads, and the logits after the prompt."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name].make(), dtype=torch.bfloat16).eval()
    read = None
    if runtime in (W8A16, W8A8):
        octavo.quantize(model, "w8a16" if runtime == W8A16 else "w8a8", include=["OutputHead"])
    elif runtime == GPT_FAST:
        use_gpt_fast(model)
    elif runtime == TORCHAO:
        from torchao import quantization

        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if runtime in (BF16, W8A16, W8A8):  # the others' are w8a16's
        read = _read_by_a_token(model)
    bench_worker.hold(model)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=device), logits_to_keep=1).logits[0, -1].float().cpu()
    _forget_peak(device)
    return {"token_bytes": read, "logits": logits}


def compile_whole(ids: list[int]) -> dict[str, Any]:
    """Returns: the seconds that compiling took."""
    seconds = bench_worker.compile_model(ids, NEW)
    _forget_peak(bench_worker.held().device.type)
    return {"token_bytes": None, "compile_s": seconds}


def _read_by_a_token(model: Any) -> int:
    """Bytes; of the experts in a mixture, those that one token is routed to."""
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
        right = {label: run for label, run in one["runtimes"].items() if _error(one, label) < WRONG}
        for several, key, show in (
            (MODELS[name].decode, "decode_s", lambda seconds: f"{1 / seconds:.1f} tokens/s"),
            (MODELS[name].prefill, "first_token_s", lambda seconds: f"{seconds * 1e3:.1f} ms"),
        ):
            seconds = {label: statistics.median(run[key]) for label, run in right.items()}
            rows += [(name, *goals.row(goal, seconds, show)) for goal in several]
    return [
        Table("Models: what must be reached", ("model", *goals.COLUMNS), tuple(rows), "llllrrrrl"),
        *(_runtimes(name, one) for name, one in found.items()),
    ]


def _error(one: dict[str, Any], label: str) -> float:
    """Of a compiled runtime: of the same model, run eagerly."""
    return float(one["runtimes"][label.removesuffix(compiled(""))]["error"])


def _runtimes(name: str, one: dict[str, Any]) -> Table:
    runs, speed = one["runtimes"], one["memory_bytes_per_s"]
    rows = []
    for label, run in runs.items():
        plain = label.removesuffix(compiled(""))
        baseline = runs[label.replace(plain, BF16)]
        bytes_read = runs[plain]["token_bytes"] or runs[W8A16]["token_bytes"]
        prefill, decode = statistics.median(run["first_token_s"]), statistics.median(run["decode_s"])
        ratios = (
            statistics.median(baseline["first_token_s"]) / prefill,
            statistics.median(baseline["decode_s"]) / decode,
        )
        rows.append(
            (
                label,
                f"{prefill * 1e3:.1f} ms ({ratios[0]:.2f}x)",
                f"{1 / decode:.1f} ({ratios[1]:.2f}x)",
                f"{human_bytes(int(bytes_read / decode))}/s",
                human_percent(bytes_read / decode / speed),
                f"{human_bytes(run['peak_bytes'])} ({run['peak_bytes'] / baseline['peak_bytes']:.2f}x)",
                "-" if run.get("compile_s") is None else f"{run['compile_s']:.0f} s",
                f"{_error(one, label):.3f}",
            )
        )
    rows += [(label, why, *("-" for _ in range(6))) for label, why in one["missing"].items()]
    columns = (
        "runtime", "prefill", "decode, tokens/s", "weights read", "of a copy's speed", "peak memory", "compile time",
        "error of the logits",
    )  # fmt: skip
    title = (
        f"{name}: {MODELS[name].prompt} tokens in, {NEW} out, batch 1; medians of {ROUNDS} rounds; in brackets: next "
        f"to bf16. A copy on the GPU: {human_bytes(int(speed))}/s, read and written"
    )
    return Table(title, columns, tuple(rows), "lrrrrrrr")
