"""Read from the source of a class what its methods do with parts of self and with their arguments.

    def forward(self, x, table):
        x = F.linear(x, self.a[0].b.weight)     a read of `weight` at the path ("self", "a", "0", "b")
        x = F.linear(x, table.weight)           one at the path ("table",)
        return self.head(x, table)              a call of ("self", "head") with the path ("table",) as argument 1
        if isinstance(self.a[0], nn.Linear):    a read of its class at the path ("self", "a", "0")

Reads whose value only goes into a product (`F.linear`, a convolution) are told from others (`product_arguments.py`).
Paths are followed through local names, loops, indices and `getattr`. The conditions of `if`s around a read or call are
kept, and `holds` evaluates them for a module as it is configured.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import linecache
import operator
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from octavo.layers import KINDS
from octavo.model_code.product_arguments import ASPECTS, HARMLESS, products_within

__all__ = [
    "SELF", "Call", "Method", "Path", "Read", "holds", "is_a", "is_readable", "is_weight", "methods_of",
]  # fmt: skip

SELF = "self"
"""First element of the path of a part of self, whatever a method calls self. Other paths start with a parameter's
name."""

_LISTS = {"all_weights", "_flat_weights"}
_WEIGHT = "|".join(
    [*sorted({param for kind in KINDS for param in kind.params} | _LISTS), r"weight_(?:ih|hh|hr)_l\d+(?:_reverse)?"]
)


def is_weight(name: str) -> bool:
    """Whether `name` is that of a parameter that becomes int8, or of a list of such parameters."""
    return re.fullmatch(_WEIGHT, name) is not None


Path = tuple[str, ...]
"""Names from self, or from an argument, down to a part. "*" is an index that is not constant, "**" anything below."""

Conditions = tuple[ast.expr, ...]


@dataclasses.dataclass(frozen=True)
class Read:
    """A read of the weight of the layer at `path`, under `conditions`; or a test of its class.

    path: () for a class test of something that is not a part of self or of an argument.
    asks: what the read is for: "values", only "dtype" or "shape", or `goes_into(F.linear)` if it is the weight of a
        product; `is_a("Linear")` for a test against a class of that name.
    """

    path: Path
    conditions: Conditions
    asks: str = "values"


def is_a(name: str) -> str:
    """`Read.asks` of a test for a class of this name."""
    return f"is a {name}"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a part of self, at path `function`, under `conditions`. arguments: (position or keyword, path) of those
    arguments that are parts of self or of an argument."""

    function: Path
    arguments: tuple[tuple[int | str, Path], ...]
    conditions: Conditions


