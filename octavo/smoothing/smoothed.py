"""What smoothing divided a layer's outputs by, read back from its int8 weights.

Smoothing divides output channels (of up_proj, v_proj) by powers of two that the next layer's weights take back. Next
to the float model's such an output looks wrong, though nothing is. No record is kept, for weights tell it: of a pair,

    W'_nk = W_nk * c_k / s_n     c: what its columns took from the pair before it, s: what its rows were divided by

where rounding to int8 moves a row by a hundredth, and s_n is a power of two. A norm has one column and c = 1, so that
going through the pairs in the order in which they run there is one unknown at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from octavo.fused.norms import FusedRMSNorm
from octavo.layers import kind_of
from octavo.modules import QuantLinear
from octavo.modules.float_linear import FloatLinear
from octavo.primitives import dequantize
from octavo.smoothing.norms import is_norm, scales_by_one_plus
from octavo.smoothing.pairs import find_pairs

__all__ = ["smooth_scales"]


def smooth_scales(model: nn.Module, int8_model: nn.Module, example: Any) -> dict[str, Tensor]:
    """What the output channels of int8 linear layers were divided by: name -> fp32 [N], of those with other than 1.

    model: the float model as it was before smoothing, not modified; for one that is smoothed already there are none.
    int8_model: what became of it. example: a batch to find the pairs of `model` with.
    """
    before, after = dict(model.named_modules()), dict(int8_model.named_modules())
    both = {name: (layer, after[name]) for name, layer in before.items() if _is_one_layer(layer, after.get(name))}
    int8 = [layers for layers in both.values() if isinstance(layers[1], QuantLinear)]
    if all(_same_ranges(*map(_rows, layers)) for layers in int8):
        return {}
    columns: dict[str, Tensor] = {}
    found = {}
    for pair in find_pairs(model, example):
        if pair.layout is not None and pair.source in both:
            was, now = map(_rows, both[pair.source])
            factors = _power_of_two_between(now, was * columns.get(f"{pair.source}.weight", torch.ones(1)))
            columns |= {sink.param: factors[pair.layout.rows][pair.layout.channels] for sink in pair.sinks}
            if isinstance(after[pair.source], QuantLinear) and bool((factors != 1).any()):
                found[pair.source] = factors
    return found


def _is_one_layer(was: nn.Module, now: nn.Module | None) -> bool:
    """Whether both are states of one linear layer or norm."""
    kind, weight = kind_of(was), was._parameters.get("weight")
    if weight is None or not (is_norm(was) or (kind is not None and kind.module is QuantLinear)):
        return False
    if isinstance(now, QuantLinear):
        return kind is not None and kind.rows(weight, was).shape == now.codes_and_scale()[0].shape
    if now is None or type(now) not in (type(was), FloatLinear, FusedRMSNorm):
        return False
    other = now._parameters.get("weight")
    return other is not None and other.shape == weight.shape


def _rows(layer: nn.Module) -> Tensor:
    """What each output channel of a linear layer is made with, [N, K], or of a norm, [N, 1]: fp32 on the CPU."""
    if isinstance(layer, QuantLinear):
        return dequantize(*layer.codes_and_scale()).cpu()
    kind, weight = kind_of(layer), layer.get_parameter("weight")
    if kind is not None:
        return kind.rows(weight.detach(), layer).float().cpu()
    return (weight.detach().float() + scales_by_one_plus(layer, weight)).unsqueeze(1).cpu()


def _same_ranges(was: Tensor, now: Tensor) -> bool:
    """Whether the largest magnitude of each row [K] is the same but for rounding: a fold changes it somewhere."""
    return torch.allclose(was.abs().amax(1), now.abs().amax(1), rtol=0.05, atol=0.0)


def _power_of_two_between(rows: Tensor, times: Tensor) -> Tensor:
    """The powers of two [N] of which, but for rounding, `times` is a multiple of `rows`, both [N, K]; 1 if of none."""
    ratio = (rows * times).sum(1) / rows.square().sum(1)
    power = torch.exp2(ratio.log2().round())
    return torch.where((ratio / power - 1).abs() < 0.1, power, 1.0)
