"""Language models: other kinds are refused, windows begin as the tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from octavo import CheckpointError
from octavo.integrations.language_model import load_causal, load_language_model, positions_of, token_ids
from tests.tiny_checkpoints import byte_level_tokenizer, language_model
from tests.tiny_models import bert, build, llava, t5, vit


@pytest.mark.parametrize("make", [bert, t5, vit])
def test_other_kinds_are_refused_before_their_weights_are_read(make: Callable[..., Any], tmp_path: Path) -> None:
    model = build(make)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"holds a {type(model).__name__}, expected a causal language model"):
        load_causal(tmp_path)


def test_a_source_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_language_model(folder)
    assert load_causal(folder).device.type == "cpu"


def test_a_file_of_weights_is_no_language_model(tmp_path: Path) -> None:
    file = language_model(tmp_path / "model") / "model.safetensors"
    with pytest.raises(CheckpointError, match=rf"^{file}: is a file of weights, .*; give {file.parent}$"):
        load_language_model(file)


def test_of_a_model_that_sees_too_the_part_that_reads_text_says_how_many_tokens_it_holds() -> None:
    model = build(llava)
    model.config.text_config.max_position_embeddings = 96
    assert positions_of(model) == 96


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


TEXT = "In the beginning was the word. " * 20


def test_without_bos_the_tokens_are_the_text_s(plain: PreTrainedTokenizerFast) -> None:
    ids = token_ids(plain, TEXT, limit=50, window=16)
    assert ids.dtype == torch.int64 and ids.tolist() == plain(TEXT).input_ids[:50]
    assert len(token_ids(plain, "word", limit=50, window=16)) == len(plain("word").input_ids)


def test_with_bos_every_window_begins_with_it(plain: PreTrainedTokenizerFast) -> None:
    ids = token_ids(byte_level_tokenizer(bos=True), TEXT, limit=50, window=16).tolist()
    assert len(ids) == 50
    windows = [ids[start : start + 16] for start in range(0, 50, 16)]
    assert [window[0] for window in windows] == [0] * 4
    # What is between them is the text, token by token.
    body = [token for window in windows for token in window[1:]]
    assert body == plain(TEXT).input_ids[: len(body)]
