"""Find code of a model that reads a layer's weight instead of calling the layer.

    y = x @ self.embed_tokens.weight.T                      (a head written by hand: it would use codes without scales)
    for block in self.blocks: block.output.weight.div_(2)   (RWKV rescales its layers)

An int8 layer there would give wrong numbers without an error, so such layers stay float, with this reason
(`weight_readers`). They are found in the source of the model's classes (`class_source.py`): every `self.a.b.weight` in
a method that may run while the model computes, including methods that are passed the layer (as LayoutLMv3's are), and
what a layer's own class reads of its weight.

Not every read is an obstacle:

    self.wo.weight.device                                   codes have one too (also `.numel()`, ...)
    self.wo.weight.dtype != torch.int8                      the code takes care of int8 already (transformers' T5)
    if self.pretraining_tp > 1: ...                         false for the model as it is configured (BLOOM)
    target_dtype = self.patch_embedding.weight.dtype        the int8 layer has to answer with the dtype of the model, or
                                                            inputs would be cast to int8; likewise with the shape of the
                                                            weight, where codes are laid out in another way
                                                            (`asked_for_dtype_or_shape`, `facade.py`)
    qkv = F.linear(x, self.qkv.weight, bias)                the int8 layer has to show a weight that `F.linear` takes
                                                            (`used_in_products`, `int8_weight.py`)
    if self.training: ...                                   an obstacle to training only (`refuse_training`)

Two more things change what a model computes without an error:

    if isinstance(layer, nn.Linear): x = layer(x)           false for an int8 layer: layers whose class is tested stay
                                                            float (`class_testers`); all layers of the module, where it
                                                            cannot be told which are tested
    next(self.parameters()).dtype                           codes are no parameters: one layer stays float
                                                            (`first_parameter_readers`)

Which methods may run is decided by their names: forwards and public methods with arguments, which may be called from
outside of the model, and every method that one of these mentions. Methods that initialize, convert or rescale a model
are called before it is quantized, and do not count.

Not found are weights that are passed to, or looked up by, code outside the model's classes, and private methods that
only such code calls.
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

__all__ = [
    "asked_for_dtype_or_shape",
    "class_testers",
    "first_parameter_readers",
    "refuse_training",
    "used_in_products",
    "weight_readers",
]

_SETS_UP = re.compile(
    r"^_*(init|initialize)(_*weights?|_*parameters|_+)?$|^__init_subclass__$|^_init_added_|reset_parameters|resize|"
    "tie_weights|extra_repr|^set_|num_parameters|floating_point_ops|"
    "gradient_checkpointing(_enable|_disable)?$|input_require_grads$|"
    "^load_(from|pretrained|weights)$|^__prepare_scriptable__$"
)
"""Methods that build a model, count its parameters or prepare it for training, and those that only torch.jit calls."""


def weight_readers(model: nn.Module) -> dict[str, str]:
    """Name of a layer -> the method (Class.method) that reads its weight in a way that codes would spoil, in eval
    mode."""
    classes = {type(module) for module in model.modules() if not _is_known(type(module))}
    _warn_of_unreadable(classes)
    return {each.layer: each.method for each in _read(model, classes, training=False)}


def used_in_products(model: nn.Module) -> set[str]:
    """Names of the layers whose weights are passed to `F.linear` or a convolution, in train or eval mode."""
    classes = {type(module) for module in model.modules() if not _is_known(type(module))}
    layers = dict(model.named_modules())
    found = [each for training in (False, True) for each in _found(model, classes, _TAKERS.keys(), training=training)]
    return {each.layer for each in found if _is_product(each.asks, layers[each.layer])}


_TAKERS = {goes_into(product): kinds for product, kinds in PRODUCTS.items()}
"""`Read.asks` of a weight that is passed to a product -> the kinds of layers whose codes can take its place there."""


def _is_product(asks: str, layer: nn.Module) -> bool:
    """Whether a read of the weight of `layer`, float or int8, is a product that its codes can be used in."""
    kind = kind_of(layer)
    return asks in _TAKERS and (shows_int8_weight(layer) if kind is None else kind.name in _TAKERS[asks])


def _read(model: nn.Module, classes: Collection[type], *, training: bool) -> Iterator[_Found]:
    """Reads of weights that codes would spoil, by modules of `classes` in train or eval mode."""
    layers = dict(model.named_modules())
    found = _found(model, classes, {"values", *_TAKERS}, training=training)
    return (each for each in found if not _is_product(each.asks, layers[each.layer]))


def class_testers(model: nn.Module) -> dict[str, str]:
    """Name of a layer -> the method (Class.method) that tests its class, in eval mode."""
    classes = {type(module) for module in model.modules() if not _is_known(type(module))}
    bases = {base for module in model.modules() for base in type(module).__mro__} - {nn.Module, object}
    asks = {is_a(base.__name__) for base in bases}
    return {each.layer: each.method for each in _found(model, classes, asks, training=False)}


def asked_for_dtype_or_shape(model: nn.Module) -> set[str]:
    """Names of the layers whose weight is asked, in train or eval mode, for its dtype, or for its shape where the codes
    have another one."""
    turned = {name for name, layer in model.named_modules() if (kind := kind_of(layer)) and not kind.keeps_shape}
    words = {"dtype", "shape", "size"} if turned else {"dtype"}
    classes = {cls for cls in {type(module) for module in model.modules()} if _mentions(cls, words)}
    asks = {"dtype", "shape"}
    found = [each for training in (False, True) for each in _found(model, classes, asks, training=training)]
    return {each.layer for each in found if each.asks == "dtype" or each.layer in turned}


def first_parameter_readers(model: nn.Module) -> dict[str, str]:
    """Name of a module -> its method (Class.method) that calls `next(self.parameters())`, for a device or dtype."""
    return {
        name: f"{type(module).__name__}.{method.name}"
        for name, module in model.named_modules()
        if not _is_known(type(module))
        for method in _methods(type(module))
        if method.asks_a_parameter
    }


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """A forward pre-hook of a module that reads the weight of an int8 layer in training mode: it raises there."""

    layer: str
    method: str

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            raise OctavoError(
                f"{self.layer}: {self.method} reads its weight directly while training, and would take int8 codes for "
                f"it; run the model in eval mode, or to train it quantize with ignore=['{self.layer}', ...]"
            )


def refuse_training(model: nn.Module, int8: Collection[str]) -> None:
    """Make modules of `model` raise OctavoError in training mode if they then read the weight of one of the layers
    `int8`.

    model: before or after the swap; layers have the same names.
    """
    classes = {cls for cls in {type(module) for module in model.modules()} if _mentions(cls, {"training"})}
    in_eval = set(_read(model, classes, training=False))
    for found in dict.fromkeys(_read(model, classes, training=True)):
        if found.layer in int8 and found not in in_eval:
            found.module.register_forward_pre_hook(_Refusal(found.layer, found.method))


def _mentions(cls: type, words: set[str]) -> bool:
    """Whether a method or property of the class mentions both a weight and an attribute of `words`. Compiled code is
    searched, which is faster than to read the source."""
    members = (member for base in cls.__mro__ if not _is_known(base) for member in vars(base).values())
    uses = [_mentioned_in(function.__code__) for function in map(_function_of, members) if inspect.isfunction(function)]
    return any(names & words and any(map(is_weight, names)) for names in uses)


def _function_of(member: Any) -> Any:
    """The function behind a member of a class: of a method, property, ...; None for other members."""
    match member:
        case property(fget=function) | functools.cached_property(func=function):
            return inspect.unwrap(function) if function else None
        case staticmethod(__func__=function) | classmethod(__func__=function):
            return inspect.unwrap(function)
    return inspect.unwrap(member) if inspect.isfunction(member) else None


def _mentioned_in(code: CodeType) -> set[str]:
    """The names and strings in compiled code and in the functions inside it."""
    strings = {part for part in code.co_consts if isinstance(part, str)}
    return strings.union(code.co_names, *(_mentioned_in(part) for part in code.co_consts if isinstance(part, CodeType)))


class _Found(NamedTuple):
    """One read of a weight. module: the module whose code reads the weight of the layer called `layer`, itself or by
    passing the layer to a method. method: the method that reads it, as Class.method. asks: what for, see `Read`."""

    module: nn.Module
    layer: str
    method: str
    asks: str


def _found(model: nn.Module, classes: Collection[type], asks: Collection[str], *, training: bool) -> Iterator[_Found]:
    """The reads by modules of `classes` in train or eval mode whose `asks` is one of those given."""
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
    """The layers that a read at `path` in the code of module `name` is about. For a test of a class: the layers of that
    class, at `path`, or among all that the module holds where it cannot be told what is tested."""
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
    """Which methods of a model's classes may run while it computes: those that may be called from outside, and those
    that a method that may run mentions."""

    def __init__(self, model: nn.Module) -> None:
        self._classes: set[Any] = {type(module) for module in model.modules() if not _is_known(type(module))}

    def has(self, cls: type[nn.Module], method: Method) -> bool:
        return _may_be_called(cls, method) or method.name in self._mentioned

    @functools.cached_property
    def _mentioned(self) -> set[str]:
        every = {method for cls in self._classes for method in methods_of(cls)}
        # A method that a constructor passes on (`hook(self.watch)`) may be called later.
        names = {name for method in every if _SETS_UP.search(method.name) for name in method.hands_on}
        running = {method for cls in self._classes for method in _methods(cls) if _may_be_called(cls, method)}
        waiting = {method for cls in self._classes for method in _methods(cls)} - running
        while running:
            names.update(*(method.mentions for method in running))
            running = {method for method in waiting if method.name in names}
            waiting -= running
        return names


def _may_be_called(cls: type[nn.Module], method: Method) -> bool:
    """Whether a method may be called from outside of the model: a forward, or a public method with arguments, except
    one that changes the model in place (`clip_`). All methods of a class without a forward may be."""
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
    """The modules at `path` of the module called `name`: several if the path has a "*" or "**"; none if it starts at an
    argument, or is the module itself and that is no layer with a class of its own."""
    if path[0] != SELF or (path == (SELF,) and not _has_own_class(places[name])):
        return []
    place = ".".join((name, *path[1:]) if name else path[1:])
    if "*" not in place:
        return [places[place]] if place in places else []
    pattern = re.compile(re.escape(place).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+"))
    return [layer for each, layer in places.items() if pattern.fullmatch(each)]


class _Search:
    """Finds the reads of methods in train or eval mode whose `asks` is one of those given. follow: also the reads of
    what a method passes to other methods."""

    def __init__(self, asks: Collection[str], training: bool, follow: bool) -> None:
        self._asks = asks
        self._training = training
        self._follow = follow
        self._of_arguments: dict[tuple[int, str], set[tuple[int | str, str, str]]] = {}

    def read_by(self, module: nn.Module, method: Method) -> Iterator[tuple[Path, str, str]]:
        """For each read of a method of `module`: the path of the layer, the Class.method that reads, what it asks
        for."""
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
        """For each argument of a function at path `function` of `module` whose weight is read: its position (and once
        more its name), the Class.method that reads, what it asks for."""
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
        """The module and the name of the method that `self.path(...)` calls: a method of `module` itself, or the
        forward of a layer (the first of several); (None, "") if it is neither."""
        if len(path) == 1 and path[0] not in module._modules:
            return module, path[0]
        called: nn.Module | None = module
        for part in path:
            layers = {} if called is None else called._modules
            called = next(iter(layers.values()), None) if "*" in part else layers.get(part)
        return called, "forward" if called is not None else ""


def _has_own_class(module: nn.Module) -> bool:
    """Whether it is a layer of a known kind whose class derives from that of the kind and does more."""
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
