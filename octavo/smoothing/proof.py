"""Prove on the model itself that smoothing preserved the function it computes.

Two runs on the same batch, before and after, are compared: what each weight was multiplied by (what a fold divided is
multiplied back first), and every tensor that the model returned. Factors are powers of two, so on CPUs in bf16 and fp32
the comparison is for equal bits. A fold that changes anything is taken out again, with the reason.

Three cases allow for rounding: norms that scale by 1 + weight, fp16, and devices other than CPUs. What no batch
shows is not proved: a branch on the sizes or values of tensors that runs the very same layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from octavo.smoothing.fold import Fold
from octavo.smoothing.trace import Product, Trace, equal, largest_of, traced

__all__ = ["prove"]

_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Dtype -> how far a tensor may be off where a fold could not be exact, as a fraction of its largest magnitude."""


def prove(model: nn.Module, example: Any, folded: list[Fold], before: Trace) -> list[tuple[Fold, str]]:
    """Run the smoothed model on `example`: every product and the output must be those of the unsmoothed model.

    before: the trace of the unsmoothed model. folded: the folds in the model.
    Returns: the folds that changed anything, each with the reason. They are undone, and removed from `folded`.
    """
    undone = []
    while folded:
        fault = _first_fault(before, traced(model, example), folded)
        if fault is None:
            break
        at, what = fault
        fold = _culprit(model, example, folded, before, at)
        folded.remove(fold)
        undone.append((fold, f"folding it changes the model: {what}"))
    return undone


def _first_fault(before: Trace, after: Trace, folded: list[Fold]) -> tuple[int, str] | None:
    """Index and description of the first product that differs, or of the output, whose index is that after the last
    product; None if all agree."""
    exact = all(fold.exact for fold in folded)
    owner = {sink.param: fold for fold in folded for sink in fold.pair.sinks}
    for i, (b, a) in enumerate(zip(before.products, after.products, strict=False)):
        x = a.x
        if a.sink.param in owner:
            x = x.float() * owner[a.sink.param].factors_of(a)
        if a.sink != b.sink or a.x.shape != b.x.shape or not _agree(b.x.float(), x.float(), b.x.dtype, exact):
            return i, f"the input of {b.sink.layer} is another"
    made = len(before.products), len(after.products)
    if made[0] != made[1]:
        return min(made), "other layers run"
    outputs = zip(before.returned, after.returned, strict=False)
    if len(before.returned) != len(after.returned) or not all(_agree(b, a, b.dtype, exact) for b, a in outputs):
        return made[0], "its output is another"
    return None


def _agree(before: Tensor, after: Tensor, dtype: torch.dtype, exact: bool) -> bool:
    """Equal, or in `dtype` nearly so where a fold could not be exact; whole numbers and booleans are equal or not."""
    exact = exact and before.device.type == "cpu" and dtype != torch.float16
    if exact or not dtype.is_floating_point or before.shape != after.shape:
        return equal(before, after)
    before, after = before.float(), after.float()
    return torch.allclose(before, after, rtol=0, atol=_TOLERANCES[dtype] * largest_of(before), equal_nan=True)


def _culprit(model: nn.Module, example: Any, folded: list[Fold], before: Trace, at: int) -> Fold:
    """The fold that is to blame for the fault at index `at`: without it the first fault comes later, or never. It is
    undone."""
    first = {fold: _first_event(fold, before.products) for fold in folded}
    for fold in sorted(folded, key=lambda fold: abs(first[fold] - at)):
        fold.undo()
        rest = [other for other in folded if other is not fold]
        fault = _first_fault(before, traced(model, example), rest)
        if fault is None or fault[0] > at:
            return fold
        fold.apply()
    nearest = min(folded, key=lambda fold: abs(first[fold] - at))
    nearest.undo()
    return nearest


def _first_event(fold: Fold, events: list[Product]) -> int:
    params = {sink.param for sink in fold.pair.sinks}
    return next((i for i, event in enumerate(events) if event.sink.param in params), len(events))
