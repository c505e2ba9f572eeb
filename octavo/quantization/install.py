"""Carry a plan out: int8 layers take the place of float ones, in place, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from octavo.computed_weights import merge_older_weight_norm, parts_of, weight_of
from octavo.feeding import Progress
from octavo.fused.gated import fused_gated_mlps
from octavo.fused.norms import fused_norms
from octavo.fused.rotary import fused_rotaries
from octavo.model_code.facade import facade, needs_facade
from octavo.model_code.weight_readers import asked_for_dtype_or_shape, class_testers, refuse_training, used_in_products
from octavo.modules import (
    Codes,
    DynamicQuantLinear,
    QuantModule,
    StaticQuantLinear,
    TiedQuantEmbedding,
    TiedQuantLinear,
)
from octavo.modules.float_linear import float_linears
from octavo.modules.shared_input import SharedInput
from octavo.quantization.coverage import REASONS_ATTRIBUTE, Coverage, coverage
from octavo.quantization.heap import keep_freed_memory
from octavo.quantization.plan import Decision, selects
from octavo.recipe import Pattern
from octavo.stand_ins import attributes, kept_attributes

__all__ = ["CodesOf", "install", "quantized_codes", "record_reasons"]


CodesOf = Callable[[Decision, nn.Module], tuple[Codes, torch.dtype]]
"""(decision, float layer) -> the codes of its weights, and the float dtype that the weights have or had."""


def quantized_codes(decision: Decision, layer: nn.Module) -> tuple[Codes, torch.dtype]:
    """The codes of `layer`'s own weights; on `meta`, empty ones of the right shapes."""
    assert decision.scheme is not None
    params = decision.kind.params_of(layer)
    codes = {
        param: decision.kind.quantize_param(
            layer, param, weight_of(layer, param), decision.scheme, f"{decision.name}.{param}"
        )
        for param in params
    }
    return codes, attrgetter(params[0])(layer).dtype


def install(
    model: nn.Module,
    decisions: list[Decision],
    *,
    codes_of: CodesOf = quantized_codes,
    ignore: Iterable[Pattern] = (),
    progress: Progress | None = None,
) -> None:
    """Replace layers by int8 ones in place, one at a time, then float parts by ones that compute the same faster.

    model: float; on `meta` this makes the empty int8 skeleton.
    decisions: from `plan`; a layer with a scheme becomes int8.
    codes_of: where the codes come from: by default the layer's own weights are quantized.
    ignore: RMS norms, gated MLPs and attentions that these patterns select keep their own class, as do those whose
        class the model's code tests. (Float linear layers become `FloatLinear` even if ignored: "ignore" means "stay
        float".)
    progress: called with (layers done, number of layers).

    Modules that read the weight of an int8 layer in training mode raise OctavoError there from now on.
    """
    places = _Places(model)
    owners: dict[str, QuantModule] = {}
    shared = SharedInput()
    asked, tested, factors = asked_for_dtype_or_shape(model), class_testers(model), used_in_products(model)
    todo = [decision for decision in decisions if decision.scheme]
    # Owners of shared tables first; then from the last to the first, which puts a child before its parent: an
    # attention block takes its out_proj over as it finds it.
    ordered = sorted(reversed(todo), key=lambda decision: decision.owner is not None)
    for done, decision in enumerate(ordered, 1):
        layer = model.get_submodule(decision.name)
        assert decision.scheme is not None
        merge_older_weight_norm(layer)
        int8_class = _int8_class(decision, layer, decision.name in asked, decision.name in factors)
        new = owners[decision.name] = _int8_layer(int8_class, decision, layer, codes_of, owners, shared)
        places.swap(layer, new)
        if progress:
            progress(done, len(ordered))
    refuse_training(model, owners.keys())
    for stand_ins, ignored in (
        (float_linears, ()),
        (fused_norms, tuple(ignore)),
        (fused_gated_mlps, tuple(ignore)),
        (fused_rotaries, tuple(ignore)),
    ):
        _fuse(model, {name: new for name, new in stand_ins(model).items() if name not in tested}, ignored)
    _switch_off_fused_encoder(model)
    keep_freed_memory()


