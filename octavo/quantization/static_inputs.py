"""Scales of static inputs, from what calibration kept; and the layers that one scale would ruin, found by measuring."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from octavo.calibration.observers import Observer, ObserverKind, check_observer
from octavo.calibration.sensitivity import CATASTROPHE_DB, evenly, output_error, rounded_input
from octavo.calibration.stats import Stats, check_stats
from octavo.errors import CalibrateError
from octavo.quantization.plan import Decision
from octavo.recipe import Scheme
from octavo.report import sqnr_db

__all__ = ["set_input_scales"]

_HALF_DB = 3.0
"""3 dB, which is half the error: what float inputs have to gain over dynamic ones to be chosen."""


def set_input_scales(
    model: nn.Module, decisions: list[Decision], stats: Stats | None, *, observer: ObserverKind, repair: bool
) -> None:
    """Set `input_scale` in the decisions on layers with static inputs, and change the scheme of layers that cannot have
    them: no batch reached them, or (with `repair`) their measured error would be catastrophic.

    Raises: CalibrateError as `quantize` does.
    """
    check_observer(observer)
    if stats is not None:
        check_stats(stats)
    static = {decision.name: decision for decision in decisions if decision.scheme and decision.scheme.is_static}
    if not static:
        return
    if stats is None:
        raise CalibrateError(
            f"{next(iter(static.values())).scheme} has static inputs, and stats is None; pass stats=octavo.calibrate("
            "model, batches), or take 'w8a8', which needs none"
        )
    stats.check_are_of(model)
    unknown = static.keys() - stats.observers.keys() - set(stats.unreached)
    if unknown:
        raise CalibrateError(
            f"stats know nothing of {min(unknown)!r} ({len(unknown)} such), which is to have static inputs; calibrate "
            "this model, or put it on the ignore list"
        )
    done: set[str] = set()
    for name in static:
        if name not in done:
            group = [static[sibling] for sibling in stats.siblings(name) if sibling in static]
            _set_group(model, group, stats, observer, repair)
            done.update(decision.name for decision in group)


def _set_group(model: nn.Module, group: list[Decision], stats: Stats, observer: ObserverKind, repair: bool) -> None:
    """The same for the layers that are fed one tensor: they get one scale, or all change their scheme."""
    first = group[0]
    assert first.scheme is not None
    seen = stats.observers.get(first.name)
    if seen is None or seen.largest() == 0:
        why = "its inputs were all 0 in calibration" if seen else "no batch of the calibration reached it"
        return _change_schemes(group, Scheme.as_dynamic, f"{why}: a dynamic scale")
    scale = stats.input_scale(first.name, _weight(model, first).dtype, observer)
    if not scale:
        return _change_schemes(group, Scheme.as_dynamic, "its inputs were too small in calibration: a dynamic scale")

    def measured(change: Callable[[Scheme], Scheme]) -> float:
        return min(_sqnr(model, decision, change, seen, scale * 127) for decision in group)

    if repair and len(seen.rows) and (static_db := measured(_as_is)) < CATASTROPHE_DB:
        why, dynamic_db = f"a static scale leaves {static_db:.1f} dB", measured(Scheme.as_dynamic)
        if dynamic_db < CATASTROPHE_DB:
            float_db = measured(_with_float_inputs)
            if float_db >= dynamic_db + _HALF_DB:
                why = f"{why}, a dynamic one {dynamic_db:.1f}"
                return _change_schemes(group, _with_float_inputs, f"{why}: float inputs")
            why = f"{why}, float inputs {float_db:.1f}"  # it is the weights that cost it
        return _change_schemes(group, Scheme.as_dynamic, f"{why}: a dynamic one")
    for decision in group:
        decision.input_scale = scale


def _change_schemes(group: list[Decision], change: Callable[[Scheme], Scheme], note: str) -> None:
    for decision in group:
        assert decision.scheme is not None
        decision.scheme, decision.note = change(decision.scheme), note


def _as_is(scheme: Scheme) -> Scheme:
    return scheme


def _with_float_inputs(scheme: Scheme) -> Scheme:
    return Scheme("w8a16", scheme.weight)


def _weight(model: nn.Module, decision: Decision) -> Tensor:
    weight = model.get_submodule(decision.name)._parameters["weight"]
    assert weight is not None
    return weight.detach()


def _sqnr(
    model: nn.Module, decision: Decision, change: Callable[[Scheme], Scheme], seen: Observer, largest: Tensor
) -> float:
    """SQNR in dB of the layer's output under `change(its scheme)`, on the rows that calibration kept. largest: fp32
    [1], the magnitude that a static scale maps to 127."""
    assert decision.scheme is not None
    scheme = change(decision.scheme)
    weight = evenly(decision.kind.rows(_weight(model, decision), model.get_submodule(decision.name)))
    x = seen.rows.to(weight.device).float()
    return sqnr_db(output_error(weight, x @ weight.T, rounded_input(x, scheme, largest.to(x.device)), scheme))
