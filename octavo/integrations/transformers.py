"""Quantize while transformers loads, and load int8 as int8.

    from octavo.integrations.transformers import OctavoConfig
    model = AutoModelForCausalLM.from_pretrained(id, quantization_config=OctavoConfig("w8a16"))
    model.save_pretrained("out/"); AutoModelForCausalLM.from_pretrained("out/")     # real int8 again

Importing this module registers the quantization method "octavo" with transformers. A program that only loads such a
checkpoint needs the import too, or `octavo.load`, which does it: transformers alone warns of an "Unknown quantization
type" and goes on with random weights. Tensors on disk are laid out as compressed-tensors' pack-quantized and
int-quantized, whichever way they were saved; `octavo.save` writes a config that vLLM and transformers without octavo
read, `save_pretrained` one that brings transformers here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from octavo import formats
from octavo.computed_weights import parts_of
from octavo.errors import CheckpointError, OctavoError, RecipeError
from octavo.formats.checkpoint import CheckpointReader
from octavo.formats.experts import Part
from octavo.integrations.attention import attention_of, check_int8_attention, use_int8_attention
from octavo.integrations.float_attention import use_float_attention
from octavo.integrations.stored_names import on_disk, refuse_wrapped_parts, renaming
from octavo.integrations.stored_weights import leave_new_ones, refuse_int8, refuse_other_dtypes, tie
from octavo.integrations.weight_rules import (
    QuantizeParameter,
    ReadParameter,
    for_each_stack,
    for_saving,
    merges,
    renamings_of_parts,
    stored_scale,
    unpacked,
)
from octavo.modules import QuantModule
from octavo.quantization.install import install, record_reasons
from octavo.quantization.plan import Decision, plan
from octavo.quantization.quantize import warn_unasked
from octavo.recipe import Pattern, Recipe, Scheme

__all__ = ["OctavoConfig", "OctavoQuantizer", "holds_int8", "let_transformers_save"]


class _Method(str, Enum):
    """Of one value, since diffusers asks a method for its `value`; everywhere else it is the string."""

    OCTAVO = "octavo"


METHOD = _Method.OCTAVO


@register_quantization_config(METHOD)
class OctavoConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` for `from_pretrained`: the recipe to quantize with while loading.

    scheme, ignore, include, overrides, group_size, attention: as for `octavo.quantize`.
    Raises: RecipeError for an unknown scheme, key or pattern, and for static inputs: their scales come from running the
        model, which is not there yet.
    """

    def __init__(
        self,
        scheme: str | Scheme | Recipe | Mapping[str, Any] = "w8a16",
        *,
        ignore: Iterable[Pattern] = (),
        include: Iterable[Pattern] = (),
        overrides: Mapping[Pattern, Scheme] | None = None,
        group_size: int | None = None,
        attention: str | None = None,
    ) -> None:
        self.quant_method = METHOD
        base = Recipe.from_dict(scheme) if isinstance(scheme, Mapping) else scheme
        self.recipe = Recipe.of(
            base, ignore=ignore, include=include, overrides=overrides, group_size=group_size, attention=attention
        )
        _refuse_static(self.recipe)
        self.layout: dict[str, Any] = {}

    @classmethod
    def of_checkpoint(cls, config: Any) -> OctavoConfig:
        """The config of an int8 checkpoint, whose recipe lies in its tensors."""
        made = cls()
        made.layout = dict(config if isinstance(config, Mapping) else config.to_dict())
        return made

    @property
    def attention(self) -> str:
        """How the model's attention is computed: "float" or "int8"."""
        return formats.stored_attention(self.layout) if self.layout else self.recipe.attention

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What transformers calls with the quantization_config of a config.json, or with a dict of a user's.

        Raises: RecipeError for a key that is none of the arguments, where the dict describes no checkpoint.
        """
        if not {"config_groups", "format"} & config_dict.keys():
            given = {key: value for key, value in config_dict.items() if key != "quant_method"}
            unknown = given.keys() - {"scheme", "ignore", "include", "overrides", "group_size", "attention"}
            if unknown:
                raise RecipeError(
                    f"quantization_config: unknown key {min(unknown)!r}; expected scheme, ignore, include, overrides, "
                    "group_size or attention"
                )
            made = cls(**given)
        else:
            made = cls.of_checkpoint(config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """What lands in config.json."""
        return {**self.layout, "quant_method": METHOD.value}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _refuse_static(recipe: Recipe) -> None:
    for scheme in recipe.schemes:
        if scheme.is_static:
            raise RecipeError(
                f"scheme {scheme} has static inputs, whose scales cannot be found while a model is loaded; load the "
                "float model, then stats = octavo.calibrate(model, batches) and octavo.quantize(model, recipe, "
                "stats=stats), or take 'w8a8', which needs no calibration"
            )


@register_quantizer(METHOD)
class OctavoQuantizer(HfQuantizer):  # type: ignore[misc]
    """The hooks that transformers calls while it loads a model."""

    requires_calibration = False
    quantization_config: OctavoConfig

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._decisions: list[Decision] = []
        self._targets: dict[str, tuple[Decision, nn.Module]] = {}
        self._replaced: dict[str, nn.Module] = {}
        self._later: list[Decision] = []
        self._model: PreTrainedModel | None = None
        self._folder: Path | None = None
        self._error: OctavoError | None = None
        self._parts: dict[str, Part] = {}
        self._rules: list[Any] = []
        self._put_aside: list[Any] = []
        self._of_parts: dict[Any, list[Any]] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Swap the layers of the empty model; the weights then find their int8 places."""
        if self.quantization_config.attention == "int8":
            check_int8_attention(model)
        tie(model, checkpoint_files or ())
        if self.pre_quantized:
            float_dtypes = self._read_decisions(model, checkpoint_files or [])
        else:
            refuse_int8(checkpoint_files or ())
            float_dtypes = {}
            self._decisions = plan(model, self.quantization_config.recipe)
            leave_new_ones(self._decisions, model, checkpoint_files or ())
        now: list[Decision] = []
        for decision in self._decisions:
            computed = not self.pre_quantized and parts_of(model.get_submodule(decision.name))
            (self._later if computed else now).append(decision)  # once the weights that it is computed from are loaded
        for decision in now:
            if decision.scheme:
                layer = self._replaced[decision.name] = model.get_submodule(decision.name)
                params = () if decision.owner else decision.kind.params_of(layer)
                self._targets.update({f"{decision.name}.{param}": (decision, layer) for param in params})
        install(model, now, ignore=self.quantization_config.recipe.ignore)
        self._leave_experts_to_us(model)
        self._keep_ties(model)
        self._model = model
        for name, dtype in float_dtypes.items():
            self.target(name)[2].float_dtype = dtype
        if not self.pre_quantized:
            self._make_float_places()
            # Some of transformers' conversions (`Transpose`, `Split`) ask the model for the parameter that they make.
            model.get_parameter = self._float_parameter  # type: ignore[method-assign]

    def _read_decisions(self, model: PreTrainedModel, checkpoint_files: list[str]) -> dict[str, torch.dtype]:
        """Find out from an int8 checkpoint which layers are int8: sets `_folder`, `_parts` and `_decisions`.

        Returns: name of an int8 parameter, but for those of experts -> the dtype that it had in the float model.
        """
        if not checkpoint_files:
            raise CheckpointError("the int8 checkpoint has no safetensors files; octavo reads no others")
        self._folder = Path(checkpoint_files[0]).parent
        with CheckpointReader(self._folder) as reader:
            int8 = formats.int8_names(reader, renaming(model))
            refuse_other_dtypes(reader, model, int8.values())
            self._parts = formats.stored_expert_parts(model, partial(on_disk, model), int8)
            if all(name in reader or f"{name}_packed" in reader for name in self._parts):
                # Weights that the class has no place for (a head, a tower) are left out: transformers reports them,
                # as it does for float ones.
                modules = {name for name, _ in model.named_modules()}
                unplaced = {name for name in int8 if name.rpartition(".")[0] not in modules}
                int8 = {name: at for name, at in int8.items() if name not in unplaced or at in self._parts}
            self._decisions = formats.stored_decisions(reader, model, int8, self._parts)
            return {
                name: reader.info(f"{stored}_scale").dtype for name, stored in int8.items() if stored not in self._parts
            }

    def _keep_ties(self, model: PreTrainedModel) -> None:
        """Take int8 layers that share a table off transformers' list of tied weights: they share it already, and
        transformers could not tie codes."""
        for decision in self._decisions:
            if decision.owner is not None:
                own, table = f"{decision.name}.weight", f"{decision.owner}.weight"
                model.all_tied_weights_keys.pop(own, None)
                if model.all_tied_weights_keys.get(table) == own:  # a file that holds the table by its other name
                    del model.all_tied_weights_keys[table]

    def _make_float_places(self) -> None:
        """Put float tensors where codes will be: transformers before 5.23 casts what it reads to the dtype of the one
        that it replaces, even a weight that is yet to be quantized."""
        for name in self._targets:
            _, layer, module, param = self.target(name)
            codes, scale = module.codes_and_scale(param)
            module.hold(param, codes.to(attrgetter(param)(layer).dtype), scale)

    def _float_parameter(self, name: str) -> Any:
        """`model.get_parameter`, which for an int8 layer returns the parameter of the float layer that it replaced."""
        if name in self._targets:
            _, layer, _, param = self.target(name)
            return attrgetter(param)(layer)
        assert self._model is not None
        return nn.Module.get_parameter(self._model, name)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element once loaded; transformers plans by it which layers go on which device."""
        return 1 if self.is_int8(param_name) else param.element_size()

    def target(self, name: str) -> tuple[Decision, nn.Module, QuantModule, str]:
        """(decision, float layer that was replaced, int8 layer, name in both) of the int8 parameter `name`."""
        decision, layer = self._targets[name]
        assert self._model is not None
        module = self._model.get_submodule(decision.name)
        assert isinstance(module, QuantModule)
        return decision, layer, module, name.removeprefix(f"{decision.name}.")

    def put_off(self, error: OctavoError, name: str) -> dict[str, Tensor]:
        """Keep `error`, to raise it when loading is over: transformers would replace it by an error without the reason.
        Returns: placeholders for `name` until then."""
        self._error = self._error or error
        _, _, module, param = self.target(name)
        codes, scale = module.codes_and_scale(param)
        return {
            name: torch.zeros_like(codes, device="cpu"),
            f"{name}_scale": torch.ones_like(scale, device="cpu"),
        }

    def is_int8(self, name: str) -> bool:
        """Whether the parameter `name` is to be int8."""
        return name in self._targets

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.is_int8(param_name) or any(map(self.is_int8, self._beside(param_name)))

    def _beside(self, name: str) -> list[str]:
        """The other parameters that transformers makes of the same tensors as `name`, if `name` is the first."""
        rules = (rule.target_patterns for rule in self._rules if isinstance(rule, WeightConverter))
        return [name.replace(first, other) for first, *others in rules if first in name for other in others]

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeParameter(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The rules for reading int8 layers: from the names of their tensors on disk to those in the model."""
        if not self.pre_quantized:
            return []
        scale, codes = ReadParameter(self, stored_scale), ReadParameter(self, unpacked)
        # A recurrent layer has several weights, and names of its own for them.
        named = {name.rpartition(".")[2] for name in self._targets}
        params = {"weight"} | {name for name in named if not name.endswith("weight")}
        return [
            *(WeightConverter([f"{name}_packed", f"{name}_shape"], name, [codes]) for name in sorted(params)),
            *(WeightConverter(f"{name}_scale", f"{name}_scale", [scale]) for name in sorted(params)),
            WeightConverter("input_scale", "input_scale", [scale]),
        ]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Restrict the rules that merge experts to float experts: those of int8 ones are read by `_read_experts`.

        model: given by transformers from 5.21 on.
        """
        self._rules = list(weight_conversions)
        stacks = {part.param for part in self._int8_parts().values()}
        floats = {part.param for part in self._parts.values()} - stacks
        self._put_aside = [rule for rule in weight_conversions if merges(rule, stacks)]
        kept = [rule for rule in weight_conversions if not merges(rule, stacks)]
        assert self._model is not None
        prefix = self._model.base_model_prefix
        kept += [each for rule in self._put_aside for each in for_each_stack(rule, floats, prefix)]
        self._of_parts = {rule: renamings_of_parts(rule) for rule in kept} if self.pre_quantized else {}
        kept = [each for rule in kept for each in (rule, *self._of_parts.get(rule, ()))]
        return super().update_weight_conversions(kept, *model)

    def _leave_experts_to_us(self, model: PreTrainedModel) -> None:
        """Tell transformers that weights of int8 experts are neither missing from the files nor unexpected there."""
        own = self._int8_parts()
        missing = {re.escape(part.param) + "(_scale)?$" for part in own.values()}
        # By their names on disk, and as they are after transformers' renamings.
        stacks = {re.split(r"\.\d+\.[^.]+\.weight$", name)[0] for name in own}
        stacks |= {part.param.rpartition(".")[0] for part in own.values()}  # a child of the layer may hold it
        unexpected = {r"(^|\.)" + re.escape(stack) + r"\.\d+\." for stack in stacks}
        for attribute, patterns in (
            ("_keys_to_ignore_on_load_missing", missing),
            ("_keys_to_ignore_on_load_unexpected", unexpected),
        ):
            if patterns:
                setattr(model, attribute, {*(getattr(model, attribute, None) or ()), *patterns})
        # Nor to initialize them, which some classes do from the module around the stack.
        for stack in {part.layer for part in own.values()}:
            for name in (stack, stack.rpartition(".")[0]):
                model.get_submodule(name)._is_hf_initialized = True  # type: ignore[assignment]

    def _int8_parts(self) -> dict[str, Part]:
        """The parts on disk of the experts that are int8."""
        int8 = {decision.name for decision in self._decisions}
        return {name: part for name, part in self._parts.items() if part.layer in int8}

    def _read_experts(self, model: PreTrainedModel) -> None:
        assert self._folder is not None
        with CheckpointReader(self._folder) as reader:
            for layer, short, param in {(part.layer, part.short, part.param) for part in self._int8_parts().values()}:
                module = model.get_submodule(layer)
                assert isinstance(module, QuantModule)
                codes, scale, module.float_dtype = formats.read_experts(reader, param, self._parts)
                place = module.codes_and_scale(short)[0].device
                device = "cpu" if place.type == "meta" else place
                module.hold(short, codes.to(device), scale.to(device))

    def _make_own_buffers(self, model: PreTrainedModel) -> None:
        """Fill the buffers of int8 layers that no file holds (the factor of Gemma's embedding), by transformers' own
        initialization of the float layer."""
        for name, layer in self._replaced.items():
            module = model.get_submodule(name)
            assert isinstance(module, QuantModule)
            module.void_float()
            own = layer._non_persistent_buffers_set & module._non_persistent_buffers_set
            if not own:
                continue
            layer._buffers |= {buffer: torch.empty_like(module.get_buffer(buffer)) for buffer in own}
            for parameter in layer.parameters():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            _innermost_model(model, name)._init_weights(layer)
            module._buffers |= {buffer: layer._buffers[buffer] for buffer in own}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._error is not None:
            raise self._error
        vars(model).pop("get_parameter", None)
        self._make_own_buffers(model)
        if self._later:
            install(model, self._later, ignore=self.quantization_config.recipe.ignore)
        if self._folder is not None:
            self._read_experts(model)
        self._model = None
        self._targets, self._replaced, self._later = {}, {}, []
        # Of the rules, transformers keeps those that it used, for what it writes; it does not know of ours.
        used = {id(rule) for rule in (*(model._weight_conversions or ()), *self._put_aside)}
        used |= {id(rule) for rule, ours in self._of_parts.items() if used & set(map(id, ours))}
        model._weight_conversions = for_saving([rule for rule in self._rules if id(rule) in used], model)
        if self._folder is not None:
            with CheckpointReader(self._folder) as reader:
                formats.restore_reasons(model, formats.stored_coverage(reader), renaming(model))
        else:
            warn_unasked(record_reasons(model, self._decisions))
        if self.quantization_config.attention == "int8":
            use_int8_attention(model)
        else:
            use_float_attention(model)
        let_transformers_save(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes, and the config that says how it is laid out. Raises: QuantizeError as
        `octavo.save` does for parts that are wrapped."""
        if not getattr(model, "_hf_peft_config_loaded", False):  # else adapters alone are written
            refuse_wrapped_parts(model)
        names = partial(on_disk, model)
        self.quantization_config.layout = formats.describe_layout(model, names, attention_of(model))
        model.config.quantization_config = self.quantization_config
        tensors = formats.state_dict(model, names)
        rules = getattr(model, "_weight_conversions", None)
        if rules is None:  # it was never loaded: those that transformers would take
            rules = get_model_conversion_mapping(model, add_legacy=False)
            rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
        kept = for_saving(rules, model)
        if kept != rules:
            model._weight_conversions = kept
        return tensors, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on the frozen int8 base can be trained: gradients reach the inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _innermost_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model of transformers that the module `name` is a part of: `model` or one within it."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:length])) for length in reversed(range(len(parts))))
    return next(part for part in around if isinstance(part, PreTrainedModel))


def let_transformers_save(model: nn.Module) -> None:
    """Make `save_pretrained` write int8 for an int8 model, for the models within it, and for models that contain it.

    By itself transformers does so only for the outermost model of those that it loaded as int8. It would save the codes
    of any other as if they were float weights.
    """
    PreTrainedModel.hf_quantizer = _QuantizerIfInt8()
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or isinstance(vars(part).get("hf_quantizer"), OctavoQuantizer):
            continue
        if holds_int8(part):  # one of its own: a pickle brings this module along
            part.hf_quantizer = OctavoQuantizer(OctavoConfig())


class _QuantizerIfInt8:
    """`hf_quantizer` of models that have none of their own: a quantizer to save with, if the model holds int8 layers.

    It is looked up when the model is saved, because which models will contain an int8 one is not known before.
    """

    def __get__(self, model: PreTrainedModel | None, owner: type) -> OctavoQuantizer:
        if model is None or not holds_int8(model):
            raise AttributeError(f"{owner.__name__!r} object has no attribute 'hf_quantizer'")
        return OctavoQuantizer(OctavoConfig())


def holds_int8(model: nn.Module) -> bool:
    """Whether there is an int8 layer in it."""
    return any(isinstance(module, QuantModule) for module in model.modules())
