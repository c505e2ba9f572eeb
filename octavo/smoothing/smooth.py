"""Move the outliers of activations into the weights, where a scale per channel takes them: SmoothQuant, on any model.

    s_j = amax(x_j)^alpha / amax(w_j)^(1 - alpha)          per input channel j of the weights that x is multiplied by
    x_j' = x_j / s_j    folded into what produces x        w_j' = w_j * s_j    so that x' w' = x w

(Xiao et al., arXiv:2211.10438, equation 4.) Here s is rounded to a power of two. That costs next to nothing in
accuracy and makes every fold *exact*, in bf16 and fp16 too: no weight is rounded anew, and the smoothed model computes
the same bits as before. So "the function is preserved" is a test for equality of all tensors that the model returns
and of what each weight is multiplied by, made on the model itself, on a batch for each way through it that calibration
saw: other layers, or arguments of another structure (`Stats.further`). A fold that fails it is taken back, and the
report says why. (Three exceptions, for which the test allows for rounding of floats: norms that scale by 1 + weight,
fp16, whose smallest numbers have fewer digits, and devices other than CPUs.) Not proved is what no such batch shows: a
branch on the sizes or values of tensors over the very same layers.

Inside a stack of experts, up -> down, each expert has factors of its own: s is [E, I] there. Experts that calibration
routed no token to have factors of 1.

Where to fold is found by `octavo.smoothing.pairs`. What will stay float takes factors as well as what becomes int8, for
which that will be is not known here: an output head that a recipe includes gains by it, to others it makes no
difference.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octavo.calibration.calibrate import check_is_float
from octavo.calibration.expert_inputs import ExpertsObserver
from octavo.calibration.sensitivity import CATASTROPHE_DB, OUTPUTS, evenly, output_error, rounded_input
from octavo.calibration.stats import Stats, check_stats, columns_of, is_watched, largest_of_columns
from octavo.errors import CalibrateError, OctavoWarning, QuantizeError, RecipeError
from octavo.experts import spec_of
from octavo.feeding import Progress
from octavo.layers import kind_of
from octavo.recipe import Scheme
from octavo.report import SmoothedPair, SmoothReport, sqnr_db
from octavo.smoothing.pairs import Pair, find_pairs, is_norm, scales_by_one_plus
from octavo.smoothing.trace import Product, Sink, Trace, equal, largest_of, traced

__all__ = ["GRID", "smooth"]

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
    """Smooth a float model in place: outliers of activations move into the weights, what it computes stays the same.

        s_j = amax(|x_j|)^alpha / amax(|w_j|)^(1 - alpha)      x_j' = x_j / s_j,  w_j' = w_j * s_j,  so that x' w' = x w

    for each input channel j of the layers that one norm (or value or up projection) feeds, rounded to a power of two,
    so that nothing else is rounded. Source: SmoothQuant (Xiao et al., arXiv:2211.10438), equation 4. What is proved,
    and where within a tolerance only: the head of octavo.smoothing.smooth.

    model: float, on any device.
    stats: of this model, from `octavo.calibrate`. They follow: afterwards they are those of the smoothed model.
    alpha: 0 to 1, how much of the difficulty moves from activations to weights; "auto" takes for each pair the value of
        0, 0.05, ... 0.95 with the smallest error at the outputs of its layers, measured on the rows that `stats` kept,
        and leaves alone a pair that none were kept of.
    scheme: the quantization that "auto" measures, and the report's errors are of; a preset's name or a Scheme.
    repair: as it will be given to `octavo.quantize`: whether layers that static inputs do not suit will get others. The
        alpha of those is chosen for dynamic inputs.
    batch: an input to find and prove the pairs with; by default the first that `stats` were made of. Those that go
        another way prove them too.
    progress: called with (pairs done, number of pairs).
    Returns: each pair with its alpha and its effect; each norm and each stack of experts that was left alone, with the
        reason.
    Warns: OctavoWarning if layers that a folded norm may feed were reached by no batch.
    Raises: CalibrateError for statistics of another model, or without an example batch where no `batch` is given;
        QuantizeError for an alpha that is out of range, a scheme whose inputs stay float, a model that is int8 already,
        or what is no module; RecipeError for an unknown scheme; EvaluateError for a batch that the model cannot be fed.
    """
    if alpha != "auto" and not (isinstance(alpha, float | int) and 0 <= alpha <= 1):
        raise QuantizeError(f"alpha is {alpha!r}, expected a number from 0 to 1, or 'auto'")
    check_stats(stats)
    chosen = Scheme.of(scheme) if isinstance(scheme, str) else scheme
    if not isinstance(chosen, Scheme):
        raise RecipeError(f"scheme is {scheme!r}, expected a preset's name or a Scheme")
    if chosen.input is None:
        raise QuantizeError(f"scheme is {chosen}, whose inputs stay float, so that there is nothing to smooth for")
    schemes = (chosen, chosen.as_dynamic()) if chosen.is_static and repair else (chosen,)
    example = stats.example if batch is None else batch
    if example is None:
        raise CalibrateError("these statistics hold no example batch; pass one as batch=")
    check_is_float(model)
    stats.check_are_of(model)
    examples = [example, *stats.further]
    before = [traced(model, one) for one in examples]
    done: list[SmoothedPair] = []
    folded: list[_Fold] = []
    pairs = find_pairs(model, example)
    try:
        for count, pair in enumerate(pairs, 1):
            fold = _planned(model, pair, stats, alpha, schemes) if pair.reason is None else pair.reason
            why = fold if isinstance(fold, str) else _applied(fold, folded)
            if why is not None:
                done.append(_left_out(pair, why))
            if progress is not None:
                progress(count, len(pairs))
        for one, trace in zip(examples, before, strict=True):
            for fold, why in _prove(model, one, folded, trace):
                done.append(_left_out(fold.pair, why))
        _warn_of_unreached(model, stats, folded, before)
    except BaseException:  # an interrupt, a warning that is an error: nothing stays folded that stats do not know of
        for fold in folded:
            fold.undo()
        raise
    for fold in folded:
        fold.divide(stats)
        done.append(fold.report)
    if stats.columns:
        stats.columns = largest_of_columns(dict(model.named_modules()))
    order = {pair.source: i for i, pair in enumerate(pairs)}
    return SmoothReport(tuple(sorted(done, key=lambda row: order[row.source])))


def _applied(fold: _Fold, folded: list[_Fold]) -> str | None:
    """Fold, and note it in `folded`; returns why not, if it cannot be done."""
    folded.append(fold)
    why = fold.apply()
    if why is not None:
        folded.remove(fold)
    return why


def _warn_of_unreached(model: nn.Module, stats: Stats, folded: list[_Fold], traces: list[Trace]) -> None:
    """That no batch reached a layer which a folded norm may feed: what it computes then was not looked at. (One whose
    weight was multiplied by was reached, if not called: the output projection of nn.MultiheadAttention.)"""
    fed = {sink.layer for fold in folded for sink in fold.pair.sinks}
    fed.update(product.sink.layer for trace in traces for product in trace.products)
    widths = {fold.columns.shape[-1] for fold in folded}
    names = [name for name in stats.unreached if name not in fed and columns_of(model.get_submodule(name)) in widths]
    if names:
        warnings.warn(
            f"no batch of the calibration reached {names[0]} ({len(names)} such): if a norm that was smoothed feeds "
            "it, it computes something else now; calibrate on a batch that reaches it too",
            OctavoWarning,
            stacklevel=3,
        )


def _left_out(pair: Pair, why: str) -> SmoothedPair:
    return SmoothedPair(pair.source, _names(pair), reason=why)


def _names(pair: Pair) -> tuple[str, ...]:
    """What the report calls the sinks: layers, but inside a stack of experts the down projection."""
    return tuple(sink.layer if pair.experts is None else sink.param for sink in pair.sinks)


# -- choosing the factors --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Ranges:
    """What the factors [..., S] of a pair are made of, each [..., S] in fp32.

    x: largest magnitude of the inputs of its sinks. typical_x: what they usually are, if rows were kept to tell it by.
    w: largest magnitude of the weights that they are multiplied by.
    """

    x: Tensor
    typical_x: Callable[[], Tensor]
    w: Tensor


def _planned(
    model: nn.Module, pair: Pair, stats: Stats, alpha: float | Literal["auto"], schemes: Sequence[Scheme]
) -> _Fold | str:
    """The fold of a pair, or why there is none."""
    assert pair.layout is not None
    ranges = _ranges(model, pair, stats) if pair.experts is None else _ranges_of_experts(model, pair, stats)
    if isinstance(ranges, str):
        return ranges
    channels = pair.layout.channels.to(ranges.x.device)
    trial = (_Trial if pair.experts is None else _ExpertsTrial)(model, pair, stats, ranges.x.device)
    if alpha != "auto":
        best, factors = float(alpha), _factors(ranges.x, ranges.w, alpha)
    elif trial.can_measure:
        best, factors = _best_factors(trial, ranges, channels, schemes)
    else:
        return "nothing to choose alpha by: no layer that it feeds can be int8, or no rows of their input were kept"
    report = SmoothedPair(
        pair.source,
        _names(pair),
        best,
        ranges.x.max().item(),
        (ranges.x / factors).max().item(),
        trial.error(torch.ones_like(factors)[..., channels], schemes[0]) if trial.can_measure else None,
        trial.error(factors[..., channels], schemes[0]) if trial.can_measure else None,
    )
    return _Fold(model, pair, factors, channels, report)


def _ranges(model: nn.Module, pair: Pair, stats: Stats) -> _Ranges | str:
    """Those of a pair of layers, [S]; or why there are none."""
    assert pair.layout is not None
    seen = [stats.observers[layer] for layer in _watched(pair, stats)]
    if not seen:
        watched = any(is_watched(model.get_submodule(sink.layer)) for sink in pair.sinks)
        return "no batch of the calibration reached its layers" if watched else "the inputs of its layers stay float"
    columns = [_columns(model, sink) for sink in pair.sinks]
    device = columns[0].device
    channels, rows = pair.layout.channels.to(device), len(pair.layout.rows)
    if len(seen[0].amax) != len(channels):
        return f"the statistics have {len(seen[0].amax)} channels, the weights {len(channels)}"

    def by_row(values: Iterable[Tensor]) -> Tensor:
        """The largest of what several weights or inputs have for the channels of each row: [K] each -> [S]."""
        largest = torch.stack([value.to(device) for value in values]).amax(0)
        return largest.new_zeros(rows).scatter_reduce_(0, channels, largest, "amax")

    return _Ranges(
        by_row(observer.amax for observer in seen),
        lambda: by_row(observer.typical_range() for observer in seen),
        by_row(weight.abs().amax(0).float() for weight in columns),
    )


def _ranges_of_experts(model: nn.Module, pair: Pair, stats: Stats) -> _Ranges | str:
    """Those of a pair inside a stack of experts, [E, I]; or why there are none."""
    (sink,) = pair.sinks
    seen = stats.experts.get(sink.param)
    if seen is None:
        return "the statistics have nothing of the inputs of its experts' down projections"
    weight = model.get_parameter(sink.param).detach()
    w = weight.abs().amax(3 - sink.axis).float()
    if seen.amax.shape != w.shape:
        return f"the statistics have {list(seen.amax.shape)} experts and channels, the weights {list(w.shape)}"
    return _Ranges(seen.amax.to(w.device), lambda: seen.typical_range().to(w.device), w)


def _watched(pair: Pair, stats: Stats) -> list[str]:
    """The layers of a pair's sinks that calibration reached."""
    return list(dict.fromkeys(sink.layer for sink in pair.sinks if sink.layer in stats.observers))


