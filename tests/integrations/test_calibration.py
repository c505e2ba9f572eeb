"""Text becomes batches of the right tokens, spread over all of it; int8 models are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo import CalibrateError, QuantizeError
from octavo.integrations.calibration import (
    LinearInputs,
    document_batches,
    linear_inputs,
    load_float,
    save_float,
    text_batches,
)
from octavo.integrations.language_model import positions_of
from tests.tiny_checkpoints import byte_level_tokenizer, language_model

TEXT = "In the beginning was the word, and the word was long. " * 100


def test_windows_are_spread_over_the_text() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer(TEXT).input_ids
    batches = text_batches(tokenizer, TEXT, samples=5, seq_len=16)
    whole = len(ids) // 16
    starts = [16 * (i * whole // 5) for i in range(5)]
    assert [batch.tolist() for batch in batches] == [[ids[start : start + 16]] for start in starts]
    assert starts[0] == 0 and starts[-1] > 0.7 * len(ids)
    assert all(batch.dtype == torch.int64 for batch in batches)


def test_a_short_text_gives_what_it_has() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer(TEXT).input_ids
    assert len(text_batches(tokenizer, TEXT, samples=10**6, seq_len=16)) == len(ids) // 16
    (batch,) = text_batches(tokenizer, "word", samples=4, seq_len=512)
    assert batch.tolist() == [tokenizer("word").input_ids]
    with pytest.raises(CalibrateError, match="no tokens"):
        text_batches(tokenizer, "", samples=4, seq_len=16)


def test_nothing_but_first_tokens_is_no_calibration() -> None:
    """What follows no other token is not like the others; one such document among more is a document."""
    tokenizer = byte_level_tokenizer()
    with pytest.raises(CalibrateError, match="the calibration text is one token, expected text like"):
        text_batches(tokenizer, "!", samples=4, seq_len=16)
    with pytest.raises(CalibrateError, match="no calibration document has more than one token, expected"):
        document_batches(tokenizer, ["!", "?"], samples=4, seq_len=16)
    batches = document_batches(tokenizer, ["!", "a word"], samples=4, seq_len=16)
    assert [len(batch[0]) for batch in batches] == [1, len(tokenizer("a word").input_ids)]


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    for batch in text_batches(byte_level_tokenizer(bos=True), TEXT, samples=5, seq_len=16):
        assert batch.shape == (1, 16) and batch[0].tolist().count(0) == 1 and batch[0, 0] == 0


def test_documents_are_cut_and_chats_go_through_the_template() -> None:
    tokenizer = byte_level_tokenizer(chat=True)
    chat = [{"role": "user", "content": "Hello"}]
    batches = document_batches(tokenizer, ["One text.", "skipped", chat, "skipped"], samples=2, seq_len=8)
    said = tokenizer("<s>user: Hello\nassistant:").input_ids
    assert [batch[0].tolist() for batch in batches] == [tokenizer("One text.").input_ids[:8], said[:8]]


@pytest.mark.parametrize(
    ("documents", "words"),
    [([], "no documents"), ([""], "has no tokens"), ([[{"role": "user", "content": "x"}]], "no chat template")],
    ids=["none", "empty", "chat"],
)
def test_documents_that_cannot_be_used(documents: list, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(CalibrateError, match=words):
        document_batches(byte_level_tokenizer(), documents, samples=2, seq_len=8)


def test_a_float_model_is_loaded_in_its_own_dtype_and_an_int8_one_refused(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "float")
    model, _ = load_float(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training
    assert positions_of(model) == 256
    octavo.quantize_checkpoint(folder, tmp_path / "int8", "w8a16")
    with pytest.raises(QuantizeError, match="is quantized already"):
        load_float(tmp_path / "int8")


def test_a_float_model_is_written_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    model, tokenizer = load_float(language_model(tmp_path / "float"))
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setattr(logging.hf_hub_utils, "enable_progress_bars", lambda: None)  # the tests forbid the Hub's own
    capfd.readouterr()
    save_float(model, tokenizer, tmp_path / "again")
    assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled()
    before, after = (folder / "model.safetensors" for folder in (tmp_path / "float", tmp_path / "again"))
    assert before.read_bytes() == after.read_bytes()


def test_inputs_are_counted_by_kind() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    stats = octavo.calibrate(model, [torch.randn(16, 8)])
    overrides = {"1": octavo.Scheme("w8a8"), "2": octavo.Scheme("w8a16")}
    octavo.quantize(model, "w8a8-static", stats=stats, ignore=["3"], overrides=overrides)
    assert linear_inputs(model) == LinearInputs(static=1, dynamic=1, float=1)
