"""The house has floors: which file may import which, read from the sources with `ast`.

To add a file to octavo/, put its name in LAYERS, on the lowest floor that has what it needs. A floor may import what
is below it and what stands before it on the same floor; inside a package (ops, formats ...) everything may import
everything. Imports inside functions count too: being late does not make them go the right way.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    # 0 meaning
    ("errors", "tables", "report", "recipe", "primitives", "feeding", "atomic"),
    # 1 running
    ("ops",),
    # 2 parts
    (
        "stand_ins",
        "alike",
        "computed_weights",
        "watched_experts",
        "experts",
        "modules",
        "layers",
        "fused",
        "model_code",
    ),
    # 3 pipeline
    ("calibration", "smoothing", "quantization"),
    # 4 disk and judgement
    ("formats", "evaluate"),
    # 5 edge; api is what the public names of octavo/__init__.py, "", stand for
    ("plot", "integrations", "api", "", "cli", "__main__"),
)
ROOMS = [room for layer in LAYERS for room in layer]

NEVER = {
    "ops": {"recipe": "ops take tensors and numbers only"},
    "calibration.calibrate": {
        "modules": "calibration knows nothing of quantization",
        "ops": "calibration runs float models",
    },
    "calibration.stats": {
        "modules": "calibration knows nothing of quantization",
        "ops": "calibration runs float models",
    },
    **{
        f"smoothing.{file}": {"modules": "smoothing changes float models", "ops": "smoothing changes float models"}
        for file in ("smooth", "factors", "fold", "proof")
    },
    "evaluate": {"quantization": "it judges any callable, float and int8 alike"},
}
"""Room, or file of a room -> rooms that are below it and still not for it, and why."""

WITHOUT_TORCH = {"errors", "tables", "recipe", "report"}
"""These import the standard library and each other: a command that only prints must not wait for torch to load."""

ANYWHERE = {"torch", "numpy", "safetensors", "huggingface_hub"}
LATE = {"yaml", "rich", "matplotlib"}
"""Third parties for imports inside functions, in any room; those of ANYWHERE may also stand at the top of a file."""

ONLY_IN = {
    "transformers": "octavo.integrations",
    "diffusers": "octavo.integrations",
    "tokenizers": "octavo.integrations",
    "compressed_tensors": "octavo.integrations",
    "gguf": "octavo.integrations",
    "jinja2": "octavo.integrations",
    "lm_eval": "octavo.integrations",
    "peft": "octavo.integrations",
    "triton": "octavo.ops.triton",
    "rich": "octavo.cli",
    "matplotlib": "octavo.plot",
}
"""Third party -> the prefix of the modules that may import it, at the top of the file too."""


@dataclasses.dataclass(frozen=True)
class Import:
    module: str
    line: int
    late: bool
    """Inside a function: it runs when the function is called."""
    typing_only: bool
    """Under `if TYPE_CHECKING:`: it never runs."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((ROOT / "octavo").rglob("*.py"))}


