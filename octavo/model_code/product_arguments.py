"""What an argument of a call goes into: a product, with nothing else done to it, or whatever.

    F.linear(x, self.qkv.weight, bias)                      the second argument is the weight of a product
    shifted_window_attention(x, self.qkv.weight, ...)       so it is here, if that function hands it to `F.linear`, and
                                                            otherwise asks it for its shape at most

A function of the model's library is read for this, and the functions that it hands the argument to.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch.nn import functional as F

from octavo.modules.int8_weight import PRODUCTS

__all__ = ["ASPECTS", "HARMLESS", "goes_into", "products_within"]

HARMLESS = {"device", "data_ptr", "is_meta", "dim", "ndim", "numel", "requires_grad"}
"""Attributes of a weight that codes have as well."""

ASPECTS = {"dtype": "dtype", "shape": "shape", "size": "shape"}
"""What is asked of a weight by these attributes of it."""


def goes_into(product: Callable[..., Any]) -> str:
    """What a read asks that hands the weight to one of `PRODUCTS`."""
    return f"goes into {product.__name__}"


def products_within(code: ast.AST, known: Mapping[str, Any], is_one: Callable[[ast.expr], bool]) -> dict[ast.expr, str]:
    """Of the arguments of calls in `code` that `is_one` looks for, those that go into a product; each with what it is.

    known: what names mean that are not assigned to there.
    """
    nodes = list(ast.walk(code))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    found: dict[ast.expr, str] = {}
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        given: list[tuple[int | str | None, ast.expr]] = [(keyword.arg, keyword.value) for keyword in call.keywords]
        if not any(isinstance(argument, ast.Starred) for argument in call.args):
            given += enumerate(call.args)
        for key, argument in given:
            if is_one(argument) and (product := _product_of(_meaning(call.func, known, own), key)):
                found[argument] = product
    return found


def _meaning(node: ast.expr, known: Mapping[str, Any], own: set[str]) -> Any:
    """What `a.b.c` is; None if that is not known, as where `a` is one of a function's own names."""
    match node:
        case ast.Name(id=name):
            return None if name in own else known.get(name)
        case ast.Attribute(value=value, attr=attribute):
            return getattr(_meaning(value, known, own), attribute, None)
    return None


def _product_of(function: Any, key: int | str | None) -> str | None:
    """What an argument of `function`, at that position or of that name, goes into, and nothing else is done with it."""
    if inspect.isbuiltin(function):
        return goes_into(function) if function in PRODUCTS and key in (1, "weight") else None
    if not isinstance(function, FunctionType) or inspect.unwrap(function) is not function:
        return None
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    name = positional[key] if isinstance(key, int) and key < len(positional) else key
    return _product_of_parameter(function, name) if isinstance(name, str) else None


_of_parameters: dict[tuple[FunctionType, str], str | None] = {}


def _product_of_parameter(function: FunctionType, name: str) -> str | None:
    """What `function` makes a product of its parameter `name` by, if it otherwise only asks for its shape and dtype, or
    whether it is None."""
    if function is F.multi_head_attention_forward:  # which asks all that it is handed for a `__torch_function__` first
        return goes_into(F.linear) if name in {f"{part}_proj_weight" for part in ("q", "k", "v", "out")} else None
    if (function, name) not in _of_parameters:
        _of_parameters[function, name] = None  # to one that calls itself
        _of_parameters[function, name] = _only_product(_definition_of(function), function.__globals__, name)
    return _of_parameters[function, name]


def _only_product(definition: ast.AST, known: Mapping[str, Any], name: str) -> str | None:
    nodes = list(ast.walk(definition))
    asked = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr in {*HARMLESS, *ASPECTS}]
    asked += [node.left for node in nodes if isinstance(node, ast.Compare) and _is_identity(node)]
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == name and node not in asked]
    products = products_within(definition, known, lambda node: isinstance(node, ast.Name) and node.id == name)
    goes = {products.get(use) for use in uses}
    return goes.pop() if len(goes) == 1 else None


@functools.cache
def _definition_of(function: FunctionType) -> ast.AST:
    """The syntax of a function; an empty one where it has no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _is_identity(test: ast.Compare) -> bool:
    return all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops)
