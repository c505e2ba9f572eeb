"""`octavo bench`: what is counted is what there is, what is timed is right, and processes that die are told of."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo.cli import bench, bench_worker, memory, new_parser
from octavo.cli.bench import Measured
from octavo.cli.bench_worker import Loaded, Round, bytes_per_token
from octavo.cli.machine import describe_machine
from octavo.cli.terminal import Terminal
from octavo.cli.verb import CommandError
from tests.tiny_models import TEXT, build, llama, mixtral, tied_llama

HIDDEN, INNER, VOCABULARY, LAYERS = (
    TEXT[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
)
LINEAR = LAYERS * (HIDDEN * (HIDDEN + 16 + 16 + HIDDEN) + 3 * HIDDEN * INNER)
"""Elements of the linear layers' weights; key and value heads make 16 columns."""
ROWS = LAYERS * (HIDDEN + 16 + 16 + HIDDEN + 2 * INNER + HIDDEN)
NORMS = (2 * LAYERS + 1) * HIDDEN


def test_a_token_reads_all_weights_but_one_row_of_the_embedding() -> None:
    model = build(llama, torch.bfloat16)
    assert bytes_per_token(model) == 2 * (LINEAR + NORMS + VOCABULARY * HIDDEN + HIDDEN)


def test_a_table_that_is_the_head_too_is_read_whole_and_once() -> None:
    model = build(tied_llama, torch.bfloat16)
    assert bytes_per_token(model) == 2 * (LINEAR + NORMS + VOCABULARY * HIDDEN)


def test_int8_weights_are_codes_and_scales() -> None:
    model = build(llama, torch.bfloat16)
    octavo.quantize(model, "w8a16", include=["Embedding", "OutputHead"])
    linear = LINEAR + 4 * ROWS
    assert bytes_per_token(model) == linear + 2 * NORMS + VOCABULARY * (HIDDEN + 4) + (HIDDEN + 4)


def test_a_tied_int8_table_is_read_whole_and_once() -> None:
    model = build(tied_llama, torch.bfloat16)
    octavo.quantize(model, "w8a16", include=["Embedding", "OutputHead"])
    assert bytes_per_token(model) == LINEAR + 4 * ROWS + 2 * NORMS + VOCABULARY * (HIDDEN + 4)


def test_a_lookup_by_itself_is_a_row() -> None:
    assert bytes_per_token(nn.Embedding(1000, 8)) == 32


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench_worker, "_state", {})
    yield


@pytest.mark.usefixtures("in_this_process")
def test_a_mixture_of_experts_reads_what_it_chooses(tmp_path: Path) -> None:
    build(mixtral).save_pretrained(tmp_path)
    assert bench_worker.load(str(tmp_path), "cpu", None).token_bytes is None


