"""Move the outliers of activations into the weights, where a scale per channel takes them: SmoothQuant, on any model.

    s_j = amax(x_j)^alpha / amax(w_j)^(1 - alpha)          per input channel j of the weights that x is multiplied by
    x_j' = x_j / s_j    folded into what produces x        w_j' = w_j * s_j    so that x' w' = x w

(Xiao et al., arXiv:2211.10438, equation 4.) Here s is rounded to a power of two. That costs next to nothing in
accuracy and makes every fold *exact*, in bf16 and fp16 too: no weight is rounded anew, and the smoothed model computes
the same bits as before. So "the function is preserved" is a test for equality, made on the model itself; a fold that
fails it is taken back, and the report says why. (Two exceptions, for which the test allows for rounding: norms that
scale by 1 + weight, which is exact in fp32 only, and the smallest numbers of fp16, which have fewer digits.)

Where to fold is found by `octavo.pairs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octavo.calibrate import Stats
from octavo.errors import CalibrateError, QuantizeError
from octavo.layers import kind_of
from octavo.pairs import Pair, Product, Sink, find_pairs, is_norm, products
from octavo.recipe import Scheme
from octavo.report import SmoothedPair, SmoothReport, sqnr_db
from octavo.sensitivity import CATASTROPHE_DB, evenly, output_error, rounded_input

__all__ = ["GRID", "smooth"]

Progress = Callable[[int, int], None]
"""Called with (pairs done, pairs in all)."""

GRID = tuple(i / 20 for i in range(20))
"""The values that alpha="auto" tries: 0, 0.05, ... 0.95. It tries them with two ranges in the place of amax(x_j): that
one, and the typical range of `Observer.typical_range`, which a few huge tokens do not sway."""


def smooth(
    model: nn.Module,
    stats: Stats,
    alpha: float | Literal["auto"] = 0.5,
    *,
    scheme: str | Scheme = "w8a8",
    repair: bool = True,
    batch: Any = None,
    progress: Progress | None = None,
) -> SmoothReport:
    """Smooth a float model in place; what it computes stays the same.

    stats: of this model, from `octavo.calibrate`. They follow: afterwards they are those of the smoothed model.
    alpha: 0 to 1, how much of the difficulty moves from activations to weights; "auto" takes for each pair the value of
        `GRID` with the smallest error at the outputs of its layers, measured on the rows that `stats` kept.
    scheme: the quantization that "auto" measures, and the report's errors are of.
    repair: as it will be given to `octavo.quantize`: whether layers that static inputs do not suit will get others. The
        alpha of those is chosen for dynamic inputs.
    batch: an input to find and prove the pairs with; by default the first that `stats` were made of.
    Returns: each pair with its alpha and its effect; each norm that was left alone, with the reason.
    Raises: CalibrateError for statistics of another model, or without rows for "auto"; QuantizeError for an alpha that
        is out of range, or a model that is int8 already.
    """
    if alpha != "auto" and not (isinstance(alpha, float | int) and 0 <= alpha <= 1):
        raise QuantizeError(f"alpha is {alpha!r}, expected a number from 0 to 1, or 'auto'")
    chosen = Scheme.of(scheme) if isinstance(scheme, str) else scheme
    schemes = (chosen, chosen.as_dynamic()) if chosen.is_static and repair else (chosen,)
    example = stats.example if batch is None else batch
    if example is None:
        raise CalibrateError("these statistics hold no example batch; pass one as batch=")
    _refuse_int8(model)
    _check_stats(model, stats)
    before = products(model, example)
    done: list[SmoothedPair] = []
    folded: list[_Fold] = []
    pairs = find_pairs(model, example)
    for count, pair in enumerate(pairs, 1):
        fold = _planned(model, pair, stats, alpha, schemes) if pair.reason is None else pair.reason
        if isinstance(fold, _Fold):
            why = fold.apply()
            if why is None:
                folded.append(fold)
            else:
                done.append(_left_out(pair, why))
        else:
            done.append(_left_out(pair, fold))
        if progress is not None:
            progress(count, len(pairs))
    for fold, why in _prove(model, example, folded, before):
        done.append(_left_out(fold.pair, why))
    for fold in folded:
        for layer in fold.watched:
            stats.observers[layer].divide(fold.smooth_scale[fold.channels].cpu())
        done.append(fold.report)
    order = {pair.source: i for i, pair in enumerate(pairs)}
    return SmoothReport(tuple(sorted(done, key=lambda row: order[row.source])))


def _refuse_int8(model: nn.Module) -> None:
    if any(hasattr(module, "quantized_params") for module in model.modules()):
        raise QuantizeError("the model holds int8 layers, whose codes cannot be scaled; smooth it first, then quantize")


def _check_stats(model: nn.Module, stats: Stats) -> None:
    modules = dict(model.named_modules())
    unknown = [name for name in stats.observers if name not in modules]
    if unknown:
        raise CalibrateError(
            f"stats are of another model: it has no layer {unknown[0]!r} ({len(unknown)} such); calibrate this one"
        )


def _left_out(pair: Pair, why: str) -> SmoothedPair:
    return SmoothedPair(pair.source, tuple(sink.layer for sink in pair.sinks), reason=why)


# -- choosing the factors --------------------------------------------------------------------------------------------


def _planned(
    model: nn.Module, pair: Pair, stats: Stats, alpha: float | Literal["auto"], schemes: Sequence[Scheme]
) -> _Fold | str:
    """The fold of a pair, or why there is none."""
    assert pair.layout is not None
    watched = list(dict.fromkeys(sink.layer for sink in pair.sinks if sink.layer in stats.observers))
    if not watched:
        return "no batch of the calibration reached its layers"
    columns = [_columns(model, sink) for sink in pair.sinks]
    device = columns[0].device
    seen = [stats.observers[layer] for layer in watched]
    channels, rows = pair.layout.channels.to(device), len(pair.layout.rows)
    if len(seen[0].amax) != len(channels):
        return f"the statistics have {len(seen[0].amax)} channels, the weights {len(channels)}"

    def by_row(values: Iterable[Tensor]) -> Tensor:
        """The largest of what several weights or inputs have for the channels of each row: [K] each -> [S]."""
        largest = torch.stack([value.to(device) for value in values]).amax(0)
        return largest.new_zeros(rows).scatter_reduce_(0, channels, largest, "amax")

    amax_w = by_row(weight.abs().amax(0).float() for weight in columns)
    amax_x = by_row(observer.amax for observer in seen)
    trial = _Trial(model, pair, stats, device)
    if alpha != "auto":
        best, factors = float(alpha), _factors(amax_x, amax_w, alpha)
    elif trial.can_measure:
        ranges = (amax_x, by_row(observer.typical_range() for observer in seen))
        best, factors = _best_factors(trial, ranges, amax_w, channels, schemes)
    else:
        return "nothing to choose alpha by: no layer that it feeds can be int8, or no rows of their input were kept"
    report = SmoothedPair(
        pair.source,
        tuple(sink.layer for sink in pair.sinks),
        best,
        amax_x.max().item(),
        (amax_x / factors).max().item(),
        trial.error(torch.ones_like(factors)[channels], schemes[0]) if trial.can_measure else None,
        trial.error(factors[channels], schemes[0]) if trial.can_measure else None,
    )
    return _Fold(model, pair, factors, channels, watched, report)


def _best_factors(
    trial: _Trial, ranges: Sequence[Tensor], amax_w: Tensor, channels: Tensor, schemes: Sequence[Scheme]
) -> tuple[float, Tensor]:
    """The alpha of the grid, and its factors, with the smallest error under the first of the schemes that comes out of
    it well enough to be kept; under the last if none does."""
    candidates: dict[tuple[float, ...], tuple[float, Tensor]] = {}
    alive = (ranges[0] > 0) & (amax_w > 0)
    for range_x in ranges:
        for alpha in GRID:
            factors = _centered(_factors(range_x, amax_w, alpha), alive)
            candidates.setdefault(tuple(factors.tolist()), (alpha, factors))  # many differ by less than a power of two
    for scheme in schemes:
        errors = [(trial.error(factors[channels], scheme), alpha) for alpha, factors in candidates.values()]
        least = min(range(len(errors)), key=errors.__getitem__)
        if sqnr_db(errors[least][0]) >= CATASTROPHE_DB:
            break
    return list(candidates.values())[least]


def _factors(range_x: Tensor, amax_w: Tensor, alpha: float) -> Tensor:
    """s of each channel, fp32: the formula at the head of this file, to a power of two; 1 for a channel that was dead
    in calibration or that no weight reads."""
    alive = (range_x > 0) & (amax_w > 0)
    log2 = alpha * range_x.clamp_min(1e-12).log2() - (1 - alpha) * amax_w.clamp_min(1e-12).log2()
    return torch.where(alive, torch.exp2(log2.round().clamp(-24, 24)), 1.0)


def _centered(factors: Tensor, alive: Tensor) -> Tensor:
    """The factors without what is common to those of all channels that are alive: it helps no scale, and would carry
    activations away from where fp16 can hold them."""
    common = factors.log2()[alive].mean().round() if bool(alive.any()) else 0.0
    return torch.where(alive, factors * 2.0**-common, factors)


def _columns(model: nn.Module, sink: Sink) -> Tensor:
    """A sink's weight as [rows, K], whatever its layout."""
    weight = model.get_parameter(sink.param).detach()
    return weight.movedim(sink.axis, -1).reshape(-1, weight.shape[sink.axis])


