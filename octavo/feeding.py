"""Batches, and models that are run on them to be watched or judged: in eval mode, without gradients, left as they were.

A batch is a tensor (the model's one argument), a tuple or list (positional arguments) or a dict (keyword arguments). It
is left as it was, too: a model is fed a copy, for it may write into what it is given (a key-value cache grows), and be
run on it again.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from octavo.errors import EvaluateError, QuantizeError

__all__ = [
    "Progress",
    "at_rest",
    "check_batches",
    "check_module",
    "device_of",
    "drawn_again",
    "feed",
    "first_tensor",
    "hooked",
    "on_tensors",
    "padding_masks",
]

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all, or 0 where that is not known) as the work goes on."""


def check_module(model: object) -> None:
    """Raise QuantizeError for what is no module: a state dict, a pipeline that holds models."""
    if not isinstance(model, nn.Module):
        raise QuantizeError(
            f"model is a {type(model).__name__}, expected an nn.Module; of a pipeline, give the modules that it holds "
            "one by one, of a state dict, the model with it loaded"
        )


def check_batches(batches: object) -> None:
    """Raise EvaluateError for one batch where an iterable of them is expected."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise EvaluateError(
            f"batches is one {type(batches).__name__}, expected an iterable of batches; for one batch write [batch]"
        )


def feed(model: Callable[..., Any], batch: Any, device: torch.device | None, who: str) -> Any:
    """What `model` returns for a copy of `batch`, whose tensors are on `device` (None: where they are in the batch).

    who: what an error calls the model. Raises: EvaluateError for a batch of another type.
    """

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)

    if isinstance(batch, Mapping):
        return model(**on_tensors(batch, moved))
    if isinstance(batch, Tensor | PackedSequence):
        return model(on_tensors(batch, moved))
    if isinstance(batch, tuple | list):
        return model(*on_tensors(batch, moved))
    raise EvaluateError(
        f"{who} was to be fed a {type(batch).__name__}; expected a tensor, a tuple of positional arguments or a "
        "dict of keyword arguments"
    )


def on_tensors(batch: Any, do: Callable[[Tensor], Any]) -> Any:
    """A deep copy of the batch with `do` of each of its tensors in its place, whatever holds them; a mapping becomes a
    dict. Arguments that cannot be copied (a lock, an open file) are in it themselves."""
    known: dict[int, Any] = {}

    def copied(item: Any) -> Any:
        if isinstance(item, torch.Generator):
            return item.clone_state()
        try:
            with _CopyingBy(do):
                return copy.deepcopy(item, known)
        except TypeError:
            return item

    if isinstance(batch, Mapping):
        return {name: copied(item) for name, item in batch.items()}
    return type(batch)(map(copied, batch)) if type(batch) in (tuple, list) else copied(batch)


class _CopyingBy(TorchFunctionMode):
    """While open, the deep copy of a tensor is `do` of it."""

    def __init__(self, do: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._do = do

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        return self._do(args[0])


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among a module's arguments, which hooks see apart."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)


def device_of(model: Any, name: str) -> torch.device | None:
    """Where a module's first parameter (or buffer) is; None for what has none.

    Raises: EvaluateError, calling the model `name`, if that is `meta`.
    """
    if not isinstance(model, nn.Module):
        return None
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    if first is not None and first.is_meta:
        raise EvaluateError(f"{name}: is on the meta device, which holds no values; load its weights first")
    return None if first is None else first.device


@contextlib.contextmanager
def at_rest(*models: Any) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode comes back at the end. And without the fast path of torch's
    encoder layers, which runs none of the modules in them, on nested tensors without the padding."""
    roots = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for root in roots:
            root.eval()
        # Not inference_mode: what a module caches in its forward must stay an ordinary tensor.
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


def drawn_again(device: torch.device | None) -> contextlib.AbstractContextManager[None]:
    """While open, the random numbers that a model on `device` draws (noise, samples) are those that come after it, too:
    runs that are to be held against each other draw the same."""
    return torch.random.fork_rng([device] if device is not None and device.type == "cuda" else [])


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], register: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """With a hook on each of `modules`; register: puts it there, and returns the handle by which it is removed."""
    handles = []
    try:
        for name, module in modules.items():
            handles.append(register(name, module))
        yield
    finally:
        for handle in handles:
            handle.remove()


def padding_masks(model: Any, batch: Any) -> list[Tensor]:
    """The masks [B, T] that a batch has, as booleans, True where a position counts: `attention_mask`, then the
    decoder's: `decoder_attention_mask`, or all of its input, or what is no padding (-100) of the labels that an
    encoder-decoder makes its input of."""
    if not isinstance(batch, Mapping):
        return []
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if masks[1] is None:
        fed = (batch.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        masks[1] = next((x.new_ones(x.shape[:2]) for x in fed if isinstance(x, Tensor)), None)
    labels = batch.get("labels")
    if masks[1] is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        of_tokens = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        masks[1] = labels != -100 if of_tokens else None
    return [mask.bool() for mask in masks if isinstance(mask, Tensor)]
