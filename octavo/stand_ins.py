"""What a module may be replaced by is asked of the module itself, whatever its class is called: of a copy that is run.

`norms.py`, `gated.py` and `rotary.py` recognize what they can compute faster in this way. Here is what they ask before
that, and what stands for a module and still is of its class.
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
"""Dtypes that a stand-in is compared in."""


def attributes(module: nn.Module) -> Mapping[str, Any]:
    """What was set on the module besides what every module has."""
    bare = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in bare}


def kept_attributes(module: nn.Module) -> dict[str, Any]:
    """The same without what torch's class keeps for itself: lists of the float weights, for one."""
    torchs = made_by(next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.")))
    return {name: value for name, value in attributes(module).items() if name[0] != "_" or name not in torchs}


@functools.cache
def made_by(cls: type) -> frozenset[str]:
    """Names that a class of modules may give to its instances: what it has, declares, and mentions in its methods."""
    names = set(dir(cls))
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        names.update(inspect.get_annotations(base))
        functions = filter(inspect.isfunction, map(inspect.unwrap, vars(base).values()))
        names.update(*(function.__code__.co_names for function in functions))
    return frozenset(names)


def share_contents(new: nn.Module, module: nn.Module) -> None:
    """Give `new`, which is empty, what `module` holds, no copies: attributes, parameters, children, and its mode."""
    for name, value in attributes(module).items():
        setattr(new, name, value)
    for name, parameter in module._parameters.items():
        new.register_parameter(name, parameter)
    for name, child in module._modules.items():
        new.add_module(name, child)
    new.training = module.training


class Derived(nn.Module):
    """A stand-in of a class that derives from its own kind (`FusedGatedMLP`, ...) and from the other module's, whose
    layers, attributes and methods it has: what asks for that class finds it."""

    source_class: type[nn.Module]

    @classmethod
    def standing_for(cls, module: nn.Module) -> Any:
        """One that holds what `module` holds, and is no copy."""
        new = _blank(cls, type(module))
        nn.Module.__init__(new)
        share_contents(new, module)
        return new

    @classmethod
    def members_for(cls, source: type[nn.Module]) -> dict[str, Any]:
        """What the class for modules of `source` has besides."""
        return {}

    @classmethod
    def made_of(cls, source: type[nn.Module]) -> Any:
        """By what the class for modules of `source` is another one, if that is: anything that can be a key."""

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
    """A function of the same code, with `known` for its globals, and of another closure."""
    made = FunctionType(function.__code__, known, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__doc__, made.__module__ = function.__kwdefaults__, function.__doc__, function.__module__
    made.__annotations__, made.__qualname__ = function.__annotations__, function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


def has_hooks(module: nn.Module) -> bool:
    """Whether anything was registered on the module but its training mode, parameters and children."""
    own = vars(module)
    return any(
        own.get(name) != value
        for name, value in vars(nn.Module()).items()
        if name not in ("training", "_parameters", "_modules")
    )


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def is_plain_value(value: object) -> bool:
    """Whether it is a number, a string or the like, or a tuple of such."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain_value, value)))


def takes_one_argument(module: nn.Module) -> bool:
    """Whether `forward` takes x, under whatever name, and nothing else."""
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
    """fp32 on the CPU, whatever the defaults are."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def same_bits(y: Tensor, other: object) -> bool:
    return isinstance(other, Tensor) and y.dtype == other.dtype and torch.equal(y, other)
