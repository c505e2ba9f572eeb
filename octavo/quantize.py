"""Turn the layers of a model into int8 layers, in place, one at a time.

`plan` decides the fate of every layer and changes nothing; `quantize` carries the plan out. Files are quantized by
the same plan, made on a model without weights (`formats/stream.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from octavo.calibrate import Stats, check_stats
from octavo.coverage import REASONS_ATTRIBUTE, ROUTER_REASON, Coverage, coverage
from octavo.errors import CalibrateError, OctavoWarning, QuantizeError, RecipeError
from octavo.experts import routers
from octavo.feeding import Progress, check_module
from octavo.gated import fused_gated_mlps
from octavo.heap import keep_freed_memory
from octavo.inputs import SharedInput
from octavo.layers import KINDS, LayerKind, kind_of, users_of_parameters, why_not
from octavo.modules import (
    Codes,
    DynamicQuantLinear,
    QuantLinear,
    QuantModule,
    StaticQuantLinear,
    TiedQuantEmbedding,
    TiedQuantLinear,
)
from octavo.norms import fused_norms
from octavo.observers import Observer, ObserverKind, check_observer
from octavo.ops.reference import LONGEST_EXACT
from octavo.recipe import DEFAULT_TARGETS, OPT_IN_TARGETS, Pattern, Recipe, Scheme, pattern_matches
from octavo.report import sqnr_db
from octavo.sensitivity import CATASTROPHE_DB, evenly, output_error, rounded_input
from octavo.weight_readers import weight_readers

__all__ = [
    "CodesOf",
    "Decision",
    "install",
    "output_heads",
    "plan",
    "quantize",
    "quantized_codes",
    "settle",
    "warn_unasked",
]

_KIND_NAMES = {kind.name for kind in KINDS} | {*OPT_IN_TARGETS}
_UNASKED_LIMIT = 0.05


@dataclasses.dataclass
class Decision:
    """The fate of one layer.

    name: of the layer in the model. kind: its row of the table. label: the kind's name, or "OutputHead".
    scheme: how it is to be quantized, or None: then `reason` says why not, and `asked` whether the recipe said so.
    note: why `scheme` is not the one that the recipe names, if it is another.
    owner: name of the layer whose codes this one shares, for a tied weight; None for a layer with its own.
    input_scale: of a static input, fp32 [1].
    """

    name: str
    kind: LayerKind
    label: str
    scheme: Scheme | None
    reason: str | None = None
    asked: bool = False
    note: str | None = None
    owner: str | None = None
    input_scale: Tensor | None = None


def quantize(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    ignore: Iterable[Pattern] = (),
    include: Iterable[Pattern] = (),
    overrides: Mapping[Pattern, Scheme] | None = None,
    group_size: int | None = None,
    attention: str | None = None,
    stats: Stats | None = None,
    observer: ObserverKind = "absmax",
    repair: bool = True,
    fake: bool = False,
    progress: Progress | None = None,
) -> Coverage:
    """Quantize the layers of `model` in place; each float weight is freed before the next is touched.

    A weight W [N, K] of any float dtype becomes codes int8 [N, K] and a scale fp32 [N, 1] ([N, K/g] in groups of g
    columns), W ~ codes * scale: the arithmetic of octavo.primitives. Which layers there are: the head of octavo.layers.
    RMS norms keep their float weights and become FusedRMSNorm, and gated MLPs become FusedGatedMLP, which compute the
    same in fewer kernels (octavo.norms, octavo.gated); `ignore` keeps them as they are. On CPUs the attention of a
    transformers model, if it is "sdpa", gets faster too, by octavo.integrations.float_attention;
    `model.set_attn_implementation("sdpa")` undoes that. Up to 64 MiB of freed memory stay with the process
    (octavo.heap).

    model: any module with its weights loaded, on any device.
    scheme: a preset's name ("w8a16"), a Scheme or a Recipe; see octavo.recipe for `ignore`, `include`, `overrides`
        and `group_size`, which are added to it.
    attention: "int8" for Q K^T and P V as int8 products in every attention of a transformers model, "float" for none.
    stats: from `octavo.calibrate`; a scheme with static inputs needs them. A layer that no batch reached, or whose
        inputs were all 0, gets dynamic inputs, and its row of the coverage says so.
    observer: what a static scale is taken from, "absmax", "percentile" or "mse"; see octavo.observers.
    repair: whether a layer whose static error is catastrophic, measured on the rows that `stats` kept, gets dynamic
        inputs (or, where those are no better, float ones) together with the layers that are fed the same tensor.
    fake: let linear layers compute in float with what the codes stand for, to study what int8 does; real int8 gives the
        same up to the rounding of sums.
    progress: called with (layers done, number of layers).
    Returns: what became int8, what stayed float, and why.
    Raises: RecipeError for an unknown scheme, a pattern that matches nothing, a group_size that does not divide a K, or
        a layer that is ignored while it shares its weight with one that is not; QuantizeError for a model that is
        already quantized, on `meta`, lazy, itself a single layer, that holds NaN or inf, or whose attention cannot be
        int8, and for what is no module; CalibrateError for static inputs without `stats`, or with those of another
        model, and for an unknown observer; MissingExtra for int8 attention without transformers. The plan is checked
        before anything is changed; a weight with NaN or inf stops at its layer, with the layers before it already int8.
    Warns: OctavoWarning if more than 5% of the bytes stay float for a reason that the recipe did not ask for.
    """
    recipe = Recipe.of(
        scheme, ignore=ignore, include=include, overrides=overrides, group_size=group_size, attention=attention
    )
    check_module(model)
    _refuse_missing_values(model)
    decisions = plan(model, recipe)
    fix_inputs(model, decisions, stats, observer=observer, repair=repair)
    install(model, decisions, ignore=recipe.ignore, progress=progress)
    if fake:
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.fake = True
    report = settle(model, decisions)
    warn_unasked(report)
    return report


def _refuse_missing_values(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise QuantizeError(
                f"{name} belongs to a lazy layer and has no shape yet; run the model once on an input, then quantize"
            )
        if parameter.is_meta:
            raise QuantizeError(
                f"{name} is on the meta device and has no values; load the weights first, or quantize the checkpoint's "
                "files with octavo.quantize_checkpoint"
            )


def warn_unasked(report: Coverage) -> None:
    """Warn if more than 5% of the bytes stayed float for a reason that the recipe did not ask for."""
    if report.unasked_fraction > _UNASKED_LIMIT:
        unasked: dict[str, int] = {}
        for row in report.rows:
            if not row.scheme and not row.asked and row.reason:
                unasked[row.reason] = unasked.get(row.reason, 0) + row.bytes_before
        reasons = sorted(unasked, key=lambda reason: -unasked[reason])[:3]
        warnings.warn(
            f"{report.unasked_fraction:.1%} of the model's bytes stay float although the recipe did not ask for it: "
            + "; ".join(f"{reason} ({unasked[reason] / report.bytes_before:.1%})" for reason in reasons),
            OctavoWarning,
            stacklevel=4,  # the caller of octavo.quantize or quantize_checkpoint
        )


# -- deciding -------------------------------------------------------------------------------------------------------


def plan(model: nn.Module, recipe: Recipe) -> list[Decision]:
    """The fate of every layer of a known kind, in the order of the model's modules; `model` may be on `meta`.

    Raises: RecipeError, QuantizeError as `quantize` does.
    """
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise QuantizeError("the model already holds int8 layers; quantize a float model (octavo.coverage shows them)")
    if kind_of(model) is not None:
        raise QuantizeError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; wrap it in nn.Sequential"
        )
    layers = {name: layer for name, layer in model.named_modules() if kind_of(layer) is not None}
    _check_patterns(model, recipe, layers)
    heads = output_heads(model)
    readers = weight_readers(model)
    deciding = routers(model)
    decisions: dict[str, Decision] = {}
    obstacles: dict[str, str] = {}
    for name, layer in layers.items():
        kind = kind_of(layer)
        assert kind is not None
        label = "OutputHead" if name in heads else kind.name
        if obstacle := why_not(layer, kind):
            obstacles[name] = obstacle
        elif name in readers:
            obstacles[name] = f"{readers[name]} reads its weight directly instead of calling it"
        decision = decisions[name] = _decide(name, layer, kind, label, recipe, obstacles.get(name))
        if name in deciding and not (decision.asked or _names(recipe, name, layer)):
            decision.scheme, decision.reason, decision.asked = None, ROUTER_REASON, True
    # Each may leave a layer float that the other has to know of; neither does anything more the third time.
    for _ in range(2):
        _keep_attention_whole(decisions, obstacles)
        _tie(model, decisions, obstacles)
    for name, decision in decisions.items():
        _check_groups(decision, layers[name])
    return list(decisions.values())


def _decide(name: str, layer: nn.Module, kind: LayerKind, label: str, recipe: Recipe, obstacle: str | None) -> Decision:
    decision = Decision(name, kind, label, None)
    for pattern in recipe.ignore:
        if _selects(pattern, name, layer, label):
            shown = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "a predicate")
            decision.reason, decision.asked = f"ignored by {shown!r}", True
            return decision
    if not any(_selects(pattern, name, layer, label) for pattern in recipe.targets):
        opt_in = label in OPT_IN_TARGETS
        decision.reason = f"opt-in: include {label!r} to quantize it" if opt_in else f"{label} is not among the targets"
        decision.asked = True
        return decision
    decision.reason = obstacle
    if obstacle is None:
        chosen = (scheme for pattern, scheme in recipe.overrides if pattern_matches(pattern, name, layer))
        wanted = next(chosen, recipe.scheme)
        decision.scheme = kind.effective(wanted)
        if wanted.input and not decision.scheme.input:
            decision.note = f"the inputs of a {label} stay float"
        elif wanted.is_static and not decision.scheme.is_static:
            decision.note = f"the inputs of {label} have dynamic scales"
        if decision.scheme.input and (k := max(kind.row_lengths(layer).values())) > LONGEST_EXACT:
            decision.scheme = kind.effective(Scheme("w8a16", wanted.weight))
            decision.note = f"its inputs stay float: int32 may not hold the sum of {k} products of codes"
    return decision


def _names(recipe: Recipe, name: str, layer: nn.Module) -> bool:
    """Whether one of the targets means this very layer, and not all of a kind."""
    return any(
        not (isinstance(pattern, str) and pattern in _KIND_NAMES) and pattern_matches(pattern, name, layer)
        for pattern in recipe.targets
    )


def _selects(pattern: Pattern, name: str, layer: nn.Module, label: str) -> bool:
    """Whether a pattern of `targets` or `ignore` selects the layer. A kind selects its label, so that "Linear" leaves
    the output head to those who name it."""
    if isinstance(pattern, str) and pattern in _KIND_NAMES:
        return pattern == label
    return pattern_matches(pattern, name, layer)


def _check_patterns(model: nn.Module, recipe: Recipe, layers: dict[str, nn.Module]) -> None:
    modules = dict(model.named_modules())
    labels = {kind.name for layer in layers.values() if (kind := kind_of(layer))}
    if output_heads(model):
        labels.add("OutputHead")
    for field, patterns in (
        ("ignore", recipe.ignore),
        ("targets (include)", [pattern for pattern in recipe.targets if pattern not in DEFAULT_TARGETS]),
        ("overrides", [pattern for pattern, _ in recipe.overrides]),
    ):
        for pattern in patterns:
            if isinstance(pattern, str) and pattern in _KIND_NAMES and field != "overrides":
                matches = pattern in labels
            else:
                matches = any(pattern_matches(pattern, name, module) for name, module in modules.items() if name)
            if not matches:
                kinds = labels if field != "overrides" else set()
                close = difflib.get_close_matches(
                    str(pattern).removeprefix("re:"), [*modules, *sorted(kinds)], n=3, cutoff=0.5
                )
                hint = f"; did you mean {', '.join(map(repr, close))}?" if close else "."
                listed = f", or a kind of layer that it has ({', '.join(sorted(kinds))})" if kinds else ""
                raise RecipeError(
                    f"{field}: {pattern!r} matches no layer of this model{hint} Expected a module's name, or a 're:' "
                    f"pattern matched from the start of the name{listed}"
                )


_HEAD_NAMES = ("lm_head", "embed_out", "output_head")


def output_heads(model: nn.Module) -> set[str]:
    """Names of the layers that produce the logits over a vocabulary: what the model's `get_output_embeddings` says,
    a linear layer that shares an embedding's table, or one called lm_head."""
    said: set[int] = set()
    tables: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables.add(id(module._parameters.get("weight")))
        ask = getattr(module, "get_output_embeddings", None)
        try:
            head = ask() if callable(ask) else None
        except (AttributeError, NotImplementedError):
            head = None  # transformers' base classes ask a submodule that not every model has
        if isinstance(head, nn.Module):
            said.update(id(part) for part in head.modules())
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and (
            id(layer) in said or name.rpartition(".")[2] in _HEAD_NAMES or id(layer._parameters.get("weight")) in tables
        )
    }


