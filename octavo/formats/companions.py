"""Copy the files that belong to a checkpoint beside its weights: tokenizer, chat templates, generation config, code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from octavo.errors import CheckpointError
from octavo.formats.checkpoint import PICKLE_SUFFIXES, not_readable

__all__ = ["NOT_A_TOKENIZERS", "copy_companions"]

_OTHER_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite")
_WEIGHT_SUFFIXES = PICKLE_SUFFIXES + _OTHER_SUFFIXES


NOT_A_TOKENIZERS = ("*.py", "*processor_config.json")
"""The companions to copy when a tokenizer is saved separately: code of the model, and processors of other inputs."""


def copy_companions(src: str | Path, dst: str | Path, only: Collection[str] = ("*",)) -> list[str]:
    """Copy what belongs to a checkpoint beside its weights: tokenizer, generation config, chat templates, code, README.

    src: a checkpoint's folder; links are followed (files in the Hub's cache are links). For a lone file: nothing.
    dst: an existing folder. only: patterns, of which a file's name has to match one.
    Returns: the copied files' names, relative to `src`, sorted.
    Raises: CheckpointError naming a file that cannot be read.

    Left out: weights in any format and their indexes; adapter_config.json, by which transformers would look for such;
    config.json, which whoever writes the weights writes; hidden files; and folders that hold weights, which are other
    exports of the model (onnx/, checkpoint-500/), unless modules.json names them as parts of it (the 2_Dense/ of a
    sentence-transformers model): those are copied whole.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_dir():
        return []
    parts = _sentence_transformers_parts(src)
    chosen = [
        file
        for entry in src.iterdir()
        if entry.name not in ("config.json", "adapter_config.json") and not _is_clutter(entry.name)
        for file in _companion_files(entry, whole=entry.name in parts)
        if any(fnmatchcase(file.name, pattern) for pattern in only)
    ]
    names = sorted(file.relative_to(src).as_posix() for file in chosen)
    for name in names:
        (dst / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(src / name, dst / name)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{src / name}: is a link to a file that is not there; download it again or remove it"
            ) from error
        except PermissionError as error:
            if error.filename != str(src / name):
                raise
            raise not_readable(src / name, error) from error
    return names


def _sentence_transformers_parts(src: Path) -> set[str]:
    """The subfolders that modules.json, [{"idx", "name", "path", "type"}, ...], makes parts of the model."""
    modules = src / "modules.json"
    if not modules.is_file():
        return set()
    try:
        return {str(module["path"]) for module in json.loads(modules.read_text(encoding="utf-8"))}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{modules}: expected a JSON list of objects with a path: {error!r}") from error


def _companion_files(entry: Path, *, whole: bool) -> list[Path]:
    if not entry.is_dir():
        return [] if _is_weights(entry) else [entry]
    inside = (file for file in entry.rglob("*") if not file.is_dir())
    files = [file for file in inside if not any(map(_is_clutter, file.relative_to(entry).parts))]
    return files if whole or not any(map(_is_weights, files)) else []


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHT_SUFFIXES or fnmatchcase(file.name, "*.index*.json")  # a variant's: .index.fp16.json
