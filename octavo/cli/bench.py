"""`octavo bench PATH`: a language model's speed and memory, next to the original's. (`--ops` is `bench_ops.py`.)

Each model runs in a process of its own (`bench_worker.py`). The two take turns, round after round: prefill and decode
of one, then of the other. So other load on the machine slows both alike. The medians over the rounds are reported.

    prefill           tokens of the prompt / time to the first token
    decode            tokens after the first / their time; batch 1, greedy, with a KV cache
    weights read      bytes of weights that one token reads x tokens decoded per second. A token reads all weights, but
                      only one row of an embedding table that serves lookups alone. The KV cache is not counted
    of memory's speed weights read / the machine's memory bandwidth (`memory.py`), which a third process measures in
                      the same rounds

With --compile both models run as `CompiledModel`: a static KV cache, prefill and decode compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeVar

from octavo.cli import bench_ops
from octavo.cli.bench_ops import SHAPES, SIZES
from octavo.cli.machine import machine_line
from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import CommandError, Verbs, a_path, add_cache, add_device, cache_of, device_of, new_verb, positive
from octavo.tables import Table, human_bytes, human_percent

if TYPE_CHECKING:
    from octavo.cli.bench_worker import Loaded, Round

__all__ = ["Measured", "add_parser", "run", "settled"]

T = TypeVar("T")


def add_parser(verbs: Verbs) -> None:
    """`octavo bench`."""
    parser = new_verb(
        verbs, "bench", "time a language model next to the original, or the ops on this machine",
        "octavo bench smollm2-int8 --baseline HuggingFaceTB/SmolLM2-135M-Instruct --threads 2\n"
        "  octavo bench smollm2-int8 --compile", run,
    )  # fmt: skip
    parser.add_argument(
        "--threads", metavar="N", type=positive, help="threads of torch, up to one a core (default: as torch decides)"
    )
    add_device(parser)
    models = parser.add_argument_group("a model: speed and memory")
    models.add_argument(
        "path", metavar="PATH", type=a_path, nargs="?", help="checkpoint folder, Hub id or .gguf file; int8 or float"
    )
    models.add_argument("--baseline", metavar="PATH", type=a_path, help="the original, timed in the same run")
    models.add_argument("--prompt-tokens", metavar="N", type=positive, help="tokens in the prompt (default 512)")
    models.add_argument("--new-tokens", metavar="N", type=positive, help="tokens to decode (default 64)")
    models.add_argument("--repeats", metavar="N", type=positive, help="rounds for each model (default 5)")
    models.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="compile both models first (torch.compile), which takes minutes",
    )
    add_cache(models)
    ops = parser.add_argument_group("the ops on this machine; takes 4 GB of memory")
    ops.add_argument("--ops", action="store_true", help="time int8 linear layers next to bf16 ones; no PATH")
    ops.add_argument(
        "--shapes",
        metavar="NxK",
        type=shape,
        nargs="+",
        help=f"shapes of weights (default {' '.join(map(_by, SHAPES))})",
    )
    ops.add_argument(
        "--rows", metavar="M", type=positive, nargs="+", help=f"rows of input (default {' '.join(map(str, SIZES))})"
    )


MODEL_OPTIONS = {
    "path": None, "baseline": None, "prompt_tokens": 512, "new_tokens": 64, "repeats": 5, "compile": False,
    "cache": None,
}  # fmt: skip
OPS_OPTIONS = {"shapes": list(SHAPES), "rows": list(SIZES)}
"""Options of the one and of the other, and their defaults."""


def shape(text: str) -> tuple[int, int]:
    """An argument such as 4096x11008: two whole numbers of at least 1."""
    N, K = map(positive, text.split("x"))
    return N, K


shape.__name__ = "shape of a weight (NxK, such as 4096x4096)"  # argparse says: invalid shape of a weight ... value: '0'


def _by(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the defaults filled in.

    Raises: CommandError for options of a model together with options of --ops, and for more threads than cores.
    """
    if not args.ops and args.path is None:
        raise CommandError("what to time? expected the PATH of a model, or --ops for the ops on this machine")
    given = {name for name in (*MODEL_OPTIONS, *OPS_OPTIONS) if getattr(args, name) is not None}
    stray = sorted(given & set(MODEL_OPTIONS if args.ops else OPS_OPTIONS))
    if stray:
        name = "PATH" if stray[0] == "path" else f"--{stray[0].replace('_', '-')}"
        raise CommandError(
            f"{name} is of {'a model' if args.ops else 'the ops'}, and {'--ops' if args.ops else f'PATH {args.path}'} "
            "was given; time the two in two commands"
        )
    cores = os.cpu_count()
    if args.threads is not None and cores is not None and args.threads > cores:
        raise CommandError(f"--threads is {args.threads}, expected at most {cores}, one for each core of this machine")
    defaults = {**MODEL_OPTIONS, **OPS_OPTIONS}
    return argparse.Namespace(**{**vars(args), **{name: defaults[name] for name in defaults if name not in given}})


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model and its rounds. The properties are medians.

    compile_s: seconds that compiling took; None if the model was not compiled.
    memory_bytes_per_s: memory bandwidth in these rounds.
    """

    path: str
    loaded: Loaded
    rounds: tuple[Round, ...]
    peak_bytes: int
    prompt_tokens: int
    new_tokens: int
    memory_bytes_per_s: float
    compile_s: float | None = None

    @property
    def first_token_s(self) -> float:
        """Seconds from the prompt to the first token."""
        return statistics.median(one.first_token_s for one in self.rounds)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.first_token_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first per second; None if only one was asked for."""
        if self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / statistics.median(one.decode_s for one in self.rounds)

    @property
    def weight_bytes_per_s(self) -> float | None:
        """Bytes of weights read per second of decode; None if unknown."""
        if self.loaded.token_bytes is None or self.decode_tokens_per_s is None:
            return None
        return self.loaded.token_bytes * self.decode_tokens_per_s

    @property
    def of_memory_speed(self) -> float | None:
        """Fraction of the memory bandwidth at which decode reads weights."""
        return None if self.weight_bytes_per_s is None else self.weight_bytes_per_s / self.memory_bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """The medians, and every round."""
        loaded = dataclasses.asdict(self.loaded)
        loaded.pop("machine")
        return {
            "path": self.path,
            "load_s": loaded.pop("seconds"),
            "compile_s": self.compile_s,
            **loaded,
            "peak_bytes": self.peak_bytes,
            "first_token_s": self.first_token_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "weight_bytes_per_s": self.weight_bytes_per_s,
            "of_memory_speed": self.of_memory_speed,
            "rounds": [dataclasses.asdict(one) for one in self.rounds],
        }


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Time the models in turns, or the ops."""
    args = settled(args)
    if args.ops:
        return bench_ops.run(args, terminal)
    cache, device = cache_of(args), device_of(args)
    paths = [args.path] if args.baseline is None else [args.path, args.baseline]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker(path, args.debug)) for path in paths]
        caches = (cache, "float" if args.compile else None)
        loaded = [_load(terminal, *each, device, args) for each in zip(workers, paths, caches, strict=False)]
        ids = _prompt(args, loaded)
        compile_s = [_compile(terminal, worker, path, ids, args) for worker, path in zip(workers, paths, strict=True)]
        from octavo.cli import bench_worker

        stream = stack.enter_context(_worker("the speed of memory", args.debug))
        stream(bench_worker.open_stream, device, args.threads)
        with terminal.progress("timing") as progress:
            steps = (args.repeats + 1) * len(workers)
            agreement, rounds, memory = _measure(workers, stream, ids, args, lambda done: progress(done, steps))
        peaks = [worker(bench_worker.peak_memory) for worker in workers]
    measured = [
        Measured(path, *facts, args.prompt_tokens, args.new_tokens, memory, seconds)
        for path, facts, seconds in zip(paths, zip(loaded, rounds, peaks, strict=True), compile_s, strict=True)
    ]
    machine = loaded[0].machine
    return Answer(
        {
            "machine": machine,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
            "compiled": args.compile,
            "memory_bytes_per_s": memory,
            "models": [one.to_dict() for one in measured],
            "top1_agreement": agreement,
        },
        (_table(measured, args), _notes(measured, agreement, machine)),
    )


# -- the processes --------------------------------------------------------------------------------------------------


Worker = Callable[..., Any]
"""Called with a function of `bench_worker` and its arguments, which then runs in the model's process."""


