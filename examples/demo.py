"""A real language model to int8, end to end: quantize, judge against the original, save, load back, let it write.

    python examples/demo.py        (or `make demo`, which does all set-up)

Each step is the `octavo` command that a user would type, run in this process; the table at the end is made of what
the steps measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from models import smollm2_checkpoint

from octavo import cli
from octavo.cli.text import sample_text
from octavo.tables import Table, human_bytes

WORK = Path(".demo")
TOKENS = "8192"
PROMPT = "Explain in one paragraph why the sky is blue."
CALIBRATION = WORK / "calibration.txt"
"""A part of the text that is not judged on."""
VARIANTS = {
    "int8 linears": [],
    "int8 linears, embedding and head": ["--include", "Embedding"],
    "int8 linears, activations and attention": [
        "--scheme", "w8a8", "--smooth", "auto", "--calibration", str(CALIBRATION), "--samples", "32",
        "--attention", "int8",
    ],
}  # fmt: skip


def main() -> int:
    source = smollm2_checkpoint(WORK)
    text = sample_text()
    CALIBRATION.write_text(text[len(text) // 2 :], encoding="utf-8")
    results: dict[str, dict[str, Any]] = {}
    for name, options in VARIANTS.items():
        out = WORK / f"SmolLM2-135M-Instruct-{name.replace(' ', '-').replace(',', '')}"
        shutil.rmtree(out, ignore_errors=True)
        run("quantize", str(source), str(out), *options)
        judged = run_json("eval", str(out), "--baseline", str(source), "--tokens", TOKENS)
        print(
            f"perplexity {judged['perplexity']:.3f}, the original's is {judged['baseline_perplexity']:.3f}; "
            f"KL {judged['comparison']['kl']:.4f} nats; {judged['comparison']['top1']:.1%} of next tokens the same"
        )
        timed = run_json(
            "bench", str(out), "--baseline", str(source), "--prompt-tokens", "256", "--new-tokens", "32",
            "--repeats", "3",
        )  # fmt: skip
        results[name] = {"folder": out, "speed": timed["models"], **judged}
    for name, result in results.items():
        print(f"\n{name} writes:\n")
        run("generate", str(result["folder"]), "--prompt", PROMPT, "--max-new-tokens", "80")
    print(f"\n{summary(source, results)}")
    return 0


def run(*command: str) -> None:
    """Type a command, as it were: show it, run it, and stop the demo where it fails."""
    print(f"\n$ octavo {' '.join(command)}\n", flush=True)
    if cli.main(list(command)) != 0:
        sys.exit(f"the demo stops: octavo {command[0]} failed, see above")


def run_json(*command: str) -> dict[str, Any]:
    """The same, for the command's result as a program gets it."""
    print(f"\n$ octavo {' '.join(command)}\n", flush=True)
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        failed = cli.main([*command, "--json"])
    if failed:
        sys.exit(f"the demo stops: octavo {command[0]} failed, see above")
    result: dict[str, Any] = json.loads(captured.getvalue())
    return result


def summary(source: Path, results: dict[str, dict[str, Any]]) -> Table:
    """A row for the original and for each int8 checkpoint: size, accuracy, speed."""
    original = weight_bytes(source)
    baseline = next(iter(results.values()))["baseline_perplexity"]
    rows = [("original, bf16", human_bytes(original), f"{baseline:.3f}", "", "", "", "")]
    for name, result in results.items():
        size = weight_bytes(result["folder"])
        agreement = result["comparison"]["top1"]
        rows.append(
            (
                name,
                human_bytes(size),
                f"{result['perplexity']:.3f}",
                f"{size / original:.2f} x the size, {result['ratio'] - 1:+.2%} perplexity",
                f"{agreement:.1%}",
                *(times_as_fast(result["speed"], phase) for phase in ("prefill", "decode")),
            )
        )
    title = f"SmolLM2-135M-Instruct on {TOKENS} tokens of {next(iter(results.values()))['text']}"
    columns = ("model", "size", "perplexity", "vs original", "same next token", "prefill", "decode")
    return Table(title, columns, tuple(rows), "lrrlrrr")


def times_as_fast(models: list[dict[str, Any]], phase: str) -> str:
    """The int8 model's speed next to the original's, which took turns with it."""
    int8, original = (model[f"{phase}_tokens_per_s"] for model in models)
    return f"{int8 / original:.2f} x as fast"


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
