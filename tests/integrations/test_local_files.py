"""Where a model's files are found: what is local, what is the Hub's, and what is neither."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import octavo
from octavo import CheckpointError
from octavo.integrations import local_files

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "source",
    ["./no/such/folder", "no/such/folder", "./nosuch", "../nosuch", "model.gguf", "a b", "/no/where", Path("org/name")],
)
def test_what_is_no_hub_id_is_never_looked_for_there(source: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_download", lambda hub_id: pytest.fail(f"asked the Hub for {hub_id}"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        local_files.resolve(source)


@pytest.mark.parametrize("call", [octavo.load, lambda source: octavo.quantize_checkpoint(source, "out", "w8a16")])
def test_offline_a_hub_id_is_a_clear_error(call: Callable[[str], Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(
        CheckpointError, match=r"octavo-test/none: not a local path, .*the Hub cannot be reached; connect"
    ):
        call("octavo-test/none")
    assert time.perf_counter() - start < 5
    assert list(tmp_path.iterdir()) == []


def resolve_elsewhere(environment: dict[str, str], timeout: float) -> str:
    """What `resolve` answers in a process of its own, that has not been told to be offline."""
    code = (
        "from octavo.integrations import local_files\n"
        "local_files._HUB_TIMEOUT = 1.0\n"
        "try: print('found', local_files.resolve('octavo-test/model'))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment = {**clean, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=True)
    return run.stdout


@pytest.mark.parametrize("answers", [False, True], ids=["refuses", "silent"])
def test_a_network_that_does_not_answer_is_not_waited_for(tmp_path: Path, answers: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:  # it takes the connection, and never says a word
            server.listen(8)
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        said = resolve_elsewhere(environment, timeout=60)
    assert said.startswith("CheckpointError octavo-test/model: not a local path") and "cannot be reached" in said


def test_what_the_cache_has_is_found_offline(tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--octavo-test--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    said = resolve_elsewhere({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}, timeout=60)
    assert said.strip() == f"found {snapshot}"


def test_weights_are_downloaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of repositories that hold them twice, as Mistral's and gpt-oss's do."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha="a" * 40, siblings=[])
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **kwargs: asked.update(kwargs) or ".")
    local_files.resolve("octavo-test/model")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "2_Dense/model.safetensors", "modeling_own.py"]
    twice = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "original/config.json"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *twice], **patterns)) == wanted


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model-Q8_0.gguf"])
def test_weights_that_are_no_safetensors_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    import huggingface_hub

    siblings = [SimpleNamespace(rfilename=name) for name in ("config.json", file)]
    told = SimpleNamespace(sha="a" * 40, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: told)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: ".")
    with pytest.raises(CheckpointError, match=f"^octavo-test/model: holds no safetensors, but {file}; download one"):
        local_files.resolve("octavo-test/model")
    siblings.append(SimpleNamespace(rfilename="model.safetensors"))
    assert local_files.resolve("octavo-test/model") == Path()
