"""Recognize a module by what it computes, and replace it by a stand-in that is still an instance of its class.

`norms.py`, `gated.py` and `rotary.py` run a copy of a module on random inputs: if it computes the bits of their formula
it can be replaced, whatever its class is called. Here is what they share: checks before such a run (does the module
hold anything unexpected?), and `Derived`, the base class of stand-ins.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FLOATS",
    "Derived",
    "attributes",
    "has_hooks",
    "is_plain_value",
    "kept_attributes",
    "made_by",
    "random",
    "same_bits",
    "same_code",
    "share_contents",
    "takes_one_argument",
]  # fmt: skip

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which a stand-in is compared with the module."""


def attributes(module: nn.Module) -> Mapping[str, Any]:
    """The attributes of the module that not every module has; no parameters, buffers or children."""
    bare = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in bare}


def kept_attributes(module: nn.Module) -> dict[str, Any]:
    """`attributes` without the private ones of torch's own class (recurrent layers keep lists of float weights)."""
    torchs = made_by(next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.")))
    return {name: value for name, value in attributes(module).items() if name[0] != "_" or name not in torchs}


@functools.cache
def made_by(cls: type) -> frozenset[str]:
    """Names of attributes that instances of a class of modules may have: those of the class, and all names that it
    declares or that its methods mention."""
    names = set(dir(cls))
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        names.update(inspect.get_annotations(base))
        functions = filter(inspect.isfunction, map(inspect.unwrap, vars(base).values()))
        names.update(*(function.__code__.co_names for function in functions))
    return frozenset(names)


def share_contents(new: nn.Module, module: nn.Module) -> None:
    """Give the empty module `new` the attributes, parameters, children and mode of `module`, not copies of them."""
    for name, value in attributes(module).items():
        setattr(new, name, value)
    for name, parameter in module._parameters.items():
        new.register_parameter(name, parameter)
    for name, child in module._modules.items():
        new.add_module(name, child)
    new.training = module.training


class Derived(nn.Module):
    """Base class of stand-ins whose class derives from both a kind of stand-in (`FusedGatedMLP`, ...) and the class of
    the module that it replaces: it has that module's layers, attributes and methods, and `isinstance` still holds."""

    source_class: type[nn.Module]

    @classmethod
    def standing_for(cls, module: nn.Module) -> Any:
        """A stand-in that holds what `module` holds, not copies of it."""
        new = _blank(cls, type(module))
        nn.Module.__init__(new)
        share_contents(new, module)
        return new

    @classmethod
    def members_for(cls, source: type[nn.Module]) -> dict[str, Any]:
        """Further members of the class of stand-ins for modules of class `source`."""
        return {}

    @classmethod
    def made_of(cls, source: type[nn.Module]) -> Any:
        """A key (anything hashable) for classes of stand-ins for `source`: for another key a new class is made."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, type(self).__bases__, vars(self)


def _blank(kind: Any, source: Any) -> Any:
    cls = _class_of(kind, source, kind.made_of(source))
    return cls.__new__(cls)


@functools.cache
def _class_of(kind: Any, source: Any, made_of: Any) -> Any:
    members = {"source_class": source, **kind.members_for(source)}
    return type(f"Fused{source.__name__}", (kind, source), members)


def same_code(function: FunctionType, known: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    """A copy of `function` with `known` as its globals and another closure."""
    made = FunctionType(function.__code__, known, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__doc__, made.__module__ = function.__kwdefaults__, function.__doc__, function.__module__
    made.__annotations__, made.__qualname__ = function.__annotations__, function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks, buffers or other registrations besides its mode, parameters and children."""
    own = vars(module)
    return any(
        own.get(name) != value
        for name, value in vars(nn.Module()).items()
        if name not in ("training", "_parameters", "_modules")
    )


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def is_plain_value(value: object) -> bool:
    """Whether it is a number, string, None, dtype or device, or a tuple of such values."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain_value, value)))


def takes_one_argument(module: nn.Module) -> bool:
    """Whether `forward` takes exactly one argument, under whatever name."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except ValueError:  # a function of a library in C may have no signature
        return False
    return (
        len(parameters) == 1
        and parameters[0].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        and parameters[0].default is inspect.Parameter.empty
    )


def random(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal random numbers of this shape, fp32 on the CPU, whatever torch's defaults are."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def same_bits(y: Tensor, other: object) -> bool:
    return isinstance(other, Tensor) and y.dtype == other.dtype and torch.equal(y, other)
