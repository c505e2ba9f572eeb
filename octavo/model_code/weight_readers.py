"""Find code that reads a layer's weight instead of calling the layer.

    y = x @ self.embed_tokens.weight.T                      (a head written by hand: codes used without their scale)
    for block in self.blocks: block.output.weight.div_(2)   (RWKV rescales its layers)

An int8 layer in that place would give wrong numbers without an error, so such layers stay float with this reason.
Found by reading the source of the model's own classes (`class_source.py`): every `self.a.b.weight` in a
method that may run while the model computes, also in one that is handed the layer (LayoutLMv3 looks its biases up so),
and what a layer's own class reads of it. Spared are uses that are harmless (`.device`, `.numel()`), that already mind
int8 (transformers' `self.wo.weight.dtype != torch.int8`), or that stand under an `if` that is false as this model is
configured (BLOOM reads its weights only if `self.pretraining_tp > 1 and self.slow_but_exact`).

    target_dtype = self.patch_embedding.weight.dtype        (CLIP, SigLIP, Qwen-VL)

is no obstacle either, but such a layer has to answer with the model's dtype (`facade.py`), or its input would be cast
to int8. Nor is `.shape`, but where codes are laid out otherwise than the weight was (transposed convolutions, GPT-2's
`Conv1D`) the layer has to answer with that of the weight.

    qkv = F.linear(x, self.qkv.weight, bias)                (BEiT, EVA, Swin V2)

is none either, also in a function that is handed the weight: such a layer has to show something that `F.linear` takes
for a weight (`int8_weight.py`).

    if isinstance(layer, nn.Linear): x = layer(x)           (false of an int8 layer)

is no read of a weight, but would do something else of an int8 layer without an error, too: layers whose class is tested
stay float as they are. Where it cannot be told which are tested, all are that the module itself holds.

What is read under `if self.training` only (Mamba 2's mixers hand their output projection to a kernel there) is no
obstacle to int8, but to training: `refuse_training`.

Which methods may run is told by their names: those that may be called from outside of the model, which are forwards and
public methods that are given something, and those that one that may run mentions. What fuses layers, or rescales them
after they were initialized, is called while a model is made or converted (timm, diffusers), and does not count.

What it cannot see: weights handed to or found by code outside the model's classes, and private methods that only such
code calls.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

from octavo.errors import OctavoError, OctavoWarning
from octavo.layers import EXPERTS, float_class, kind_of
from octavo.model_code.class_source import (
    SELF,
    Call,
    Method,
    Path,
    Read,
    holds,
    is_a,
    is_readable,
    is_weight,
    methods_of,
)
from octavo.model_code.product_arguments import goes_into
from octavo.model_code.written_out import is_written_out
from octavo.modules.int8_weight import PRODUCTS, shows_int8_weight

__all__ = ["ask_a_parameter", "asked_about", "multiplied", "refuse_training", "told_apart", "weight_readers"]

_SETS_UP = re.compile(
    r"^_*(init|initialize)(_*weights?|_*parameters|_+)?$|^__init_subclass__$|^_init_added_|reset_parameters|resize|"
    "tie_weights|extra_repr|^set_|num_parameters|floating_point_ops|"
    "gradient_checkpointing(_enable|_disable)?$|input_require_grads$|"
    "^load_(from|pretrained|weights)$|^__prepare_scriptable__$"
)
"""Methods that make a model, count it or make it ready for training, and what torch.jit.script alone calls."""


def weight_readers(model: nn.Module) -> dict[str, str]:
    """Module name -> the method (Class.method) that reads its weight directly, and neither in a product that codes can
    be used in nor only for its dtype or shape, for the modules of `model`, in eval mode."""
    classes = {type(module) for module in model.modules() if not _is_known(type(module))}
    _warn_of_unreadable(classes)
    return {each.layer: each.method for each in _read(model, classes, training=False)}


def multiplied(model: nn.Module) -> set[str]:
    """Names of the modules of `model` whose weights are handed to a product, in train or eval mode."""
    classes = {type(module) for module in model.modules() if not _is_known(type(module))}
    layers = dict(model.named_modules())
    found = [each for training in (False, True) for each in _found(model, classes, _TAKERS.keys(), training=training)]
    return {each.layer for each in found if _is_product(each.asks, layers[each.layer])}


_TAKERS = {goes_into(product): kinds for product, kinds in PRODUCTS.items()}
"""What a read asks that hands a weight to a product -> the kinds of layers of which codes can be handed to it."""


def _is_product(asks: str, layer: nn.Module) -> bool:
    """Whether a read of the weight of `layer`, float or int8, is a product that its codes can be used in."""
    kind = kind_of(layer)
    return asks in _TAKERS and (shows_int8_weight(layer) if kind is None else kind.name in _TAKERS[asks])


def _read(model: nn.Module, classes: Collection[type], *, training: bool) -> Iterator[_Found]:
    """Reads of weights that codes would spoil, by modules of `classes` in train or eval mode."""
    layers = dict(model.named_modules())
    found = _found(model, classes, {"values", *_TAKERS}, training=training)
    return (each for each in found if not _is_product(each.asks, layers[each.layer]))


def told_apart(model: nn.Module) -> dict[str, str]:
    """Module name -> the method (Class.method) that tests its class, for the modules of `model`, in eval mode."""
    classes = {type(module) for module in model.modules() if not _is_known(type(module))}
    bases = {base for module in model.modules() for base in type(module).__mro__} - {nn.Module, object}
    asks = {is_a(base.__name__) for base in bases}
    return {each.layer: each.method for each in _found(model, classes, asks, training=False)}


def asked_about(model: nn.Module) -> set[str]:
    """Names of the modules of `model` whose weights are asked, in train or eval mode, for what the codes would answer
    otherwise: for their dtype, or for their shape if it is not that of the codes."""
    turned = {name for name, layer in model.named_modules() if (kind := kind_of(layer)) and not kind.keeps_shape}
    words = {"dtype", "shape", "size"} if turned else {"dtype"}
    classes = {cls for cls in {type(module) for module in model.modules()} if _mentions(cls, words)}
    asks = {"dtype", "shape"}
    found = [each for training in (False, True) for each in _found(model, classes, asks, training=training)]
    return {each.layer for each in found if each.asks == "dtype" or each.layer in turned}


def ask_a_parameter(model: nn.Module) -> dict[str, str]:
    """Module name -> the method (Class.method) that takes `next(self.parameters())` of it, for its device or dtype.
    Codes are no parameters."""
    return {
        name: f"{type(module).__name__}.{method.name}"
        for name, module in model.named_modules()
        if not _is_known(type(module))
        for method in _methods(type(module))
        if method.asks_a_parameter
    }


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
    classes = {cls for cls in {type(module) for module in model.modules()} if _mentions(cls, {"training"})}
    in_eval = set(_read(model, classes, training=False))
    for found in dict.fromkeys(_read(model, classes, training=True)):
        if found.layer in int8 and found not in in_eval:
            found.module.register_forward_pre_hook(_Refusal(found.layer, found.method))


def _mentions(cls: type, words: set[str]) -> bool:
    """Whether one of its methods or properties that may read a weight mentions an attribute of `words`: asked of
    compiled code, for the source of a class takes a while to read."""
    members = (member for base in cls.__mro__ if not _is_known(base) for member in vars(base).values())
    uses = [_mentioned_in(function.__code__) for function in map(_function_of, members) if inspect.isfunction(function)]
    return any(names & words and any(map(is_weight, names)) for names in uses)


def _function_of(member: Any) -> Any:
    """The function that a member of a class is, or is made of, as a property is."""
    match member:
        case property(fget=function) | functools.cached_property(func=function):
            return inspect.unwrap(function) if function else None
        case staticmethod(__func__=function) | classmethod(__func__=function):
            return inspect.unwrap(function)
    return inspect.unwrap(member) if inspect.isfunction(member) else None


def _mentioned_in(code: CodeType) -> set[str]:
    """The names that compiled code mentions, strings too, and the functions within it."""
    strings = {part for part in code.co_consts if isinstance(part, str)}
    return strings.union(code.co_names, *(_mentioned_in(part) for part in code.co_consts if isinstance(part, CodeType)))


class _Found(NamedTuple):
    """module: that reads the weight of the layer called `layer`, or has a method read it that it hands the layer to.
    method: that method, as Class.method. asks: what for, see `Read`."""

    module: nn.Module
    layer: str
    method: str
    asks: str


def _found(model: nn.Module, classes: Collection[type], asks: Collection[str], *, training: bool) -> Iterator[_Found]:
    """What modules of `classes` ask for in train or eval mode, of what `asks` lists."""
    names = {id(module): name for name, module in model.named_modules()}
    places = dict(model.named_modules(remove_duplicate=False))  # one layer may stand in several
    search = _Search(asks, training, follow=any(_reads_arguments(cls, asks) for cls in classes))
    running = _Running(model)
    for name, module in model.named_modules():
        if type(module) in classes:
            for method in _methods(type(module)):
                for path, reader, asked in search.read_by(module, method):
                    layers = _asked(name, path, asked, places)
                    if layers and running.has(type(module), method):
                        yield from (_Found(module, names[id(layer)], reader, asked) for layer in layers)


def _asked(name: str, path: Path, asks: str, places: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The layers that are asked by a read at `path` of the module called `name`. Of tests for a class those that it is
    about: where it cannot be told what is tested, those of that class which the module itself holds."""
    if asks in ("values", "dtype", "shape", *_TAKERS):
        return _at(name, path, places)
    layers = _at(name, path, places) if path[:1] == (SELF,) else list(_held(places[name]))
    return [layer for layer in layers if asks in {is_a(base.__name__) for base in type(layer).__mro__}]


