"""Run a model on batches to observe or to judge it: in eval mode, without gradients, and with nothing changed by it.

A batch is a tensor (the model's only argument), a tuple or list (positional arguments) or a dict (keyword arguments).
The model is fed a copy of it, because a model may write to its arguments (a key-value cache grows) and may be run on
the same batch again.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from octavo.errors import EvaluateError, OctavoError, QuantizeError

__all__ = [
    "Progress",
    "check_batches",
    "check_callable",
    "check_module",
    "check_progress",
    "device_of",
    "eval_mode",
    "feed",
    "first_tensor",
    "hooked",
    "on_tensors",
    "padding_masks",
    "same_random_numbers",
]

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all, or 0 where that is not known) as the work goes on."""


def check_module(model: object) -> None:
    """Raise QuantizeError if `model` is not an nn.Module, but a class, a state dict or a pipeline that holds models."""
    if isinstance(model, type):
        raise QuantizeError(f"model is the class {model.__name__}, expected a module: call it, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise QuantizeError(
            f"model is a {type(model).__name__}, expected an nn.Module; of a pipeline, give the modules that it holds "
            "one by one, of a state dict, the model with it loaded"
        )


def check_callable(model: object, name: str) -> None:
    """Raise EvaluateError for what cannot be run as a model; name: of the argument."""
    if isinstance(model, type) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise EvaluateError(
            f"{name} is {what}, expected a model: an nn.Module or a function that is called with a batch; octavo.load "
            "reads one from a path"
        )


def check_progress(progress: object) -> None:
    """Raise OctavoError for what cannot be called as the work goes on, which would stop it halfway."""
    if progress is not None and not callable(progress):
        raise OctavoError(
            f"progress is {progress!r}, expected a function that is called with (steps done, steps in all), or None"
        )


def check_batches(batches: object) -> None:
    """Raise EvaluateError if `batches` is a single batch and not an iterable of batches."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise EvaluateError(
            f"batches is one {type(batches).__name__}, expected an iterable of batches; for one batch write [batch]"
        )


def feed(model: Callable[..., Any], batch: Any, device: torch.device | None, who: str) -> Any:
    """Call `model` with a copy of `batch`, its tensors moved to `device` (None: left where they are).

    who: what an error calls the model.
    Returns: what the model returns.
    Raises: EvaluateError for a batch of another type, or of other arguments than the model takes.
    """

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)

    args: Any = ()
    kwargs: Any = {}
    if isinstance(batch, Mapping):
        kwargs = on_tensors(batch, moved)
    elif isinstance(batch, Tensor | PackedSequence):
        args = (on_tensors(batch, moved),)
    elif isinstance(batch, tuple | list):
        args = on_tensors(batch, moved)
    else:
        raise EvaluateError(
            f"{who} was to be fed a {type(batch).__name__}; expected a tensor, a tuple of positional arguments or a "
            "dict of keyword arguments"
        )
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        _refuse_misfit(model, args, kwargs, who, error)
        raise


def _refuse_misfit(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], who: str, error: TypeError) -> None:
    """Raise EvaluateError if these are not the arguments that the model takes. error: what calling it gave."""
    try:
        takes = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except ValueError:  # what is written in C says nothing of it
        return
    try:
        takes.bind(*args, **kwargs)
    except TypeError as misfit:
        given = f"the keywords {', '.join(kwargs)}" if kwargs else f"{len(args)} positional arguments"
        raise EvaluateError(
            f"{who} was fed {given}, and takes {takes}: {misfit}; of a loader of inputs and labels give the inputs "
            "alone: (x for x, _ in loader)"
        ) from error


def on_tensors(batch: Any, do: Callable[[Tensor], Any]) -> Any:
    """A deep copy of the batch in which every tensor t, however deep inside, is replaced by `do(t)`.

    A mapping becomes a dict. Arguments that cannot be copied (a lock, an open file) are passed on as they are.
    """
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
    """While open, `copy.deepcopy` of a tensor t returns `do(t)`."""

    def __init__(self, do: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._do = do

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        return self._do(args[0])


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among the arguments of a module, as its hooks get them."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)


def device_of(model: Any, name: str) -> torch.device | None:
    """The device of a module's first parameter or buffer; None if it has none, or is not a module.

    Raises: EvaluateError, which calls the model `name`, if that device is `meta`.
    """
    if not isinstance(model, nn.Module):
        return None
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    if first is not None and first.is_meta:
        raise EvaluateError(f"{name}: is on the meta device, which holds no values; load its weights first")
    return None if first is None else first.device


@contextlib.contextmanager
def eval_mode(*models: Any) -> Iterator[None]:
    """While open, the models are in eval mode and no gradients are recorded; afterwards each module has its own mode
    back.

    The fast path of torch's encoder layers is off as well: it bypasses the modules inside them, and so their hooks.
    """
    roots = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for root in roots:
            root.eval()
        # Not inference_mode: a tensor that a module caches in its forward must remain usable outside of it.
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


def same_random_numbers(device: torch.device | None) -> contextlib.AbstractContextManager[None]:
    """While open, random numbers may be drawn on `device`; afterwards the generators are back in the state they had
    before. Two runs to be compared, each inside of one, draw the same numbers."""
    return torch.random.fork_rng([device] if device is not None and device.type == "cuda" else [])


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], register: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """While open, each of `modules` has a hook. register: (name, module) -> the handle by which the hook is removed."""
    handles = []
    try:
        for name, module in modules.items():
            handles.append(register(name, module))
        yield
    finally:
        for handle in handles:
            handle.remove()


def padding_masks(model: Any, batch: Any) -> list[Tensor]:
    """The padding masks of a batch, bool [B, T] each, True for positions that count: `attention_mask`, then the
    decoder's.

    The decoder's mask is `decoder_attention_mask`; without one, all positions of the decoder's input count, or those of
    the labels, which an encoder-decoder makes that input from, that are not padding (-100).
    """
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
