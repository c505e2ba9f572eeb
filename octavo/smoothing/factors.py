"""By how much to smooth: the factors of a pair.

    s_j = amax(|x_j|)^alpha / amax(|w_j|)^(1 - alpha)      per input channel j, rounded to a power of two

x_j is divided by s_j and w_j multiplied by it (SmoothQuant, Xiao et al., arXiv:2211.10438, equation 4). alpha says how
much of the quantization difficulty moves from activations to weights. alpha="auto" tries a grid and takes the value
with the smallest error at the outputs of the pair's layers, measured on the inputs that calibration kept.

Inside a stack of experts, up -> down, each expert has factors of its own: s is [E, I]. Experts that calibration routed
no token to have factors of 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from octavo.calibration.expert_inputs import ExpertsObserver
from octavo.calibration.sensitivity import CATASTROPHE_DB, OUTPUTS, evenly, output_error, rounded_input
from octavo.calibration.stats import Stats, is_watched
from octavo.experts import spec_of
from octavo.layers import kind_of
from octavo.recipe import Scheme
from octavo.report import SmoothedPair, sqnr_db
from octavo.smoothing.pairs import Pair
from octavo.smoothing.trace import Sink

__all__ = ["GRID", "choose_factors", "reached_layers"]

GRID = tuple(i / 20 for i in range(20))
"""The values that alpha="auto" tries: 0, 0.05, ... 0.95. Each is tried with two measures of the range of x_j: its
largest magnitude, and its typical range (`Observer.typical_range`), which a few huge tokens do not dominate."""


def choose_factors(
    model: nn.Module, pair: Pair, stats: Stats, alpha: float | Literal["auto"], schemes: Sequence[Scheme]
) -> tuple[Tensor, SmoothedPair] | str:
    """The factors of a pair, fp32 [S] ([E, S] inside a stack of experts), and its row of the report; or why there are
    none.

    alpha: as for `octavo.smooth`. schemes: those that the layers may get, the preferred one first.
    """
    assert pair.layout is not None
    ranges = _ranges(model, pair, stats) if pair.experts is None else _ranges_of_experts(model, pair, stats)
    if isinstance(ranges, str):
        return ranges
    channels = pair.layout.channels.to(ranges.x.device)
    outputs = (_LayersError if pair.experts is None else _ExpertsError)(model, pair, stats, ranges.x.device)
    if alpha != "auto":
        best, factors = float(alpha), _factors(ranges.x, ranges.w, alpha)
    elif outputs.can_measure:
        best, factors = _best_factors(outputs, ranges, channels, schemes)
    else:
        return "nothing to choose alpha by: no layer that it feeds can be int8, or no rows of their input were kept"
    report = SmoothedPair(
        pair.source,
        pair.sink_names,
        best,
        ranges.x.max().item(),
        (ranges.x / factors).max().item(),
        outputs.error(torch.ones_like(factors)[..., channels], schemes[0]) if outputs.can_measure else None,
        outputs.error(factors[..., channels], schemes[0]) if outputs.can_measure else None,
    )
    return factors, report


@dataclasses.dataclass
class _Ranges:
    """What the factors of a pair are computed from: fp32 [S] each, or [E, S] inside a stack of experts.

    x: largest magnitude of the sinks' inputs. typical_x: their typical range (`Observer.typical_range`), from the rows
    that calibration kept. w: largest magnitude of the sinks' weights.
    """

    x: Tensor
    typical_x: Callable[[], Tensor]
    w: Tensor


def reached_layers(pair: Pair, stats: Stats) -> list[str]:
    """The layers that a pair's sinks belong to, of those that calibration reached."""
    return list(dict.fromkeys(sink.layer for sink in pair.sinks if sink.layer in stats.observers))


def _ranges(model: nn.Module, pair: Pair, stats: Stats) -> _Ranges | str:
    """The ranges of a pair of layers, [S]; or the reason why it cannot be smoothed."""
    assert pair.layout is not None
    seen = [stats.observers[layer] for layer in reached_layers(pair, stats)]
    if not seen:
        watched = any(is_watched(model.get_submodule(sink.layer)) for sink in pair.sinks)
        return "no batch of the calibration reached its layers" if watched else "the inputs of its layers stay float"
    columns = [_columns(model, sink) for sink in pair.sinks]
    device = columns[0].device
    channels, rows = pair.layout.channels.to(device), len(pair.layout.rows)
    if len(seen[0].amax) != len(channels):
        return f"the statistics have {len(seen[0].amax)} channels, the weights {len(channels)}"

    def by_row(values: Iterable[Tensor]) -> Tensor:
        """The largest of `values`, [K] each, over all input channels that an output channel feeds: [S]."""
        largest = torch.stack([value.to(device) for value in values]).amax(0)
        return largest.new_zeros(rows).scatter_reduce_(0, channels, largest, "amax")

    return _Ranges(
        by_row(observer.amax for observer in seen),
        lambda: by_row(observer.typical_range() for observer in seen),
        by_row(weight.abs().amax(0).float() for weight in columns),
    )


def _ranges_of_experts(model: nn.Module, pair: Pair, stats: Stats) -> _Ranges | str:
    """The ranges of a pair inside a stack of experts, [E, I]; or the reason why it cannot be smoothed."""
    (sink,) = pair.sinks
    seen = stats.experts.get(sink.param)
    if seen is None:
        return "the statistics have nothing of the inputs of its experts' down projections"
    layer = model.get_submodule(sink.layer)
    spec = spec_of(layer)
    assert spec is not None
    w = spec.stack(layer, spec.down).detach().abs().amax(1).float()
    if seen.amax.shape != w.shape:
        return f"the statistics have {list(seen.amax.shape)} experts and channels, the weights {list(w.shape)}"
    return _Ranges(seen.amax.to(w.device), lambda: seen.typical_range().to(w.device), w)