def _held(module: nn.Module) -> Iterator[nn.Module]:
    """What a module holds, also in containers."""
    for child in module.children():
        yield child
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _held(child)


class _Running:
    """Which methods of a model's classes may run while it computes: what may be called from outside, and what one that
    may run mentions."""

    def __init__(self, model: nn.Module) -> None:
        self._classes: set[Any] = {type(module) for module in model.modules() if not _is_known(type(module))}

    def has(self, cls: type[nn.Module], method: Method) -> bool:
        return _may_be_called(cls, method) or method.name in self._mentioned

    @functools.cached_property
    def _mentioned(self) -> set[str]:
        every = {method for cls in self._classes for method in methods_of(cls)}
        # A method that is handed on while its module is made may be called later, as a hook is.
        names = {name for method in every if _SETS_UP.search(method.name) for name in method.hands_on}
        running = {method for cls in self._classes for method in _methods(cls) if _may_be_called(cls, method)}
        waiting = {method for cls in self._classes for method in _methods(cls)} - running
        while running:
            names.update(*(method.mentions for method in running))
            running = {method for method in waiting if method.name in names}
            waiting -= running
        return names


def _may_be_called(cls: type[nn.Module], method: Method) -> bool:
    """Whether it may be called from outside of the model: a forward, and what is public and is given something, but for
    what changes the model in place (`clip_`); of a class without a forward all that it has."""
    if cls.forward is nn.Module.forward or method.has_other_name or method.name.strip("_").startswith("forward"):
        return True
    is_special = method.name.startswith("__")
    is_plain = not method.name.startswith("_") and not method.name.endswith("_")
    return is_special or (is_plain and method.takes_input)


