"""Layers side by side: q/k/v, and gate/up, read the same row of x, and on GPUs become one launch.

A layer of one row takes a GPU a few microseconds, of which starting and ending the kernel are a good part: one launch
of three times the rows is shorter than three. The weights stay where they are. This is a pass for Inductor
(`post_grad_custom_post_pass`), for only a compiled graph shows who reads what.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["SideBySide"]

_LAYER = torch.ops.octavo.w8a16_linear.default


class SideBySide(CustomGraphPass):
    """`w8a16_linear` of one row, of several weights: one `w8a16_linears`, and slices of what it returns."""

    def __call__(self, graph: fx.Graph) -> None:
        readers: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for node in graph.nodes:
            if node.target is _LAYER and _is_row_on_gpu(node.args[0]) and _are_inputs(node.args[1:]):
                x, _, scale, _ = node.args
                readers.setdefault((x, scale.meta["val"].shape[1]), []).append(node)
        for (x, _), layers in readers.items():
            if len(layers) > 1:
                _join(graph, x, layers)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_row_on_gpu(x: Any) -> bool:
    value = x.meta["val"]
    return bool(value.is_cuda and statically_known_true(value.numel() == value.shape[-1]))


def _are_inputs(operands: tuple[Any, ...]) -> bool:
    """Whether they are there from the beginning of the graph, as weights are."""
    return all(one is None or one.op in ("placeholder", "get_attr") for one in operands)


def _join(graph: fx.Graph, x: fx.Node, layers: list[fx.Node]) -> None:
    weights, scales, biases = (list(column) for column in zip(*(layer.args[1:] for layer in layers), strict=True))
    with graph.inserting_before(layers[0]):
        y = graph.call_function(torch.ops.octavo.w8a16_linears.default, (x, weights, scales, biases))
        one = layers[0].meta["val"]
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