def _int8_class(decision: Decision, layer: nn.Module, is_asked: bool, is_multiplied: bool) -> Any:
    assert decision.scheme is not None
    if decision.owner is None:
        plain = decision.kind.module_for(decision.scheme)
    else:
        plain = TiedQuantEmbedding if decision.kind.name == "Embedding" else TiedQuantLinear
    if is_asked or is_multiplied or needs_facade(layer, decision.kind):
        return facade(plain, layer, decision.kind, is_multiplied=is_multiplied)
    return plain


def _int8_layer(
    int8_class: Any,
    decision: Decision,
    layer: nn.Module,
    codes_of: CodesOf,
    owners: Mapping[str, QuantModule],
    shared: SharedInput,
) -> QuantModule:
    new: QuantModule
    if decision.owner is None:
        codes, float_dtype = codes_of(decision, layer)
        new = int8_class(layer, codes, decision.scheme, float_dtype)
        if isinstance(new, DynamicQuantLinear):
            new.shared_input = shared
        if isinstance(new, StaticQuantLinear) and decision.input_scale is not None:
            new.set_input_scale(decision.input_scale)
    else:
        new = int8_class(layer, owners[decision.owner])
    new.replaces, new.note = decision.label, decision.note
    return new


def _fuse(model: nn.Module, stand_ins: Mapping[str, nn.Module], ignore: tuple[Pattern, ...]) -> None:
    """Replace each module that has one of `stand_ins` under its name, except those that `ignore` selects."""
    places = _Places(model)
    for name, new in stand_ins.items():
        module = model.get_submodule(name)
        if not any(selects(pattern, name, module, type(module).__name__) for pattern in ignore):
            places.swap(module, new)


def record_reasons(model: nn.Module, decisions: list[Decision]) -> Coverage:
    """Store on the model why layers stayed float, where `coverage` finds it, and return its coverage."""
    reasons: dict[str, tuple[str, bool]] = {}
    for decision in decisions:
        if decision.reason is not None:
            layer = model.get_submodule(decision.name)
            for param in {*decision.kind.params, *decision.kind.params_of(layer)}:
                reasons |= {
                    f"{decision.name}.{name}": (decision.reason, decision.asked) for name in _made_of(layer, param)
                }
    setattr(model, REASONS_ATTRIBUTE, reasons)
    return coverage(model)


def _made_of(layer: nn.Module, param: str) -> list[str]:
    """Names of the parameters that the layer's `param` is, or is computed from (by weight_norm, pruning, ...)."""
    starts = (f"{param}_", f"parametrizations.{param}.")
    return [name for name, _ in layer.named_parameters() if name == param or name.startswith(starts)]


# -- one module in the place of another ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """A place that refers to a module. root: the `__dict__` of an object. path: a key of it, then keys and indices into
    dicts, lists and tuples. method: name of the module's bound method that is there instead of the module, or None."""

    root: dict[str, Any]
    path: tuple[Any, ...]
    method: str | None = None

    def put(self, new: nn.Module) -> None:
        """Put `new`, or its bound method, there; nothing changes if `new` has no such method."""
        value = new if self.method is None else getattr(new, self.method, None)
        if value is not None:
            _put(self.root, self.path, value)