class Method:
    """A method of a class: its parameters after self, and (analyzed when first used) what it reads and calls.

    known: the globals of the method.
    has_other_name: whether the class body uses it outside of methods, as in `size = property(_size)`.
    asks_a_parameter: whether it calls `next(self.parameters())`, which fails without parameters.
    """

    def __init__(self, definition: ast.FunctionDef, text: str, known: Mapping[str, Any], has_other_name: bool) -> None:
        self._own, *others = [each.arg for each in (*definition.args.posonlyargs, *definition.args.args)] or [""]
        self.name = definition.name
        self.has_other_name = has_other_name
        self.parameters = (*others, *(each.arg for each in definition.args.kwonlyargs))
        self._definition = definition
        self._known = known
        self.asks_a_parameter = _FIRST_PARAMETER.search(text) is not None
        self._may_read = _MENTION.search(text) is not None
        self._minds_int8 = "int8" in text

    @functools.cached_property
    def reads(self) -> tuple[Read, ...]:
        """The reads and class tests, except reads of layers whose dtype it compares with int8 itself, as T5 does."""
        if not self._may_read:
            return ()
        text = ast.unparse(self._definition) if self._minds_int8 else ""
        found = (each for each in self._found if isinstance(each, Read))
        return tuple(read for read in found if f"{'.'.join(read.path)}.weight.dtype != torch.int8" not in text)

    @functools.cached_property
    def calls(self) -> tuple[Call, ...]:
        """The calls that pass a part of self, or of an argument, to a part of self."""
        return tuple(each for each in self._found if isinstance(each, Call))

    @property
    def takes_input(self) -> bool:
        """Whether it has a parameter other than boolean switches."""
        arguments = self._definition.args
        defaults = (*arguments.defaults, *arguments.kw_defaults)
        switches = [each for each in defaults if isinstance(each, ast.Constant) and isinstance(each.value, bool)]
        return len(self.parameters) > len(switches) or bool(arguments.vararg or arguments.kwarg)

    @functools.cached_property
    def mentions(self) -> frozenset[str]:
        """All names of attributes in it, and all strings, which `getattr` may use as such."""
        nodes = list(ast.walk(self._definition))
        strings = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
        return frozenset((*strings, *(node.attr for node in nodes if isinstance(node, ast.Attribute))))

    @functools.cached_property
    def hands_on(self) -> frozenset[str]:
        """Names of attributes that it looks up without calling them, such as `watch` in `hook(self.watch)`."""
        nodes = list(ast.walk(self._definition))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        looked_up = (node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
        return frozenset(node.attr for node in looked_up if id(node) not in called)

    @property
    def calls_super(self) -> bool:
        """Whether it uses `super()`."""
        return any(map(_is_plain_super, ast.walk(self._definition)))

    @property
    def goes_past_super(self) -> bool:
        """Whether it uses a `forward` other than that of plain `super()` or of a part of self, for example
        `nn.Conv1d.forward(self, x)` or `super(Mine, self).forward(x)`."""
        return any(
            isinstance(each, ast.Attribute)
            and each.attr == "forward"
            and not (_is_plain_super(each.value) or _paths(each.value, self._names))
            for each in ast.walk(self._definition)
        )

    @functools.cached_property
    def _names(self) -> _Names:
        names: _Names = {self._own: {(SELF,)}, **{name: {(name,)} for name in self.parameters}}
        for node in _in_order(self._definition):
            _bind_in(node, names)
        return names

    @functools.cached_property
    def _found(self) -> list[Read | Call]:
        products = products_within(self._definition, self._known, _is_weight_of_a_part)
        return list(_reads_and_calls(self._definition, (), self._names, products))


def _is_plain_super(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name("super"), args=[], keywords=[]):
            return True
    return False


_MENTION = re.compile(rf"[.\"']({_WEIGHT})\b|\b(isinstance|type)\(|__class__")

_FIRST_PARAMETER = re.compile(r"\bnext\(\s*self\.parameters\(\)\s*\)")

_Names = dict[str, set[Path]]
"""The paths that a local name may stand for, somewhere in a method."""


@functools.cache
def methods_of(cls: Any) -> tuple[Method, ...]:
    """The methods of `cls`, then those of its bases, without torch's classes."""
    bases = (base for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins")))
    return tuple(method for base in bases for method in _methods_of_class(base))


@functools.cache
def _methods_of_class(cls: Any) -> tuple[Method, ...]:
    return tuple(_read_class(cls))


def _read_class(cls: type) -> Iterator[Method]:
    for file in _files_of_class(cls):
        lines = linecache.getlines(file)
        known = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
        for definition in _classes_of_file(file).get(cls.__qualname__, []):
            others = (part for part in definition.body if not isinstance(part, ast.FunctionDef))
            used = {node.id for part in others for node in ast.walk(part) if isinstance(node, ast.Name)}
            for part in definition.body:
                if isinstance(part, ast.FunctionDef):
                    text = "".join(lines[part.lineno - 1 : part.end_lineno])
                    if "getattr(" in text:
                        _Getattr().visit(part)
                    yield Method(part, text, known, part.name in used)
                    if part.name == "__init__":
                        yield from _made_by(part, text, known)


def _made_by(init: ast.FunctionDef, text: str, known: Mapping[str, Any]) -> Iterator[Method]:
    """Functions defined inside a constructor, as in `self.head = lambda x: x @ self.embed.weight.T`."""
    for node in ast.walk(init):
        if isinstance(node, ast.Lambda | ast.FunctionDef) and node is not init:
            body: list[ast.stmt] = [ast.Return(node.body)] if isinstance(node, ast.Lambda) else node.body
            arguments = {**dict(ast.iter_fields(node.args)), "posonlyargs": [init.args.args[0], *node.args.posonlyargs]}
            name = getattr(node, "name", "<lambda>")
            yield Method(ast.FunctionDef(name, ast.arguments(**arguments), body, []), text, known, has_other_name=True)


class _Getattr(ast.NodeTransformer):
    """Rewrites `getattr(x, "name")` as `x.name`, and `getattr(x, name)` as `x[name]`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name("getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                return ast.copy_location(ast.Attribute(value, name, ast.Load()), node)
            case ast.Call(func=ast.Name("getattr"), args=[value, name, *_]):
                return ast.copy_location(ast.Subscript(value, name, ast.Load()), node)
        return node


def _files_of_class(cls: type) -> set[str]:
    """Names under which `linecache` may have the source of a class: files, and cells of notebooks."""
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


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all nodes below it, in the order of the source."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


def _bind_in(node: ast.AST, names: _Names) -> None:
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                _bind_value(target, value, names)
        case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
            _bind_value(target, value, names)
        case ast.For(target=target, iter=iterated) | ast.comprehension(target=target, iter=iterated):
            _bind_loop(target, iterated, names)


def _bind(target: ast.expr, paths: set[Path], names: _Names) -> None:
    if isinstance(target, ast.Name) and paths:
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
    """Bind the names of `for target in iterated` to the parts that they may be: also through `enumerate`, `zip`, and
    iteration over (name, part) pairs."""
    match iterated, target:
        case ast.Call(func=ast.Name("enumerate"), args=[parts, *_]), ast.Tuple(elts=[_, each]):
            _bind_loop(each, parts, names)
        case ast.Call(func=ast.Name("zip"), args=lists), ast.Tuple(elts=elements):
            for each, parts in zip(elements, lists, strict=False):
                _bind_loop(each, parts, names)
        case ast.Call(func=ast.Attribute(value=whole, attr=method)), ast.Tuple(elts=[_, each]) if method in _NAMED:
            _bind(each, {(*path, _NAMED[method]) for path in _paths(whole, names)}, names)
        case _:
            _bind(target, _items(iterated, names), names)


_NAMED = {"named_children": "*", "items": "*", "named_modules": "**"}
_UNNAMED = {"children": "*", "values": "*", "modules": "**"}
"""Methods that iterate over the parts of a part -> the path of these below it. `_NAMED` yield (name, part) pairs."""


def _items(iterated: ast.expr, names: _Names) -> set[Path]:
    """The paths of what `iterated` iterates over: the parts of a part, or the elements of a tuple, list or set."""
    match iterated:
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            starred = (_items(part.value, names) for part in parts if isinstance(part, ast.Starred))
            return set().union(*starred, *(_paths(part, names) for part in parts))
        case ast.Call(func=ast.Name("reversed" | "list" | "tuple"), args=[parts]):
            return _items(parts, names)
        case ast.Call(func=ast.Attribute(value=whole, attr=method), args=[]) if method in _UNNAMED:
            return {(*path, _UNNAMED[method]) for path in _paths(whole, names)}
    return {(*path, "*") for path in _paths(iterated, names)}


def _paths(node: ast.expr, names: _Names) -> set[Path]:
    """The paths that an expression may refer to: {("self", "a", "0", "b")} for `self.a[0].b`; empty if it is not a part
    of self or of an argument."""
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


def _is_weight_of_a_part(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and is_weight(node.attr)


def _reads_and_calls(
    node: ast.AST, conditions: Conditions, names: _Names, products: Mapping[ast.expr, str]
) -> Iterator[Read | Call]:
    """The reads and calls in and below `node`, each with the conditions around it. products: from `products_within`."""
    if isinstance(node, ast.If | ast.IfExp):
        yield from _reads_and_calls(node.test, conditions, names, products)
        for branch, condition in ((node.body, node.test), (node.orelse, ast.UnaryOp(ast.Not(), node.test))):
            yield from _in_turn(branch, (*conditions, condition), names, products)
        return
    if isinstance(node, ast.Attribute):
        asked = node.value if isinstance(node.value, ast.Attribute) and is_weight(node.value.attr) else None
        if asked and node.attr in HARMLESS:
            return
        if asked and node.attr in ASPECTS:
            yield from (Read(path, conditions, ASPECTS[node.attr]) for path in sorted(_paths(asked.value, names)))
            return
        if is_weight(node.attr):
            asks = products.get(node, "values")
            yield from (Read(path, conditions, asks) for path in sorted(_paths(node.value, names)))
    if isinstance(node, ast.Call) and (arguments := _arguments(node, names)):
        functions = sorted(path for path in _paths(node.func, names) if path[0] == SELF)
        yield from (Call(path, arguments, conditions) for path in functions)
    for tested, classes in _class_tests(node):
        paths = sorted(_paths(tested, names)) or [()]
        yield from (Read(path, conditions, is_a(name)) for path in paths for name in sorted(_names_in(classes)))
    for _, value in ast.iter_fields(node):
        yield from _in_turn(value, conditions, names, products)


def _in_turn(
    value: Any, conditions: Conditions, names: _Names, products: Mapping[ast.expr, str]
) -> Iterator[Read | Call]:
    """The same for a field of a node, such as a list of statements. Statements after an `if` that returns or raises are
    under the condition that its test is false."""
    for node in value if isinstance(value, list) else [value]:
        if isinstance(node, ast.AST):
            yield from _reads_and_calls(node, conditions, names, products)
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return | ast.Raise):
            conditions = (*conditions, ast.UnaryOp(ast.Not(), node.test))


def _class_tests(node: ast.AST) -> Iterator[tuple[ast.expr, ast.AST]]:
    """For tests of a class in `node`, (what is tested, the expression with the names of classes): `isinstance(x, (A,
    B))`, `type(x) is A`, `x.__class__.__name__ == "A"`."""
    match node:
        case ast.Call(func=ast.Name("isinstance"), args=[tested, classes]):
            yield tested, classes
        case ast.Compare():
            for part in ast.walk(node):
                match part:
                    case ast.Call(func=ast.Name("type"), args=[tested]) | ast.Attribute(value=tested, attr="__class__"):
                        yield tested, node


def _names_in(node: ast.AST) -> set[str]:
    """All names, names of attributes, and strings in and below `node`."""
    found = set()
    for part in ast.walk(node):
        match part:
            case ast.Name(id=str(name)) | ast.Attribute(attr=str(name)) | ast.Constant(value=str(name)):
                found.add(name)
    return found


def _arguments(call: ast.Call, names: _Names) -> tuple[tuple[int | str, Path], ...]:
    given: list[tuple[int | str, ast.expr]] = list(enumerate(call.args))
    given += [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg]
    return tuple((key, path) for key, value in given for path in sorted(_paths(value, names)) if path != (SELF,))


_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
_UNKNOWN = object()


def holds(test: ast.expr, module: nn.Module, training: bool) -> bool | None:
    """Whether the condition `test` is true for `module` as it is configured, in train or eval mode; None if that
    depends on anything else."""
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
            if isinstance(a, Tensor | nn.Module) or isinstance(b, Tensor | nn.Module):
                comparable = isinstance(op, ast.Is | ast.IsNot)
            return None if _UNKNOWN in (a, b) or not comparable else bool(_COMPARE[type(op)](a, b))
    value = _setting(test, module, training)
    return None if value is _UNKNOWN or isinstance(value, Tensor) else bool(value)


def _setting(node: ast.expr, module: nn.Module, training: bool) -> Any:
    """The value of a constant; of `self.a.b` if it is a plain value; of `self.a` if it is a parameter or child. Else
    `_UNKNOWN`."""
    if isinstance(node, ast.Constant):
        return node.value
    paths = _paths(node, {SELF: {(SELF,)}})
    if paths == {(SELF, "training")}:
        return training
    if not isinstance(node, ast.Attribute) or len(paths) != 1 or node.attr == "training":
        return _UNKNOWN
    ((_, first, *others),) = paths
    if not others and first in (held := {**module._parameters, **module._modules}):
        return held[first]
    value = vars(module).get(first, _UNKNOWN)
    for attribute in others:
        value = _UNKNOWN if isinstance(value, nn.Module) else getattr(value, attribute, _UNKNOWN)
    return value if value is None or isinstance(value, bool | int | float | str) else _UNKNOWN