@pytest.mark.usefixtures("in_this_process")
def test_what_is_timed_is_the_model_s_own_continuation(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = bench_worker.load(str(tiny), "cpu", 1)
    assert torch.get_num_threads() == 1 and loaded.served_by == ()
    model = bench_worker._state["model"]
    assert loaded.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert (loaded.vocabulary, loaded.positions) == (model.config.vocab_size, 256)
    prompt, fed = [5, 6, 7, 8], []
    model.register_forward_pre_hook(lambda m, args, kwargs: fed.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    one = bench_worker.time_round(prompt, 6)
    assert one.first_token_s > 0 and one.decode_s > 0
    model._forward_pre_hooks.clear()
    ids = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    # The prompt, then five tokens one by one; the sixth is made and not fed.
    assert fed == [[prompt], *([[token]] for token in ids[4:9])]
    with torch.no_grad():
        assert bench_worker.predictions(prompt) == model(torch.tensor([prompt])).logits[0].argmax(-1).tolist()
    assert bench_worker.peak_memory() > 50e6


def measured(*rounds: tuple[float, float], token_bytes: int | None = 1000, new_tokens: int = 11) -> Measured:
    loaded = Loaded(1.0, 2000, token_bytes, 96, None, "cpu", "float", ("reference",), {})
    return Measured("model", loaded, tuple(Round(*one) for one in rounds), 3000, 100, new_tokens, 10_000.0)


def test_medians_become_speeds() -> None:
    one = measured((0.5, 2.0), (9.0, 9.0), (0.4, 1.0))
    assert one.first_token_s == 0.5 and one.prefill_tokens_per_s == 200
    assert one.decode_tokens_per_s == 5 and one.weight_bytes_per_s == 5000 and one.of_memory_speed == 0.5


def test_what_is_not_known_is_not_made_up() -> None:
    one = measured((1.0, 1.0), token_bytes=None)
    assert one.weight_bytes_per_s is None and one.of_memory_speed is None and one.compile_s is None
    one = measured((1.0, 0.0), new_tokens=1)
    assert one.decode_tokens_per_s is None and one.weight_bytes_per_s is None
    assert bench._cells([None, 2.0], str) == ["-", "2.0", "-"]
    assert bench._cells([1.0, 2.0], str) == ["1.0", "2.0", "0.50x"]


def backend_of(op: str) -> str:
    return next(row.backend for row in octavo.backends() if (row.op, row.device) == (op, "cpu"))


@pytest.mark.parametrize(
    ("scheme", "attention", "called"),
    [
        ("w8a16", "float", {"w8a16_linear"}),
        ("w8a8", "float", {"quantize_per_token", "w8a8_linear"}),
        ("w8a8", "int8", {"quantize_per_token", "w8a8_linear", "int8_attention"}),
    ],
)
def test_who_serves_a_model_is_who_serves_the_ops_that_it_calls(scheme: str, attention: str, called: set[str]) -> None:
    model = build(llama)
    octavo.quantize(model, scheme, attention=attention)
    assert bench_worker.served_by(model, "cpu") == tuple(sorted({backend_of(op) for op in called}))


@pytest.mark.parametrize("attention", ["float", "int8"])
def test_who_serves_an_int8_cache(attention: str) -> None:
    model = build(llama)
    octavo.quantize(model, "w8a16", attention=attention)
    called = {"w8a16_linear", f"{attention}_attention_of_codes"}
    assert bench_worker.served_by(model, "cpu", "int8") == tuple(sorted({backend_of(op) for op in called}))


@pytest.mark.usefixtures("in_this_process")
def test_the_cache_of_a_model_that_is_timed_is_int8(tiny_int8: Path) -> None:
    from octavo.integrations.int8_cache import Int8Cache
    from octavo.integrations.language_model import cache_name

    bench_worker.load(str(tiny_int8), "cpu", 1, "int8")
    kept = []
    model = bench_worker.held()
    model.register_forward_hook(lambda _, __, output: kept.append(getattr(output, str(cache_name(model)))))
    one = bench_worker.time_round([5, 6, 7, 8], 6)
    assert one.decode_s > 0 and len(kept) == 6 and isinstance(kept[0], Int8Cache) and len({*map(id, kept)}) == 1
    assert kept[0].get_seq_length() == 9


@pytest.mark.usefixtures("in_this_process")
def test_compiled_rounds_are_timed_like_others(tiny_int8: Path, compiled_eagerly: None) -> None:
    bench_worker.load(str(tiny_int8), "cpu", 1)
    assert bench_worker.compile_model([5, 6, 7, 8], 6) > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        one = bench_worker.time_round([8, 7, 6, 5], 6)
    assert one.first_token_s > 0 and one.decode_s > 0


def test_people_see_what_was_compiled() -> None:
    one = dataclasses.replace(measured((0.5, 2.0)), compile_s=31.25)
    table = str(bench._table([one], arguments("--compile")))
    assert "compile time" in table and "31.2 s" in table and "batch 1, compiled" in table
    assert "static KV cache" in bench._notes([one], None, describe_machine())
    assert "compile" not in str(bench._table([measured((0.5, 2.0))], arguments()))


def test_memory_is_streamed_whole() -> None:
    stream = memory.MemoryStream("cpu")
    assert stream._data.nbytes == memory.BYTES >= 1e9
    start = time.perf_counter()
    speed = stream.bytes_per_s()
    assert memory.BYTES / speed <= time.perf_counter() - start


def test_both_models_in_one_run(tiny: Path, tiny_int8: Path) -> None:
    sizes = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2", "--threads", "1", "--json"]
    # A process of its own, so that what its children say on stderr is seen.
    command = [sys.executable, "-m", "octavo", "bench", tiny_int8, "--baseline", tiny, *sizes]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    data = json.loads(shown.stdout)
    int8, base = data["models"]
    assert (int8["path"], base["path"]) == (str(tiny_int8), str(tiny))
    assert int8["served_by"] == [backend_of("w8a16_linear")] and base["served_by"] == []
    assert int8["weight_bytes"] < base["weight_bytes"]
    for model in (int8, base):
        assert model["cache"] == "float"
        assert len(model["rounds"]) == 2 and model["prefill_tokens_per_s"] > 0 and model["load_s"] > 0
        assert model["decode_tokens_per_s"] > 0 and model["peak_bytes"] > 50e6
        assert model["weight_bytes_per_s"] == pytest.approx(model["token_bytes"] * model["decode_tokens_per_s"])
        share = model["of_memory_speed"] * data["memory_bytes_per_s"]
        assert share == pytest.approx(model["weight_bytes_per_s"]) and model["compile_s"] is None
    assert data["memory_bytes_per_s"] > 1e8 and data["compiled"] is False
    assert 0.5 < data["top1_agreement"] <= 1
    assert data["machine"]["threads"] == 1 and data["machine"]["torch"] == torch.__version__


def arguments(*argv: str) -> argparse.Namespace:
    return bench.settled(new_parser().parse_args(["bench", "model", *argv]))


def test_people_see_each_model_and_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = measured((0.5, 2.0)), measured((1.0, 1.0), token_bytes=None)
    lines = str(bench._table([one, two], arguments())).splitlines()
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines[3:]}
    assert rows == {
        "weights in memory": "1.00x",
        "peak memory": "1.00x",
        "load time": "1.00x",
        "time to first token": "0.50x",
        "prefill": "2.00x",
        "decode": "0.50x",
        "weights read in decode": "-",
        "of memory's speed": "-",
    }
    assert "ratio" not in str(bench._table([one], arguments()))
    notes = bench._notes([one, two], 0.5, describe_machine())
    assert "50.0% of the positions" in notes and "model served by: reference, on cpu" in notes
    assert "not known for a mixture of experts" in notes


def test_what_is_not_given_has_its_default() -> None:
    args = arguments("--repeats", "2")
    assert (args.prompt_tokens, args.new_tokens, args.repeats, args.device) == (512, 64, 2, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected the PATH of a model, or --ops"),
        (["--shapes", "8x8"], "expected the PATH of a model, or --ops"),
        (["--ops", "model"], "PATH is of a model, and --ops was given"),
        (["--ops", "--new-tokens", "64"], "--new-tokens is of a model, and --ops was given"),
        (["--ops", "--compile"], "--compile is of a model, and --ops was given"),
        (["model", "--rows", "4"], "--rows is of the ops, and PATH model was given"),
        (["model", "--shapes", "8x8"], "--shapes is of the ops"),
        (["--ops", "--cache", "int8"], "--cache is of a model, and --ops was given"),
        (["model", "--compile", "--cache", "int8"], "--compile keeps a static float cache, and --cache is int8"),
    ],
    ids=str,
)
def test_a_model_and_the_ops_are_two_things(argv: list[str], message: str, run: Callable[..., Any]) -> None:
    shown = run("bench", *argv)
    assert shown.code == 1 and shown.out == "" and message in shown.err


