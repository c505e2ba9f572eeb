"""`octavo eval` measures what float64 arithmetic on transformers' own logits measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from octavo.cli.text import sample_text

Run = Callable[..., Any]


def expected_perplexity(folder: Path, tokens: int, window: int) -> float:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(sample_text()).input_ids[:tokens]
    losses = []
    for start in range(0, tokens - 1, window):
        piece = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            logits = model(piece.unsqueeze(0)).logits[0].double()
        losses.append(F.cross_entropy(logits[:-1], piece[1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


def test_perplexity_of_a_float_model(run: Run, tiny: Path) -> None:
    data = run("eval", tiny, "--tokens", 200, "--window", 64, "--json").data
    # The command runs the model in bf16, as it is stored.
    assert data["perplexity"] == pytest.approx(expected_perplexity(tiny, 200, 64), rel=2e-2)
    assert data["tokens"] == 200 and "pydoc_data.topics" in data["text"] and "baseline" not in data


def test_a_model_against_itself_costs_nothing(run: Run, tiny: Path) -> None:
    data = run("eval", tiny, "--baseline", tiny, "--tokens", 129, "--window", 64, "--json").data
    comparison = data["comparison"]
    assert data["ratio"] == 1 and comparison["kl"] == 0 and comparison["top1"] == 1
    assert comparison["sqnr_db"] is None and comparison["cosine_min"] == pytest.approx(1)
    # 129 tokens are two windows: the last token alone predicts nothing.
    assert (comparison["batches"], comparison["positions"]) == (2, 128)


def test_int8_against_float(run: Run, tiny: Path, tiny_int8: Path) -> None:
    data = run("eval", tiny_int8, "--baseline", tiny, "--tokens", 128, "--window", 64, "--json").data
    assert data["ratio"] == pytest.approx(data["perplexity"] / data["baseline_perplexity"])
    assert 0 < data["comparison"]["kl"] < 0.01 and data["comparison"]["sqnr_db"] > 20
    assert len(data["comparison"]["layers"]) == 14


def test_what_an_int8_cache_costs(run: Run, tiny: Path) -> None:
    """Next to the same model with a cache of its own."""
    options = ("--baseline", tiny, "--tokens", 128, "--window", 64, "--json")
    data = run("eval", tiny, *options, "--cache", "int8").data
    assert data["cache"] == "int8" and run("eval", tiny, *options).data["perplexity"] == data["baseline_perplexity"]
    assert 0 < data["comparison"]["kl"] < 0.01 and data["perplexity"] != data["baseline_perplexity"]


def test_people_see_the_change_and_the_worst_five(run: Run, tiny: Path, tiny_int8: Path) -> None:
    shown = run("eval", tiny_int8, "--baseline", tiny, "--tokens", 64, "--window", 32)
    assert shown.code == 0 and shown.err == ""
    lines = shown.out.splitlines()
    assert "64 tokens of Python" in lines[0] and "windows of 32" in lines[0]
    (line,) = (line for line in lines if line.startswith(str(tiny_int8)))
    assert line.endswith("%")
    assert "KL(float || int8)" in shown.out and "top-1 agreement" in shown.out
    assert "The 5 layers of lowest SQNR, of 14" in shown.out


def test_models_are_called_what_they_are(run: Run, tiny: Path, tiny_int8: Path) -> None:
    few = ("--tokens", 8)
    for path, baseline, words in (
        (tiny_int8, tiny, ("\nint8 against float (", "\nKL(float || int8) ")),
        (tiny, tiny_int8, ("\nfloat against int8 (", "\nKL(int8 || float) ")),
        (tiny, tiny, ("\nmodel against baseline (", "\nKL(baseline || model) ")),
        (tiny_int8, tiny_int8, ("\nmodel against baseline (", "\nKL(baseline || model) ")),
    ):
        out = run("eval", path, "--baseline", baseline, *few).out
        assert all(word in out for word in words)


def test_a_text_of_one_s_own(run: Run, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and again. " * 4)
    data = run("eval", tiny, "--text", text, "--json").data
    assert data["text"] == str(text) and 2 < data["tokens"] < 300


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe\x00", "is not UTF-8"), (b"", "has 0 tokens"), (None, "No such file")],
    ids=["bytes", "empty", "missing"],
)
def test_a_text_that_is_none(content: bytes | None, words: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    shown = run("eval", tiny, "--text", text)
    assert shown.code == 1 and shown.out == "" and words in shown.err and str(text) in shown.err


@pytest.mark.parametrize("option", ["--window", "--tokens"])
def test_one_token_is_refused_before_a_model_is_loaded(option: str, run: Run, tmp_path: Path) -> None:
    shown = run("eval", tmp_path / "no model", option, 1)
    assert shown.code == 1 and f"{option} is 1, expected at least 2" in shown.err


def test_a_device_that_is_not_there(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = run("eval", tiny, "--device", "cuda")
    assert shown.code == 1 and "--device is cuda" in shown.err


def test_a_window_that_the_model_does_not_hold(run: Run, tiny: Path) -> None:
    """256 tokens: what is beyond, it was never trained on, and where positions are a table, it does not exist."""
    assert run("eval", tiny, "--tokens", 300, "--json").data["window"] == 256
    shown = run("eval", tiny, "--window", 257)
    assert shown.code == 1 and f"--window is 257, and {tiny} holds 256 tokens" in shown.err


def test_a_baseline_that_holds_fewer_tokens_decides_the_window(run: Run, tiny: Path, tmp_path: Path) -> None:
    """Its positions are a table: there are no others."""
    import transformers

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}
    config = transformers.GPT2Config(vocab_size=400, bos_token_id=0, eos_token_id=1, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    argv = ("eval", tiny, "--baseline", tmp_path / "gpt2", "--tokens", 100)
    data = run(*argv, "--json").data
    assert data["window"] == 48 and data["comparison"]["batches"] == 3
    shown = run(*argv, "--window", 49)
    assert shown.code == 1 and f"--window is 49, and {tmp_path / 'gpt2'} holds 48 tokens" in shown.err
