"""Make an int8 layer look like the float layer to the model's own code: its class's methods, its weight's dtype and
shape.

    class ScaledWordEmbedding(nn.Embedding):                    Gemma, BART, ...; causal convolutions of audio models
        def forward(self, input_ids):
            return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)

    pixel_values.to(self.patch_embedding.weight.dtype)          CLIP, SigLIP, Qwen-VL, ...
    self.up(x) * self.up.weight.shape[0] ** -0.5                a transposed convolution, whose codes lie otherwise

A class that does something around the layer that it derives from keeps its methods: the int8 layer gets a class with
these methods on top of the int8 class, so that `super().forward` is that of the int8 layer. The `weight` of a layer
with a facade is a tensor of the model's dtype and the float weight's shape, all NaN, because there are no float values.
Where the model passes the weight to `F.linear` or a convolution, it is an `Int8Weight` instead.
"""

from __future__ import annotations

import functools
import re
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from octavo.computed_weights import parts_of
from octavo.layers import EXPERTS, LayerKind, float_class
from octavo.model_code.class_source import is_readable, methods_of
from octavo.model_code.written_out import is_written_out
from octavo.modules import QuantModule
from octavo.modules.base import hold_rest
from octavo.modules.int8_weight import Int8Weight
from octavo.stand_ins import same_code

__all__ = ["facade", "has_own_forward", "needs_facade", "why_no_facade"]


def needs_facade(layer: nn.Module, kind: LayerKind) -> bool:
    """Whether `layer` is more than a plain layer of its kind: of a class of the model, or with further parameters."""
    if kind.name == EXPERTS:
        return False
    weights = (*kind.params_of(layer), *parts_of(layer))
    held = (name for name, parameter in layer._parameters.items() if parameter is not None)
    own = [name for name in held if name not in weights and "bias" not in name]  # all int8 layers take biases over
    return bool(_own_classes(layer, kind) or own)


def has_own_forward(layer: nn.Module, kind: LayerKind) -> bool:
    """Whether the forward of `layer` computes something else than that of a plain layer of its kind."""
    if kind.name == EXPERTS or type(layer).forward is float_class(layer, kind).forward:
        return False
    return not is_written_out(layer, float_class(layer, kind))


def _own_classes(layer: nn.Module, kind: LayerKind) -> tuple[Any, ...]:
    """The classes of `layer` that derive from the float class of its kind, the most derived first; none if they compute
    what the float class does."""
    if is_written_out(layer, float_class(layer, kind)):
        return ()
    mro = type(layer).__mro__
    return tuple(cls for cls in mro[: mro.index(float_class(layer, kind))] if not cls.__module__.startswith("torch."))


def why_no_facade(layer: nn.Module, kind: LayerKind) -> str | None:
    """Why the methods of the class of `layer` cannot be put on top of an int8 class; None if they can. (Whether they
    read the values of the weight is checked by `weight_readers`.)"""
    if kind.name == EXPERTS:
        return None
    plain = f"which a plain {kind.name} would not do"
    base = float_class(layer, kind)
    for cls in _own_classes(layer, kind):
        own = _own_names(cls, base)
        changed = {
            name
            for name, member in vars(cls).items()
            if _is_of_the_kind(name, base) or _is_run_around_forward(name, member)
        } - own
        if changed:
            return f"{cls.__name__} has a {min(changed)} of its own, {plain}"
        if "forward" in own and not is_readable(cls):
            return f"{cls.__name__} has a forward of its own, {plain}, and its source cannot be read"
        methods = {method.name: method for method in reversed(methods_of(cls))}  # its own, where a base has it too
        for name in own & methods.keys():
            if methods[name].goes_past_super or (methods[name].calls_super and not _knows_its_class(vars(cls)[name])):
                return f"{cls.__name__}.{name} calls what it derives from otherwise than by a plain super()"
    return None


def _is_of_the_kind(name: str, base: type[nn.Module]) -> bool:
    """Whether `name` is a member of `base` that not every module has, apart from constructors and the like."""
    return hasattr(base, name) and not hasattr(nn.Module, name) and not _IS_MADE.search(name)


_IS_MADE = re.compile(r"^__|reset_parameters$|^from_pretrained$|^_fill_padding_idx_with_zero$")


