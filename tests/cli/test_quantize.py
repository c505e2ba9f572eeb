"""`octavo quantize` writes what `octavo.quantize_checkpoint` writes, and says what it did."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from octavo.cli.text import sample_text
from octavo.integrations.calibration import load_float, text_batches
from tests.tiny_models import bert, build, t5

Run = Callable[..., Any]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_the_library_s(run: Run, tiny: Path, tmp_path: Path) -> None:
    data = run("quantize", tiny, tmp_path / "cli", "--ignore", "re:.*down_proj", "--group-size", 16, "--json").data
    report = octavo.quantize_checkpoint(tiny, tmp_path / "api", "w8a16", ignore=["re:.*down_proj"], group_size=16)
    assert files(tmp_path / "cli") == files(tmp_path / "api")
    assert data["coverage"] == json.loads(report.to_json())
    assert data["scheme"] == "w8a16 g16" and data["seconds"] > 0


def test_people_see_the_families_the_sizes_and_what_to_do_next(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "with a blank"
    shown = run("quantize", tiny, out)
    assert shown.code == 0 and shown.err == ""
    assert "model.layers.*.mlp.down_proj.weight  x2" in shown.out and "opt-in: include 'Embedding'" in shown.out
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    before = sum(path.stat().st_size for path in tiny.glob("*.safetensors"))
    (after,) = (line for line in shown.out.splitlines() if line.startswith("after"))
    percent = float(after.split(",")[1].split("%")[0])
    # Of the files, headers are a part; the difference is smaller than a tenth of a model that is this small.
    assert percent == pytest.approx(100 * weights / before, rel=0.1)
    assert f"octavo eval '{out}' --baseline {tiny}" in shown.out


@pytest.mark.parametrize("make", [bert, t5])
def test_the_next_steps_of_a_model_that_writes_no_text_are_others(
    make: Callable[[], Any], run: Run, tmp_path: Path
) -> None:
    build(make).save_pretrained(tmp_path / "float")
    out = tmp_path / "in t8"
    shown = run("quantize", tmp_path / "float", out)
    assert shown.code == 0 and "octavo eval" not in shown.out and "octavo generate" not in shown.out
    (command,) = (line.partition("octavo inspect ")[2] for line in shown.out.splitlines() if "octavo inspect" in line)
    assert shlex.split(command) == [str(out)] and run("inspect", out).code == 0


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_recipe_file(suffix: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / f"recipe{suffix}"
    recipe.write_text(json.dumps({"scheme": {"weight": {"granularity": "per_group", "group_size": 32}}}))
    data = run("quantize", tiny, tmp_path / "out", "--recipe", recipe, "--ignore", "re:.*mlp", "--json").data
    rows = data["coverage"]["rows"]
    assert {row["scheme"] for row in rows if "self_attn" in row["name"]} == {"w8a16 g32"}
    assert {row["reason"] for row in rows if ".mlp." in row["name"]} == {"ignored by 're:.*mlp'"}


@pytest.mark.parametrize("value", ["null", "3"])
def test_a_list_in_a_recipe_file_that_is_none(value: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: w8a16\nignore: {value}\n")
    shown = run("quantize", tiny, tmp_path / "out", "--recipe", recipe)
    got = {"null": "None"}.get(value, value)
    assert shown.code == 1
    assert shown.err == f"error: {recipe}: ignore is {got}, expected a list of patterns; write [] for none\n"


def test_max_shard_size_cuts_shards(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny, tmp_path / "out", "--max-shard-size", "20KB").code == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ignore", "nothing.here"], "'nothing.here' matches no layer"),
        (["--group-size", "7"], "group_size=7 does not divide"),
        (["--recipe", "nowhere.json"], "nowhere.json"),
        (["--recipe", "x.json", "--scheme", "w8a16"], "--scheme and --recipe are both given"),
        (["--recipe", "x.json", "--group-size", "8"], "--group-size and --recipe are both given"),
        (["--max-shard-size", "much"], "max_shard_size is 'much'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_leave_nothing_behind(options: list[str], words: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    shown = run("quantize", tiny, tmp_path / "out", *options)
    assert shown.code == 1 and shown.out == ""
    assert words in shown.err and shown.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_patterns_stand_before_the_paths_and_several_times(run: Run, tiny: Path, tmp_path: Path) -> None:
    ignore = ("--ignore", "re:.*mlp", "--ignore", "re:.*q_proj", "--include", "Embedding")
    for out, args in (("before", (*ignore, tiny, tmp_path / "before")), ("after", (tiny, tmp_path / "after", *ignore))):
        rows = run("quantize", *args, "--json").data["coverage"]["rows"]
        reasons = {row["name"]: row["reason"] for row in rows if row["scheme"] is None and len(row["shape"]) == 2}
        assert set(reasons.values()) == {"ignored by 're:.*mlp'", "ignored by 're:.*q_proj'"}, out


@pytest.mark.parametrize("kind", ["Conv2d", "Experts"])
def test_a_kind_that_the_model_lacks_is_not_what_was_meant(kind: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    shown = run("quantize", tiny, tmp_path / "out", "--ignore", kind)
    assert shown.code == 1 and f"{kind!r} matches no layer of this model." in shown.err
    assert "a kind of layer that it has (Embedding, Linear, OutputHead" in shown.err
    assert "did you mean 'Linear'?" in run("quantize", tiny, tmp_path / "out", "--ignore", "Linar").err


SMALL = ("--samples", 4, "--seq-len", 32)


def by_hand(folder: Path, scheme: str, alpha: Any, **options: Any) -> tuple[Any, octavo.SmoothReport]:
    """The model that the command should make, and what smoothing did."""
    model, tokenizer = load_float(folder)
    stats = octavo.calibrate(model, text_batches(tokenizer, sample_text(), samples=4, seq_len=32))
    report = octavo.smooth(model, stats, alpha, scheme=scheme)
    octavo.quantize(model, scheme, stats=stats, **options)
    return model, report


def test_static_and_smooth_in_one_command(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = run("quantize", tiny, out, "--scheme", "w8a8-static", "--smooth", "auto", *SMALL, "--json").data
    model, report = by_hand(tiny, "w8a8-static", "auto")
    assert data["smoothing"] == json.loads(report.to_json())
    assert data["coverage"] == json.loads(octavo.coverage(model).to_json())
    assert data["linear_inputs"] == {"static": 14, "dynamic": 0, "float": 0}
    ids = torch.arange(48).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(octavo.load(out)(ids).logits, model(ids).logits)


def test_smoothing_alone_and_statistics_made_before(run: Run, tiny: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    assert run("calibrate", tiny, *SMALL, "-o", stats).code == 0
    options = ("--scheme", "w8a8", "--smooth", 0.5, "--calibration", stats)
    data = run("quantize", tiny, tmp_path / "out", *options, "--json").data
    assert data["smoothing"] == json.loads(by_hand(tiny, "w8a8", 0.5)[1].to_json()) and "linear_inputs" not in data


def test_people_see_the_smoothing_and_the_static_inputs(run: Run, tiny: Path, tmp_path: Path) -> None:
    options = ("--scheme", "w8a8-static", "--smooth", "auto", "--observer", "percentile", "--no-repair")
    shown = run("quantize", tiny, tmp_path / "out", *options, *SMALL)
    assert shown.code == 0 and shown.err == ""
    coverage, smoothing, inputs = map(shown.out.index, ("Coverage", "Smoothing", "14 static, 0 dynamic, 0 float"))
    assert coverage < smoothing < inputs


@pytest.mark.parametrize("options", [("w8a8",), ("w8a8-static", *SMALL)], ids=["files", "model"])
def test_attention_in_int8(options: tuple[Any, ...], run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", tiny, out, "--attention", "int8", "--scheme", *options).code == 0
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["attention"] == "int8"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "x.txt"], "--calibration has no effect"),
        (["--samples", "4"], "--samples has no effect"),
        (["--seq-len", "4"], "--seq-len has no effect"),
        (["--device", "cpu"], "--device has no effect"),
        (["--scheme", "w8a8", "--smooth", "auto", "--observer", "mse"], "--observer has no effect"),
        (["--scheme", "w8a8", "--smooth", "auto", "--no-repair"], "--no-repair has no effect"),
        (["--smooth", "auto"], "--smooth is for int8 inputs, and scheme w8a16 has none"),
        (["--scheme", "w8a8-static", "--observer", "median"], "observer is 'median'"),
        (["--scheme", "w8a8-static", "--calibration", "nowhere.txt"], "nowhere.txt: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_mean_nothing_are_refused(
    options: list[str], words: str, run: Run, tiny: Path, tmp_path: Path
) -> None:
    shown = run("quantize", tiny, tmp_path / "out", *options)
    assert shown.code == 1 and shown.out == "" and words in shown.err and list(tmp_path.iterdir()) == []


def test_a_static_scheme_refuses_what_it_cannot_use_before_it_works(
    run: Run, tiny: Path, tiny_int8: Path, tmp_path: Path
) -> None:
    shown = run("quantize", tiny, tiny_int8, "--scheme", "w8a8-static", *SMALL)
    assert shown.code == 1 and "already exists" in shown.err
    shown = run("quantize", tiny_int8, tmp_path / "out", "--scheme", "w8a8-static", *SMALL)
    assert shown.code == 1 and "is quantized already" in shown.err and list(tmp_path.iterdir()) == []


def test_an_int8_source_and_a_folder_that_exists_are_refused(
    run: Run, tiny: Path, tiny_int8: Path, tmp_path: Path
) -> None:
    shown = run("quantize", tiny_int8, tmp_path / "out")
    assert shown.code == 1 and "already quantized" in shown.err
    before = files(tiny_int8)
    shown = run("quantize", tiny, tiny_int8)
    assert shown.code == 1 and str(tiny_int8) in shown.err
    assert files(tiny_int8) == before