class _Trial:
    """The error at the outputs of a pair's layers, for factors that might be folded."""

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


def _may_be_int8(model: nn.Module, sink: Sink) -> bool:
    """Whether the layer is a linear one, or a stack of experts; a router is neither."""
    kind = kind_of(model.get_submodule(sink.layer))
    return model.get_parameter(sink.param).dim() == 3 or (kind is not None and kind.int8_input)


# -- folding ---------------------------------------------------------------------------------------------------------


class _Fold:
    """One pair's factors: put into the weights, and taken out again."""

    def __init__(
        self,
        model: nn.Module,
        pair: Pair,
        smooth_scale: Tensor,
        channels: Tensor,
        watched: list[str],
        report: SmoothedPair,
    ) -> None:
        self.pair = pair
        self.smooth_scale = smooth_scale
        self.channels = channels
        self.watched = watched
        self.report = report
        self.exact = True
        self._model = model
        self._scaled: list[tuple[nn.Parameter, Tensor]] = []
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def apply(self) -> str | None:
        """Fold; returns why not, if it cannot be done."""
        source = self._model.get_submodule(self.pair.source)
        inverse = 1 / self.smooth_scale
        why = self._fold_norm(source, inverse) if is_norm(source) else self._fold_linear(source, inverse)
        for sink in self.pair.sinks:
            if why is None:
                weight = self._model.get_parameter(sink.param)
                shape = [1] * weight.dim()
                shape[sink.axis] = -1
                why = self._scale(weight, self.smooth_scale[self.channels].reshape(shape))
        if why is not None:
            self.undo()
        return why

    def _fold_norm(self, norm: nn.Module, inverse: Tensor) -> str | None:
        """A norm scales its output by its weight, or by 1 + weight (Gemma): which, its weight of now and a weight of
        zeros tell."""
        weight = norm._parameters["weight"]
        assert weight is not None
        if _scales_by_one_plus(norm, weight):
            self._keep(weight)
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

    def _scale_bias(self, layer: nn.Module, factors: Tensor) -> str | None:
        bias = layer._parameters.get("bias")
        return None if bias is None else self._scale(bias, factors)

    def _scale(self, parameter: nn.Parameter, factors: Tensor) -> str | None:
        """Multiply by powers of two; returns why not, if the dtype cannot hold a product. fp16 cannot hold the smallest
        in full, which is let pass as long as it is small beside the largest weight."""
        data = parameter.data
        scaled = (_wide(data) * factors).to(data.dtype)
        lost = ((_wide(scaled) / factors).to(data.dtype) - data).abs()
        if not bool((lost <= _MAY_BE_LOST * data.abs().amax()).all()):  # NaN and inf, too
            return f"{data.dtype} cannot hold its weights times the factors; smooth the model in fp32"
        self.exact = self.exact and not bool(lost.any())
        parameter.data = scaled
        self._scaled.append((parameter, factors))
        return None

    def _keep(self, parameter: nn.Parameter) -> None:
        self._kept.append((parameter, parameter.data))

    def undo(self) -> None:
        """Take the factors out again."""
        for parameter, factors in self._scaled:
            parameter.data = (_wide(parameter.data) / factors).to(parameter.dtype)
        for parameter, data in self._kept:
            parameter.data = data
        self._scaled, self._kept, self.exact = [], [], True