def _is_run_around_forward(name: str, member: object) -> bool:
    """Whether Python or torch calls this method around or instead of the forward: `__call__`, `__getattr__`, ..."""
    return isinstance(member, FunctionType) and _RUNS_AROUND.search(name) is not None


_RUNS_AROUND = re.compile(
    r"^_(wrapped_)?call_impl$|^__(?!(init|new|init_subclass|class_getitem|repr|str|getstate|setstate|reduce|reduce_ex|"
    r"copy|deepcopy|del|annotate|annotate_func)__$).*__$"
)


def _knows_its_class(function: object) -> bool:
    """Whether `super()` in a function finds its class in a closure cell, which can be replaced."""
    return isinstance(function, FunctionType) and "__class__" in function.__code__.co_freevars


def facade(
    int8: type[QuantModule], layer: nn.Module, kind: LayerKind, *, is_multiplied: bool = False
) -> type[QuantModule]:
    """A class derived from the int8 class `int8` that looks to the model's code like the class of `layer`.

    is_multiplied: whether that code passes the weight to products, so that it has to be an `Int8Weight`.
    """
    own = _own_classes(layer, kind)
    made_of: tuple[Any, ...] = (int8, own, float_class(layer, kind), kind.params_of(layer), is_multiplied)
    return _facade(*made_of)  # type: ignore[no-any-return]


@functools.cache
def _facade(int8: Any, own: tuple[Any, ...], float_class: Any, params: tuple[str, ...], is_multiplied: bool) -> Any:
    below = int8
    for cls in reversed(own):
        below = _on_top(cls, below, float_class)
    shown = {param: _shown(param, getattr(int8, param, None), is_multiplied) for param in params}
    name = f"Quant{own[0].__name__}" if own else int8.__name__
    return type(name, (_Facade, below), {**shown, "made_of": (int8, own, float_class, params, is_multiplied)})


def _on_top(cls: type[nn.Module], below: type[QuantModule], float_class: type[nn.Module]) -> type[QuantModule]:
    """A class with the methods of `cls` that derives from `below`; `super()` in the methods is `below`."""
    cell = CellType()
    own = {name: vars(cls)[name] for name in _own_names(cls, float_class)}
    bound = {name: _bound(each, cell) if isinstance(each, FunctionType) else each for name, each in own.items()}
    made = type(cls.__name__, (below,), bound)
    cell.cell_contents = made
    return made


def _own_names(cls: type[nn.Module], float_class: type[nn.Module]) -> set[str]:
    """The members that `cls` adds to the float class that it derives from, and its forward; no special methods."""
    added = {name for name in vars(cls) if not (name.startswith("__") or hasattr(float_class, name))}
    return added | (vars(cls).keys() & {"forward"})


def _bound(function: FunctionType, cell: CellType) -> FunctionType:
    """A copy of `function` whose `super()` refers to the class in `cell`."""
    held = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = tuple(cell if name == "__class__" else value for name, value in held)
    return same_code(function, function.__globals__, closure)


def _shown(param: str, inherited: object, is_multiplied: bool) -> property:
    """The property that shows parameter `param` with the shape and dtype of the float one. inherited: the member of the
    int8 class under that name."""

    def get(self: _Facade) -> Tensor | Int8Weight:
        shown = self._float.expand(self._shapes[param])
        if not torch.compiler.is_compiling():
            vars(shown).update(vars(self.codes_and_scale(param)[0]))  # what is noted on it, for one that it is loaded
        return Int8Weight(self, shown) if is_multiplied else shown

    return property(get, inherited.fset if isinstance(inherited, property) else None)


class _Facade(QuantModule):
    """Base of the classes that `facade` makes. made_of: the arguments of `_facade`, by which a layer is pickled,
    because its class cannot be imported by name."""

    made_of: tuple[Any, ...]

    def __init__(self, layer: nn.Module, *args: Any) -> None:
        super().__init__(layer, *args)
        *_, params, _ = self.made_of
        self._shapes = {param: getattr(layer, param).shape for param in params}
        self._follow_casts(self.codes_and_scale(params[0])[0].device)  # where its values are, if the layer was empty
        hold_rest(self, layer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, self.made_of, vars(self)


def _empty(*made_of: Any) -> _Facade:
    cls = _facade(*made_of)
    return cls.__new__(cls)  # type: ignore[no-any-return]