@contextlib.contextmanager
def _worker(path: str, debug: bool) -> Iterator[Worker]:
    from octavo.cli import bench_worker

    # Spawned, not forked: the memory of a copy of this process would be counted as the model's.
    context = multiprocessing.get_context("spawn")
    started: list[BaseProcess] = []
    with ProcessPoolExecutor(1, mp_context=context, initializer=bench_worker.prepare, initargs=(debug,)) as pool:

        def call(function: Callable[..., T], *args: Any) -> T:
            try:
                with _interrupts_held_back():  # the first call starts the process, which unblocks them in `prepare`
                    future = pool.submit(function, *args)
                    started[:] = multiprocessing.active_children()
                return future.result()
            except BrokenProcessPool as error:
                pool.shutdown()  # which waits for the process's exit code
                if any(process.exitcode == -signal.SIGINT for process in started):
                    raise KeyboardInterrupt from error  # the interrupt went to every process; this one's is yet to come
                raise CommandError(
                    f"{path}: the process that ran this model was ended from outside, for lack of memory perhaps; "
                    "free some, or time the models one by one"
                ) from error

        yield call


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """While open, this process gets no interrupts, and one started inside gets none until it unblocks them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load(
    terminal: Terminal, worker: Worker, path: str, cache: str | None, device: str, args: argparse.Namespace
) -> Loaded:
    from octavo.cli import bench_worker

    with terminal.progress(f"loading {path}"):
        loaded: Loaded = worker(bench_worker.load, path, device, args.threads, cache)
    needed = args.prompt_tokens + args.new_tokens
    if loaded.positions is not None and needed > loaded.positions:
        raise CommandError(
            f"--prompt-tokens and --new-tokens make {needed}, and {path} holds {loaded.positions} tokens; ask for fewer"
        )
    return loaded


def _compile(terminal: Terminal, worker: Worker, path: str, ids: list[int], args: argparse.Namespace) -> float | None:
    """Compile the model. Returns: the seconds that it took, or None if models are not to be compiled."""
    if not args.compile:
        return None
    from octavo.cli import bench_worker

    with terminal.progress(f"compiling {path}"):
        return float(worker(bench_worker.compile_model, ids, args.new_tokens))


def _prompt(args: argparse.Namespace, loaded: list[Loaded]) -> list[int]:
    """Random tokens: speed does not depend on their meaning."""
    vocabulary = min(one.vocabulary for one in loaded)
    chance = random.Random(0)
    return [chance.randrange(vocabulary) for _ in range(args.prompt_tokens)]


def _measure(
    workers: list[Worker], stream: Worker, ids: list[int], args: argparse.Namespace, progress: Callable[[int], None]
) -> tuple[float | None, list[tuple[Round, ...]], float]:
    """Returns: the share of the prompt's positions on which both models choose the same token (top-1 agreement, see
    `octavo.evaluate`), each model's rounds, and the memory bandwidth in bytes per second."""
    from octavo.cli import bench_worker

    done = 0
    chosen = [worker(bench_worker.predictions, ids) for worker in workers]
    rounds: list[list[Round]] = [[] for _ in workers]
    passes = []
    for repeat in range(args.repeats + 1):
        for worker, kept in zip(workers, rounds, strict=True):
            one = worker(bench_worker.time_round, ids, args.new_tokens)
            if repeat:  # the first is to warm up
                kept.append(one)
            done += 1
            progress(done)
        passes.append(stream(bench_worker.stream_bytes_per_s))
    agreement = None
    if len(chosen) == 2:
        agreement = sum(a == b for a, b in zip(*chosen, strict=True)) / len(ids)
    return agreement, [tuple(kept) for kept in rounds], statistics.median(passes)