_MAY_BE_LOST = 1e-3
"""Of the largest weight, that a scaled weight may be rounded by."""


def _wide(values: Tensor) -> Tensor:
    """In fp32 at least, where factors that fp16 cannot hold are no trouble."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _scales_by_one_plus(norm: nn.Module, weight: nn.Parameter) -> bool:
    """Whether the norm's output for a weight of zeros is not zero (its bias aside)."""
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype).unsqueeze(0)
    bias = norm._parameters.get("bias")
    before = weight.data
    try:
        with torch.no_grad():
            weight.data = torch.zeros_like(before)
            y = norm(x)
    except Exception:  # it wants more than x, whatever its way to say so: the proof is the judge then
        return False
    finally:
        weight.data = before
    return bool((y - bias if bias is not None else y).any())


# -- proving ---------------------------------------------------------------------------------------------------------


_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Of the largest value, that a tensor may differ by where a fold could not be exact."""

Trace = tuple[list[Product], list[Tensor]]


def _prove(model: nn.Module, example: Any, folded: list[_Fold], before: Trace) -> list[tuple[_Fold, str]]:
    """Run the smoothed model: every product and the output must be what they were. Folds that change any are undone,
    taken out of `folded` and returned with the reason."""
    undone = []
    while folded:
        fault = _first_fault(before, products(model, example), folded)
        if fault is None:
            break
        at, what = fault
        fold = _culprit(model, example, folded, before, at)
        folded.remove(fold)
        undone.append((fold, f"folding it changes the model: {what}"))
    return undone


def _first_fault(before: Trace, after: Trace, folded: list[_Fold]) -> tuple[int, str] | None:
    """Index and description of the first product, or (after the last) output, that is not what it was."""
    exact = all(fold.exact for fold in folded)
    owner = {sink.param: fold for fold in folded for sink in fold.pair.sinks}
    for i, (b, a) in enumerate(zip(before[0], after[0], strict=False)):
        x = a.x
        if a.sink.param in owner:
            fold = owner[a.sink.param]
            x = x.float() * fold.smooth_scale[fold.channels]
        if a.sink != b.sink or a.x.shape != b.x.shape or not _agree(b.x.float(), x.float(), b.x.dtype, exact):
            return i, f"the input of {b.sink.layer} is another"
    if len(before[0]) != len(after[0]):
        return min(len(before[0]), len(after[0])), "other layers run"
    for b_out, a_out in zip(before[1], after[1], strict=True):
        if not _agree(b_out.float(), a_out.float(), b_out.dtype, exact):
            return len(before[0]), "its output is another"
    return None


def _agree(before: Tensor, after: Tensor, dtype: torch.dtype, exact: bool) -> bool:
    if exact and before.device.type == "cpu" and dtype != torch.float16:
        return torch.equal(before, after)
    largest = before.abs().max() if before.numel() else 0.0
    return bool(((before - after).abs() <= _TOLERANCES[dtype] * largest).all())


def _culprit(model: nn.Module, example: Any, folded: list[_Fold], before: Trace, at: int) -> _Fold:
    """The fold without which the first fault is later or gone; it is undone."""
    first = {fold: _first_event(fold, before[0]) for fold in folded}
    for fold in sorted(folded, key=lambda fold: abs(first[fold] - at)):
        fold.undo()
        rest = [other for other in folded if other is not fold]
        fault = _first_fault(before, products(model, example), rest)
        if fault is None or fault[0] > at:
            return fold
        fold.apply()
    nearest = min(folded, key=lambda fold: abs(first[fold] - at))
    nearest.undo()
    return nearest


def _first_event(fold: _Fold, events: list[Product]) -> int:
    params = {sink.param for sink in fold.pair.sinks}
    return next((i for i, event in enumerate(events) if event.sink.param in params), len(events))
