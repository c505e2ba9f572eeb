"""Read back from an int8 model what smoothing divided the outputs of its layers by.

Smoothing divides output channels (of up_proj, v_proj) by powers of two that the next layer's weights take back.
Compared with the float model such an output looks wrong, although nothing is. No record of the factors is kept, because
they follow from the weights of both models: for the source of a pair

    W'_nk = W_nk * c_k / s_n     c: what its columns took from the pair before it, s: what its rows were divided by

Rounding to int8 changes a row by about 1%, so the power of two s_n can be told. A norm has one column with c = 1. Pair
by pair, in the order in which they run, there is then one unknown at a time.
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
    """Name of an int8 linear layer -> what its output channels were divided by, fp32 [N]; layers with all 1 are left
    out.

    model: the float model as it was before smoothing, not modified. (For one that is already smoothed the result is
        empty.)
    int8_model: the int8 model that it became. example: a batch to find the pairs of `model` with.
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
    """Whether `now` is what became of the linear layer or norm `was`."""
    kind = kind_of(was)
    is_either = is_norm(was) or (kind is not None and kind.module is QuantLinear)
    weight = was._parameters.get("weight") if is_either else None
    if weight is None:
        return False
    if isinstance(now, QuantLinear):
        return kind is not None and kind.rows(weight, was).shape == now.codes_and_scale()[0].shape
    if now is None or type(now) not in (type(was), FloatLinear, FusedRMSNorm):
        return False
    other = now._parameters.get("weight")
    return other is not None and other.shape == weight.shape


def _rows(layer: nn.Module) -> Tensor:
    """The weights of each output channel: [N, K] of a linear layer, [N, 1] of a norm; fp32 on the CPU."""
    if isinstance(layer, QuantLinear):
        return dequantize(*layer.codes_and_scale()).cpu()
    kind, weight = kind_of(layer), layer.get_parameter("weight")
    if kind is not None:
        return kind.rows(weight.detach(), layer).float().cpu()
    return (weight.detach().float() + scales_by_one_plus(layer, weight)).unsqueeze(1).cpu()


def _same_ranges(was: Tensor, now: Tensor) -> bool:
    """Whether the largest magnitude of each row is the same up to rounding. A fold would change some of them."""
    return torch.allclose(was.abs().amax(1), now.abs().amax(1), rtol=0.05, atol=0.0)


def _power_of_two_between(rows: Tensor, times: Tensor) -> Tensor:
    """fp32 [N]: for each row the power of two p with times = p * rows up to rounding; 1 if there is none. Both are
    [N, K]."""
    ratio = (rows * times).sum(1) / rows.square().sum(1)
    power = torch.exp2(ratio.log2().round())
    return torch.where((ratio / power - 1).abs() < 0.1, power, 1.0)
