"""Measure, and write bench/results/NAME.json and bench/RESULTS.md.

    python -m bench.run                     every benchmark
    python -m bench.run quantize vision     some of them
    python -m bench.run --page              only make the page anew
    python -m bench.run speed --on zen3     beside what was measured on another kind of machine, not in its place

Each benchmark runs in a process of its own, so that neither memory nor caches of one are the other's. OCTAVO_TEXT names
the text that language models are judged on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

from bench import (
    architectures,
    attention,
    audio,
    cache,
    convolutions,
    diffusion,
    embeddings,
    engines,
    experts,
    float_linear,
    gpu_layers,
    gpu_llama,
    gpu_mixtral,
    kernels,
    language,
    mixtral,
    quantize,
    recurrent,
    smoothquant,
    speed,
    vision,
)
from bench.record import FOLDER, Skipped, page, record

BENCHMARKS = {
    "language": language,
    "smoothquant": smoothquant,
    "mixtral": mixtral,
    "embeddings": embeddings,
    "vision": vision,
    "audio": audio,
    "architectures": architectures,
    "quantize": quantize,
    "kernels": kernels,
    "convolutions": convolutions,
    "diffusion": diffusion,
    "recurrent": recurrent,
    "attention": attention,
    "cache": cache,
    "experts": experts,
    "float_linear": float_linear,
    "speed": speed,
    "engines": engines,
    "gpu_layers": gpu_layers,
    "gpu_llama": gpu_llama,
    "gpu_mixtral": gpu_mixtral,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure octavo next to its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: one a core)")
    parser.add_argument("--on", metavar="KIND", help="a name for this kind of machine: results stand apart")
    parser.add_argument("--page", action="store_true", help="make bench/RESULTS.md from the results that are there")
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; valid: {', '.join(BENCHMARKS)}")
    context = multiprocessing.get_context("spawn")
    failed = []
    for name in [] if args.page else args.names or BENCHMARKS:
        process = context.Process(target=_measure, args=(name, args.threads, args.on))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(name)
    (FOLDER / "RESULTS.md").write_text(page(BENCHMARKS), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}; their results are as they were before", file=sys.stderr)
    return 1 if failed else 0


def _measure(name: str, threads: int, kind: str | None) -> None:
    import torch

    torch.set_num_threads(threads)
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        record(name, BENCHMARKS[name], _command(name, threads, kind), kind)
    except Skipped as reason:
        print(f"{name}: skipped, {reason}", file=sys.stderr)
    else:
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def _command(name: str, threads: int, kind: str | None) -> str:
    text = os.environ.get("OCTAVO_TEXT")
    prefix = f"OCTAVO_TEXT={Path(text).name} " if text and name in ("language", "smoothquant", "mixtral") else ""
    return f"{prefix}python -m bench.run {name} --threads {threads}{f' --on {kind}' if kind else ''}"


if __name__ == "__main__":
    sys.exit(main())
