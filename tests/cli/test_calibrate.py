"""`octavo calibrate` writes what `octavo.calibrate` finds, also when several processes share the work."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.calibration.calibrate import calibrate
from octavo.calibration.stats import Stats
from octavo.cli.text import sample_text
from octavo.errors import CalibrateError
from octavo.integrations.calibration import load_float, text_batches
from octavo.integrations.hub import load_tokenizer
from tests.tiny_checkpoints import byte_level_tokenizer, language_model
from tests.tiny_models import build, mixtral

Run = Callable[..., Any]

SMALL = ("--samples", 5, "--seq-len", 32)


def same(a: Stats, b: Stats) -> bool:
    return list(a.observers) == list(b.observers) and all(
        torch.equal(seen.amax, b.observers[name].amax)
        and torch.equal(seen.histogram, b.observers[name].histogram)
        and seen.tokens == b.observers[name].tokens
        for name, seen in a.observers.items()
    )


def test_the_file_is_the_library_s(run: Run, tiny: Path, tmp_path: Path) -> None:
    data = run("calibrate", tiny, *SMALL, "-o", tmp_path / "stats.safetensors", "--json").data
    model, tokenizer = load_float(tiny)
    expected = calibrate(model, text_batches(tokenizer, sample_text(), samples=5, seq_len=32))
    assert same(Stats.load(tmp_path / "stats.safetensors"), expected)
    assert (data["samples"], data["tokens"], data["unreached"]) == (5, 160, [])
    assert [layer["name"] for layer in data["layers"]] == list(expected.observers)
    for layer in data["layers"]:
        channels = expected.observers[layer["name"]].amax.double().numpy()
        assert layer["amax"] == channels.max() and layer["tokens"] == 160
        median = (sorted(channels)[len(channels) // 2 - 1] + sorted(channels)[len(channels) // 2]) / 2
        assert layer["median_channel_amax"] == pytest.approx(median)
        assert layer["ratio"] == pytest.approx(channels.max() / median)


def test_people_see_families(run: Run, tiny: Path, tmp_path: Path) -> None:
    shown = run("calibrate", tiny, *SMALL, "-o", tmp_path / "stats.safetensors")
    assert shown.code == 0 and shown.err == ""
    assert "160 tokens of Python" in shown.out and "in 5 samples" in shown.out
    assert "model.layers.*.mlp.down_proj  x2" in shown.out and "--scheme w8a8-static --smooth auto" in shown.out


def test_the_command_that_it_suggests_is_quoted(run: Run, tiny: Path, tmp_path: Path) -> None:
    model, stats = tmp_path / "it's a model", tmp_path / "my stats.safetensors"
    model.symlink_to(tiny)
    command = shlex.split(run("calibrate", model, *SMALL, "-o", stats).out.splitlines()[-1])
    assert command[:3] == ["octavo", "quantize", str(model)] and command[-2:] == ["--calibration", str(stats)]


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A checkpoint with two blocks of 64 experts, of which a token goes through two."""
    tokenizer = byte_level_tokenizer()
    model = build(mixtral, torch.bfloat16, vocab_size=len(tokenizer), intermediate_size=48, num_local_experts=64)
    model.save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_experts(run: Run, mixture: Path, tmp_path: Path) -> None:
    command = ("calibrate", mixture, "--samples", 1, "--seq-len", 16, "-o", tmp_path / "stats.safetensors")
    shown = run(*command)
    stats = Stats.load(tmp_path / "stats.safetensors")
    count = sum(map(len, stats.unrouted.values()))
    assert 0 < count < 128 and shown.code == 0
    assert shown.err.startswith(f"warning: {count} of 128 experts, in 2 of 2 layers, saw no token of the calibration")
    assert f"Experts that no token was routed to, {count}" in shown.out
    assert "model.layers.*.mlp.experts.down_proj  x2" in shown.out
    data = run(*command, "--json").data
    for row, (name, seen) in zip(data["experts"], stats.experts.items(), strict=True):
        assert row["name"] == name and row["tokens"] == seen.tokens.tolist() and sum(row["tokens"]) == 32
        assert row["unrouted"] == [e for e, tokens in enumerate(row["tokens"]) if not tokens]
        assert row["amax"] == [max(channels) for channels in seen.amax.tolist()]
    everywhere = run(*command, "--route-all-experts")
    assert everywhere.err == "" and "no token was routed to" not in everywhere.out
    for seen in Stats.load(tmp_path / "stats.safetensors").experts.values():
        assert seen.tokens.tolist() == [16] * 64


