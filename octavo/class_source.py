"""What the source of a class says that its methods do with parts of self.

    F.linear(x, self.a[0].b.weight)      a read of `weight` at the path ("a", "0", "b")

Paths are followed through local names, loops and indices. `if`s that a read stands under are kept: `holds` says whether
one does for a module as it is configured.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import linecache
import operator
from collections.abc import Iterator
from typing import Any

from torch import nn

from octavo.layers import KINDS

__all__ = ["WEIGHTS", "Read", "holds", "is_readable", "reads_of_class"]

WEIGHTS = {param for kind in KINDS for param in kind.params}
"""Names of the parameters that become int8."""

_HARMLESS = {"device", "shape", "size", "data_ptr", "is_meta", "dim", "ndim", "numel", "requires_grad"}


@dataclasses.dataclass(frozen=True)
class Read:
    """`self.path.weight` in `method`, under `conditions`. In the path, "*" stands for an index that is not constant."""

    path: tuple[str, ...]
    method: str
    conditions: tuple[ast.expr, ...]


@functools.cache
def reads_of_class(cls: Any) -> tuple[Read, ...]:
    """The reads of all methods of `cls` and its bases, but for torch's."""
    reads: list[Read] = []
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "builtins")):
            continue
        for method in _methods_of_class(base):
            reads.extend(_reads_of_method(method))
    return tuple(reads)


def _methods_of_class(cls: type) -> Iterator[ast.FunctionDef]:
    for file in _files_of_class(cls):
        for definition in _classes_of_file(file).get(cls.__qualname__, []):
            yield from (part for part in definition.body if isinstance(part, ast.FunctionDef))


def _files_of_class(cls: type) -> set[str]:
    """Where its source may stand: files, and cells of notebooks, whose names its functions know, and `linecache`."""
    functions = (inspect.unwrap(value) for value in vars(cls).values() if callable(value))
    files = {function.__code__.co_filename for function in functions if hasattr(function, "__code__")}
    try:
        return {*files, inspect.getsourcefile(cls) or ""}
    except (TypeError, OSError):  # typed at a prompt, or compiled
        return files


def is_readable(cls: type) -> bool:
    """Whether the source of a class can be found."""
    return any(cls.__qualname__ in _classes_of_file(file) for file in _files_of_class(cls))


@functools.lru_cache(maxsize=8)  # a model's classes are in a few files, and syntax trees are large
def _classes_of_file(file: str) -> dict[str, list[ast.ClassDef]]:
    """Qualified name -> the classes of that name. (`inspect.getsource` would parse the file again for every class.)"""
    classes: dict[str, list[ast.ClassDef]] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.ClassDef):
                classes.setdefault(prefix + child.name, []).append(child)
                inner = f"{prefix}{child.name}."
            elif isinstance(child, ast.FunctionDef):
                inner = f"{prefix}{child.name}.<locals>."
            if not isinstance(child, ast.expr):
                collect(child, inner)

    try:
        collect(ast.parse("".join(linecache.getlines(file))), "")
    except SyntaxError:
        return {}  # not Python, such as a file of Cython
    return classes


_Path = tuple[str, ...]
_Names = dict[str, set[_Path]]
"""The parts of self that a local name may stand for, somewhere in a method."""


def _reads_of_method(method: ast.FunctionDef) -> Iterator[Read]:
    names: _Names = {name.arg: {()} for name in method.args.args[:1]}
    for node in _in_order(method):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    _bind_value(target, value, names)
            case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
                _bind_value(target, value, names)
            case ast.For(target=target, iter=iterated) | ast.comprehension(target=target, iter=iterated):
                _bind_loop(target, iterated, names)
    reads = list(_reads(method, (), names))
    text = ast.unparse(method) if reads else ""
    for path, conditions in reads:
        if f"self.{'.'.join(path)}.weight.dtype != torch.int8" not in text:
            yield Read(path, method.name, conditions)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it, as they stand in the source."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


def _bind(target: ast.expr, paths: set[_Path], names: _Names) -> None:
    if isinstance(target, ast.Name) and paths - {()}:
        names.setdefault(target.id, set()).update(paths)
    elif isinstance(target, ast.Tuple):  # the parts of a ModuleList
        for part in target.elts:
            _bind(part, {(*path, "*") for path in paths}, names)


def _bind_value(target: ast.expr, value: ast.expr, names: _Names) -> None:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for each, part in zip(target.elts, value.elts, strict=False):
            _bind_value(each, part, names)
    else:
        _bind(target, _paths(value, names), names)


