"""Find code that reads a layer's weight instead of calling the layer.

    target_dtype = self.patch_embedding.weight.dtype        (CLIP, SigLIP, Qwen-VL: the input would be cast to int8)
    F.linear(x, self.embed_tokens.weight)                   (a head written by hand: codes used without their scale)
    for block in self.blocks: block.output.weight.div_(2)   (RWKV rescales its layers)

An int8 layer in that place would give wrong numbers without an error, so such layers stay float with this reason.
Found by reading the source of the model's own classes (`class_source.py`): every `self.a.b.weight` outside of
constructors and the like. Spared are uses that are harmless (`.device`, `.shape`), that already mind int8 (transformers'
`self.wo.weight.dtype != torch.int8`), or that stand under an `if` that is false as this model is configured (BLOOM
reads its weights only if `self.pretraining_tp > 1 and self.slow_but_exact`).

What is read under `if self.training` only (Mamba 2's mixers hand their output projection to a kernel there) is no
obstacle to int8, but to training: `refuse_training`.

What it cannot see: weights handed to or found by code outside the model's classes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from octavo.class_source import WEIGHTS, holds, is_readable, reads_of_class
from octavo.errors import OctavoError, OctavoWarning

__all__ = ["refuse_training", "weight_readers"]

_NOT_RUNNING = re.compile(
    r"^_*(init|initialize)(_*weights?|_*parameters|_+)?$|^__init_subclass__$|reset_parameters|resize|tie_weights|"
    "extra_repr|^set_"
)

def weight_readers(model: nn.Module) -> dict[str, str]:
    """Module name -> the method (Class.method) that reads its weight directly, for the modules of `model`, in eval
    mode."""
    classes = {type(module) for module in model.modules() if not _is_known(type(module))}
    _warn_of_unreadable(classes)
    return {layer: method for _, layer, method in _found(model, classes, training=False)}


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """A hook before the forward of a module that reads the weight of an int8 layer while it is trained."""

    layer: str
    method: str

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            raise OctavoError(
                f"{self.layer}: {self.method} reads its weight directly while training, and would take int8 codes for "
                f"it; run the model in eval mode, or to train it quantize with ignore=['{self.layer}', ...]"
            )


def refuse_training(model: nn.Module, int8: Collection[str]) -> None:
    """Have the modules of `model` that read weights of the layers `int8` in training mode raise OctavoError in it.

    model: with float layers or int8 ones in their places, whose names are the same.
    """
    classes = {cls for cls in {type(module) for module in model.modules()} if _mentions_training(cls)}
    in_eval = set(_found(model, classes, training=False))
    for reader, layer, method in dict.fromkeys(_found(model, classes, training=True)):
        if layer in int8 and (reader, layer, method) not in in_eval:
            reader.register_forward_pre_hook(_Refusal(layer, method))


def _mentions_training(cls: type) -> bool:
    """Whether one of its methods may read a weight under `if self.training`: asked of compiled code, for the source of
    a class takes a while to read."""
    functions = (inspect.unwrap(value) for base in cls.__mro__ if not _is_known(base) for value in vars(base).values())
    uses = [set(function.__code__.co_names) for function in functions if inspect.isfunction(function)]
    return any("training" in names and names & WEIGHTS for names in uses)


def _found(model: nn.Module, classes: Collection[type], *, training: bool) -> Iterator[tuple[nn.Module, str, str]]:
    """(module of one of `classes`, name of a layer whose weight it reads directly, its method Class.method that does)
    in train or eval mode."""
    names = {id(module): name for name, module in model.named_modules()}
    places = dict(model.named_modules(remove_duplicate=False))  # one layer may stand in several
    for name, module in model.named_modules():
        if type(module) not in classes:
            continue
        for read in reads_of_class(type(module)):  # type: ignore[arg-type]  # a class is hashable
            if _NOT_RUNNING.search(read.method):
                continue
            if all(holds(condition, module, training) is not False for condition in read.conditions):
                method = f"{type(module).__name__}.{read.method}"
                path = ".".join((name, *read.path) if name else read.path)
                if "*" in read.path:
                    pattern = re.compile(re.escape(path).replace(r"\*", r"[^.]+"))
                    read_layers = [layer for place, layer in places.items() if pattern.fullmatch(place)]
                else:
                    read_layers = [places[path]] if path in places else []
                yield from ((module, names[id(layer)], method) for layer in read_layers)


def _is_known(cls: type) -> bool:
    return cls.__module__.startswith(("torch.", "octavo."))


def _warn_of_unreadable(classes: set[type]) -> None:
    own = (base for cls in classes for base in cls.__mro__ if "forward" in vars(base) and not _is_known(base))
    names = sorted({base.__qualname__ for base in own if not is_readable(base)})
    if names:
        warnings.warn(
            f"the source of {', '.join(names)} cannot be read (it was typed at a prompt?): code that reads a layer's "
            "weight instead of calling the layer is not found there, and would compute with int8 codes; put the class "
            "into a file, or such layers on the ignore list",
            OctavoWarning,
            stacklevel=4,
        )
