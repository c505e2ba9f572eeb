"""Rotary position embeddings of queries and keys computed by one kernel instead of ten.

    y = x * cos + rotate_half(x) * sin      rotate_half((first, second)) = (-second, first)     https://arxiv.org/abs/2104.09864

A model's attention calls a function for this, `apply_rotary_pos_emb(q, k, cos, sin)` of its own file: halves are
copied, negated, joined, multiplied and added, each a pass over memory and a launch on GPUs. Where this package has a
kernel and no gradient is wanted (`ops.rotary`), it does everything, with torch's rounding: the same bits.

The function is recognized by what it computes, whatever it is called: of the functions that an attention's `forward`
mentions, one with the parameters cos and sin after two others is run on random inputs, and has to return the bits of
the formula. The attention then gets a class that derives from its own and whose `forward` is the same code, but with
the fused function under that name. No other `forward` changes. (The new `forward` has its own copy of the globals, so
it does not see names that are changed in the model's file later.)
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.stand_ins import FLOATS, Derived, random, same_bits, same_code

__all__ = ["FusedRotary", "fused_rotaries"]


class FusedRotary(Derived):
    """An attention whose queries and keys are rotated by one kernel of this package where possible."""

    @classmethod
    def members_for(cls, source: Any) -> dict[str, Any]:
        return {"forward": _calling_fused(source.forward)}

    @classmethod
    def made_of(cls, source: Any) -> Any:
        """`forward` and the objects that the names in it refer to: they may have been patched since the last class was
        made."""
        function = _innermost(source.forward)
        return source.forward, tuple(id(function.__globals__.get(name)) for name in function.__code__.co_names)


def _calling_fused(function: FunctionType) -> FunctionType:
    """A copy of `function`, and of the decorators around it, that calls fused versions of the rotary functions."""
    wrapped = _wrapped(function)
    if wrapped is None:
        return same_code(function, _with_fused(function, _named(function)), function.__closure__)
    within = _calling_fused(wrapped)
    cells = tuple(CellType(within) if _holds(cell, wrapped) else cell for cell in function.__closure__ or ())
    again = same_code(function, function.__globals__, cells)
    vars(again)["__wrapped__"] = within
    return again


def _with_fused(function: FunctionType, names: tuple[str, ...]) -> dict[str, Any]:
    """The globals of a function, with fused functions under these names."""
    known = {**function.__globals__, **{name: _fused(function.__globals__[name]) for name in names}}
    known.pop("__name__", None)  # or torch.compile would look names up in the module of that name instead
    return known


def _wrapped(function: FunctionType) -> FunctionType | None:
    """The function that a decorated function calls; None if it is not decorated."""
    within = vars(function).get("__wrapped__")
    held = isinstance(within, FunctionType) and any(_holds(cell, within) for cell in function.__closure__ or ())
    return within if held else None


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def rotary(*args: Any, **kwargs: Any) -> Any:
        turned = ops.rotary(*args) if len(args) == 4 and not kwargs else None
        return function(*args, **kwargs) if turned is None else turned

    return rotary


def fused_rotaries(model: nn.Module) -> dict[str, FusedRotary]:
    """Stand-ins for the attentions of `model`: module name -> stand-in. `model` is not modified, and may be on `meta`.

    An attention can be replaced if the `forward` of its class mentions a rotary function, see the head of this file.
    """
    found: dict[str, FusedRotary] = {}
    for name, module in model.named_modules():
        is_own = "forward" in vars(module) or isinstance(module, FusedRotary)
        if not is_own and _rotations(type(module)):
            found[name] = FusedRotary.standing_for(module)
    return found


def _rotations(source: Any) -> tuple[str, ...]:
    """The names in `forward` of the class `source` that refer to rotary functions."""
    function = _innermost(getattr(source, "forward", None))  # a class of torch.jit's has none
    return _named(function) if isinstance(function, FunctionType) else ()


def _innermost(function: Any) -> Any:
    while isinstance(function, FunctionType) and (wrapped := _wrapped(function)) is not None:
        function = wrapped
    return function


def _named(function: FunctionType) -> tuple[str, ...]:
    named = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
    return tuple(name for name, value in named if isinstance(value, FunctionType) and _is_rotary(value))


@functools.cache
def _is_rotary(function: FunctionType) -> bool:
    if list(inspect.signature(function).parameters)[2:4] != ["cos", "sin"]:
        return False
    try:
        with torch.no_grad():
            return all(_does_with(function, *operands) for operands in _samples())
    except Exception:  # whatever it wants, it is not what this is given
        return False


def _samples() -> Iterator[tuple[Tensor, ...]]:
    """q [B, H, T, D], k [B, KV, T, D], cos and sin [B or 1, T, D]."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = torch.logspace(-3, 3, 12, device="cpu", dtype=torch.float32)
    for dtype, (batch, one, tokens) in itertools.product(FLOATS, ((1, 1, 1), (2, 1, 5), (3, 3, 4))):
        shapes = (batch, 4, tokens, 12), (batch, 2, tokens, 12), (one, tokens, 12), (one, tokens, 12)
        yield tuple((random(*shape, generator=generator) * sizes).to(dtype) for shape in shapes)


def _does_with(function: Callable[..., Any], *operands: Tensor) -> bool:
    given = [operand.clone() for operand in operands]
    turned = function(*given)
    *states, cos, sin = operands
    unchanged = all(torch.equal(one, other) for one, other in zip(given, operands, strict=True))
    expected = [_formula(x, cos[:, None], sin[:, None]) for x in states]
    return unchanged and len(turned) == len(states) and all(map(same_bits, expected, turned))


def _formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