# -- for people -----------------------------------------------------------------------------------------------------


def _table(measured: list[Measured], args: argparse.Namespace) -> Table:
    rows: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("weights in memory", [one.loaded.weight_bytes for one in measured], lambda value: human_bytes(int(value))),
        ("peak memory", [one.peak_bytes for one in measured], lambda value: human_bytes(int(value))),
        ("load time", [one.loaded.seconds for one in measured], "{:.2f} s".format),
        *([("compile time", [one.compile_s for one in measured], "{:.1f} s".format)] if args.compile else []),
        ("time to first token", [one.first_token_s * 1e3 for one in measured], "{:.1f} ms".format),
        ("prefill", [one.prefill_tokens_per_s for one in measured], "{:.1f} tokens/s".format),
        ("decode", [one.decode_tokens_per_s for one in measured], "{:.1f} tokens/s".format),
        (
            "weights read in decode",
            [one.weight_bytes_per_s for one in measured],
            lambda value: f"{human_bytes(int(value))}/s",
        ),
        ("of memory's speed", [one.of_memory_speed for one in measured], human_percent),
    ]
    compiled = ", compiled" if args.compile else ""
    title = (
        f"{args.prompt_tokens} tokens in, {args.new_tokens} out, batch 1{compiled}; medians of {args.repeats} rounds"
    )
    columns = ("", *(one.path for one in measured), *(["ratio"] if len(measured) == 2 else []))
    cells = tuple((name, *_cells(values, write)) for name, values, write in rows)
    return Table(title, columns, cells, "l" + "r" * (len(columns) - 1))


