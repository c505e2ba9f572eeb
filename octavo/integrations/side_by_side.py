"""A compiler pass for GPUs: layers that read the same row of x (q/k/v, gate/up) become one launch.

A layer takes a GPU a few microseconds for one row, and starting and ending the kernel are a good part of them: one
launch for three layers is faster than three. The weights stay where they are. It is a pass of Inductor
(`post_grad_custom_post_pass`), because only in a compiled graph it is known which layers read the same tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["SideBySide"]

_JOINED: dict[Any, Any] = {
    torch.ops.octavo.w8a16_linear.default: torch.ops.octavo.w8a16_linears.default,
    torch.ops.octavo.w8a8_linear.default: torch.ops.octavo.w8a8_linears.default,
}
"""The op of one layer -> the op of several layers; it takes the same arguments, with lists of weights, scales,
biases."""


class SideBySide(CustomGraphPass):
    """Replaces linear layers that read one row by one call for all of them, and slices of its result."""

    def __call__(self, graph: fx.Graph) -> None:
        readers: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in graph.nodes:
            if node.target not in _JOINED:
                continue
            before, layer, after = _parts(node)
            if _is_row_on_gpu(before[0]) and _are_inputs(layer):
                groups = layer[1].meta["val"].shape[1]
                readers.setdefault((node.target, before, after, groups), []).append(node)
        for layers in readers.values():
            if len(layers) > 1:
                _join(graph, layers)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _parts(node: fx.Node) -> tuple[tuple[Any, ...], ...]:
    """The arguments of a call in three parts: x (and its scale if it is int8); weight, scale and bias; the rest (a
    dtype)."""
    weight = [argument.name for argument in node.target._schema.arguments].index("weight")  # type: ignore[union-attr]
    return node.args[:weight], node.args[weight : weight + 3], node.args[weight + 3 :]


def _is_row_on_gpu(x: Any) -> bool:
    value = x.meta["val"]
    return bool(value.is_cuda and statically_known_true(value.numel() == value.shape[-1]))


def _are_inputs(operands: tuple[Any, ...]) -> bool:
    """Whether the operands are inputs of the graph, as weights are, and not computed in it."""
    return all(one is None or one.op in ("placeholder", "get_attr") for one in operands)


def _join(graph: fx.Graph, layers: list[fx.Node]) -> None:
    first = layers[0]
    before, _, after = _parts(first)
    columns = [list(column) for column in zip(*(_parts(layer)[1] for layer in layers), strict=True)]
    one = first.meta["val"]
    with graph.inserting_before(first):
        y = graph.call_function(_JOINED[first.target], (*before, *columns, *after))
        y.meta["val"] = one.new_empty((*one.shape[:-1], sum(layer.meta["val"].shape[-1] for layer in layers)))
        start = 0
        for layer in layers:
            end = start + layer.meta["val"].shape[-1]
            part = graph.call_function(torch.ops.aten.slice.Tensor, (y, -1, start, end))
            part.meta["val"] = torch.ops.aten.slice.Tensor(y.meta["val"], -1, start, end)
            layer.replace_all_uses_with(part)
            start = end
    for layer in layers:
        graph.erase_node(layer)