def _keep_attention_whole(decisions: dict[str, Decision], obstacles: dict[str, str]) -> None:
    """A float nn.MultiheadAttention reads the weight of its out_proj itself, so that must stay float with it."""
    for decision in decisions.values():
        parent = decisions.get(decision.name.rpartition(".")[0])
        if parent and parent.kind.name == "MultiheadAttention" and not parent.scheme:
            obstacles[decision.name] = f"{parent.name}, which reads its weight directly, stays float"
            if decision.scheme:
                decision.scheme, decision.owner = None, None
                decision.reason, decision.asked = obstacles[decision.name], parent.asked


def _tie(model: nn.Module, decisions: dict[str, Decision], obstacles: dict[str, str]) -> None:
    """Layers that share a weight get one fate: one table of codes, owned by the first of them, or all stay float.

    A layer that is opt-in follows the one that it shares with, unless there is an obstacle to its being int8.
    """
    for names in users_of_parameters(model).values():
        if len(names) == 1:
            continue
        members = [decisions.get(name.rpartition(".")[0]) for name in names]
        known = [member for member in members if member is not None]
        wanted = [member for member in known if member.scheme]
        if not wanted or all(name.endswith("bias") for name in names):
            continue
        ignored = [member for member in known if member.reason and member.reason.startswith("ignored by")]
        if ignored:
            raise RecipeError(
                f"{ignored[0].name} is ignored but shares its weight with {wanted[0].name}, which is not; "
                "ignore both or neither"
            )
        blocked = next((member for member in known if member.name in obstacles), None)
        if (
            len(known) < len(members)
            or blocked
            or any(member.kind.name not in ("Linear", "Embedding") for member in known)
        ):
            other = blocked.name if blocked else next(n for n in names if n.rpartition(".")[0] != wanted[0].name)
            for member in wanted:
                member.scheme, member.owner = None, None
                member.reason = obstacles[member.name] = f"shares its weight with {other}, which stays float"
            if blocked and blocked.label in OPT_IN_TARGETS:
                blocked.reason, blocked.asked = obstacles[blocked.name], False
            continue
        # One table is one scheme; an embedding's rows cannot be cut into groups, and shared tables have float inputs.
        asked = wanted[0].scheme or Scheme()
        scheme = min((member.kind.effective(Scheme("w8a16", asked.weight)) for member in known), key=str)
        if asked.input:
            known[0].note = "its weight is shared: its inputs stay float"
        for member in known:
            member.scheme, member.reason, member.asked = scheme, None, False
            member.owner = None if member is known[0] else known[0].name