def _cells(values: list[float | None], write: Callable[[float], str]) -> list[str]:
    cells = ["-" if value is None else write(value) for value in values]
    if len(values) == 2:
        model, baseline = values
        cells.append(f"{model / baseline:.2f}x" if model is not None and baseline else "-")
    return cells


def _notes(measured: list[Measured], agreement: float | None, machine: dict[str, Any]) -> str:
    lines = []
    if agreement is not None:
        lines.append(f"Top-1 agreement of the two on the prompt: {human_percent(agreement)} of the positions.")
    lines += [f"octavo ops of {one.path} served by: {_served(one)}" for one in measured if one.loaded.served_by]
    if not any(one.loaded.served_by for one in measured):
        lines.append("octavo ops served by: none, no layer is int8")
    lines.append(
        "Weights read: bytes that a token needs (of an embedding table, one row) x decode's tokens/s"
        + ("." if all(one.loaded.token_bytes for one in measured) else "; not known for a mixture of experts.")
    )
    lines += [f"{one.path} keeps keys and values in int8." for one in measured if one.loaded.cache == "int8"]
    device, speed = measured[0].loaded.device, human_bytes(int(measured[0].memory_bytes_per_s))
    way = "a copy on the GPU, read and written" if device == "cuda" else "torch.sum over a GiB"
    lines.append(f"The memory's speed, measured in the same rounds: {speed}/s ({way}).")
    if any(one.compile_s is not None for one in measured):
        lines.append("Both run with a static KV cache; peak memory is with the compiler's.")
    lines.append(machine_line(machine))
    return "\n".join(lines)


def _served(one: Measured) -> str:
    return f"{', '.join(one.loaded.served_by)}, on {one.loaded.device}"
