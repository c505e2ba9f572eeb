"""The command as a whole: help, exit codes, errors in words, quiet libraries."""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.cli import backends, new_parser
from octavo.cli.terminal import Answer
from octavo.cli.verb import a_path
from octavo.formats.outputs import new_folder

VERBS = ("quantize", "calibrate", "smooth", "inspect", "eval", "generate", "bench", "backends")
Run = Callable[..., Any]


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in new_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_the_verbs_are_the_verbs() -> None:
    assert tuple(verb_parsers()) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_describes_in_one_line_and_its_examples_parse(verb: str, run: Run) -> None:
    shown = run(verb, "--help")
    assert shown.code == 0 and shown.err == ""
    description = str(verb_parsers()[verb].description)
    assert description.endswith(".") and len(description) < 90 and description in shown.out
    head, _, examples = shown.out.partition("example:\n")
    assert all(option in head for option in ("--json", "--debug"))
    assert examples.strip()
    for example in examples.strip().splitlines():
        program, *argv = shlex.split(example)
        assert program == "octavo"
        assert new_parser().parse_args(argv).verb == verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_is_explained(verb: str) -> None:
    assert [a.dest for a in verb_parsers()[verb]._actions if not a.help] == []


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys; from octavo.cli import main; main(['--help']); main(['bench', '--help']); "
        "sys.exit(repr({'torch', 'transformers', 'rich', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.strip() == "set()"


def test_python_m_octavo() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", "octavo", "backends", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {row["op"] for row in json.loads(found.stdout)["ops"]} >= {"w8a16_linear", "w8a16_conv"}
    assert found.stderr == ""


def test_no_verb_shows_the_help_and_is_a_usage_error(run: Run) -> None:
    shown = run()
    assert shown.code == 2 and shown.out == "" and "quantize" in shown.err


@pytest.mark.parametrize(
    "argv",
    [
        ["fold"],
        ["quantize", "only-a-source"],
        ["quantize", "a", "b", "--scheme", "w3"],
        ["quantize", "a", "b", "--group-size", "0"],
        ["quantize", "a", "b", "--smooth", "1.5"],
        ["calibrate", "a"],
        ["calibrate", "a", "-o", "b", "--text", "x", "--jsonl", "y"],
        ["smooth", "a", "b", "--alpha", "high"],
        ["smooth", "a", "b", "--scheme", "w8a16"],
        ["generate", "a"],
        ["generate", "a", "--prompt", " "],
        ["generate", "a", "--prompt", "x", "--temperature", "-1"],
        ["generate", "a", "--prompt", "x", "--temperature", "nan"],
        ["generate", "a", "--prompt", "x", "--temperature", "1e-300"],
        ["generate", "a", "--prompt", "x", "--seed", "18446744073709551616"],
        ["generate", "a", "--prompt", "x", "--seed", "-1"],
        ["bench", "a", "--repeats", "0"],
        ["bench", "--ops", "--shapes", "8x0"],
        ["bench", "--ops", "--shapes", "8x8x8"],
        ["bench", "--ops", "--rows", "0"],
        ["eval", "a", "--device", "tpu"],
    ],
    ids=" ".join,
)
def test_usage_errors(argv: list[str], run: Run) -> None:
    shown = run(*argv)
    assert shown.code == 2 and shown.out == "" and "usage: octavo" in shown.err


def test_no_path_is_empty(run: Run) -> None:
    """It would be that of the current folder."""
    named = {"PATH", "SRC", "DST", "MODEL", "FILE"}
    types = {action.type for parser in verb_parsers().values() for action in parser._actions if action.metavar in named}
    assert types == {a_path}
    for argv in (["inspect", ""], ["quantize", "a", ""], ["bench", "a", "--baseline", ""]):
        shown = run(*argv)
        assert shown.code == 2 and "invalid path (not an empty one) value: ''" in shown.err


def test_version(run: Run) -> None:
    assert run("--version").out == f"octavo {octavo.__version__}\n"