def _check_groups(decision: Decision, layer: nn.Module) -> None:
    group_size = decision.scheme.weight.group_size if decision.scheme else None
    if group_size is None:
        return
    for param, k in decision.kind.row_lengths(layer).items():
        if not k or k % group_size:
            raise RecipeError(
                f"{decision.name}.{param}: group_size={group_size} does not divide K={k}; choose a divisor of every K, "
                "or give this layer a scheme of its own with overrides"
            )


# -- static inputs --------------------------------------------------------------------------------------------------


def fix_inputs(
    model: nn.Module, decisions: list[Decision], stats: Stats | None, *, observer: ObserverKind, repair: bool
) -> None:
    """Give the layers that are to have static inputs their scales, and other schemes to those that cannot have them.

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
            _fix_group(model, group, stats, observer, repair)
            done.update(decision.name for decision in group)


def _fix_group(model: nn.Module, group: list[Decision], stats: Stats, observer: ObserverKind, repair: bool) -> None:
    """The same for layers that are fed one tensor: one scale, and one fate."""
    first = group[0]
    assert first.scheme is not None
    seen = stats.observers.get(first.name)
    if seen is None or seen.largest() == 0:
        why = "its inputs were all 0 in calibration" if seen else "no batch of the calibration reached it"
        return _give(group, Scheme.as_dynamic, f"{why}: a dynamic scale")
    scale = stats.input_scale(first.name, _weight(model, first).dtype, observer)
    if repair and len(seen.rows):
        static_db, dynamic_db = (
            min(_sqnr(model, decision, change, seen, scale * 127) for decision in group)
            for change in (_as_is, Scheme.as_dynamic)
        )
        if static_db < CATASTROPHE_DB <= dynamic_db:
            return _give(group, Scheme.as_dynamic, f"a static scale leaves {static_db:.1f} dB: a dynamic one")
        if static_db < CATASTROPHE_DB:
            why = f"a static scale leaves {static_db:.1f} dB, a dynamic one {dynamic_db:.1f}: float inputs"
            return _give(group, _with_float_inputs, why)
    for decision in group:
        decision.input_scale = scale


def _give(group: list[Decision], change: Callable[[Scheme], Scheme], note: str) -> None:
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
    """Of the layer's output under its scheme, changed, in dB, on the rows that calibration kept; largest: fp32 [1], of
    a static input."""
    assert decision.scheme is not None
    scheme = change(decision.scheme)
    weight = evenly(decision.kind.rows(_weight(model, decision), model.get_submodule(decision.name)))
    x = seen.rows.to(weight.device).float()
    return sqnr_db(output_error(weight, x @ weight.T, rounded_input(x, scheme, largest.to(x.device)), scheme))


# -- doing ------------------------------------------------------------------------------------------------------------


CodesOf = Callable[[Decision, nn.Module], tuple[Codes, torch.dtype]]
"""Gives the codes of a float layer's weights, and the dtype that the weights have (or had)."""


