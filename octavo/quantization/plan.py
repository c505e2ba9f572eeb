"""Decide the fate of every layer of a model, and change nothing.

Files are quantized by the same plan, made on a model without weights (`formats/stream.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
from operator import attrgetter

from torch import Tensor, nn

from octavo.computed_weights import parts_of
from octavo.errors import QuantizeError, RecipeError
from octavo.experts import held_for, routers
from octavo.layers import (
    EXPERTS,
    KINDS,
    LINEAR,
    LayerKind,
    kind_of,
    name_in_files,
    users_of_parameters,
    why_not,
)
from octavo.model_code.facade import has_own_forward, needs_facade, why_no_facade
from octavo.model_code.weight_readers import (
    asked_for_dtype_or_shape,
    class_testers,
    first_parameter_readers,
    used_in_products,
    weight_readers,
)
from octavo.modules import QuantModule
from octavo.ops.reference import LONGEST_EXACT
from octavo.quantization.coverage import ROUTER_REASON
from octavo.recipe import (
    DEFAULT_TARGETS,
    OPT_IN_TARGETS,
    READ_BY_OTHERS,
    Pattern,
    Recipe,
    Scheme,
    pattern_matches,
)

__all__ = ["Decision", "output_heads", "plan", "selects"]

_KIND_NAMES = {kind.name for kind in KINDS} | {*OPT_IN_TARGETS}


@dataclasses.dataclass
class Decision:
    """The fate of one layer.

    name: of the layer in the model. kind: its row of the table. label: the kind's name (`name_in_files`), or
        "OutputHead".
    scheme: how it is to be quantized; None to leave it float. Then `reason` says why, and `asked` whether the recipe
        asked for that.
    note: why `scheme` is not the one that the recipe names, if it is another.
    owner: for a tied weight, name of the layer whose codes this one shares; None for a layer with its own.
    input_scale: fp32 [1], for static inputs.
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
    readers, tested, asked, factors = (
        weight_readers(model),
        class_testers(model),
        asked_for_dtype_or_shape(model),
        used_in_products(model),
    )
    deciding = routers(model)
    decisions: dict[str, Decision] = {}
    obstacles: dict[str, str] = {}
    behind_facades = set()
    for name, layer in layers.items():
        kind = kind_of(layer)
        assert kind is not None
        label = "OutputHead" if name in heads else kind.name
        if obstacle := why_not(layer, kind) or why_no_facade(layer, kind):
            obstacles[name] = obstacle
        elif name in readers:
            obstacles[name] = f"{readers[name]} reads its weight directly instead of calling it"
        elif name in tested:
            obstacles[name] = f"{tested[name]} tests its class, which would be another"
        decision = decisions[name] = _decide(name, layer, kind, label, recipe, obstacles.get(name))
        if decision.scheme and (name in asked or name in factors or needs_facade(layer, kind)):
            behind_facades.add(name)
        if name in deciding and not (decision.asked or _names(recipe, name, layer)):
            decision.scheme, decision.reason, decision.asked = None, ROUTER_REASON, True
        if label == kind.name:
            decision.label = name_in_files(layer, kind)
    if hasattr(getattr(model, "config", None), "model_type"):  # others read models of transformers' only
        _keep_readable(decisions, layers, recipe, behind_facades)
    _leave_a_parameter(model, decisions, obstacles)
    # Each of the two may make a layer float that matters to the other; a third time changes nothing.
    for _ in range(2):
        _keep_attention_whole(decisions, obstacles)
        _tie(model, decisions, obstacles)
    for name, decision in decisions.items():
        _check_groups(decision, layers[name])
    return list(decisions.values())


def _decide(name: str, layer: nn.Module, kind: LayerKind, label: str, recipe: Recipe, obstacle: str | None) -> Decision:
    decision = Decision(name, kind, label, None)
    for pattern in recipe.ignore:
        if selects(pattern, name, layer, label):
            shown = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "a predicate")
            decision.reason, decision.asked = f"ignored by {shown!r}", True
            return decision
    if not any(selects(pattern, name, layer, label) for pattern in recipe.targets):
        opt_in = label in OPT_IN_TARGETS
        decision.reason = f"opt-in: include {label!r} to quantize it" if opt_in else f"{label} is not among the targets"
        decision.asked = True
        return decision
    decision.reason = obstacle
    if obstacle is None:
        chosen = (scheme for pattern, scheme in recipe.overrides if pattern_matches(pattern, name, layer))
        wanted = next(chosen, recipe.scheme)
        decision.scheme = kind.effective(wanted)
        if decision.scheme.is_static and has_own_forward(layer, kind):  # calibration saw what that is given
            decision.scheme = decision.scheme.as_dynamic()
        if wanted.input and not decision.scheme.input:
            decision.note = f"the inputs of a {label} stay float"
        elif wanted.is_static and not decision.scheme.is_static:
            what = type(layer).__name__ if has_own_forward(layer, kind) else label
            decision.note = f"the inputs of {what} have dynamic scales"
        elif decision.scheme.weight != wanted.weight:
            decision.note = f"the weights of {label} have a scale a channel, not {wanted.weight.granularity}"
        if decision.scheme.input and (k := max(kind.row_lengths(layer).values())) > LONGEST_EXACT:
            decision.scheme = kind.effective(Scheme("w8a16", wanted.weight))
            decision.note = f"its inputs stay float: int32 may not hold the sum of {k} products of codes"
    return decision


