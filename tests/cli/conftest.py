"""Checkpoints that the verbs are run on, and what runs them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.cli import main
from tests.tiny_checkpoints import gguf_file, language_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float language model; not to be written to."""
    return language_model(tmp_path_factory.mktemp("tiny") / "float")


@pytest.fixture(scope="session")
def tiny_int8(tiny: Path) -> Path:
    """The same in int8, but for its tied embedding and head; not to be written to."""
    folder = tiny.parent / "int8"
    octavo.quantize_checkpoint(tiny, folder, "w8a16")
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in a .gguf file."""
    return gguf_file(tmp_path_factory.mktemp("gguf") / "model.gguf")


@dataclasses.dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """What --json printed: one object, and nothing else."""
        return json.loads(self.out, parse_constant=pytest.fail)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command in this process."""

    def run(*argv: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
