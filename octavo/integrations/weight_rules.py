"""transformers' rules for loading and saving weights ("weight conversions"), for models with int8 layers.

A rule renames tensors on their way from files to the model (`WeightRenaming`), or makes other tensors of them with
`ConversionOps` (`WeightConverter`): a fused q, k and v is cut in three, experts are merged into one stack. To save, the
rules are applied in reverse. For int8 layers

    loading    QuantizeParameter   a float weight becomes codes and scale
               ReadParameter       stored codes and scales become the layer's buffers
    saving     for_saving          codes are not merged or converted, and their scales are renamed with them
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from octavo.errors import CheckpointError, OctavoError
from octavo.formats import compressed_tensors as layout
from octavo.modules import QuantExperts, QuantModule

if TYPE_CHECKING:
    from octavo.integrations.transformers import OctavoQuantizer

__all__ = [
    "QuantizeParameter", "ReadParameter", "for_each_stack", "for_saving", "merges", "renamings_of_parts",
    "stored_scale", "unpacked",
]  # fmt: skip


# -- loading ---------------------------------------------------------------------------------------------------------


class _SharedOp(ConversionOps):  # type: ignore[misc]
    """A conversion that is not copied: transformers deep-copies the operations for every parameter, and a copy would
    include the quantizer and the whole model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class QuantizeParameter(_SharedOp):
    """A float weight, as just read from disk, becomes codes and scale."""

    def __init__(self, quantizer: OctavoQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **_: Any) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            # Of one weight the name is that of the layer; of several (a fused q, k and v), some may be to stay float.
            name = full_layer_name if len(input_dict) == 1 else name
            made |= self._quantized(name, weight) if self.quantizer.is_int8(name) else {name: weight}
        return made

    def _quantized(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        decision, layer, module, param = self.quantizer.target(name)
        assert decision.scheme is not None
        expected = attrgetter(param)(layer).shape
        try:
            if weight.shape != expected:
                raise CheckpointError(
                    f"{name}: has shape {list(weight.shape)} in the checkpoint, the model's {list(expected)}; "
                    "config.json and the weights are of different models"
                )
            codes, scale = decision.kind.quantize_param(layer, param, weight, decision.scheme, name)
        except OctavoError as error:
            return self.quantizer.put_off(error, name)
        module.float_dtype = weight.dtype
        return {name: codes, f"{name}_scale": scale}


class ReadParameter(_SharedOp):
    """Tensors of an int8 layer on disk become a buffer of the layer. (Codes that are not packed need no conversion.)

    read: (the buffer's name, the buffer that it will replace, the tensors on disk, all checked before) -> the buffer.
    """

    def __init__(self, quantizer: OctavoQuantizer, read: Callable[[str, Tensor, dict[str, Tensor]], Tensor]) -> None:
        # transformers leaves the dtype of what is loaded alone if an operation has this attribute
        self.hf_quantizer = quantizer
        self.read = read

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any) -> dict[str, Tensor]:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        layer, name = full_layer_name.rsplit(".", 1)
        place = model.get_submodule(layer)._buffers[name]
        return {full_layer_name: self.read(full_layer_name, place, tensors)}


def unpacked(name: str, place: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    (packed,) = (tensor for part, tensor in tensors.items() if part.endswith("_packed"))
    return layout.unpack(packed, place.shape, name=f"{name}_packed")


def stored_scale(name: str, place: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    (scale,) = tensors.values()
    return scale.float().expand(place.shape).contiguous()  # one for the whole weight is that of every row


def for_each_stack(rule: Any, stacks: set[str], model_prefix: str) -> list[Any]:
    """A rule that merges experts, as copies of it that each make only one of the `stacks`.

    model_prefix: `base_model_prefix` of the model.
    """
    prefix = f"{model_prefix}."
    # A pattern that begins with a dot needs the name before it.
    ends = [("[^.]+" if target.startswith(".") else "") + re.escape(target) for target in rule.target_patterns]
    made_here = re.compile(rf"(^|\.)({'|'.join(ends)})$")
    scopes = {param[: found.start()] for param in stacks if (found := made_here.search(param))}
    made = []
    for scope in sorted(scopes):
        made.append(copy.deepcopy(rule))
        made[-1].scope_prefix, made[-1].base_model_prefix = scope.removeprefix(prefix), prefix[:-1]
    return made


# -- saving ----------------------------------------------------------------------------------------------------------


def for_saving(rules: Iterable[Any], model: PreTrainedModel) -> list[Any]:
    """The rules that `save_pretrained` may apply in reverse to an int8 model.

    Left out are the rules that unpack codes, which `get_state_dict_and_metadata` has packed already, and those whose
    reverse would merge codes with other tensors (a rule that cuts a fused q, k and v). A rule that renames a weight is
    followed by rules for the tensors that its codes are stored as.
    """
    alone = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, QuantModule) and not isinstance(module, QuantExperts)
    ]
    kept = [rule for rule in rules if not (_reads_int8(rule) or _merges_any(rule, alone) or _is_of_part(rule))]
    return [each for rule in kept for each in (rule, *renamings_of_parts(rule))]


_PARTS = ("_packed", "_shape", "_scale")


def _is_of_part(rule: Any) -> bool:
    ends = (*_PARTS, "input_scale")
    return isinstance(rule, WeightRenaming) and all(pattern.endswith(ends) for pattern in rule.source_patterns)


def renamings_of_parts(rule: Any) -> list[Any]:
    """For a rule that renames a "...weight": rules that rename the tensors that its codes are stored as ("..._packed").
    The rule itself does not match those names."""
    if type(rule) is not WeightRenaming:
        return []
    sources, targets = rule._original_source_patterns, rule._original_target_patterns
    if not all(each[-1].isalnum() for each in sources) or not all(each.endswith("weight") for each in targets):
        return []
    named = [([each + part for each in sources], [each + part for each in targets]) for part in _PARTS]
    if all(each.endswith("weight") for each in sources):
        named.append(([_of_input(each) for each in sources], [_of_input(each) for each in targets]))
    made = [WeightRenaming(*names) for names in named]
    for each in made:
        each.scope_prefix, each.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
    return made


def _of_input(pattern: str) -> str:
    return pattern.removesuffix("weight") + "input_scale"


def merges(rule: Any, stacks: set[str]) -> bool:
    """Whether a rule merges several tensors into one of the parameters `stacks`."""
    targets = getattr(rule, "target_patterns", ())
    targets = [targets] if isinstance(targets, str) else targets
    many = isinstance(rule, WeightConverter) and bool(rule.operations)
    return many and any(f".{param}".endswith(f".{target.lstrip('.')}") for target in targets for param in stacks)


def _merges_any(rule: Any, params: list[str]) -> bool:
    """Whether the reverse of a rule merges one of `params` with other tensors."""
    if not isinstance(rule, WeightConverter):
        return False
    reverse = rule.reverse_transform()
    return any(reverse.rename_source_key(param)[1] is not None for param in params)


def _reads_int8(rule: Any) -> bool:
    return any(isinstance(operation, ReadParameter) for operation in getattr(rule, "operations", ()))
