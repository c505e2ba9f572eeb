"""What building the kernels says of a compiler that cannot: in one sentence, before it compiles anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("setuptools")


def build(compiler: str, folder: Path) -> str:
    """What a build with it ends with, which it must, leaving nothing."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"],
        cwd=ROOT, env={**os.environ, "CXX": compiler}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and not list(folder.rglob("*.so"))
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "macros, found",
    [({"__clang_major__": "14", "__GNUC__": "4"}, "clang 14"), ({"__GNUC__": "10"}, "GCC 10")],
    ids=["clang", "an old GCC"],
)
def test_a_compiler_that_does_not_know_the_instruction_sets(macros: dict[str, str], found: str, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    says = "\n".join(f"#define {name} {value}" for name, value in {"__x86_64__": "1", **macros}.items())
    compiler.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    compiler.chmod(0o755)
    line = build(str(compiler), tmp_path)
    assert f"is {found}: install g++" in line and "GCC 11 or later" in line and "OCTAVO_NO_NATIVE=1" in line


def test_no_compiler(tmp_path: Path) -> None:
    line = build("no-such-compiler", tmp_path)
    assert "'no-such-compiler' is not one: install g++" in line and "OCTAVO_NO_NATIVE=1" in line


def test_a_build_of_its_own_has_torch() -> None:
    """pip makes a new environment for each build, unless it is told otherwise: `pip install .` found no torch in it."""
    (requires,) = re.findall(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    (torch,) = re.findall(r'"(torch[^"]*)"', requires)
    assert f'    "{torch}",\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