def _methods(cls: Any) -> list[Method]:
    return [method for method in methods_of(cls) if not _SETS_UP.search(method.name)]


def _reads_arguments(cls: type, asks: Collection[str]) -> bool:
    reads = (read for method in _methods(cls) for read in method.reads if read.asks in asks)
    return any(read.path[:1] != (SELF,) for read in reads)


def _at(name: str, path: Path, places: Mapping[str, nn.Module]) -> list[nn.Module]:
    """What lies at `path` of the module called `name`; several if there is a "*" or "**" in the path, none for an
    argument, nor for a module itself that is no layer of a kind with int8 weights."""
    if path[0] != SELF or (path == (SELF,) and not _has_own_class(places[name])):
        return []
    place = ".".join((name, *path[1:]) if name else path[1:])
    if "*" not in place:
        return [places[place]] if place in places else []
    pattern = re.compile(re.escape(place).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+"))
    return [layer for each, layer in places.items() if pattern.fullmatch(each)]


class _Search:
    """What methods ask for in train or eval mode, of what `asks` lists. follow: also of what they hand to methods that
    they call."""

    def __init__(self, asks: Collection[str], training: bool, follow: bool) -> None:
        self._asks = asks
        self._training = training
        self._follow = follow
        self._of_arguments: dict[tuple[int, str], set[tuple[int | str, str, str]]] = {}

    def read_by(self, module: nn.Module, method: Method) -> Iterator[tuple[Path, str, str]]:
        """Of a method of `module`: paths of what it reads the weights of, the Class.method that does it, and what that
        asks for."""
        for read in method.reads:
            if read.asks in self._asks and self._may_run(read, module):
                yield read.path, f"{type(module).__name__}.{method.name}", read.asks
        for call in method.calls if self._follow else ():
            if self._may_run(call, module):
                for argument, reader, asks in sorted(self._readers_of_arguments(module, call.function), key=str):
                    yield from ((path, reader, asks) for key, path in call.arguments if key == argument)

    def _may_run(self, step: Read | Call, module: nn.Module) -> bool:
        return all(holds(condition, module, self._training) is not False for condition in step.conditions)

    def _readers_of_arguments(self, module: nn.Module, function: Path) -> set[tuple[int | str, str, str]]:
        """Of a function that is a part of `module`: position, and name, of each argument whose weight is read, by which
        Class.method, and what that asks for."""
        called, name = self._method(module, function[1:])
        if called is None or _is_known(type(called)):
            return set()
        known = self._of_arguments.get((id(called), name))
        if known is not None:
            return known
        readers = self._of_arguments[id(called), name] = set()  # also where the method calls itself
        for method in _methods(type(called)):
            if method.name == name:
                for path, reader, asks in list(self.read_by(called, method)):
                    if len(path) == 1 and path != (SELF,):
                        readers |= {(key, reader, asks) for key in (*path, method.parameters.index(path[0]))}
                break  # bases come later
        return readers

    def _method(self, module: nn.Module, path: Path) -> tuple[nn.Module | None, str]:
        """What is called by `self.path(...)`: a method of `module` itself or a layer's forward, of several layers the
        first's; (None, "") for what is neither."""
        if len(path) == 1 and path[0] not in module._modules:
            return module, path[0]
        called: nn.Module | None = module
        for part in path:
            layers = {} if called is None else called._modules
            called = next(iter(layers.values()), None) if "*" in part else layers.get(part)
        return called, "forward" if called is not None else ""


def _has_own_class(module: nn.Module) -> bool:
    """Whether it is a layer of a kind that can be int8, and its class derives from that of the kind and does more."""
    kind = kind_of(module)
    if kind is None or kind.name == EXPERTS or type(module) is float_class(module, kind):
        return False
    return not is_written_out(module, float_class(module, kind))


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
