"""Find arguments of calls that are only used as the weight of a product (`F.linear`, a convolution).

    F.linear(x, self.qkv.weight, bias)                      the second argument is the weight of a product
    shifted_window_attention(x, self.qkv.weight, ...)       here too, if that function passes it on to `F.linear` and
                                                            otherwise asks at most for its shape

For the latter the source of the called function is read, and of the functions that it passes the argument to.
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
"""Attributes of a weight for which codes have an equivalent value."""

ASPECTS = {"dtype": "dtype", "shape": "shape", "size": "shape"}
"""Attribute of a weight -> what reading it asks for, as in `Read.asks`."""


def goes_into(product: Callable[..., Any]) -> str:
    """`Read.asks` of a read that passes the weight to `product`, one of `PRODUCTS`."""
    return f"goes into {product.__name__}"


def products_within(code: ast.AST, known: Mapping[str, Any], is_one: Callable[[ast.expr], bool]) -> dict[ast.expr, str]:
    """The arguments of calls in `code` that satisfy `is_one` and only go into a product -> which product (`goes_into`).

    known: the globals of the code: name -> value.
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
    """The value of the expression `a.b.c`; None if it is not known, for example if `a` is a local name."""
    match node:
        case ast.Name(id=name):
            return None if name in own else known.get(name)
        case ast.Attribute(value=value, attr=attribute):
            return getattr(_meaning(value, known, own), attribute, None)
    return None


def _product_of(function: Any, key: int | str | None) -> str | None:
    """The product that the argument of `function` at position or keyword `key` goes into; None if none, or if anything
    else is done with it."""
    if inspect.isbuiltin(function):
        return goes_into(function) if function in PRODUCTS and key in (1, "weight") else None
    if not isinstance(function, FunctionType) or inspect.unwrap(function) is not function:
        return None
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    name = positional[key] if isinstance(key, int) and key < len(positional) else key
    return _product_of_parameter(function, name) if isinstance(name, str) else None


_of_parameters: dict[tuple[FunctionType, str], str | None] = {}


def _product_of_parameter(function: FunctionType, name: str) -> str | None:
    """The product that the parameter `name` of `function` goes into, if it is otherwise only asked for its shape or
    dtype, or compared with None."""
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
    """The syntax tree of a function; an empty one if its source is not available."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _is_identity(test: ast.Compare) -> bool:
    return all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops)
