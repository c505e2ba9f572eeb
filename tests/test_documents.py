"""What documents name is there: files, links and their anchors, options of the command line, the rooms of the house."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.cli import new_parser
from tests.test_architecture import LAYERS, ROOMS

ROOT = Path(__file__).parents[1]
DOCUMENTS = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
FOLDERS = ("octavo", "csrc", "tests", "docs", "bench", "examples")
FILES = [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))]
OF_OTHERS = {"llama.cpp", "utils.py"}
"""Names that look like files of this repository: another project, and one that is not to be."""

PACKAGES = [path.parent for path in sorted((ROOT / "octavo").rglob("*/__init__.py"))]
OF_THEIR_NAMES = {"cli", "triton"}
"""Packages whose heads need not name all files: each is called as the verb, or the kind of op, that it is of."""

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code_blocks(document: str) -> list[tuple[str, str]]:
    """Language and text of each."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text("utf-8"), re.MULTILINE | re.DOTALL)


@each_document
def test_files_are_there(document: Path) -> None:
    named = re.findall(r"(?<![\w/.*-])((?:[\w-]+/)*[\w-]+\.(?:py|h|cpp|md|toml))\b", document.read_text("utf-8"))
    paths = [f"/{path.relative_to(ROOT)}" for path in FILES]
    missing = [name for name in {*named} - OF_OTHERS if not any(path.endswith(f"/{name}") for path in paths)]
    assert sorted(missing) == []


def anchors(path: Path) -> set[str]:
    """GitHub's, of each heading."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_targets_of_make_are_there(document: Path) -> None:
    targets = re.findall(r"`make ([a-z-]+)", document.read_text("utf-8"))
    assert {*targets} <= {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)}


def commands() -> Iterator[tuple[str, str]]:
    """Verb and rest of each `octavo ...` line of the README; a line that begins with spaces goes on with it."""
    for language, block in code_blocks("README.md"):
        for verb, rest in re.findall(r"^octavo (\w+)(.*(?:\n .*)*)", block, re.MULTILINE):
            assert not language
            yield verb, rest


def test_the_readme_shows_verbs_and_options_that_there_are() -> None:
    (verbs,) = (action for action in new_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert {verb for verb, _ in commands()} == {*verbs.choices}
    for verb, rest in commands():
        known = {option for action in verbs.choices[verb]._actions for option in action.option_strings}
        assert {*re.findall(r"(?<!\S)\[?(--?[a-z-]+)", rest)} <= known, verb


def test_code_of_the_readme_is_python() -> None:
    blocks = [block for language, block in code_blocks("README.md") if language == "python"]
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_house_is_listed_from_the_ground_up() -> None:
    listed = re.findall(r"^  ([\w]+)(?:\.py|/) {2,}\w", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert listed == ["__init__", *(room for room in ROOMS if room not in ("api", "", "__main__"))]


def test_the_floors_are_those_of_the_house() -> None:
    rows = re.findall(r"^\| (\d) [\w ]+ \| (.*) \|$", (ROOT / "docs/architecture.md").read_text("utf-8"), re.MULTILINE)
    shown = {int(floor): [name.removesuffix(".py") for name in re.findall(r"`([\w.]+)/?`", row)] for floor, row in rows}
    public = {"__init__": ""}
    assert {floor: {public.get(name, name) for name in names} for floor, names in shown.items()} == {
        floor: {room for room in rooms if room != "__main__"} for floor, rooms in enumerate(LAYERS)
    }


@pytest.mark.parametrize(
    "package", [path for path in PACKAGES if path.name not in OF_THEIR_NAMES], ids=lambda p: p.name
)
def test_heads_of_packages_name_their_files(package: Path) -> None:
    head = ast.get_docstring(ast.parse((package / "__init__.py").read_text("utf-8"))) or ""
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert files - {*re.findall(r"\w+\.py", head)} == set()