def _put(holder: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`holder` with `new` at `path`: changed in place, but a tuple is made anew."""
    key, rest = path[0], path[1:]
    item = _put(holder[key], rest, new) if rest else new
    if isinstance(holder, tuple):
        parts = (*holder[:key], item, *holder[key + 1 :])
        return holder._make(parts) if hasattr(holder, "_make") else type(holder)(parts)
    holder[key] = item
    return holder


_ATOMS = (type(None), int, float, str, bytes, Tensor, type, ModuleType)
"""Types that hold no layers, and those (classes, Python modules) that are not the model's own."""


def _parts(place: _Place, value: Any, in_object: bool) -> Iterator[tuple[_Place, Any]]:
    """What `value`, found at `place`, holds: each item with its place."""
    if isinstance(value, list | tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield _Place(place.root, (*place.path, key)), item
    elif not in_object:
        try:
            root = object.__getattribute__(value, "__dict__")  # its own: a proxy would show another's
        except AttributeError:
            return
        for name, item in root.items():
            yield _Place(root, (name,)), item


class _Places:
    """All places that refer to the modules of a model: as children, and inside other attributes of modules
    (MaskFormer's blocks hold the layers that they call in a list): lists, tuples and dicts of any depth, and plain
    objects, but not objects inside those. A module may be in several places, in some as a bound method."""

    def __init__(self, model: nn.Module) -> None:
        self._children: dict[int, list[tuple[nn.Module, str]]] = {}  # id of a module -> parents, and their attributes
        self._held: dict[int, list[_Place]] = {}
        modules = list(model.modules())
        self._known = set(map(id, modules))
        self._seen: set[tuple[int, bool]] = set()
        for parent in modules:
            for attribute, child in parent._modules.items():
                if child is not None:
                    self._children.setdefault(id(child), []).append((parent, attribute))
            for attribute, value in attributes(parent).items():
                if not isinstance(value, _ATOMS):
                    self._look(_Place(vars(parent), (attribute,)), value)

    def _look(self, place: _Place, value: Any) -> None:
        """Record the modules that `value`, found at `place`, is or holds."""
        todo = [(place, value, False)]
        while todo:
            place, value, in_object = todo.pop()
            if id(value) in self._known:
                self._held.setdefault(id(value), []).append(place)
            elif isinstance(value, MethodType) and id(value.__self__) in self._known:
                method = dataclasses.replace(place, method=value.__name__)
                self._held.setdefault(id(value.__self__), []).append(method)
            elif isinstance(value, tuple) or self._is_new(value, in_object):
                todo += [
                    (inner, item, in_object or inner.root is not place.root)
                    for inner, item in _parts(place, value, in_object)
                    if not isinstance(item, _ATOMS)
                ]

    def _is_new(self, value: Any, in_object: bool) -> bool:
        """Whether `value` was not visited before. (Objects may contain themselves. Tuples are visited every time,
        because each place that holds one has to be changed.)"""
        before = len(self._seen)
        self._seen.add((id(value), in_object))
        return len(self._seen) > before

    def swap(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever `old` is, and move hooks and other attributes of `old` over to it."""
        for parent, attribute in self._children.pop(id(old), ()):
            setattr(parent, attribute, new)
        for place in self._held.pop(id(old), ()):
            place.put(new)
        _take_over(new, old)  # after the above: `old` may have held a reference to itself
        for child in new.children():  # children that were taken over have `new` as their parent now
            if id(child) in self._children:
                self._children[id(child)] = [
                    (new if parent is old else parent, attribute) for parent, attribute in self._children[id(child)]
                ]


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _take_over(new: nn.Module, old: nn.Module) -> None:
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for name, value in kept_attributes(old).items():
        if not hasattr(new, name):
            setattr(new, name, value)
    for name, buffer in old._buffers.items():
        if not hasattr(new, name):
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, parameter in old._parameters.items():
        if not hasattr(new, name) and name not in parts_of(old):
            new.register_parameter(name, parameter)
    for name, child in old._modules.items():
        if not hasattr(new, name) and name != "parametrizations":  # what the weight was computed of
            new.add_module(name, child)


def _switch_off_fused_encoder(model: nn.Module) -> None:
    """nn.TransformerEncoderLayer has a fused path that hands float weights to a kernel; off where a layer is int8."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, QuantModule) for m in module.modules()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, QuantModule) for m in module.modules()):
            module.use_nested_tensor = False
