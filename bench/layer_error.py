"""How far each layer of a language model is from the float model's, when both are given the same.

The error of the logits says little where the weights are random: layers amplify what those before them rounded, and a
router that had nearly chosen another expert chooses it. So each layer is given what the float model's was.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

import torch
from torch import Tensor

__all__ = ["layer_error", "run_by_layers"]


@torch.no_grad()
def run_by_layers(model: Any, ids: list[int], given: list[Tensor] | None = None) -> list[Tensor]:
    """What a causal language model's decoder layers and its last norm are fed for these ids, [1, T, H] each, and the
    logits after them. given: what another run returned, with which they are fed instead."""
    fed: list[Tensor] = []

    def feed(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fed.append(args[0].clone())
        return args if given is None else (given[len(fed) - 1], *args[1:])

    with contextlib.ExitStack() as hooks:
        for step in (*model.model.layers, model.model.norm):
            hooks.callback(step.register_forward_pre_hook(feed).remove)
        logits = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1).logits
    return [*fed, logits]


def layer_error(made: list[Tensor], given: list[Tensor]) -> float:
    """The largest of three errors in what `run_by_layers` made of what it was given: that of the embedding, the layers'
    median, as a share of the norm of what the layer adds, and that of the logits."""
    added = [
        _share(one - expected, expected - before)
        for one, expected, before in zip(made[1:-1], given[1:-1], given[:-2], strict=True)
    ]
    ends = [_share(made[at] - given[at], given[at]) for at in (0, -1)]
    return max(statistics.median(added), *ends)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.float().norm() / whole.float().norm())