def _keep_readable(
    decisions: dict[str, Decision], layers: dict[str, nn.Module], recipe: Recipe, behind_facades: set[str]
) -> None:
    """Leave a few convolutions float (the patches of a vision tower) if they alone would keep transformers and vLLM
    from reading the checkpoint. They can be included by name.

    Only convolutions behind facades, and only if no other int8 layers keep others from reading it anyway, and if they
    are not most of what becomes int8.
    """
    sizes: dict[bool, int] = {False: 0, True: 0}
    few = []
    for name, decision in decisions.items():
        if decision.scheme:
            is_foreign = decision.label not in (*READ_BY_OTHERS, *OPT_IN_TARGETS, EXPERTS)
            if is_foreign and name not in behind_facades:
                return
            layer, params = layers[name], decision.kind.params_of(layers[name])
            sizes[is_foreign] += sum(attrgetter(param)(layer).numel() for param in params)
            if is_foreign and not _names(recipe, name, layer):
                few.append(decision)
    if sizes[True] <= sizes[False]:
        for decision in few:
            decision.scheme, decision.asked = None, True
            name = decision.name
            decision.reason = f"opt-in: include {name!r} to quantize it; only octavo will read the checkpoint then"


def _names(recipe: Recipe, name: str, layer: nn.Module) -> bool:
    """Whether one of the targets selects this layer by name or predicate, not by its kind."""
    return any(
        not (isinstance(pattern, str) and pattern in _KIND_NAMES) and pattern_matches(pattern, name, layer)
        for pattern in recipe.targets
    )


def selects(pattern: Pattern, name: str, layer: nn.Module, label: str) -> bool:
    """Whether a pattern of `targets` or `ignore` selects the layer. A kind is compared with the label, so that "Linear"
    does not select the output head, whose label is "OutputHead"."""
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
    """Names of the linear layers that produce the logits over a vocabulary: those that `get_output_embeddings` of the
    model returns, that share an embedding's table, or that are called lm_head or the like."""
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
        if kind_of(layer) is LINEAR
        and (
            id(layer) in said or name.rpartition(".")[2] in _HEAD_NAMES or id(layer._parameters.get("weight")) in tables
        )
    }


def _leave_a_parameter(model: nn.Module, decisions: dict[str, Decision], obstacles: dict[str, str]) -> None:
    """Keep the smallest layer of a module float if the module calls `next(self.parameters())` and would have none
    left."""
    for name, method in reversed(first_parameter_readers(model).items()):  # a child before its parent
        sizes: dict[str, int] = {}
        held = {id(parameter) for parameter in model.get_submodule(name).parameters()}
        for prefix, layer in model.get_submodule(name).named_modules(prefix=name):
            if (decision := decisions.get(prefix)) and decision.scheme:
                weights = {*decision.kind.params_of(layer), *parts_of(layer)}
                own = [parameter for short, parameter in layer.named_parameters() if short in weights]
                sizes[prefix] = sum(parameter.numel() for parameter in own)
                held -= set(map(id, own))
        if sizes and not held:
            smallest = min(sizes, key=lambda prefix: sizes[prefix])
            obstacles[smallest] = f"{method} takes the first parameter, and none would be left"
            decisions[smallest].scheme, decisions[smallest].reason = None, obstacles[smallest]


def _keep_attention_whole(decisions: dict[str, Decision], obstacles: dict[str, str]) -> None:
    """Keep the out_proj of a float nn.MultiheadAttention float: the attention reads its weight directly."""
    for decision in decisions.values():
        parent = decisions.get(decision.name.rpartition(".")[0])
        if parent and parent.kind.name == "MultiheadAttention" and not parent.scheme:
            obstacles[decision.name] = f"{parent.name}, which reads its weight directly, stays float"
            if decision.scheme:
                decision.scheme, decision.owner = None, None
                decision.reason, decision.asked = obstacles[decision.name], parent.asked


def _tie(model: nn.Module, decisions: dict[str, Decision], obstacles: dict[str, str]) -> None:
    """Give layers that share a weight one fate: they share one table of codes, or all stay float.

    The table belongs to the layer that the model calls the source of the others (`all_tied_weights_keys`), else to the
    first. An opt-in layer becomes int8 with the layer that it shares with, unless there is an obstacle.
    """
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    layer_of = held_for(model)
    for users in users_of_parameters(model).values():
        if len(users) == 1:
            continue
        names = sorted(users, key=lambda name: name in targets)
        holders = [name.rpartition(".")[0] for name in names]
        members = [decisions.get(layer_of.get(holder, holder)) for holder in holders]
        known = [member for member in members if member is not None]
        wanted = [member for member in known if member.scheme]
        if not wanted or all("bias" in name.rpartition(".")[2] for name in names):
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
            elsewhere = (name for name in names if name.rpartition(".")[0] != wanted[0].name)
            other = blocked.name if blocked else next(elsewhere, names[-1])  # the last: within one layer
            for member in wanted:
                member.scheme, member.owner = None, None
                member.reason = obstacles[member.name] = f"shares its weight with {other}, which stays float"
            if blocked and blocked.label in OPT_IN_TARGETS:
                blocked.reason, blocked.asked = obstacles[blocked.name], False
            continue
        # A shared table has one scheme: without groups if an embedding is among the layers, and with float inputs.
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