def _best_factors(
    trial: _Trial | _ExpertsTrial, ranges: _Ranges, channels: Tensor, schemes: Sequence[Scheme]
) -> tuple[float, Tensor]:
    """The alpha of the grid, and its factors, with the smallest error under the first of the schemes that comes out of
    it well enough to be kept; under the last if none does."""
    candidates: dict[bytes, tuple[float, Tensor]] = {}  # by the factors: many differ by less than a power of two
    alive = (ranges.x > 0) & (ranges.w > 0)
    for range_x in (ranges.x, ranges.typical_x()):
        for alpha in GRID:
            factors = _centered(_factors(range_x, ranges.w, alpha), alive)
            candidates.setdefault(factors.cpu().numpy().tobytes(), (alpha, factors))
    for scheme in schemes:
        errors = [(trial.error(factors[..., channels], scheme), alpha) for alpha, factors in candidates.values()]
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
    """The factors [..., S] without what is common to those of all channels that are alive: it helps no scale, and would
    carry activations away from where fp16 can hold them."""
    total = torch.where(alive, factors.log2(), 0.0).sum(-1, keepdim=True)
    common = (total / alive.sum(-1, keepdim=True).clamp_min(1)).round()
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


class _ExpertsTrial:
    """The same for the down projections of a stack of experts; those that no rows were kept of do not count."""

    def __init__(self, model: nn.Module, pair: Pair, stats: Stats, device: torch.device) -> None:
        layer, (sink,) = model.get_submodule(pair.experts or ""), pair.sinks
        self._kind, spec = kind_of(layer), spec_of(layer)
        assert spec is not None
        seen: ExpertsObserver = stats.experts[sink.param]
        experts = seen.expert.unique().tolist()
        stack = spec.rows(model.get_parameter(sink.param).detach())
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
        scheme = self._kind.effective(scheme)  # which has no static inputs
        total = 0.0
        for e, x, weight, y in self._measured:
            x = x / s[e]
            total += output_error(weight * s[e], y, rounded_input(x, scheme, x.abs().amax()), scheme)
        return total / len(self._measured)


