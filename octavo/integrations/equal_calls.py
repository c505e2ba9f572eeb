"""A compiler pass that makes equal calls in a graph once: q/k/v, and gate/up, share one quantization of their input.

Without a compiler `octavo.modules.shared_input` does this. Inductor eliminates equal calls only when it compiles for
training; this is a pass for inference (`post_grad_custom_pre_pass`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = ["EqualCalls"]


class EqualCalls(CustomGraphPass):
    """Calls with the same target and arguments are replaced by the first of them."""

    def __call__(self, graph: fx.Graph) -> None:
        returned = set(graph.output_node().all_input_nodes)  # results that a caller may write to stay apart
        first: dict[tuple[Any, str, str], fx.Node] = {}
        for node in list(graph.nodes):
            if node in returned or not _is_pure(node):
                continue
            key = (node.target, repr(node.args), repr(node.kwargs))  # a node's repr is its name, which is unique
            same = first.setdefault(key, node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_pure(node: fx.Node) -> bool:
    """Whether a call only computes its result from its arguments: no mutation, no random numbers."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is torch.ops.aten.empty.memory_format:
        return False
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
