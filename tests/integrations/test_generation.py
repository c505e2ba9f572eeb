"""What a model writes: chat templates are used, pieces add up, times are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from octavo.errors import OctavoError
from octavo.integrations.generation import generate
from octavo.integrations.language_model import load_language_model
from tests.tiny_checkpoints import byte_level_tokenizer, language_model


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


def prompt_tokens(folder: Path, **options: Any) -> int:
    model, tokenizer = load_language_model(folder)
    return generate(model, tokenizer, "Hello", max_new_tokens=1, **options).prompt_tokens


def test_the_chat_template_is_used_unless_raw(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    folder = language_model(tmp_path / "chat", chat=True)
    said = plain("<s>user: Hello\nassistant:").input_ids
    assert prompt_tokens(folder) == len(said)
    assert prompt_tokens(folder, raw=True) == len(plain("Hello").input_ids)
    assert prompt_tokens(language_model(tmp_path / "plain")) == len(plain("Hello").input_ids)


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    """As of a tokenizer that drops what it does not know."""
    model, tokenizer = load_language_model(language_model(tmp_path / "model"))
    with pytest.raises(OctavoError, match="the prompt has no tokens"):
        generate(model, tokenizer, "")


@pytest.mark.parametrize("temperature", [-1.0, 1e-300, float("inf"), float("nan")])
def test_temperatures_that_are_none(tmp_path: Path, temperature: float) -> None:
    model, tokenizer = load_language_model(language_model(tmp_path / "model"))
    with pytest.raises(OctavoError, match=f"^temperature is {temperature}, expected 0 for the likeliest"):
        generate(model, tokenizer, "Hello", temperature=temperature)


def test_the_least_temperature_draws_the_likeliest(tmp_path: Path) -> None:
    model, tokenizer = load_language_model(language_model(tmp_path / "model"))
    greedy, drawn = (generate(model, tokenizer, "Hello", max_new_tokens=5, temperature=t).text for t in (0, 1e-6))
    assert greedy == drawn


def test_pieces_add_up_and_times_are_told(tmp_path: Path) -> None:
    model, tokenizer = load_language_model(language_model(tmp_path / "model"))
    pieces: list[str] = []
    written = generate(model, tokenizer, "Hello", max_new_tokens=10, on_text=pieces.append)
    assert "".join(pieces) == written.text
    assert 1 <= written.new_tokens <= 10 and written.first_token_s > 0 and written.decode_s >= 0
    one = generate(model, tokenizer, "Hello", max_new_tokens=1)
    assert one.new_tokens == 1 and one.decode_s == 0 and one.tokens_per_s is None


def test_a_generation_config_that_asks_for_beams_writes_one_text(tmp_path: Path) -> None:
    model, tokenizer = load_language_model(language_model(tmp_path / "model"))
    expected = generate(model, tokenizer, "Hello", max_new_tokens=10).text
    model.generation_config.num_beams = model.generation_config.num_return_sequences = 2
    assert generate(model, tokenizer, "Hello", max_new_tokens=10).text == expected


def test_tokens_that_come_several_at_once_are_counted(tmp_path: Path) -> None:
    model, tokenizer = load_language_model(language_model(tmp_path / "model"))
    model.generation_config.eos_token_id = None
    model.generation_config.prompt_lookup_num_tokens = 3
    assert generate(model, tokenizer, "ab" * 20, max_new_tokens=30).new_tokens == 30