def _best_factors(
    outputs: _LayersError | _ExpertsError, ranges: _Ranges, channels: Tensor, schemes: Sequence[Scheme]
) -> tuple[float, Tensor]:
    """The alpha of the grid with the smallest error, and its factors.

    The error is that under the first of `schemes`; if even the smallest is catastrophic, so that layers will not keep
    that scheme, under the next.
    """
    candidates: dict[bytes, tuple[float, Tensor]] = {}  # many alphas round to the same factors
    alive = (ranges.x > 0) & (ranges.w > 0)
    for range_x in (ranges.x, ranges.typical_x()):
        for alpha in GRID:
            factors = _centered(_factors(range_x, ranges.w, alpha), alive)
            candidates.setdefault(factors.cpu().numpy().tobytes(), (alpha, factors))
    for scheme in schemes:
        errors = [(outputs.error(factors[..., channels], scheme), alpha) for alpha, factors in candidates.values()]
        least = min(range(len(errors)), key=errors.__getitem__)
        if sqnr_db(errors[least][0]) >= CATASTROPHE_DB:
            break
    return list(candidates.values())[least]


def _factors(range_x: Tensor, amax_w: Tensor, alpha: float) -> Tensor:
    """The formula at the head of this file, rounded to powers of two: fp32, of range_x's shape. A channel that was 0
    throughout calibration, or whose weights are 0, gets 1."""
    alive = (range_x > 0) & (amax_w > 0)
    log2 = alpha * range_x.clamp_min(1e-12).log2() - (1 - alpha) * amax_w.clamp_min(1e-12).log2()
    return torch.where(alive, torch.exp2(log2.round().clamp(-24, 24)), 1.0)


def _centered(factors: Tensor, alive: Tensor) -> Tensor:
    """The factors [..., S] divided by their geometric mean, rounded to a power of two, over the channels in use.

    A factor common to all channels makes no int8 scale better, and could move activations out of the range of fp16.
    """
    total = torch.where(alive, factors.log2(), 0.0).sum(-1, keepdim=True)
    common = (total / alive.sum(-1, keepdim=True).clamp_min(1)).round()
    return torch.where(alive, factors * 2.0**-common, factors)


def _columns(model: nn.Module, sink: Sink) -> Tensor:
    """A sink's weight as [rows, K], whatever its layout."""
    weight = model.get_parameter(sink.param).detach()
    return weight.movedim(sink.axis, -1).reshape(-1, weight.shape[sink.axis])


class _LayersError:
    """Measures the quantization error at the outputs of a pair's layers, for factors that might be folded."""

    def __init__(self, model: nn.Module, pair: Pair, stats: Stats, device: torch.device) -> None:
        self._measured: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        inputs: dict[tuple[str, ...], Tensor] = {}
        for sink in pair.sinks:
            seen = stats.observers.get(sink.layer)
            if seen is not None and len(seen.rows) and _may_be_int8(model, sink):
                weight = evenly(_columns(model, sink))
                x = inputs.setdefault(stats.siblings(sink.layer), seen.rows.to(device).float())
                self._measured.append((x, weight, x @ weight.T, seen.amax.to(device)))

    @property
    def can_measure(self) -> bool:
        return bool(self._measured)

    def error(self, s: Tensor, scheme: Scheme) -> float:
        """Mean over the layers of the error with x / s and w * s quantized. s: fp32 [K]."""
        total = 0.0
        last: tuple[Tensor, Tensor] | None = None
        for x, weight, y, amax in self._measured:
            if last is None or last[0] is not x:
                last = (x, rounded_input(x / s, scheme, (amax / s).amax()))
            total += output_error(weight * s, y, last[1], scheme)
        return total / len(self._measured)


class _ExpertsError:
    """The same for the down projections of a stack of experts; experts without kept rows do not count."""

    def __init__(self, model: nn.Module, pair: Pair, stats: Stats, device: torch.device) -> None:
        layer, (sink,) = model.get_submodule(pair.experts or ""), pair.sinks
        self._kind, spec = kind_of(layer), spec_of(layer)
        assert spec is not None
        seen: ExpertsObserver = stats.experts[sink.param]
        experts = seen.expert.unique().tolist()
        stack = spec.stack(layer, spec.down).detach()
        self._measured: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for e in experts:
            x, weight = seen.rows_of(e).to(device).float(), evenly(stack[e], max(1, OUTPUTS // len(experts)))
            self._measured.append((e, x, weight, x @ weight.T))

    @property
    def can_measure(self) -> bool:
        return bool(self._measured)

    def error(self, s: Tensor, scheme: Scheme) -> float:
        """Mean over the experts of the error with x / s and w * s quantized. s: fp32 [E, I]."""
        assert self._kind is not None
        scheme = self._kind.effective(scheme)  # experts have no static inputs
        total = 0.0
        for e, x, weight, y in self._measured:
            x = x / s[e]
            total += output_error(weight * s[e], y, rounded_input(x, scheme, x.abs().amax()), scheme)
        return total / len(self._measured)


def _may_be_int8(model: nn.Module, sink: Sink) -> bool:
    """Whether the layer is a linear one, or a stack of experts; a router is neither."""
    kind = kind_of(model.get_submodule(sink.layer))
    return model.get_parameter(sink.param).dim() == 3 or (kind is not None and kind.int8_input)
