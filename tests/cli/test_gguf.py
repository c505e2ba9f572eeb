"""The verbs on .gguf files, which transformers reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.errors import CheckpointError
from octavo.integrations import hub

Run = Callable[..., Any]


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["people", "json"])
def test_no_bars_where_there_is_no_terminal(options: list[str], run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    for verb in (
        ["quantize", tiny_gguf, tmp_path / "files"],
        ["quantize", tiny_gguf, tmp_path / "model", "--scheme", "w8a8-static", "--samples", 1, "--seq-len", 8],
        ["eval", tiny_gguf, "--tokens", 32],
    ):
        shown = run(*verb, *options)
        assert shown.code == 0 and shown.err == ""


def test_the_bar_is_there_again_for_who_loads_in_python(tiny_gguf: Path, tmp_path: Path, capsys: Any) -> None:
    octavo.quantize_checkpoint(tiny_gguf, tmp_path / "out", "w8a16")
    assert capsys.readouterr().err == ""
    octavo.load(tiny_gguf)
    assert "GGUF" in capsys.readouterr().err


def test_arguments_are_checked_before_the_work(
    run: Run, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_load_gguf", lambda *_, **__: pytest.fail("the model is loaded"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    before = sorted(tmp_path.iterdir())
    assert "already exists" in run("quantize", tiny_gguf, tmp_path / "there").err
    for more in ([], ["--scheme", "w8a8-static"]):
        shown = run("quantize", tiny_gguf, tmp_path / "out", "--max-shard-size", "much", *more)
        assert shown.code == 1 and "max_shard_size is 'much'" in shown.err
    monkeypatch.setattr(hub, "load_tokenizer", no_tokenizer)
    assert "has no tokenizer" in run("quantize", tiny_gguf, tmp_path / "out").err
    assert sorted(tmp_path.iterdir()) == before


def no_tokenizer(path: Path) -> None:
    raise CheckpointError(f"{path}: has no tokenizer")


@pytest.mark.parametrize("length", [0, 3, 20, 500, 40_000])
def test_a_truncated_file_is_named(length: int, run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    """In the magic number, the header, the tokenizer and the weights."""
    file = tmp_path / "short.gguf"
    file.write_bytes(tiny_gguf.read_bytes()[:length])
    for verb in (["quantize", file, tmp_path / "out"], ["generate", file, "--prompt", "x"]):
        shown = run(*verb)
        assert shown.code == 1 and shown.err.startswith(f"error: {file}: transformers") and "truncated" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["short.gguf"]


EVERY_VERB = (["quantize", "SRC", "out"], ["inspect", "SRC"], ["generate", "SRC", "--prompt", "x"], ["eval", "SRC"])


@pytest.mark.parametrize("verb", EVERY_VERB, ids=lambda verb: verb[0])
def test_a_folder_with_one_and_a_name_in_capitals(
    verb: list[str], run: Run, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    capitals = tmp_path / "MODEL.GGUF"
    shutil.copy(tiny_gguf, capitals)
    for source, words in (
        (tiny_gguf.parent, f"for a .gguf file give its own path, such as {tiny_gguf}"),
        (capitals, "rename it to MODEL.gguf"),
    ):
        shown = run(*(str(source) if word == "SRC" else word for word in verb))
        assert shown.code == 1 and shown.err.startswith(f"error: {source}: ") and words in shown.err


def test_a_folder_whose_name_ends_as_the_file_s_does(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert run("quantize", tiny, out).code == 0
    for verb in (["eval", out, "--tokens", 32], ["generate", out, "--prompt", "x", "--max-new-tokens", 2]):
        assert run(*verb).code == 0
