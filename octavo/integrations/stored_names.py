"""The names of transformers' models' tensors in files, how transformers converts them, and the dtypes it loads them in.

From files to the model: `renaming`, `conversions`. From the model to files: `on_disk`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
    revert_weight_conversion,
)

from octavo import formats
from octavo.errors import QuantizeError

__all__ = ["conversions", "loaded_dtypes", "loading_names", "of_kind", "on_disk", "refuse_wrapped_parts", "renaming"]


def renaming(model: PreTrainedModel) -> Callable[[str], str | None]:
    """A function from names on disk to names in the model, by transformers' rules; None for a part of a parameter."""
    state = model.state_dict()
    converted = loading_names(model, get_model_conversion_mapping(model), state)

    def rename(name: str) -> str | None:
        renamed, pattern = converted(name)
        if renamed not in state and name in state:
            return name
        return None if pattern is not None else renamed

    return rename


def loaded_dtypes(model: PreTrainedModel) -> Callable[[str], torch.dtype | None]:
    """A function from names on disk to the dtype in which transformers loads the tensor; None if the model has no place
    for it.

    model: built in the dtype of its config, on `meta` or not.
    """
    state = model.state_dict()
    converted = loading_names(model, get_model_conversion_mapping(model), state)
    kept = model._get_dtype_plan(model.config.dtype)  # patterns of names -> fp32
    is_kept = build_glob_alternation(list(kept))[0].search if kept else lambda name: None

    def dtype_of(name: str) -> torch.dtype | None:
        renamed = converted(name)[0]
        place = renamed if renamed in state else name
        if place not in state:
            return None
        return torch.float32 if is_kept(place) else state[place].dtype

    return dtype_of


def conversions(model: PreTrainedModel, names: Iterable[str]) -> list[formats.Conversion]:
    """transformers' conversions of the tensors `names` on disk into tensors of the model, beyond renaming."""
    rules = get_model_conversion_mapping(model)
    converted = loading_names(model, rules, model.state_dict())
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        target, pattern = converted(name)
        if pattern is not None:
            groups.setdefault(target, {})[name] = pattern
    converters = of_kind(rules, WeightConverter)
    made = []
    for target, patterns in groups.items():
        rule = next(rule for rule in converters if set(patterns.values()) & set(rule.source_patterns))
        made.append(formats.Conversion(tuple(patterns), partial(_convert, model, rule, target, patterns)))
    return made


def _convert(
    model: PreTrainedModel, rule: Any, target: str, patterns: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    rule = copy.deepcopy(rule)  # it collects tensors
    for name, tensor in tensors.items():
        rule.add_tensor(target, name, patterns[name], tensor)
    made = rule.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def of_kind(rules: Iterable[Any], kind: type) -> list[Any]:
    """The rules of one class, of transformers' rules for loading."""
    return [rule for rule in rules if isinstance(rule, kind)]


def loading_names(
    model: PreTrainedModel, rules: list[Any], state: Mapping[str, Tensor]
) -> Callable[[str], tuple[str, str | None]]:
    """A function from a name on disk to (name in the model, pattern of the rule that converts the tensor, or None)."""
    return partial(
        rename_source_key,
        weight_renamings=of_kind(rules, WeightRenaming),
        weight_converters=of_kind(rules, WeightConverter),
        base_model_prefix=model.base_model_prefix,
        meta_state_dict=state,
    )


def on_disk(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in the model -> under their names on disk, as `save_pretrained` would write them."""
    return dict(revert_weight_conversion(model, tensors))


def refuse_wrapped_parts(model: nn.Module) -> None:
    """Raise QuantizeError for a model with wrappers around its layers: they change the names of the weights."""
    for name, module in model.named_modules():
        if name.endswith("._orig_mod"):
            raise QuantizeError(
                f"{name.removesuffix('._orig_mod')}: is wrapped by torch.compile, under which transformers would not "
                "find its weights; save the model first, or compile such parts in place (part.compile())"
            )
        if hasattr(module, "adapter_layer_names"):
            raise QuantizeError(
                f"{name}: has adapters of PEFT on it, under which transformers would not find the weight; merge them "
                "(merge_and_unload()), or save the model without them (unload()) and the adapters by PEFT's "
                "save_pretrained"
            )
