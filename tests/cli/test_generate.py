"""`octavo generate` writes what transformers' own generate writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import octavo
from octavo.integrations.hub import load_tokenizer
from tests.tiny_checkpoints import language_model

Run = Callable[..., Any]


def test_a_token_that_the_model_lacks(run: Run, tiny: Path, tmp_path: Path) -> None:
    """Of a tokenizer with tokens that were added: only who uses them is told."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    text.write_text("a word and <new> one. " * 20)
    words = "error: the text has token 400, and the model has 400 (0 to 399); its tokenizer is another model's"
    for verb in (
        ["generate", folder, "--prompt", "a <new> one"],
        ["eval", folder, "--text", text],
        ["calibrate", folder, "--text", text, "-o", tmp_path / "stats.safetensors"],
    ):
        shown = run(*verb)
        assert shown.code == 1 and shown.err.startswith(words)
    assert run("generate", folder, "--prompt", "a word", "--max-new-tokens", 1).code == 0


PROMPT = "The names in Python"


@pytest.fixture(scope="module")
def continuation(tiny: Path) -> str:
    """The first 12 tokens that follow the prompt, by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=1)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_text_is_on_stdout_and_the_statistics_are_beside_it(run: Run, tiny: Path, continuation: str) -> None:
    shown = run("generate", tiny, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert shown.code == 0
    assert shown.out == continuation + "\n"
    assert shown.err.count("\n") == 1 and "tokens/s" in shown.err


def test_json_holds_the_text_and_the_statistics(run: Run, tiny: Path, continuation: str) -> None:
    shown = run("generate", tiny, "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    data = shown.data
    assert shown.err == "" and data["text"] == continuation
    assert 1 <= data["new_tokens"] <= 12 and data["first_token_s"] > 0
    assert data["tokens_per_s"] == pytest.approx((data["new_tokens"] - 1) / data["decode_s"])


def test_a_seed_makes_sampling_repeatable(run: Run, tiny: Path) -> None:
    argv = ("generate", tiny, "--prompt", PROMPT, "--max-new-tokens", 8, "--temperature", 2, "--json", "--seed")
    assert run(*argv, 1).data["text"] == run(*argv, 1).data["text"] != run(*argv, 2).data["text"]


def test_int8_generates_too(run: Run, tiny_int8: Path) -> None:
    assert run("generate", tiny_int8, "--prompt", PROMPT, "--max-new-tokens", 3, "--json").data["new_tokens"] >= 1


def test_compiled_text_is_the_same(run: Run, tiny: Path, continuation: str, compiled_eagerly: None) -> None:
    argv = ("generate", tiny, "--prompt", PROMPT, "--max-new-tokens", 12, "--compile")
    shown = run(*argv)
    assert shown.code == 0 and shown.out == continuation + "\n"
    assert "[compiled in " in shown.err and "[peak memory " in shown.err
    data = run(*argv, "--json").data
    assert data["text"] == continuation and data["compile_s"] > 0 and data["peak_bytes"] > 50e6
    assert 0 < data["first_token_s"] < data["compile_s"]
    # 60 thousand parameters in bf16, and what is left out is of a table that is the head too: nothing.
    parameters = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(tiny).parameters())
    assert data["weight_bytes_per_s"] == pytest.approx(2 * parameters * data["tokens_per_s"])
    assert data["of_memory_speed"] == pytest.approx(data["weight_bytes_per_s"] / data["memory_bytes_per_s"])


def test_an_int8_cache_writes_what_it_writes_in_python(run: Run, tiny_int8: Path) -> None:
    from octavo.integrations.int8_cache import Int8Cache
    from octavo.integrations.language_model import cache_name, load_language_model

    model, tokenizer = load_language_model(tiny_int8)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    cache = {str(cache_name(model)): Int8Cache(model.config)}
    ids = model.generate(**inputs, **cache, max_new_tokens=12, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    argv = ("generate", tiny_int8, "--prompt", PROMPT, "--max-new-tokens", 12, "--cache", "int8")
    data = run(*argv, "--json").data
    assert data["text"] == expected and data["cache"] == "int8"
    assert run(*argv[:-2], "--json").data["cache"] == "float"
    shown = run(*argv, "--compile")
    assert shown.code == 1 and "--compile keeps a static float cache, and --cache is int8" in shown.err


@pytest.mark.usefixtures("compiled_eagerly")
def test_the_cache_of_attention_in_int8_is_int8_unless_asked_otherwise(run: Run, tiny: Path, tmp_path: Path) -> None:
    octavo.quantize_checkpoint(tiny, tmp_path / "int8", "w8a16", attention="int8")
    argv = ("generate", tmp_path / "int8", "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    data, asked = run(*argv).data, run(*argv, "--cache", "float").data
    assert (data["cache"], asked["cache"]) == ("int8", "float") and data["text"] == asked["text"]
    assert run(*argv, "--compile").data["cache"] == "float"


@pytest.mark.parametrize("template", ["one\n{% if %}", "{{ raise_exception('line 2 of it') }}"])
def test_a_broken_chat_template_is_told_and_can_be_gone_without(template: str, run: Run, tmp_path: Path) -> None:
    model = language_model(tmp_path / "chat", chat=True)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    argv = ("generate", model, "--prompt", "word", "--max-new-tokens", 2)
    shown = run(*argv)
    assert shown.code == 1 and shown.err.startswith("error: the tokenizer's chat template cannot be used: ")
    assert "line 2" in shown.err and "--raw" in shown.err and "did not expect" not in shown.err
    assert run(*argv, "--raw").code == 0


def test_more_tokens_than_the_model_holds(run: Run, tiny: Path) -> None:
    written = run("generate", tiny, "--raw", "--prompt", "word " * 60, "--json").data
    assert written["prompt_tokens"] + written["new_tokens"] <= 256
    shown = run("generate", tiny, "--raw", "--prompt", "word", "--max-new-tokens", 300)
    assert shown.code == 1 and "the model holds 256 tokens" in shown.err
    shown = run("generate", tiny, "--raw", "--prompt", "word " * 300)
    assert shown.code == 1 and "shorten the prompt" in shown.err
