"""A language model's perplexity in float and in int8, and the size of its checkpoint."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import octavo
from bench.record import Skipped
from examples.models import cache_folder, smollm2_checkpoint
from octavo.cli.text import sample_text
from octavo.integrations.language_model import load_causal, load_language_model, token_ids
from octavo.tables import Table, human_bytes, human_percent

TITLE = "SmolLM2-135M-Instruct: perplexity and size"
HOW = """
w8a16 of a bf16 checkpoint: every linear layer of the decoder in int8, one scale per output channel, no calibration.
Perplexity on real text, in windows of 512 tokens that do not overlap. The same two models are judged with their
activations in bf16, as they are used, and in fp32, where nothing but the int8 weights differs. KL and top-1 are of the
bf16 models, on the first tokens of the same text. The standard error of the change, from the windows' own changes, says
how much another text of this length could move it. Sizes are of the safetensors files.
"""
TOKENS = 196 * 512
COMPARED = 32 * 512
WINDOW = 512
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KNOWN_TEXTS = {"f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8": "WikiText-2, validation split"}
"""SHA-256 of a file -> what it is."""


def measure() -> dict[str, Any]:
    source, (text, about) = checkpoint(), known_text()
    model, tokenizer = load_language_model(source)
    ids = token_ids(tokenizer, text, limit=TOKENS, window=WINDOW)
    return {
        "text": about,
        "tokens": len(ids),
        "window": WINDOW,
        **judge(model, load_causal(source), ids, compared=COMPARED),
        "sizes": sizes(source),
    }


def judge(
    float_model: nn.Module, model: nn.Module, ids: Tensor, *, compared: int, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, Any]:
    """Quantize `model`, a copy of `float_model`, and compare the two on `ids` int64 [T].

    compared: on how many of the tokens KL and top-1 are measured; 0 for none. dtypes: of the activations.
    """
    report = octavo.quantize(model, "w8a16")
    found: dict[str, Any] = {"int8_layers": sum(1 for row in report.rows if row.scheme), "perplexity": {}}
    if compared:
        windows = [piece.unsqueeze(0) for piece in ids[:compared].split(WINDOW) if len(piece) > 1]
        comparison = octavo.compare(float_model, model, windows, layers=False)
        found |= {"compared": comparison.positions, "kl": comparison.kl, "top1": comparison.top1}
    for name, dtype in dtypes.items():
        f, q = losses(float_model.to(dtype), ids), losses(model.to(dtype), ids)
        found["perplexity"][name] = {
            "float": f.mean().exp().item(),
            "int8": q.mean().exp().item(),
            "change": (q - f).mean().expm1().item(),
            "standard_error": ((q - f).std() / len(f) ** 0.5).item(),
        }
    return found


def losses(model: Callable[..., Any], ids: Tensor, window: int = WINDOW) -> Tensor:
    """Mean negative log likelihood, in nats, of each whole window of `ids` int64 [T]: fp64 [T // window].

    The exponential of their mean is the perplexity; their spread tells how much of a change is chance.
    """
    windows = ids[: len(ids) // window * window].split(window)
    return torch.tensor([octavo.perplexity(model, one, window=window) for one in windows], dtype=torch.float64).log()


def sizes(source: Path) -> dict[str, int]:
    """Bytes of safetensors: of the checkpoint, of its int8 form, and with embedding and output head in int8 too."""
    with tempfile.TemporaryDirectory() as folder:
        default, everything = Path(folder, "default"), Path(folder, "everything")
        octavo.quantize_checkpoint(source, default, "w8a16")
        with warnings.catch_warnings():
            # That only octavo reads int8 embeddings is known here.
            warnings.simplefilter("ignore", octavo.OctavoWarning)
            octavo.quantize_checkpoint(source, everything, "w8a16", include=["Embedding", "OutputHead"])
        return {"bf16": _weights(source), "int8": _weights(default), "int8_with_embedding": _weights(everything)}


def tables(found: dict[str, Any]) -> list[Table]:
    rows = [
        (
            name,
            f"{pair['float']:.4f}",
            f"{pair['int8']:.4f}",
            f"{pair['change']:+.3%}",
            f"{pair['standard_error']:.3%}",
        )
        for name, pair in found["perplexity"].items()
    ]
    title = f"Perplexity on {found['tokens']} tokens of {found['text']}; {found['int8_layers']} layers in int8"
    columns = ("activations", "float weights", "int8 weights", "change", "standard error of it")
    before = found["sizes"]["bf16"]
    checkpoints = [
        ("bf16", "bf16"), ("w8a16", "int8"), ("w8a16, embedding and output head too", "int8_with_embedding")
    ]  # fmt: skip
    return [
        Table(title, columns, tuple(rows), "lrrrr"),
        Table(
            f"bf16 models on the first {found['compared']} tokens",
            ("measure", "value"),
            (
                ("KL(float || int8)", f"{found['kl']:.5f} nats"),
                ("top-1 agreement", human_percent(found["top1"])),
            ),
            "lr",
        ),
        Table(
            "Checkpoint",
            ("scheme", "safetensors", "of bf16"),
            tuple(
                (name, human_bytes(found["sizes"][key]), f"{found['sizes'][key] / before:.4f}")
                for name, key in checkpoints
            ),
            "lrr",
        ),
    ]


def checkpoint() -> Path:
    """SmolLM2-135M-Instruct in bf16. Raises Skipped where no source has it."""
    try:
        return smollm2_checkpoint(cache_folder())
    except FileNotFoundError as reason:
        raise Skipped(str(reason)) from reason


def known_text() -> tuple[str, str]:
    """The text to judge on, and what it is."""
    path = os.environ.get("OCTAVO_TEXT")
    if path is None:
        return sample_text(), "Python's documentation (pydoc_data.topics)"
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return data.decode("utf-8"), KNOWN_TEXTS.get(digest, f"{Path(path).name} (SHA-256 {digest[:12]})")


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