def _may_be_int8(model: nn.Module, sink: Sink) -> bool:
    """Whether the layer is a linear one, or a stack of experts; a router is neither."""
    kind = kind_of(model.get_submodule(sink.layer))
    return model.get_parameter(sink.param).dim() == 3 or (kind is not None and kind.int8_input)


# -- folding ---------------------------------------------------------------------------------------------------------


class _Fold:
    """One pair's factors: put into the weights, and taken out again.

    smooth_scale: fp32 [S], of the source's channels; inside a stack of experts [E, S]. columns: the same of the
    channels of the sinks' inputs, [K] or [E, K].
    """

    def __init__(
        self,
        model: nn.Module,
        pair: Pair,
        smooth_scale: Tensor,
        channels: Tensor,
        report: SmoothedPair,
    ) -> None:
        self.pair = pair
        self.smooth_scale = smooth_scale
        self.columns = smooth_scale[..., channels]
        self.report = report
        self.exact = True
        self._model = model
        self._undo: list[Callable[[], None]] = []

    def apply(self) -> str | None:
        """Fold; returns why not, if it cannot be done."""
        why = self._fold_source(1 / self.smooth_scale)
        for sink in self.pair.sinks:
            if why is None:
                weight = self._model.get_parameter(sink.param)
                shape = [1] * weight.dim()
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
        """A norm scales its output by its weight, or by 1 + weight (Gemma): which, its weight of now and a weight of
        zeros tell."""
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
        factors = torch.ones(spec.rows(weight).shape[:2], device=weight.device)  # [E, U]
        factors[: len(inverse), self.pair.layout.rows.to(weight.device)] = inverse
        bias = None if spec.up_bias is None else getattr(layer, spec.up_bias)
        why = self._scale(weight, factors.unsqueeze(1 if spec.transposed else 2))
        return why or (None if bias is None else self._scale(bias, factors))

    def _scale_bias(self, layer: nn.Module, factors: Tensor) -> str | None:
        bias = layer._parameters.get("bias")
        return None if bias is None else self._scale(bias, factors)

    def _scale(self, parameter: nn.Parameter, factors: Tensor) -> str | None:
        """Multiply by powers of two; returns why not, if the dtype cannot hold a product. fp16 cannot hold the smallest
        in full, which is let pass as long as it is small beside the largest weight; a copy is kept then."""
        data = parameter.data
        scaled = (_wide(data) * factors).to(data.dtype)
        lost = ((_wide(scaled) / factors).to(data.dtype) - data).abs()
        if not bool((lost <= _MAY_BE_LOST * data.abs().amax()).all()):  # NaN and inf, too
            return f"{data.dtype} cannot hold its weights times the factors; smooth the model in fp32"
        inexact = bool(lost.any())
        self.exact = self.exact and not inexact
        self._undo.append(partial(_restore, parameter, data) if inexact else partial(_divide, parameter, factors))
        parameter.data = scaled
        return None

    def factors_of(self, product: Product) -> Tensor:
        """What the input of a sink's product is divided by now, to be broadcast over it."""
        if self.columns.dim() == 1:
            return self.columns
        columns = self.columns[product.experts]
        return columns.unsqueeze(1) if product.x.dim() == 3 else columns

    def divide(self, stats: Stats) -> None:
        """Let the statistics follow what was folded."""
        if self.pair.experts is not None:
            stats.experts[self.pair.sinks[0].param].divide(self.columns.cpu())
            return
        for layer in _watched(self.pair, stats):
            stats.observers[layer].divide(self.columns.cpu())

    def undo(self) -> None:
        """Take the factors out again."""
        while self._undo:
            self._undo.pop()()
        self.exact = True