@pytest.mark.parametrize("what", ["model", "--ops"])
def test_more_threads_than_cores_are_refused(
    what: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    shown = run("bench", what, "--threads", 7)
    assert shown.code == 1 and "--threads is 7, expected at most 6, one for each core of this machine" in shown.err
    assert arguments("--threads", "6").threads == 6


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    short = dataclasses.replace(measured((1.0, 1.0)).loaded, positions=256)
    args = arguments("--prompt-tokens", "250", "--new-tokens", "10")
    with pytest.raises(CommandError, match="make 260, and model holds 256 tokens"):
        bench._load(Terminal(json=True), lambda *_: short, "model", "float", "cpu", args)


def test_a_process_that_dies_is_told_of(tmp_path: Path) -> None:
    with bench._worker("some-model", debug=False) as call, pytest.raises(CommandError, match="some-model: the process"):
        call(os.kill, call(os.getpid), signal.SIGKILL)


def test_an_interrupt_that_ends_the_model_s_process_is_one_here_too() -> None:
    with bench._worker("some-model", debug=False) as call, pytest.raises(KeyboardInterrupt):
        call(os.kill, call(os.getpid), signal.SIGINT)


SLOW_START = """
import pathlib, sys, time
if "--multiprocessing-fork" in sys.orig_argv:
    pathlib.Path(__file__).with_name("started").touch()
    time.sleep(2)
"""


def test_an_interrupt_before_the_model_s_process_is_ready_is_one_line(tiny: Path, tmp_path: Path) -> None:
    """A shell interrupts all processes of a command; that of the model is still importing."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    paths = os.pathsep.join([str(tmp_path), str(Path(octavo.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo", "bench", str(tiny)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
