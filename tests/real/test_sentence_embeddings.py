"""all-MiniLM-L6-v2 in int8: sentences stay where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.embeddings import compare_embeddings, sentences

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(text: str) -> list[str]:
    found = sentences(text)
    chosen = found[:: len(found) // 200][:200]
    assert len(set(chosen)) == 200
    return chosen


@pytest.mark.parametrize(
    ("options", "lowest"),
    [
        # One scale a row leaves about one sentence in 800 a little below 0.999 (0.9989 was seen).
        ({}, 0.9985),
        ({"group_size": 128}, 0.999),
        ({"group_size": 128, "include": ["Embedding"]}, 0.999),
    ],
    ids=str,
)
def test_embeddings_of_200_sentences(minilm: Path, texts: list[str], options: dict[str, Any], lowest: float) -> None:
    found = compare_embeddings(minilm, texts, options)
    assert found["int8_layers"] == 6 * 6 + 1 + (3 if "include" in options else 0)
    assert lowest <= found["cosine_min"] < 1
    assert found["below_0.999"] <= 2
    assert found["cosine_mean"] >= 0.9995
    assert found["same_neighbour"] >= 0.95