def test_layers_that_no_sample_reaches_are_not_said_to_become_int8(run: Run, tmp_path: Path) -> None:
    """Mamba computes with the weight of dt_proj itself: it stays float."""
    tokenizer = byte_level_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    config = transformers.MambaConfig(vocab_size=len(tokenizer), **sizes)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    stats = tmp_path / "stats.safetensors"
    out = run("calibrate", tmp_path / "mamba", *SMALL, "-o", stats).out
    assert "no sample reached, 1; of these, what becomes int8 will have dynamic scales" in out
    data = run(
        "quantize", tmp_path / "mamba", tmp_path / "out", "--scheme", "w8a8-static", "--calibration", stats, "--json"
    ).data
    (name,) = Stats.load(stats).unreached
    (row,) = (row for row in data["coverage"]["rows"] if row["name"] == f"{name}.weight")
    assert name.endswith("dt_proj") and row["scheme"] is None


def test_all_tokens_to_all_experts_of_a_model_without_any(run: Run, tiny: Path, tmp_path: Path) -> None:
    shown = run("calibrate", tiny, *SMALL, "--route-all-experts", "-o", tmp_path / "stats.safetensors")
    assert shown.code == 1 and "the model has no stack of experts" in shown.err


def test_act_scales_and_a_plot(run: Run, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stats, scales, plot = tmp_path / "stats.safetensors", tmp_path / "scales.pt", tmp_path / "ranges.png"
    assert run("calibrate", tiny, *SMALL, "-o", stats, "--act-scales", scales, "--plot", plot).code == 0
    seen = Stats.load(stats).observers
    loaded = torch.load(scales, weights_only=True)
    assert list(loaded) == list(seen) and all(torch.equal(loaded[name], seen[name].amax) for name in seen)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_texts_of_one_s_own(run: Run, tiny: Path, tmp_path: Path) -> None:
    text, lines = tmp_path / "text.txt", tmp_path / "lines.jsonl"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    lines.write_text('{"text": "One document."}\n\n{"text": "Another, longer than that."}\n')
    output = ("-o", tmp_path / "stats.safetensors", "--json")
    assert run("calibrate", tiny, "--text", text, "--seq-len", 16, *output).data["text"] == str(text)
    data = run("calibrate", tiny, "--jsonl", lines, *output).data
    assert (data["text"], data["samples"]) == (str(lines), 2)


def test_the_length_is_what_the_model_holds(run: Run, tiny: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "stats.safetensors", "--json")
    assert run("calibrate", tiny, "--samples", 1, *output).data["tokens"] == 256
    shown = run("calibrate", tiny, "--seq-len", 257, *output)
    assert shown.code == 1 and "--seq-len is 257, and the model holds 256" in shown.err


def test_two_processes_find_what_one_finds(run: Run, tiny: Path, tmp_path: Path) -> None:
    command = ["calibrate", str(tiny), *map(str, SMALL), "--json", "-o"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "octavo"]
    paths = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    two = subprocess.run([*launch, *command, str(paths[0])], capture_output=True, text=True, timeout=100)
    assert two.returncode == 0, two.stderr
    one = run(*command, paths[1]).data
    assert {**json.loads(two.stdout), "output": one["output"]} == one  # one process answers
    assert same(*map(Stats.load, paths))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("{", "line 1: is not JSON"),
        ('{"text": "a"}\n["b"]', "line 2: expected an object"),
        ('{"text": " "}', "line 1: expected an object"),
        ('{"messages": []}', "line 1: expected an object"),
        ('{"messages": ["hello"]}', 'line 1: a message is "hello", expected {"role"'),
        ('{"messages": [{"role": "user", "content": "a"}, null]}', "line 1: a message is null"),
        ('{"messages": [{"content": "a"}]}', 'line 1: a message is {"content": "a"}'),
        ('{"messages": [{"role": "user"}]}', 'line 1: a message is {"role": "user"}'),
    ],
    ids=["empty", "no json", "no object", "blank", "no messages", "a string", "null", "no role", "no content"],
)
def test_a_jsonl_file_that_is_none(content: str, words: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(content)
    shown = run("calibrate", tiny, "--jsonl", lines, "-o", tmp_path / "stats.safetensors")
    assert shown.code == 1 and shown.out == "" and f"{lines}" in shown.err and words in shown.err
    assert not (tmp_path / "stats.safetensors").exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", ["do not fit the tokenizer's chat", "must alternate"]),
        ("one\n{% if %}", ["the tokenizer's chat template is broken: ", "line 2", "or calibrate on text"]),
    ],
    ids=["refuses", "is broken"],
)
def test_messages_that_the_template_refuses(template: str, words: list[str], run: Run, tmp_path: Path) -> None:
    model, lines = language_model(tmp_path / "chat", chat=True), tmp_path / "lines.jsonl"
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    lines.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    shown = run("calibrate", model, "--jsonl", lines, "-o", tmp_path / "stats.safetensors")
    assert shown.code == 1 and all(word in shown.err for word in words) and "did not expect" not in shown.err