def quantized_codes(decision: Decision, layer: nn.Module) -> tuple[Codes, torch.dtype]:
    """The codes of `layer`'s own weights; on `meta`, empty ones of the right shapes."""
    assert decision.scheme is not None
    params = decision.kind.params_of(layer)
    codes = {
        param: decision.kind.quantize_param(
            layer, getattr(layer, param).detach(), decision.scheme, f"{decision.name}.{param}"
        )
        for param in params
    }
    return codes, getattr(layer, params[0]).dtype


def install(
    model: nn.Module,
    decisions: list[Decision],
    *,
    codes_of: CodesOf = quantized_codes,
    ignore: Iterable[Pattern] = (),
    progress: Progress | None = None,
) -> None:
    """Swap the layers that `decisions` says for int8 ones, one at a time, then RMS norms and gated MLPs for what
    computes the same faster, but for those that `ignore` names. On `meta` this makes the empty skeleton."""
    places, held = _places(model), _held(model)
    owners: dict[str, QuantModule] = {}
    shared = SharedInput()
    todo = [decision for decision in decisions if decision.scheme]
    # Owners of shared tables first; then from the last to the first, which puts a child before its parent: an
    # attention block takes its out_proj over as it finds it.
    ordered = sorted(reversed(todo), key=lambda decision: decision.owner is not None)
    for done, decision in enumerate(ordered, 1):
        layer = model.get_submodule(decision.name)
        assert decision.scheme is not None
        new = owners[decision.name] = _int8_layer(decision, layer, codes_of, owners, shared)
        swap(places.pop(id(layer)), layer, new)
        for hold in held.pop(id(layer), ()):
            hold(new)
        for child in new.children():  # taken over from `layer`: it now stands in `new`
            if id(child) in places:
                places[id(child)] = [(new if parent is layer else parent, at) for parent, at in places[id(child)]]
        if progress:
            progress(done, len(ordered))
    _fuse(model, fused_norms(model), tuple(ignore))
    _fuse(model, fused_gated_mlps(model), tuple(ignore))
    _switch_off_fused_encoder(model)
    keep_freed_memory()


