"""Quantize while diffusers loads, save int8 when it saves, and load int8 as int8: models, and pipelines of them.

    from octavo.integrations.diffusers import OctavoConfig
    model = FluxTransformer2DModel.from_pretrained(
        id, subfolder="transformer", quantization_config=OctavoConfig("w8a8")
    )

    config = PipelineQuantizationConfig(
        quant_backend="octavo", quant_kwargs={"scheme": "w8a8"}, components_to_quantize=["transformer", "text_encoder"]
    )
    pipeline = DiffusionPipeline.from_pretrained(id, quantization_config=config)
    pipeline.save_pretrained("out/"); DiffusionPipeline.from_pretrained("out/")            # real int8 again

Importing this module registers the quantization method "octavo" with diffusers, and with transformers, whose text
encoders pipelines have. A program that only loads such a model needs the import too; without it diffusers names the
method as unknown. Tensors on disk are laid out as those of every other checkpoint of octavo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from octavo import formats
from octavo.computed_weights import parts_of
from octavo.errors import CheckpointError, OctavoError, QuantizeError
from octavo.formats import Rename
from octavo.integrations.stored_names import refuse_wrapped_parts
from octavo.integrations.transformers import METHOD, OctavoConfig, holds_int8
from octavo.modules import QuantModule
from octavo.quantization.install import install, record_reasons
from octavo.quantization.plan import Decision, plan
from octavo.quantization.quantize import warn_unasked

__all__ = ["STEM", "DiffusersOctavoQuantizer", "OctavoConfig", "config_of", "model_class_of", "renaming", "skeleton"]

STEM = "diffusion_pytorch_model"
"""What the names of files with weights begin with in diffusers."""


class DiffusersOctavoQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """The hooks that diffusers calls while it loads and saves a model.

    model: the one to save; that which is loaded is known later.
    """

    use_keep_in_fp32_modules = True
    quantization_config: OctavoConfig

    def __init__(self, quantization_config: OctavoConfig, model: ModelMixin | None = None, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = bool(quantization_config.layout)  # diffusers' from_single_file always says that it is
        self._model = model
        self._folder: Path | None = None
        self._decisions: list[Decision] = []
        self._awaited: dict[str, tuple[Decision, nn.Module]] = {}  # weight's name -> decision, float layer
        self._later: list[Decision] = []
        self._int8: set[str] = set()

    # -- loading -----------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises: OctavoError for a device map that leaves layers on disk."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise OctavoError("device_map: has layers on disk, from where int8 layers cannot run; leave out 'disk'")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast float weights to before they are quantized. Without one diffusers takes that of the
        parameter in the model, which for a layer that is to be int8 is int8."""
        return torch.get_default_dtype() if torch_dtype is None and not self.pre_quantized else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Of an int8 checkpoint diffusers is not to judge the names; octavo does, when it reads the codes."""
        if not self.pre_quantized:
            return loaded_keys
        self._folder = Path(checkpoint_files[0]).parent
        return []

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Those of float weights; which of int8 ones are missing is found when all is loaded."""
        return [] if self.pre_quantized else [name for name in missing_keys if name not in self._int8]

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        """Swap the layers of the empty model. An int8 checkpoint is read here; of a float one the weights then find
        their int8 places."""
        if self.quantization_config.attention == "int8":
            raise QuantizeError("attention is 'int8', which is for transformers' models; leave it out")
        if self.pre_quantized:
            if self._folder is None:
                raise CheckpointError("the int8 checkpoint has no folder; load it by from_pretrained")
            formats.load_into(self._folder, model, rename=renaming(model))
            self._int8 = _int8_tensors(model)
            return
        self._decisions = plan(model, self.quantization_config.recipe)
        now: list[Decision] = []
        for decision in self._decisions:
            computed = parts_of(model.get_submodule(decision.name))
            (self._later if computed else now).append(decision)  # once the weights that it is computed from are loaded
        for decision in now:
            if decision.scheme and not decision.owner:
                layer = model.get_submodule(decision.name)
                names = [f"{decision.name}.{param}" for param in decision.kind.params_of(layer)]
                self._awaited |= dict.fromkeys(names, (decision, layer))
        install(model, now, ignore=self.quantization_config.recipe.ignore)
        self._int8 = _int8_tensors(model)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor of a file becomes (or is) int8; diffusers leaves such to `create_quantized_param`."""
        return param_name in self._int8

    def create_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Quantize a float weight, as just read and cast. Raises: QuantizeError for NaN and inf; CheckpointError for a
        checkpoint that holds codes although its config does not say so."""
        if self.pre_quantized:
            return  # it was read with its scale
        if param_name not in self._awaited or not param_value.is_floating_point():
            raise CheckpointError(
                f"{param_name}: belongs to int8 codes, expected float weights to quantize; give the float model, or "
                "load the int8 one with the config.json that it was saved with"
            )
        decision, layer = self._awaited.pop(param_name)
        assert decision.scheme is not None
        param = param_name.removeprefix(f"{decision.name}.")
        weight = param_value.to(target_device)
        codes, scale = decision.kind.quantize_param(layer, param, weight, decision.scheme, param_name)
        module = model.get_submodule(decision.name)
        assert isinstance(module, QuantModule)
        module.hold(param, codes, scale)
        module.float_dtype = weight.dtype

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        if self._awaited:
            raise CheckpointError(
                f"{len(self._awaited)} weights of {type(model).__name__} are missing from the checkpoint, such as "
                f"{min(self._awaited)}; download it again"
            )
        if not self.pre_quantized:
            for layer in model.modules():
                if isinstance(layer, QuantModule):
                    layer.void_float()
            install(model, self._later, ignore=self.quantization_config.recipe.ignore)
            warn_unasked(record_reasons(model, self._decisions))
        self._model, self._later, self._decisions, self._int8 = model, [], [], set()
        _describe(model)
        return model

    # -- saving ------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_pretrained` writes. Raises: QuantizeError as `octavo.save` does, and for a pickle."""
        assert self._model is not None
        if not safe_serialization:
            raise QuantizeError("safe_serialization is False, and int8 checkpoints are safetensors; leave it out")
        refuse_wrapped_parts(self._model)
        return formats.state_dict(self._model), {}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on the frozen int8 base can be trained: gradients reach the inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _int8_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors that int8 layers hold in the place of float weights: codes, and scales."""
    return {
        f"{prefix}.{name}"
        for prefix, layer in model.named_modules()
        if isinstance(layer, QuantModule)
        for name in (*layer.quantized_params, *layer.scale_names())
    }


def _describe(model: ModelMixin) -> None:
    """Have the model's config say that it is int8, and how it lies on disk."""
    model.register_to_config(quantization_config=OctavoConfig.of_checkpoint(formats.describe_layout(model)))


