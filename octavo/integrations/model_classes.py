"""The class of transformers that a checkpoint's model has by its config.json, and the model without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.errors import CheckpointError, MissingExtra
from octavo.formats.checkpoint import CheckpointReader, read_config
from octavo.integrations.local_files import refuse_adapters_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "brings_its_code", "config_of", "import_transformers", "model_class_of", "skeleton", "transformers_class",
    "unreadable",
]  # fmt: skip


def import_transformers(what_for: str) -> Any:
    """The package. Raises: MissingExtra, which says what it is needed for, where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(f"transformers is needed {what_for}: pip install 'octavo[hf]'") from error
    return transformers


def unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises for a config or a tokenizer that is not as it should be."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError


def config_of(folder: Path, trust_remote_code: bool) -> Any:
    """transformers' config of a checkpoint. Raises: CheckpointError for one that it cannot make anything of."""
    transformers = import_transformers("to build the model; for a model of your own, pass model=")
    config = read_config(folder)
    if config is None:
        CheckpointReader(folder).close()  # raises a better error if it is not a checkpoint at all
        refuse_adapters_beside(folder)
        beside = folder.is_file() and (folder.parent / "config.json").is_file()
        fix = f"give the folder {folder.parent}, which has one, or, in Python," if beside else "in Python,"
        raise CheckpointError(
            f"{folder}: has no config.json, so what model it is of is not known; {fix} pass model=, a freshly built one"
        )
    if not trust_remote_code and brings_its_code(config):
        raise CheckpointError(
            f"{folder}: its model is not one of transformers' but in code that comes with the checkpoint, which is run "
            "only for who trusts it; in Python, pass trust_remote_code=True to octavo.load or "
            "octavo.quantize_checkpoint"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except unreadable() as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot read it: {error}; for a model that is not one of "
            "transformers', in Python, pass model=, a freshly built one"
        ) from error


def brings_its_code(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json is defined by code that comes with the checkpoint, and not by transformers."""
    name = (config.get("architectures") or [""])[0]
    return bool(config.get("auto_map")) and transformers_class(name) is None


def transformers_class(name: object) -> Any:
    """The class of models that transformers has under that name; None if it has none."""
    transformers = import_transformers("to build the model")
    found = getattr(transformers, str(name), None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def model_class_of(config: Any, folder: Path) -> Any:
    """The class that the config's first architecture names."""
    transformers = import_transformers("to build the model")
    if not config.architectures:
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures is {config.architectures}, expected the model's class, such as "
            '["LlamaForCausalLM"]; write it there, or, in Python, pass model=, a freshly built one'
        )
    name = config.architectures[0]
    if (found := transformers_class(name)) is not None:
        return found
    for auto_class, reference in (getattr(config, "auto_map", None) or {}).items():
        if str(reference).endswith(f".{name}"):  # a tokenizer's is a list
            return getattr(transformers, auto_class)
    raise CheckpointError(
        f"{folder / 'config.json'}: architectures is {config.architectures}, which transformers "
        f"{transformers.__version__} does not have; upgrade transformers, or, in Python, pass model=, a freshly "
        "built one"
    )


def skeleton(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The transformers model of a checkpoint folder, on `meta`: its structure without any weights.

    Raises: CheckpointError for a folder without a config.json, or with that of a model that transformers does not have,
        or whose code comes with the checkpoint, unless `trust_remote_code` says to run that; MissingExtra without
        transformers.
    """
    folder = Path(folder)
    config = config_of(folder, trust_remote_code)
    model_class = model_class_of(config, folder)
    try:
        with torch.device("meta"):
            if hasattr(model_class, "_from_config"):
                model = model_class._from_config(config)
            else:
                model = model_class.from_config(config, trust_remote_code=trust_remote_code)
    except unreadable() as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build a {model_class.__name__} of it: {error!r}; "
            "correct that, or architectures, there, or, in Python, pass model=, a freshly built one"
        ) from error
    model.tie_weights()
    return model  # type: ignore[no-any-return]
