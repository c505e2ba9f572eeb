"""How the small Mixtral is made; what it is good for is in tests/real/test_mixtral.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import octavo
from examples import small_mixtral
from examples.small_mixtral import split, unigram

pytest.importorskip("transformers", reason="needs transformers: pip install 'octavo[hf]'")
TEXT = "".join(f"The {i}th of {i * i} lines, of which none is another.\n" for i in range(100))


def test_a_unigram_model_predicts_by_frequency() -> None:
    model = unigram(torch.tensor([0, 0, 1]), 4)
    # 1 and 3 come after the first token: (1 + 1) / (3 + 4) and (0 + 1) / (3 + 4).
    expected = math.exp(-(math.log(2 / 7) + math.log(1 / 7)) / 2)
    assert octavo.perplexity(model, torch.tensor([2, 1, 3])) == pytest.approx(expected, rel=1e-12)


def test_nothing_held_out_is_trained_on() -> None:
    training, held_out = split(TEXT)
    assert training + held_out == TEXT
    assert len(held_out) == pytest.approx(0.1 * len(TEXT), abs=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_mixtral, "STEPS", 3)
    monkeypatch.setattr(small_mixtral, "VOCABULARY", 300)
    monkeypatch.setitem(small_mixtral.SHAPE, "num_hidden_layers", 1)


@pytest.mark.usefixtures("quick")
def test_it_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small_mixtral.small_mixtral(tmp_path, TEXT)
    assert "trained now" in capsys.readouterr().err
    assert small_mixtral.small_mixtral(tmp_path, TEXT) == first
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == [first]
    other = small_mixtral.small_mixtral(tmp_path, TEXT + "More.")
    assert other != first


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    folders = [small_mixtral.small_mixtral(tmp_path / name, TEXT) for name in ("one", "two")]
    assert torch.equal(torch.get_rng_state(), state), "training is seeded by itself"
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("quick")
def test_its_tokenizer_gives_back_any_text(tmp_path: Path) -> None:
    _, tokenizer = small_mixtral.load_language_model(small_mixtral.small_mixtral(tmp_path, TEXT))
    for text in ("The 12th", " leading,  double\n\tblanks", "Gr\u00fc\u00dfe, \u4e16\u754c"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