def _restore(parameter: nn.Parameter, data: Tensor) -> None:
    parameter.data = data


def _divide(parameter: nn.Parameter, factors: Tensor) -> None:
    parameter.data = (_wide(parameter.data) / factors).to(parameter.dtype)


_MAY_BE_LOST = 1e-3
"""Of the largest weight, that a scaled weight may be rounded by."""


def _wide(values: Tensor) -> Tensor:
    """In fp32 at least, where factors that fp16 cannot hold are no trouble."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


# -- proving ---------------------------------------------------------------------------------------------------------


_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Of the largest value, that a tensor may differ by where a fold could not be exact."""


def _prove(model: nn.Module, example: Any, folded: list[_Fold], before: Trace) -> list[tuple[_Fold, str]]:
    """Run the smoothed model: every product and the output must be what they were. Folds that change any are undone,
    taken out of `folded` and returned with the reason."""
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


def _first_fault(before: Trace, after: Trace, folded: list[_Fold]) -> tuple[int, str] | None:
    """Index and description of the first product, or (after the last) output, that is not what it was."""
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


def _culprit(model: nn.Module, example: Any, folded: list[_Fold], before: Trace, at: int) -> _Fold:
    """The fold without which the first fault is later or gone; it is undone."""
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


def _first_event(fold: _Fold, events: list[Product]) -> int:
    params = {sink.param for sink in fold.pair.sinks}
    return next((i for i, event in enumerate(events) if event.sink.param in params), len(events))
