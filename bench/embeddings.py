"""Sentence embeddings in float and in int8."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from bench.record import Skipped
from examples.models import minilm_folder
from octavo.cli.text import sample_text
from octavo.tables import Table, human_percent

TITLE = "all-MiniLM-L6-v2: sentence embeddings"
HOW = """
w8a16 of an fp32 encoder. Embeddings of all sentences of Python's documentation: the mean over the tokens of the last
hidden state, scaled to length 1, as the model's authors do. Cosine of the float and the int8 embedding of each
sentence, and how often the nearest of the other sentences stays the same.
"""
SCHEMES: dict[str, dict[str, Any]] = {
    "w8a16": {},
    "w8a16, groups of 128": {"group_size": 128},
    "w8a16, groups of 128, embeddings too": {"group_size": 128, "include": ["Embedding"]},
}
BATCH = 25


def measure() -> dict[str, Any]:
    try:
        folder = minilm_folder()
    except FileNotFoundError as reason:
        raise Skipped(str(reason)) from reason
    texts = sentences(sample_text())
    return {name: compare_embeddings(folder, texts, options) for name, options in SCHEMES.items()}


def sentences(text: str) -> list[str]:
    """The sentences of `text` that are of ordinary length and hold no code, each once."""
    return list(dict.fromkeys(re.findall(r"(?<=[.?!] )[A-Z][a-z][^.?!:`]{40,240}[.?!](?=\s)", text)))


def compare_embeddings(folder: Path, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Cosines of the float and the int8 embeddings of `texts`, and how many nearest neighbours stay.

    options: for `octavo.quantize`.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    float_model = AutoModel.from_pretrained(folder).eval()
    model = copy.deepcopy(float_model)
    report = octavo.quantize(model, "w8a16", **options)
    f, q = embed(float_model, tokenizer, texts), embed(model, tokenizer, texts)
    cosines = F.cosine_similarity(f.double(), q.double())
    return {
        "sentences": len(texts),
        "int8_layers": sum(1 for row in report.rows if row.scheme),
        "quantized_fraction": report.quantized_fraction,
        "bytes_after": report.bytes_after / report.bytes_before,
        "below_0.999": int((cosines < 0.999).sum()),
        "cosine_min": cosines.min().item(),
        "cosine_mean": cosines.mean().item(),
        "same_neighbour": (_nearest(f) == _nearest(q)).double().mean().item(),
    }


def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embeddings fp32 [len(texts), width], of length 1."""
    pieces = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pieces.append(F.normalize((hidden * mask).sum(1) / mask.sum(1)))
    return torch.cat(pieces)


def tables(found: dict[str, Any]) -> list[Table]:
    rows = tuple(
        (
            name,
            str(one["int8_layers"]),
            f"{one['bytes_after']:.3f}",
            f"{one['cosine_min']:.6f}",
            f"{one['cosine_mean']:.6f}",
            str(one["below_0.999"]),
            human_percent(one["same_neighbour"]),
        )
        for name, one in found.items()
    )
    columns = (
        "scheme", "int8 layers", "bytes of fp32", "cosine, lowest", "cosine, mean", "sentences below 0.999",
        "same nearest sentence",
    )  # fmt: skip
    count = next(iter(found.values()))["sentences"]
    return [Table(f"{count} sentences", columns, rows, "lrrrrrr")]


def _nearest(embeddings: Tensor) -> Tensor:
    similar = embeddings @ embeddings.T
    return similar.fill_diagonal_(-1).argmax(1)
