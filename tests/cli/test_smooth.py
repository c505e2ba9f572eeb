"""`octavo smooth` writes a float checkpoint that transformers loads, and that computes what the source computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

Run = Callable[..., Any]

SMALL = ("--samples", 4, "--seq-len", 32)


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(48).unsqueeze(0)).logits


@pytest.mark.parametrize("alpha", ["auto", "0.5"])
def test_the_smoothed_model_computes_the_same(alpha: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    data = run("smooth", tiny, tmp_path / "out", "--alpha", alpha, *SMALL, "--json").data
    # Powers of two are exact in bf16: not a bit is another.
    assert torch.equal(logits(tmp_path / "out"), logits(tiny))
    folded = [pair for pair in data["smoothing"]["pairs"] if pair["reason"] is None]
    assert {pair["source"] for pair in folded} >= {"model.layers.0.input_layernorm", "model.layers.1.mlp.up_proj"}
    if alpha == "0.5":
        assert {pair["alpha"] for pair in folded} == {0.5}
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny, tmp_path / "out")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before), "weights did change"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_people_see_the_pairs_and_a_plot(run: Run, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "ranges.png"
    shown = run("smooth", tiny, tmp_path / "out", *SMALL, "--plot", plot)
    assert shown.code == 0 and shown.err == ""
    assert "model.layers.*.mlp.up_proj  x2" in shown.out and "SQNR before" in shown.out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_statistics_made_before_give_the_same_model(run: Run, tiny: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    assert run("calibrate", tiny, *SMALL, "-o", stats).code == 0
    assert run("smooth", tiny, tmp_path / "a", "--calibration", stats).code == 0
    assert run("smooth", tiny, tmp_path / "b", *SMALL).code == 0
    a, b = (folder / "model.safetensors" for folder in (tmp_path / "a", tmp_path / "b"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("options", [("--samples", 4), ("--seq-len", 32)], ids=str)
def test_how_much_of_statistics_means_nothing(options: tuple[Any, ...], run: Run, tiny: Path, tmp_path: Path) -> None:
    shown = run("smooth", tiny, tmp_path / "out", "--calibration", "stats.safetensors", *options)
    assert shown.code == 1 and f"{options[0]} says how much" in shown.err and list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_and_errors_leave_nothing(
    run: Run, tiny: Path, tiny_int8: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    shown = run("smooth", tiny, tiny)
    assert shown.code == 1 and "already exists" in shown.err
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before
    shown = run("smooth", tiny_int8, tmp_path / "out")
    assert shown.code == 1 and "is quantized already" in shown.err and list(tmp_path.iterdir()) == []
    (tmp_path / "stats.safetensors").write_bytes(b"no")
    shown = run("smooth", tiny, tmp_path / "out", "--calibration", tmp_path / "stats.safetensors")
    assert shown.code == 1 and "cannot be read as calibration statistics" in shown.err
