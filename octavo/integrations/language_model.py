"""Causal language models of transformers, float or int8 alike: load one with its tokenizer, feed it text.

model, tokenizer = load_language_model("out/")
ids = token_ids(tokenizer, text, limit=8192, window=512)
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from octavo.errors import CheckpointError, OctavoError
from octavo.formats.checkpoint import CheckpointReader
from octavo.integrations.hub import load, load_tokenizer, no_progress_bar
from octavo.integrations.local_files import is_gguf, resolve
from octavo.integrations.model_classes import transformers_class

__all__ = [
    "CACHE_NAMES", "broken_template", "cache_name", "has_key_value_cache", "last_logits_only", "load_causal",
    "load_language_model", "other_kind", "positions_of", "refuse_unknown_tokens", "token_ids",
]  # fmt: skip


def load_language_model(path: str | Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    path: as for `octavo.load`. Raises: CheckpointError as `octavo.load` does, for a source without a tokenizer, and for
        a model of another kind, before its weights are loaded.
    """
    source = resolve(path)
    _refuse_other_kinds(source)
    tokenizer = load_tokenizer(source)
    return load_causal(source, device=device), tokenizer


def load_causal(path: str | Path, *, device: str = "cpu") -> Any:
    """A causal language model in eval mode, without a tokenizer. path, Raises: as for `load_language_model`."""
    source = resolve(path)
    _refuse_other_kinds(source)
    with no_progress_bar():
        return load(source).to(device)


def other_kind(source: Path) -> str | None:
    """The class of the model that a source holds, if it is one of transformers' or diffusers' and no causal language
    model."""
    if is_gguf(source):
        return None
    with CheckpointReader(source) as reader:
        config = reader.config or {}
    if "_class_name" in config:  # of diffusers
        return str(config["_class_name"])
    name = (config.get("architectures") or [""])[0]
    model_class = transformers_class(name)
    # A class that transformers does not have is `load`'s to refuse, or the checkpoint's own code.
    if model_class is not None and (config.get("is_encoder_decoder") or not model_class.can_generate()):
        return str(name)
    return None


def _refuse_other_kinds(source: Path) -> None:
    if name := other_kind(source):
        raise CheckpointError(
            f"{source}: holds a {name}, expected a causal language model (one that continues text); "
            "octavo.compare judges models of any kind in Python"
        )


def last_logits_only(model: Any) -> dict[str, int]:
    """Arguments for the model's forward that make it compute only the logits of the last position; {} if it cannot."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument for a key-value cache. transformers before 5.24 has the second; later releases still accept
it."""


def cache_name(model: Any) -> str | None:
    """The name of the key-value cache in the model's forward and outputs; None if it has none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def has_key_value_cache(model: Any) -> bool:
    """Whether the model has a cache with keys and values. (Since transformers 5.24 Mamba's state is called a cache
    too.)"""
    return cache_name(model) is not None and hasattr(model.config.get_text_config(), "num_attention_heads")


def positions_of(model: Any) -> int | None:
    """How many tokens the model can be fed at once; None where its config does not say."""
    # Of a model that sees or hears too, the part that reads text says it.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def refuse_unknown_tokens(model: Any, ids: Tensor) -> None:
    """Raise OctavoError for ids that the model's table of embeddings has no row for."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        rows = None  # transformers' base classes ask a submodule that not every model has
    if rows is not None and ids.numel() and int(ids.max()) >= rows:
        raise OctavoError(
            f"the text has token {int(ids.max())}, and the model has {rows} (0 to {rows - 1}); its tokenizer is "
            "another model's, or tokens were added to it: take the model's own, or make room with transformers' "
            "resize_token_embeddings"
        )


def broken_template(error: Exception) -> str | None:
    """The line and message of a syntax error in a chat template; None if applying it raised something else."""
    return f"line {error.lineno}: {error.message}" if isinstance(error, jinja2.TemplateSyntaxError) else None


def token_ids(tokenizer: Any, text: str, *, limit: int, window: int) -> Tensor:
    """The first `limit` tokens of `text`, for windows of `window` tokens that a model reads one by one.

    Where the tokenizer begins a text with a token of its own (BOS), each window begins with it.
    Returns: int64 [T], T <= limit, as `octavo.perplexity` takes them.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:limit]
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer("a").input_ids[:1] == [begin]:
        step = window - 1
        ids = [token for start in range(0, len(ids), step) for token in (begin, *ids[start : start + step])][:limit]
    return torch.tensor(ids, dtype=torch.int64)
