"""How far each layer of a language model is from the float model's, when both get the same input.

With random weights, the error of the logits says little: layers amplify the rounding errors of those before them, and a
router may choose another expert where the choice was close. So each layer gets the float model's input.
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
    """Returns: the inputs of a causal language model's decoder layers and of its last norm, [1, T, H] each, and the
    logits.

    given: the result of another run; its inputs are fed instead.
    """
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
    """The largest of three errors after `run_by_layers` with `given`: that of the embedding, the median over layers,
    and that of the logits. A layer's error is relative to the norm of what the layer adds."""
    added = [
        _share(one - expected, expected - before)
        for one, expected, before in zip(made[1:-1], given[1:-1], given[:-2], strict=True)
    ]
    ends = [_share(made[at] - given[at], given[at]) for at in (0, -1)]
    return max(statistics.median(added), *ends)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.float().norm() / whole.float().norm())