class _QuantizerIfInt8:
    """`hf_quantizer` of models that diffusers did not load as int8: a quantizer to save with, if there are int8 layers.

    It is looked up when the model is saved, since which parts are int8 then is not known before. `save_pretrained`
    writes the config first, so the lookup describes the model there.
    """

    def __get__(self, model: ModelMixin | None, owner: type) -> DiffusersOctavoQuantizer:
        if model is None or not holds_int8(model):
            raise AttributeError(f"{owner.__name__!r} object has no attribute 'hf_quantizer'")
        _describe(model)
        return DiffusersOctavoQuantizer(OctavoConfig(), model)


AUTO_QUANTIZER_MAPPING[METHOD] = DiffusersOctavoQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = OctavoConfig
ModelMixin.hf_quantizer = _QuantizerIfInt8()


# -- what octavo.load, save and quantize_checkpoint ask ---------------------------------------------------------------


def model_class_of(config: Mapping[str, Any], file: Path) -> Any:
    """The class that a config.json of diffusers names. Raises: CheckpointError if diffusers has no such model."""
    name = config["_class_name"]
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise CheckpointError(
            f"{file}: _class_name is {name!r}, which is no model of diffusers {diffusers.__version__}; upgrade "
            "diffusers, or, in Python, pass model=, a freshly built one"
        )
    return found


def skeleton(folder: Path, config: Mapping[str, Any]) -> ModelMixin:
    """The model of a checkpoint folder, on `meta`. Raises: CheckpointError if diffusers cannot build it."""
    model_class = model_class_of(config, folder / "config.json")
    try:
        with torch.device("meta"):
            return model_class.from_config(dict(config))
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, NotImplementedError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: diffusers cannot build a {model_class.__name__} of it: {error!r}; correct it, "
            "or, in Python, pass model=, a freshly built one"
        ) from error


def config_of(model: ModelMixin) -> dict[str, Any]:
    """What config.json holds of a model, but for the quantization."""
    config: dict[str, Any] = json.loads(model.to_json_string())
    config.pop("quantization_config", None)
    return config


def renaming(model: ModelMixin) -> Rename:
    """A function from names on disk to names in the model: old checkpoints name the layers of attention otherwise
    ("query" for "to_q")."""
    if not any(getattr(module, "_from_deprecated_attn_block", False) for module in model.modules()):
        return lambda name: name

    def rename(name: str) -> str:
        (renamed,) = model._fix_state_dict_keys_on_load({name: None})
        return str(renamed)

    return rename