def test_what_kind_of_file_a_calibration_is(run: Run, tiny: Path, tmp_path: Path) -> None:
    text = '{"text": "One document."}\n{"text": "Another, longer than that."}\n'
    command = ("smooth", tiny, tmp_path / "out", "--samples", 2, "--calibration")
    (tmp_path / "lines.json").write_text(text)
    shown = run(*command, tmp_path / "lines.json")
    assert shown.code == 1 and f"--calibration is {tmp_path / 'lines.json'}, expected text, .safetensors" in shown.err
    (tmp_path / "LINES.JSONL").write_text(text + "no JSON")
    assert "line 3: is not JSON" in run(*command, tmp_path / "LINES.JSONL").err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["-o", "--act-scales", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(option: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "file"
    shown = run("calibrate", tmp_path / "no model", "-o", tmp_path / "stats.safetensors", option, file)
    assert shown.code == 1 and f"{file}: there is no folder" in shown.err


def test_links_in_a_circle_are_no_surprise(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    shown = run("calibrate", tmp_path / "no model", "-o", tmp_path / "a.safetensors", "--plot", tmp_path / "p.txt")
    assert shown.code == 1 and "--plot is" in shown.err and "did not expect" not in shown.err


@pytest.mark.parametrize("name", ["stats.txt", "stats", "stats.jsonl", ".safetensors"])
def test_statistics_that_would_not_be_read_back_are_refused_before_the_work(
    name: str, run: Run, tmp_path: Path
) -> None:
    shown = run("calibrate", tmp_path / "no model", "-o", tmp_path / name)
    assert shown.code == 1 and f"-o is {tmp_path / name}, expected a name that ends in .safetensors" in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ranges.jpg", "ranges", ".png"])
def test_a_plot_of_another_name_is_refused_before_the_work(name: str, run: Run, tmp_path: Path) -> None:
    shown = run("calibrate", tmp_path / "no model", "-o", tmp_path / "stats.safetensors", "--plot", tmp_path / name)
    assert shown.code == 1 and f"--plot is {tmp_path / name}, expected a name that ends in .png" in shown.err


def test_a_device_that_a_plot_is_sent_to_has_a_name_of_its_own(run: Run, tmp_path: Path) -> None:
    shown = run("calibrate", tmp_path / "no model", "-o", tmp_path / "stats.safetensors", "--plot", "/dev/null")
    assert shown.code == 1 and "no model: no such file or folder" in shown.err


def test_a_sample_of_one_token_and_an_int8_model_are_refused(run: Run, tiny_int8: Path, tmp_path: Path) -> None:
    shown = run("calibrate", tiny_int8, "--seq-len", 1, "-o", tmp_path / "x.safetensors")
    assert shown.code == 1 and "--seq-len is 1" in shown.err
    shown = run("calibrate", tiny_int8, "-o", tmp_path / "x.safetensors")
    assert shown.code == 1 and "is quantized already" in shown.err


def test_lines_end_at_line_feeds_only(run: Run, tiny: Path, tmp_path: Path) -> None:
    """JSON may hold what Unicode calls the ends of lines."""
    lines = tmp_path / "lines.jsonl"
    texts = ["a\u2028b and more of it", "c\u0085d and more of it"]
    lines.write_text("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), newline="")
    output = ("-o", tmp_path / "stats.safetensors", "--json")
    assert run("calibrate", tiny, "--jsonl", lines, *output).data["samples"] == 2


def test_a_folder_in_the_place_of_a_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    stats, folder = tmp_path / "stats.safetensors", tmp_path / "folder"
    folder.mkdir()
    for options in (("-o", folder), ("-o", stats, "--act-scales", folder)):
        shown = run("calibrate", tiny, *SMALL, *options)
        assert shown.code == 1 and f"{folder}: is a folder, expected the name of a file" in shown.err
    shown = run("calibrate", tiny, *SMALL, "-o", stats, "--act-scales", stats)
    assert shown.code == 1 and "are one file, expected one for each output" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "before the work"


def test_a_folder_in_the_place_of_a_file_in_python(tmp_path: Path) -> None:
    stats = calibrate(torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.randn(2, 4)])
    for save in (stats.save, stats.save_act_scales):
        with pytest.raises(CalibrateError, match="cannot be written"):
            save(tmp_path)
    assert not list(tmp_path.iterdir())
