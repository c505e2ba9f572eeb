"""Find code that reads a layer's weight instead of calling the layer.

    target_dtype = self.patch_embedding.weight.dtype        (CLIP, SigLIP, Qwen-VL: the input would be cast to int8)
    F.linear(x, self.embed_tokens.weight)                   (a head written by hand: codes used without their scale)

An int8 layer in that place would give wrong numbers without an error, so such layers stay float with this reason.
Found by reading the source of the model's own classes: every `self.a.b.weight` outside of constructors and weight
initialization, but not the uses that are harmless (`.device`, `.shape`, `.data_ptr()`) or that already mind int8
(transformers' `self.wo.weight.dtype != torch.int8`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn

__all__ = ["weight_readers"]

_NOT_RUNNING = {"__init__", "_init_weights", "reset_parameters", "_reset_parameters", "tie_weights", "extra_repr"}
_HARMLESS = {"device", "shape", "size", "data_ptr", "is_meta", "dim", "ndim", "numel", "requires_grad"}


def weight_readers(model: nn.Module) -> dict[str, str]:
    """Module name -> the method (Class.method) that reads its weight directly, for the modules of `model`."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.", "octavo.")):
            continue
        for path, method in _paths_read(type(module)).items():
            found[f"{name}.{path}" if name else path] = f"{type(module).__name__}.{method}"
    return found


@functools.cache
def _paths_read(cls: type) -> dict[str, str]:
    """'a.b' -> method, for every `self.a.b.weight` that the methods of `cls` read."""
    paths: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(("torch.", "builtins")):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue  # no source to read (a class from a notebook or a compiled module)
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.name not in _NOT_RUNNING:
                paths.update({path: method.name for path in _reads(method)})
    return paths


def _reads(method: ast.FunctionDef) -> set[str]:
    minds_int8 = {
        path
        for path in _weights(method, harmless=False)
        if f"self.{path}.weight.dtype != torch.int8" in ast.unparse(method)
    }
    return _weights(method, harmless=True) - minds_int8


def _weights(method: ast.FunctionDef, *, harmless: bool) -> set[str]:
    """Paths p of `self.p.weight` in `method`, without the harmless ones if so asked."""
    spared = {
        id(node.value)
        for node in ast.walk(method)
        if harmless and isinstance(node, ast.Attribute) and node.attr in _HARMLESS
    }
    paths = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in spared:
            path = _path(node.value)
            if path:
                paths.add(path)
    return paths


def _path(node: ast.expr) -> str | None:
    """'a.b' of the expression `self.a.b`; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == "self" else None