@pytest.mark.parametrize("verb", ["quantize", "calibrate", "smooth", "inspect", "eval", "generate", "bench"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["people", "json"])
def test_a_missing_source_is_one_paragraph(verb: str, options: list[str], run: Run, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    more = {
        "quantize": [tmp_path / "out"],
        "smooth": [tmp_path / "out"],
        "calibrate": ["-o", tmp_path / "out.safetensors"],
        "generate": ["--prompt", "x"],
    }.get(verb, [])
    shown = run(verb, missing, *more, *options)
    assert shown.code == 1 and shown.out == ""
    assert shown.err == (
        f"error: {missing}: no such file or folder; expected a checkpoint, or the id of one on the Hub\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(
    name: str, run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions are no test: root may read everything."""
    really_open = io.open

    def refusing(file: Any, *args: Any, **options: Any) -> Any:
        if str(file) == str(tiny / name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return really_open(file, *args, **options)

    monkeypatch.setattr(io, "open", refusing)
    monkeypatch.setattr(builtins, "open", refusing)
    shown = run("quantize", tiny, tmp_path / "out")
    assert shown.code == 1 and shown.err.startswith(f"error: {tiny / name}: cannot be read: Permission denied; ")
    assert not list(tmp_path.iterdir())


def failing(error: BaseException) -> Callable[..., Answer]:
    def run(args: argparse.Namespace, terminal: object) -> Answer:
        raise error

    return run


def with_run(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Answer]) -> None:
    """`octavo backends` does as `function` does."""
    monkeypatch.setattr(backends, "run", function)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (octavo.RecipeError("ignore:\n  'x' matches nothing"), "ignore: 'x' matches nothing"),
        (
            ModuleNotFoundError("No module named 'gguf'", name="gguf"),
            "the package gguf is needed for this: pip install",
        ),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero (octavo did not expect this"),
        (MemoryError(), "MemoryError (octavo did not expect this"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_are_told_in_words(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    with_run(monkeypatch, failing(error))
    shown = run("backends")
    assert shown.code == 1 and shown.out == ""
    assert shown.err.startswith(f"error: {words}") and shown.err.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    with_run(monkeypatch, failing(octavo.RecipeError("no")))
    shown = run("backends", "--debug")
    assert shown.code == 1 and shown.out == ""
    assert shown.err.startswith("Traceback") and "RecipeError: no" in shown.err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    with_run(monkeypatch, failing(KeyboardInterrupt()))
    shown = run("backends")
    assert (shown.code, shown.out, shown.err) == (130, "", "error: interrupted\n")


def test_an_interrupt_while_the_verbs_are_imported_is_130_too() -> None:
    code = """
        import sys
        class Interrupt:
            def find_spec(name, *more):
                if name == "octavo.cli.bench":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupt)
        from octavo.cli import main
        sys.exit(main(["--help"]))
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "error: interrupted\n")


def noisy(args: argparse.Namespace, terminal: object) -> Answer:
    warnings.warn("5% stays\nfloat", octavo.OctavoWarning, stacklevel=1)
    warnings.warn("deprecated", FutureWarning, stacklevel=1)
    logging.getLogger("somebody").warning("noise")
    return Answer({"done": True}, ("done",))


def test_only_warnings_of_octavo_are_seen_and_each_is_a_line(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    with_run(monkeypatch, noisy)
    shown = run("backends")
    assert (shown.code, shown.out, shown.err) == (0, "done\n", "warning: 5% stays float\n")
    assert run("backends", "--json").data == {"done": True}
    # What was quiet for the command is as it was again.
    assert logging.root.manager.disable == logging.NOTSET
    with pytest.warns(FutureWarning, match="again"):
        warnings.warn("again", FutureWarning, stacklevel=1)


def test_a_reader_who_has_enough_is_no_error(tiny_int8: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo", "inspect", tiny_int8],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize(
    "argv", [["inspect"], ["inspect", "--json"], ["generate", "--prompt", "x", "--max-new-tokens", "2"]], ids=" ".join
)
def test_an_output_that_is_full_is_told_in_one_line(argv: list[str], tiny: Path) -> None:
    verb, *options = argv
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "octavo", verb, tiny, *options], stdout=full, stderr=subprocess.PIPE, text=True
        )
    words = "error: stdout cannot be written: No space left on device; make room there, or send it elsewhere\n"
    assert (found.returncode, found.stderr) == (1, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('"x"', "holds a JSON str, expected an object"),
        ("[1]", "holds a JSON list, expected an object"),
        ({"quantization_config": "int8"}, "quantization_config is 'int8', expected an object"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list of names"),
        ({"hidden_size": "many"}, "Field 'hidden_size' expected int, got str"),
    ],
    ids=["str", "list", "quantization_config", "architectures", "a size"],
)
@pytest.mark.parametrize("verb", ["quantize", "inspect", "generate"])
def test_a_config_that_is_none(verb: str, change: Any, words: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "model", tmp_path / "model" / "config.json"
    shutil.copytree(tiny, folder)
    text = change if isinstance(change, str) else json.dumps({**json.loads(config.read_text()), **change})
    config.write_text(text)
    more = {"quantize": [tmp_path / "out"], "generate": ["--prompt", "x"]}.get(verb, [])
    shown = run(verb, folder, *more)
    if verb == "inspect" and "hidden_size" in words:
        return  # it reads no more of it than it needs
    assert shown.code == 1 and shown.err.startswith(f"error: {folder}") and words in shown.err
    assert "did not expect" not in shown.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_terminated_removes_what_is_half_written(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    def run_verb(args: argparse.Namespace, terminal: object) -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "weights").write_bytes(b"0" * 1000)
            os.kill(os.getpid(), number)

    with_run(monkeypatch, run_verb)
    handlers = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run("backends")
    assert stop.value.code == 128 + number and signal.getsignal(number) is handlers
    assert not list(tmp_path.iterdir())


def test_nohup_holds(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def run_verb(args: argparse.Namespace, terminal: object) -> Answer:
        os.kill(os.getpid(), signal.SIGHUP)
        return Answer({}, ("done",))

    with_run(monkeypatch, run_verb)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("backends").out == "done\n"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_an_output_that_is_closed_gets_nothing(closed: str, tiny_int8: Path, tmp_path: Path) -> None:
    """And no file is opened under its number, which libraries write to."""
    command = shlex.join([sys.executable, "-m", "octavo", "generate", str(tiny_int8), "--prompt", "x"])
    found = subprocess.run(
        f"{command} --max-new-tokens 2 {dict(stdout='>&-', stderr='2>&-')[closed]}",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0
    assert (found.stderr if closed == "stdout" else found.stdout).count("\n") == 1
    assert (found.stdout if closed == "stdout" else found.stderr) == ""


def test_what_is_not_utf_8(run: Run, tiny: Path, tmp_path: Path) -> None:
    for argv in (["generate", tiny, "--prompt", "a\udcff"], ["quantize", tiny, tmp_path / "a\udcff"]):
        shown = run(*argv)
        assert shown.code == 2 and "a\\udcff' is not UTF-8; expected UTF-8\n" in shown.err
    assert not list(tmp_path.iterdir())