def _bind_loop(target: ast.expr, iterated: ast.expr, names: _Names) -> None:
    """The names that `for target in iterated` gives to parts of self, through `enumerate`, `reversed` and `zip` too."""
    match iterated, target:
        case ast.Call(func=ast.Name("enumerate"), args=[parts, *_]), ast.Tuple(elts=[_, each]):
            _bind_loop(each, parts, names)
        case ast.Call(func=ast.Name("reversed"), args=[parts]), _:
            _bind_loop(target, parts, names)
        case ast.Call(func=ast.Name("zip"), args=lists), ast.Tuple(elts=elements):
            for each, parts in zip(elements, lists, strict=False):
                _bind_loop(each, parts, names)
        case _:
            _bind(target, {(*path, "*") for path in _paths(iterated, names)}, names)


def _paths(node: ast.expr, names: _Names) -> set[_Path]:
    """{('a', '0', 'b')} of the expression `self.a[0].b`; several where it may be one of several parts of self, and none
    for what is not a part of self."""
    match node:
        case ast.Name(id=name):
            return names.get(name, set())
        case ast.Attribute(value=value, attr=attribute):
            return {(*path, attribute) for path in _paths(value, names)}
        case ast.Subscript(value=value, slice=ast.Slice()):
            return _paths(value, names)
        case ast.Subscript(value=value, slice=index):
            part = str(index.value) if isinstance(index, ast.Constant) else "*"
            return {(*path, part) for path in _paths(value, names)}
        case ast.IfExp(body=one, orelse=other):
            return _paths(one, names) | _paths(other, names)
        case ast.NamedExpr(value=value):
            return _paths(value, names)
    return set()


def _reads(
    node: ast.AST, conditions: tuple[ast.expr, ...], names: _Names
) -> Iterator[tuple[_Path, tuple[ast.expr, ...]]]:
    """Paths p of `self.p.weight` in and below `node`, each with the conditions that it stands under."""
    if isinstance(node, ast.If | ast.IfExp):
        yield from _reads(node.test, conditions, names)
        for branch, condition in ((node.body, node.test), (node.orelse, ast.UnaryOp(ast.Not(), node.test))):
            for statement in branch if isinstance(branch, list) else [branch]:
                yield from _reads(statement, (*conditions, condition), names)
        return
    if isinstance(node, ast.Attribute):
        if node.attr in WEIGHTS:
            yield from ((path, conditions) for path in sorted(_paths(node.value, names)) if path)
        if node.attr in _HARMLESS and isinstance(node.value, ast.Attribute) and node.value.attr in WEIGHTS:
            return
    for child in ast.iter_child_nodes(node):
        yield from _reads(child, conditions, names)


_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
_UNKNOWN = object()


def holds(test: ast.expr, module: nn.Module, training: bool) -> bool | None:
    """Whether `test` holds for `module` as it is configured, in train or eval mode; None if it depends on more."""
    match test:
        case ast.BoolOp(op=op, values=values):
            decisive = isinstance(op, ast.Or)
            truths = [holds(value, module, training) for value in values]
            return decisive if decisive in truths else None if None in truths else not decisive
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            truth = holds(operand, module, training)
            return None if truth is None else not truth
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            a, b = _setting(left, module, training), _setting(right, module, training)
            comparable = type(a) is type(b) or isinstance(op, ast.Eq | ast.NotEq | ast.Is | ast.IsNot)
            return None if _UNKNOWN in (a, b) or not comparable else bool(_COMPARE[type(op)](a, b))
    value = _setting(test, module, training)
    return None if value is _UNKNOWN else bool(value)


def _setting(node: ast.expr, module: nn.Module, training: bool) -> Any:
    """The value of a constant or of `self.a.b`, if it is a plain value that running the model does not change."""
    if isinstance(node, ast.Constant):
        return node.value
    paths = _paths(node, {"self": {()}})
    if paths == {("training",)}:
        return training
    if not isinstance(node, ast.Attribute) or len(paths) != 1 or node.attr == "training":
        return _UNKNOWN
    (path,) = paths
    value = vars(module).get(path[0], _UNKNOWN)
    for attribute in path[1:]:
        value = _UNKNOWN if isinstance(value, nn.Module) else getattr(value, attribute, _UNKNOWN)
    return value if value is None or isinstance(value, bool | int | float | str) else _UNKNOWN
