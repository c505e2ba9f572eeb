"""Fold the factors of a pair into the weights of its layers, in place, and take them out again.

    source    a norm, a linear layer or the up projections of experts: weights and bias of its output channels / s
    sinks     the weights that multiply the source's output: their columns * s

The factors are powers of two, so a fold is exact in every float dtype and can be undone to the bit. Exceptions are
norms that scale by 1 + weight, and fp16, whose smallest numbers have fewer digits: see `Fold.exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from octavo.calibration.stats import Stats
from octavo.experts import spec_of
from octavo.layers import kind_of
from octavo.report import SmoothedPair
from octavo.smoothing.factors import reached_layers
from octavo.smoothing.norms import is_norm, scales_by_one_plus
from octavo.smoothing.pairs import Pair
from octavo.smoothing.trace import Product

__all__ = ["Fold"]


class Fold:
    """The factors of one pair, which can be multiplied into the weights and taken out again.

    smooth_scale: fp32 [S], for the source's output channels; [E, S] inside a stack of experts.
    columns: the same for the sinks' input channels, [K] or [E, K].
    report: the pair's row of the `SmoothReport`.
    exact: whether every product so far is exact, so that the model must compute the same bits.
    """

    def __init__(self, model: nn.Module, pair: Pair, smooth_scale: Tensor, report: SmoothedPair) -> None:
        assert pair.layout is not None
        self.pair = pair
        self.smooth_scale = smooth_scale
        self.columns = smooth_scale[..., pair.layout.channels.to(smooth_scale.device)]
        self.report = report
        self.exact = True
        self._model = model
        self._undo: list[Callable[[], None]] = []

    def apply(self) -> str | None:
        """Multiply the factors into the weights; returns why not, if that cannot be done, with nothing changed."""
        why = self._fold_source(1 / self.smooth_scale)
        for sink in self.pair.sinks:
            if why is None:
                weight = self._model.get_parameter(sink.param)
                shape = [1] * (weight.dim() if self.pair.experts is None else 3)
                shape[sink.axis] = self.columns.shape[-1]
                if self.pair.experts is not None:
                    shape[0] = len(self.columns)
                why = self._scale(weight, self.columns.reshape(shape))
        if why is not None:
            self.undo()
        return why

    def _fold_source(self, inverse: Tensor) -> str | None:
        if self.pair.experts is not None:
            return self._fold_experts(self._model.get_submodule(self.pair.experts), inverse)
        source = self._model.get_submodule(self.pair.source)
        return self._fold_norm(source, inverse) if is_norm(source) else self._fold_linear(source, inverse)

    def _fold_norm(self, norm: nn.Module, inverse: Tensor) -> str | None:
        """A norm scales its output by its weight, or by 1 + weight (Gemma); the latter cannot be folded exactly."""
        weight = norm._parameters["weight"]
        assert weight is not None
        if scales_by_one_plus(norm, weight):
            self._undo.append(partial(_restore, weight, weight.data))
            weight.data = ((1 + _wide(weight.data)) * inverse - 1).to(weight.dtype)
            self.exact = False
            return self._scale_bias(norm, inverse)
        return self._scale(weight, inverse) or self._scale_bias(norm, inverse)

    def _fold_linear(self, layer: nn.Module, inverse: Tensor) -> str | None:
        kind = kind_of(layer)
        assert kind is not None and self.pair.layout is not None
        weight = layer._parameters["weight"]
        assert weight is not None
        outputs = kind.rows(weight.data, layer).shape[0]
        factors = torch.ones(outputs, device=weight.device)
        factors[self.pair.layout.rows.to(weight.device)] = inverse
        by_row = factors.unsqueeze(1) if weight.shape[0] == outputs and kind.name == "Linear" else factors
        return self._scale(weight, by_row) or self._scale_bias(layer, factors)

    def _fold_experts(self, layer: nn.Module, inverse: Tensor) -> str | None:
        spec = spec_of(layer)
        assert spec is not None and self.pair.layout is not None
        weight = self._model.get_parameter(self.pair.source)
        up = next(name for name in spec.up if layer.get_parameter(name) is weight)
        factors = torch.ones(spec.stack(layer, up).shape[:2], device=weight.device)  # [E, U]
        factors[: len(inverse), self.pair.layout.rows.to(weight.device)] = inverse
        bias = None if spec.up_bias is None else getattr(layer, spec.up_bias)
        why = self._scale(weight, spec.turned(up, factors.unsqueeze(2)))
        return why or (None if bias is None else self._scale(bias, factors))

    def _scale_bias(self, layer: nn.Module, factors: Tensor) -> str | None:
        bias = layer._parameters.get("bias")
        return None if bias is None else self._scale(bias, factors)

    def _scale(self, parameter: nn.Parameter, factors: Tensor) -> str | None:
        """Multiply a parameter by powers of two; returns why not, if its dtype cannot hold the products.

        fp16 loses bits of the smallest products. That is accepted where it is small next to the largest weight; the
        original is kept then, to undo it.
        """
        data = _as_factors(parameter.data, factors)
        scaled = (_wide(data) * factors).to(data.dtype)
        lost = ((_wide(scaled) / factors).to(data.dtype) - data).abs()
        if not bool((lost <= _MAY_BE_LOST * data.abs().amax()).all()):  # NaN and inf, too
            return f"{data.dtype} cannot hold its weights times the factors; smooth the model in fp32"
        inexact = bool(lost.any())
        self.exact = self.exact and not inexact
        before = parameter.data
        self._undo.append(partial(_restore, parameter, before) if inexact else partial(_divide, parameter, factors))
        parameter.data = scaled.view(parameter.shape)
        return None

    def factors_of(self, product: Product) -> Tensor:
        """What the input x of a sink's product is divided by once this is folded, in a shape that broadcasts with x."""
        if self.columns.dim() == 1:
            return self.columns
        each = len(self._model.get_parameter(product.sink.param)) // len(self.columns)  # rows of an expert, if 2-D
        columns = self.columns[product.experts.start // each : product.experts.stop // each]
        return columns.unsqueeze(1) if product.x.dim() == 3 else columns

    def divide(self, stats: Stats) -> None:
        """Divide the calibration statistics of the sinks' inputs as well."""
        if self.pair.experts is not None:
            stats.experts[self.pair.sinks[0].param].divide(self.columns.cpu())
            return
        for layer in reached_layers(self.pair, stats):
            stats.observers[layer].divide(self.columns.cpu())

    def undo(self) -> None:
        """Take the factors out again."""
        while self._undo:
            self._undo.pop()()
        self.exact = True


def _restore(parameter: nn.Parameter, data: Tensor) -> None:
    parameter.data = data


def _divide(parameter: nn.Parameter, factors: Tensor) -> None:
    divided = _wide(_as_factors(parameter.data, factors)) / factors
    parameter.data = divided.to(parameter.dtype).view(parameter.shape)


def _as_factors(data: Tensor, factors: Tensor) -> Tensor:
    """2-D weights of experts as [E, ...], if the factors are [E, ...]."""
    return data.unflatten(0, (len(factors), -1)) if factors.dim() > data.dim() else data


_MAY_BE_LOST = 1e-3
"""The largest rounding error of a scaled weight that is accepted, as a fraction of the largest weight."""


def _wide(values: Tensor) -> Tensor:
    """In fp32 at least, which holds factors that fp16 cannot."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