def _int8_layer(
    decision: Decision, layer: nn.Module, codes_of: CodesOf, owners: Mapping[str, QuantModule], shared: SharedInput
) -> QuantModule:
    assert decision.scheme is not None
    new: QuantModule
    if decision.owner is None:
        codes, float_dtype = codes_of(decision, layer)
        new = decision.kind.module_for(decision.scheme)(layer, codes, decision.scheme, float_dtype)
        if isinstance(new, DynamicQuantLinear):
            new.shared_input = shared
        if isinstance(new, StaticQuantLinear) and decision.input_scale is not None:
            new.set_input_scale(decision.input_scale)
    elif decision.kind.name == "Embedding":
        new = TiedQuantEmbedding(layer, owners[decision.owner])
    else:
        new = TiedQuantLinear(layer, owners[decision.owner])
    new.replaces, new.note = decision.label, decision.note
    return new


def _fuse(model: nn.Module, stand_ins: Mapping[str, nn.Module], ignore: tuple[Pattern, ...]) -> None:
    """Put each of `stand_ins` in the place of the module of its name, but for those that `ignore` names."""
    places, held = _places(model), _held(model)
    for name, new in stand_ins.items():
        module = model.get_submodule(name)
        if not any(_selects(pattern, name, module, type(module).__name__) for pattern in ignore):
            swap(places.get(id(module), []), module, new)
            for hold in held.get(id(module), ()):
                hold(new)


