"""Where the files of a model are: a local checkpoint folder or file, or the id of a model on the Hugging Face Hub
("org/name"), whose files are downloaded, or found in the local cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from octavo.errors import CheckpointError
from octavo.formats.checkpoint import PICKLE_SUFFIXES

__all__ = ["is_gguf", "refuse_adapters_beside", "resolve"]

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_TIMEOUT = 10.0
"""Seconds that the Hub has to answer."""
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "*.tiktoken")
_UNWANTED = ("consolidated*", "original/*")
"""The same weights once more, as who made the model published them first (Mistral, gpt-oss)."""


def resolve(source: str | Path) -> Path:
    """The local folder or file of a source; a Hub id is downloaded (or found in the local cache).

    Raises: CheckpointError if there is no such path and the Hub does not have it or cannot be reached, and for a name
        that transformers would not take for that of a .gguf file.
    """
    path = Path(source)
    if path.exists():
        if path.suffix.lower() == ".gguf" and path.suffix != ".gguf" and path.is_file():
            raise CheckpointError(
                f"{path}: transformers reads .gguf files by their name; rename it to {path.with_suffix('.gguf').name}"
            )
        return path
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or path.suffix == ".gguf":
        raise CheckpointError(f"{source}: no such file or folder; expected a checkpoint, or the id of one on the Hub")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # Asked first and with a limit, because snapshot_download waits for a silent network without end.
        model = HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id}: neither a local path nor a model on the Hub that you may read; check the name, or log in with "
            "`hf auth login` for a private one"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{hub_id}: no such file or folder, and no id of the Hub either") from error
    except Exception as error:  # offline, a proxy, a server's error: what is raised differs between releases
        try:
            return Path(snapshot_download(hub_id, local_files_only=True))
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"{hub_id}: not a local path, not in the local cache, and the Hub cannot be reached; connect, or "
                f"download the model elsewhere and give its folder ({type(error).__name__}: {error})"
            ) from error
    _refuse_other_weights(hub_id, [file.rfilename for file in model.siblings or ()])
    try:
        return Path(
            snapshot_download(hub_id, revision=model.sha, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED))
        )
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{hub_id}: cannot be downloaded: {error}") from error


def _refuse_other_weights(hub_id: str, files: list[str]) -> None:
    """Raise CheckpointError for a model of the Hub whose weights are all of kinds that are not downloaded."""
    others = [file for file in files if file.endswith((*PICKLE_SUFFIXES, ".gguf"))]
    if others and not any(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{hub_id}: holds no safetensors, but {', '.join(others[:3])}; download one .gguf file (`hf download`) and "
            "give its path, or convert pickles once, with from_pretrained(id).save_pretrained(folder) of the model's "
            "class in transformers"
        )


def is_gguf(source: Path) -> bool:
    """Whether a source is a .gguf file; a folder may be called so too."""
    return source.suffix == ".gguf" and source.is_file()


def refuse_adapters_beside(folder: Path) -> None:
    """Raise CheckpointError for adapters in a checkpoint's folder, which transformers would put on the model."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds adapters of PEFT; in Python, merge them into the model that they are for "
            "(merge_and_unload()) and save that, or take adapter_config.json away for the model without them"
        )
