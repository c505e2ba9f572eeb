"""Move the outliers of activations into the weights, where a scale per channel takes them: SmoothQuant, on any model.

    find the pairs      pairs.py      which layers' outputs can be divided, and which weights multiplied in return
    choose factors      factors.py    s_j = amax(|x_j|)^alpha / amax(|w_j|)^(1 - alpha), rounded to powers of two
    fold them           fold.py       x_j' = x_j / s_j, w_j' = w_j * s_j, so that x' w' = x w
    prove               proof.py      the model computes what it did before; folds that change it are taken out

(Xiao et al., arXiv:2211.10438.) Powers of two cost next to nothing in accuracy and make every fold *exact*, in bf16 and
fp16 too: no weight is rounded anew. So "the function is preserved" is a test for equality, made on the model itself, on
one batch for each way through it that calibration saw: other layers, or arguments of another structure
(`Stats.further`).

Weights that will stay float take factors as well, because which they are is not known here. An output head that the
recipe includes gains by it; for the others it makes no difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from octavo.calibration.calibrate import check_is_float
from octavo.calibration.stats import Stats, check_stats, columns_of, largest_of_columns
from octavo.errors import CalibrateError, OctavoWarning, QuantizeError, RecipeError
from octavo.feeding import Progress, check_progress
from octavo.recipe import Scheme
from octavo.report import SmoothedPair, SmoothReport
from octavo.smoothing.factors import choose_factors
from octavo.smoothing.fold import Fold
from octavo.smoothing.pairs import Pair, find_pairs
from octavo.smoothing.proof import prove
from octavo.smoothing.trace import Trace, traced

__all__ = ["smooth"]


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
    and where within a tolerance only: the head of octavo.smoothing.proof.

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
    check_progress(progress)
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
    folded: list[Fold] = []
    pairs = find_pairs(model, example)
    try:
        for count, pair in enumerate(pairs, 1):
            why = pair.reason or _fold(model, pair, stats, alpha, schemes, folded)
            if why is not None:
                done.append(_left_out(pair, why))
            if progress is not None:
                progress(count, len(pairs))
        for one, trace in zip(examples, before, strict=True):
            for fold, why in prove(model, one, folded, trace):
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


def _fold(
    model: nn.Module,
    pair: Pair,
    stats: Stats,
    alpha: float | Literal["auto"],
    schemes: Sequence[Scheme],
    folded: list[Fold],
) -> str | None:
    """Choose the factors of a pair, fold them and append the fold to `folded`; returns why not, if it is impossible."""
    chosen = choose_factors(model, pair, stats, alpha, schemes)
    if isinstance(chosen, str):
        return chosen
    fold = Fold(model, pair, *chosen)
    folded.append(fold)  # first: an interrupt while it is applied undoes it
    why = fold.apply()
    if why is not None:
        folded.remove(fold)
    return why


def _warn_of_unreached(model: nn.Module, stats: Stats, folded: list[Fold], traces: list[Trace]) -> None:
    """Warn of layers that no batch reached and that a folded norm may feed: what they compute was not checked.

    A layer counts as reached if its weight was in a product, even if the layer was not called (the output projection of
    nn.MultiheadAttention).
    """
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
    return SmoothedPair(pair.source, pair.sink_names, reason=why)