def room_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def imports_of(tree: ast.AST, late: bool = False, typing_only: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late, typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "ruff's TID252 bans relative imports"
            for alias in node.names:
                # `from octavo import recipe` is about octavo.recipe, `from octavo import Recipe` about octavo.
                member = f"{node.module}.{alias.name}"
                is_room = node.module == "octavo" and (member in SOURCES or alias.name in ROOMS)
                yield Import(member if is_room else str(node.module), node.lineno, late, typing_only)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            name = node.args[0]
            yield Import(name.value if isinstance(name, ast.Constant) else "", node.lineno, late, typing_only)
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports_of(node, late or function, typing_only or guard)


def problems(module: str, source: str) -> list[str]:
    """What is wrong with the imports and prints of `module`, one line each."""
    tree = ast.parse(source)
    found = []
    for imported in imports_of(tree):
        top = imported.module.partition(".")[0]
        why = wrong_room(module, imported) if top == "octavo" else wrong_third_party(module, imported, top)
        if why:
            found.append(f"{module}, line {imported.line}: imports {imported.module or 'by a computed name'}: {why}")
    if room_of(module) != "cli":
        found += [
            f"{module}, line {node.lineno}: prints; the library logs, or returns what the command line prints"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
    return found


def wrong_room(module: str, imported: Import) -> str | None:
    here, there = room_of(module), room_of(imported.module)
    if here == there:
        return None
    if there not in ROOMS:
        return f"there is no octavo/{there}"
    if ROOMS.index(there) > ROOMS.index(here):
        return f"{there or 'octavo/__init__.py'} stands above {here or 'octavo/__init__.py'}"
    for place in (here, module.partition(".")[2]):
        if there in NEVER.get(place, {}):
            return NEVER[place][there]
    if here in WITHOUT_TORCH and there not in WITHOUT_TORCH and not imported.typing_only:
        return f"{here} must not load torch, {there} does"
    return None


def wrong_third_party(module: str, imported: Import, top: str) -> str | None:
    if top in sys.stdlib_module_names or imported.typing_only:
        return None
    owner = ONLY_IN.get(top)
    if owner and module.startswith(owner):
        return None
    if top in LATE:
        return None if imported.late else "only inside a function, `import octavo` must stay fast"
    if owner:
        return f"only {owner} may"
    if top not in ANYWHERE:
        return "not the standard library, and in neither ANYWHERE, LATE nor ONLY_IN of tests/test_architecture.py"
    if room_of(module) in WITHOUT_TORCH:
        return f"{room_of(module)} imports the standard library only"
    return None


@pytest.mark.parametrize("module", SOURCES)
def test_every_file_has_a_place(module: str) -> None:
    assert room_of(module) in ROOMS, (
        f"octavo/{room_of(module)} is on no floor: add it to LAYERS in tests/test_architecture.py, "
        "to its line in docs/architecture.md, and import only what is below"
    )


def test_every_folder_is_a_package() -> None:
    # Without an __init__.py nothing says what the folder is for, and any other installed project could add to it.
    folders = {path.parent for path in SOURCES.values()}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module: str) -> None:
    if room_of(module) in ROOMS:
        assert problems(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("octavo.primitives", "import octavo.ops", "ops stands above primitives"),
        ("octavo.modules.conv", "from octavo.quantization.plan import plan", "quantization stands above modules"),
        ("octavo.modules.conv", "def f():\n    from octavo import quantization", "quantization stands above modules"),
        ("octavo.modules", "from octavo import Recipe", "octavo/__init__.py stands above modules"),
        ("octavo.modules", "from octavo.nowhere import x", "no octavo/nowhere"),
        ("octavo.evaluate", "from octavo.quantization.plan import plan", "judges any callable"),
        ("octavo.calibration.calibrate", "from octavo.modules import QuantLinear", "knows nothing of quantization"),
        ("octavo.report", "from octavo.primitives import amax", "primitives stands above report"),
        ("octavo.report", "import torch", "standard library only"),
        ("octavo.recipe", "import yaml", "only inside a function"),
        ("octavo.recipe", "def f():\n    import numpy", "standard library only"),
        ("octavo.formats.checkpoint", "def f():\n    import transformers.utils", "only octavo.integrations may"),
        (
            "octavo.quantization.plan",
            "import importlib\nimportlib.import_module('gguf')",
            "only octavo.integrations may",
        ),
        ("octavo.quantization.plan", "import importlib\nimportlib.import_module(name)", "by a computed name"),
        ("octavo.ops.cpu", "import triton", "only octavo.ops.triton may"),
        ("octavo.quantization.plan", "import pandas", "in neither"),
        ("octavo.quantization.plan", "if x:\n    print(1)", "prints"),
    ],
)
def test_a_wrong_way_is_seen(module: str, source: str, why: str) -> None:
    assert why in "".join(problems(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("octavo.ops.cpu", "from octavo.ops import reference"),
        ("octavo.layers", "import torch\nfrom octavo import modules"),
        ("octavo.recipe", "def f():\n    import yaml"),
        ("octavo.integrations.transformers", "import transformers\nfrom octavo.formats import checkpoint"),
        ("octavo.cli.main", "import rich\nimport octavo\nprint(1)"),
    ],
)
def test_a_right_way_is_free(module: str, source: str) -> None:
    assert problems(module, source) == []