def settle(model: nn.Module, decisions: list[Decision]) -> Coverage:
    """Leave the reasons of the float layers on the model, for `coverage`, and return the coverage."""
    reasons: dict[str, tuple[str, bool]] = {}
    for decision in decisions:
        if decision.reason is not None:
            layer = model.get_submodule(decision.name)
            for param in {*decision.kind.params, *decision.kind.params_of(layer)}:
                reasons |= {
                    f"{decision.name}.{name}": (decision.reason, decision.asked) for name in _made_of(layer, param)
                }
    setattr(model, REASONS_ATTRIBUTE, reasons)
    return coverage(model)


def _made_of(layer: nn.Module, param: str) -> list[str]:
    """The parameters that the layer's `param` is, or is computed of (by weight_norm, pruning and the like)."""
    starts = (f"{param}_", f"parametrizations.{param}.")
    return [name for name, _ in layer.named_parameters() if name == param or name.startswith(starts)]


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> every (parent, attribute) that holds it: one module may stand in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    return places


def _held(model: nn.Module) -> dict[int, list[Callable[[nn.Module], None]]]:
    """id of a module -> what puts another in its place in each plain list, tuple or dict that a module holds it in
    besides (MaskFormer's blocks call their layers from such lists)."""
    held: dict[int, list[Callable[[nn.Module], None]]] = {}
    for parent in model.modules():
        for attribute, value in vars(parent).items():
            items: Iterable[tuple[Any, Any]] = ()
            if type(value) in (list, tuple):
                items = enumerate(value)
            elif type(value) is dict and attribute != "_modules":
                items = value.items()
            for key, item in items:
                if isinstance(item, nn.Module):
                    held.setdefault(id(item), []).append(partial(_put, vars(parent), attribute, key))
    return held


def _put(attributes: dict[str, Any], attribute: str, key: Any, new: nn.Module) -> None:
    value = attributes[attribute]
    if isinstance(value, tuple):
        attributes[attribute] = (*value[:key], new, *value[key + 1 :])
    else:
        value[key] = new


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def swap(places: list[tuple[nn.Module, str]], layer: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `layer` stood, with the hooks that were registered on it, and what it held besides."""
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(layer, hooks))
    for name, value in vars(layer).items():
        if not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, value)
    for name, buffer in layer._buffers.items():
        if not hasattr(new, name):
            new.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)
    for parent, attribute in places:
        setattr(parent, attribute, new)


def _switch_off_fused_encoder(model: nn.Module) -> None:
    """nn.TransformerEncoderLayer has a fused path that hands float weights to a kernel; off where a layer is int8."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, QuantModule) for m in module.modules()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, QuantModule) for m in module.modules()):
            module.use_nested_tensor = False
