"""Turn the layers of a model into int8 layers: `plan` decides, `static_inputs` adds scales, `install` swaps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from octavo.calibration.observers import ObserverKind
from octavo.calibration.stats import Stats
from octavo.computed_weights import weight_of
from octavo.errors import OctavoWarning, QuantizeError
from octavo.feeding import Progress, check_module, check_progress
from octavo.modules import QuantLinear
from octavo.quantization.coverage import Coverage
from octavo.quantization.install import install, record_reasons
from octavo.quantization.plan import Decision, plan
from octavo.quantization.static_inputs import set_input_scales
from octavo.recipe import Pattern, Recipe, Scheme

__all__ = ["quantize", "warn_unasked"]

_UNASKED_LIMIT = 0.05


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
    same in fewer kernels (octavo.fused); `ignore` keeps them as they are. Linear layers that stay float, ignored or
    not, become FloatLinear, which is faster for few rows (octavo.modules.float_linear). On CPUs the attention of a
    transformers model, if it is "sdpa", gets faster too, by octavo.integrations.float_attention;
    `model.set_attn_implementation("sdpa")` undoes that. Up to 64 MiB of freed memory stay with the process
    (octavo.quantization.heap).

    model: any module with its weights loaded, on any device.
    scheme: a preset's name ("w8a16", "w8a8", "w8a8-static", "o1", "o2", "o3"), a Scheme or a Recipe.
    ignore: layers that stay float: names of modules, "re:..." patterns, kinds of layers, or predicates (name, module)
        -> bool; octavo.recipe has the rules.
    include: likewise, what is quantized besides: the opt-in kinds "Embedding" and "OutputHead", or layers by name.
    overrides: pattern -> the Scheme that layers matching it get instead.
    group_size: columns of a weight that share a scale; None for one scale a row.
    attention: "int8" for Q K^T and P V as int8 products in every attention of a transformers model, "float" for none.
        `octavo.integrations.int8_cache.use_int8_cache(model)` then keeps the codes of earlier keys and values, which
        are else found anew for each token.
    stats: from `octavo.calibrate`; a scheme with static inputs needs them. A layer that no batch reached, or whose
        inputs were all 0, gets dynamic inputs, and its row of the coverage says so.
    observer: what a static scale is taken from, "absmax", "percentile" or "mse"; see octavo.calibration.observers.
    repair: whether a layer whose static error is catastrophic, measured on the rows that `stats` kept, gets dynamic
        inputs (or, where those cost more than the weight does, float ones) together with the layers that are fed the
        same tensor.
    fake: let linear layers compute in float with what the codes stand for, to study what int8 does; real int8 gives the
        same up to the rounding of sums.
    progress: called with (layers done, number of layers).
    Returns: what became int8, what stayed float, and why.
    Raises: RecipeError for an unknown scheme, a pattern that matches nothing, a group_size that does not divide a K, or
        a layer that is ignored while it shares its weight with one that is not; QuantizeError for a model that is
        already quantized, on `meta`, lazy, itself a single layer, that holds NaN or inf, or whose attention cannot be
        int8, and for what is no module; CalibrateError for static inputs without `stats`, or with those of another
        model, and for an unknown observer; MissingExtra for int8 attention without transformers. All of this is
        checked before anything is changed.
    Warns: OctavoWarning if more than 5% of the bytes stay float for a reason that the recipe did not ask for, and if
        nothing became int8 though nothing is ignored.
    """
    recipe = Recipe.of(
        scheme, ignore=ignore, include=include, overrides=overrides, group_size=group_size, attention=attention
    )
    check_module(model)
    check_progress(progress)
    _refuse_missing_values(model)
    decisions = plan(model, recipe)
    _refuse_not_finite(model, decisions)
    # In inference mode too, make ordinary tensors: gradients are to pass the int8 layers later.
    with torch.inference_mode(False), torch.no_grad():
        set_input_scales(model, decisions, stats, observer=observer, repair=repair)
        install(model, decisions, ignore=recipe.ignore, progress=progress)
    if fake:
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.fake = True
    report = record_reasons(model, decisions)
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


def _refuse_not_finite(model: nn.Module, decisions: Iterable[Decision]) -> None:
    """Raise QuantizeError for a weight that cannot be int8, while all weights are still there."""
    with torch.no_grad():
        for decision in decisions:
            if decision.scheme and decision.owner is None:
                layer = model.get_submodule(decision.name)
                for param in decision.kind.params_of(layer):
                    weight = weight_of(layer, param)
                    decision.kind.refuse_not_finite(layer, param, weight, f"{decision.name}.{param}")


def warn_unasked(report: Coverage) -> None:
    """Warn if more than 5% of the bytes stayed float for a reason that the recipe did not ask for, or all of them while
    it ignores none."""
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
    elif not any(row.scheme or (row.reason or "").startswith("ignored by") for row in report.rows):
        reasons = list(report.float_reasons())[:3] or ["it has no float parameters"]
        warnings.warn(f"nothing of the model became int8: {'; '.join(reasons)}", OctavoWarning, stacklevel=4)
