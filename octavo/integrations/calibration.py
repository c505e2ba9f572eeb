"""Calibrating language models: the float model, and text as batches of token ids.

model, tokenizer = load_float(path)
stats = octavo.calibrate(model, text_batches(tokenizer, text, samples=64, seq_len=512))
octavo.smooth(model, stats, "auto")
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from octavo.errors import CalibrateError, QuantizeError
from octavo.integrations.hub import no_progress_bar
from octavo.integrations.language_model import broken_template, load_language_model, token_ids
from octavo.integrations.local_files import refuse_adapters_beside, resolve
from octavo.modules import DynamicQuantLinear, QuantLinear, QuantModule, StaticQuantLinear

__all__ = [
    "Document",
    "LinearInputs",
    "document_batches",
    "linear_inputs",
    "load_float",
    "save_float",
    "text_batches",
]

T = TypeVar("T")

_EXPECTED = "expected text like the model's later use: a token that follows none is not like the others; give more"

Document = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a chat: [{"role": "user", "content": "..."}, ...]."""


def load_float(path: str | Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """A float causal language model in its own dtype, in eval mode, and its tokenizer.

    path: as for `octavo.load`. Raises: CheckpointError as `load_language_model` does, and for adapters of PEFT beside
        the model; QuantizeError for an int8 one.
    """
    refuse_adapters_beside(resolve(path))
    model, tokenizer = load_language_model(path, device=device)
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise QuantizeError(f"{path}: is quantized already; expected the float model that it was made of")
    return model, tokenizer


@dataclasses.dataclass(frozen=True)
class LinearInputs:
    """How many int8 linear layers of a model have inputs of which kind."""

    static: int
    dynamic: int
    float: int


def linear_inputs(model: nn.Module) -> LinearInputs:
    """What became of the inputs of a quantized model's linear layers: `quantize` may have repaired some."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    static = sum(isinstance(layer, StaticQuantLinear) for layer in layers)
    int8 = sum(isinstance(layer, DynamicQuantLinear) for layer in layers)  # of which the static ones are a kind
    return LinearInputs(static, int8 - static, len(layers) - int8)


def text_batches(tokenizer: Any, text: str, *, samples: int, seq_len: int) -> list[Tensor]:
    """`samples` windows of `seq_len` tokens, spread evenly over the text; fewer if the text has no more.

    Where the tokenizer begins a text with a token of its own (BOS), each window begins with it. seq_len: at least 2.
    Returns: int64 [1, seq_len] each; one shorter window for a shorter text.
    Raises: CalibrateError for a text without tokens, or with one.
    """
    ids = token_ids(tokenizer, text, limit=sys.maxsize, window=seq_len)
    if not len(ids):
        raise CalibrateError("the calibration text has no tokens; expected text that is like the model's later use")
    if len(ids) == 1:
        raise CalibrateError(f"the calibration text is one token, {_EXPECTED}")
    windows = [window for window in ids.split(seq_len) if len(window) == seq_len] or [ids]
    return [window.unsqueeze(0) for window in _spread(windows, samples)]


def document_batches(tokenizer: Any, documents: Sequence[Document], *, samples: int, seq_len: int) -> list[Tensor]:
    """`samples` of the documents, spread evenly over all, each cut to its first `seq_len` tokens.

    A document is tokenized as the model expects it: a text begins with BOS if the tokenizer says so, messages go
    through the chat template.
    Returns: int64 [1, T] each, T <= seq_len.
    Raises: CalibrateError for no documents, one without tokens, none with more than one, and messages that there is no
        chat template for, a broken one, or one that they do not fit.
    """
    if not documents:
        raise CalibrateError("there are no documents to calibrate on, expected at least one")
    batches = [_token_ids_of(tokenizer, document)[:seq_len] for document in _spread(documents, samples)]
    if not all(batches):
        raise CalibrateError("a calibration document has no tokens; leave empty documents out")
    if max(map(len, batches)) == 1:
        raise CalibrateError(f"no calibration document has more than one token, {_EXPECTED}")
    return [torch.tensor([ids], dtype=torch.int64) for ids in batches]


def _token_ids_of(tokenizer: Any, document: Document) -> list[int]:
    if isinstance(document, str):
        return list(tokenizer(document, verbose=False).input_ids)
    if not tokenizer.chat_template:
        raise CalibrateError("a calibration document holds messages, and the tokenizer has no chat template; give text")
    try:
        return list(tokenizer.apply_chat_template(document, return_dict=True)["input_ids"])
    except Exception as error:  # what it raises is the template's own affair
        if fault := broken_template(error):
            raise CalibrateError(
                f"the tokenizer's chat template is broken: {fault}; mend it (it is in chat_template.jinja or "
                "tokenizer_config.json), or calibrate on text"
            ) from error
        raise CalibrateError(
            f"the messages of a calibration document do not fit the tokenizer's chat template: {error!r}; expected a "
            'list of {"role": ..., "content": ...} with the roles in the order that it allows'
        ) from error


def _spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly from the first on; all if there are no more."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def save_float(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a float transformers model and its tokenizer into a folder, as a checkpoint that any runtime loads.

    folder: made if it is not there; files of the same names are replaced. Raises: what transformers does.
    """
    with no_progress_bar():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
