"""LoRA adapters of PEFT on int8 linear layers: float factors are trained, the int8 base stays as it is.

    model = get_peft_model(model, on_int8(LoraConfig(r=8, target_modules="all-linear"), model))
    PeftModel.from_pretrained(model, folder, config=on_int8(LoraConfig.from_pretrained(folder), model))

    y = base(x) + lora_B(lora_A(dropout(x))) * scaling      Hu et al., https://arxiv.org/abs/2106.09685

PEFT looks up the class of adapter for a layer in a table in the config; `on_int8` adds int8 layers to it.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from octavo.errors import OctavoError, QuantizeError
from octavo.modules import QuantLinear, QuantModule, TiedQuantLinear
from octavo.primitives import dequantize, quantize_weight

__all__ = ["Int8LoraLinear", "on_int8"]

_HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip
"""Task type -> names of layers that PEFT trains as a whole for it, as if they were in `modules_to_save`."""


def on_int8(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Have PEFT put adapters on the int8 linear layers of `model` that `config` names, as on float ones.

    config: changed in place; `target_modules="all-linear"` becomes the names of all linear layers, int8 or not, but for
        the output head. PEFT's own files do not say it: it has to be said of a config that was loaded, too.
    Returns: config.
    Raises: OctavoError for what adapters would read a float weight for: an initialization by it (PiSSA, OLoRA, ...),
        DoRA and other variants, and a bias of their own; for other adapters than LoRA's; for an int8 layer that PEFT
        would train as a whole (`modules_to_save`, heads of classifiers), or in part.
    """
    if config.peft_type != PeftType.LORA:
        raise OctavoError(
            f"config: is a {type(config).__name__}, and adapters on int8 layers are those of a LoraConfig"
        )
    _refuse_readers(config)
    _refuse_trained_codes(config, model)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = (QuantLinear, nn.Linear, Conv1D)
        named = model.named_modules()
        config.target_modules = {name for name, each in named if isinstance(each, linear) and each is not head}
    config._register_custom_module({QuantLinear: Int8LoraLinear})
    return config


def _refuse_readers(config: LoraConfig) -> None:
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise OctavoError(
            f"init_lora_weights is {config.init_lora_weights!r}, which reads the float weight of a layer that has int8 "
            'codes; take True, False or "gaussian"'
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in ("use_dora", "lora_bias", *variants):
        if value := getattr(config, name):
            raise OctavoError(f"{name} is {value}, which adapters on int8 layers do not have; leave it out")


def _refuse_trained_codes(config: LoraConfig, model: nn.Module) -> None:
    """Raise OctavoError if PEFT would train int8 layers. It selects layers by the ends of their names, and would
    silently train nothing of an int8 layer."""
    tokens = config.trainable_token_indices or {}
    if not isinstance(tokens, dict):
        table = model.get_input_embeddings()  # type: ignore[operator]
        tokens = {name for name, each in model.named_modules() if each is table}
    asked = {
        "modules_to_save": config.modules_to_save,
        f"task_type {config.task_type}": _HEADS.get(config.task_type),
        "trainable_token_indices": tokens,
        "target_parameters": config.target_parameters,
    }
    layers = {name: each for name, each in model.named_modules() if isinstance(each, QuantModule)}
    for argument, ends in asked.items():
        found = [name for name, layer in layers.items() if _is_named(name, layer, tuple(ends or ()))]
        if found:
            raise OctavoError(
                f"{argument}: has PEFT train int8 layers, whose codes are frozen; keep them float: "
                f"octavo.quantize(model, ..., ignore={found})"
            )


def _is_named(name: str, layer: QuantModule, ends: tuple[str, ...]) -> bool:
    """Whether the name of the layer, of a module around it, or of one of its int8 parameters ends with one of
    `ends`."""
    paths = (name, *(f"{name}.{param}" for param in layer.quantized_params))
    return any(part.endswith(ends) for path in paths for part in itertools.accumulate(path.split("."), "{}.{}".format))


class Int8LoraLinear(LoraLinear):  # type: ignore[misc]
    """A LoRA adapter on a `QuantLinear`. While one is merged, the codes are those of the sum."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        _refuse_readers(config)
        super().__init__(base_layer, adapter_name, *args, config=config, **kwargs)
        self.fan_in_fan_out = False  # codes are [N, K], also where the float layer's weight was turned around
        self._before: tuple[Tensor, Tensor] | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Only the plain variant; PEFT then refuses all others."""
        return {(): None}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantize the base's weight, code * scale, with adapters' products added to it, by the base's own scheme.

        safe_merge: changes nothing, for a sum that is not finite is always refused and then nothing has changed.
        Raises: QuantizeError for such a sum, and for a head whose codes are those of the embedding, too.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        base = self.get_base_layer()
        if not names:
            return
        if isinstance(base, TiedQuantLinear):
            raise QuantizeError(
                "an adapter on a head that shares its codes with the embedding cannot be merged: it would change both; "
                "leave the head out of target_modules, or do not merge"
            )
        before = base.codes_and_scale()
        weight = sum((self.get_delta_weight(name).float() for name in names), dequantize(*before))
        args = base.scheme.weight
        codes, scale = quantize_weight(
            weight.to(base.float_dtype), args.granularity, group_size=args.group_size, name="base + adapters"
        )
        self._before = self._before or (before[0].clone(), before[1].clone())
        _put(base, codes, scale.expand(before[1].shape).contiguous())
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Give the base the codes that it had before anything was merged, to the bit."""
        if self._before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        _put(base, *(part.to(base.codes_and_scale()[0].device) for part in self._before))
        self._before = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return str(super().__repr__()).replace("lora.Int8LoraLinear", "lora.Int8Linear", 1)


@torch.no_grad()
def _put(base: Any, codes: Tensor, scale: Tensor) -> None:
    for own, new in zip(base.codes_and_scale(), (codes, scale), strict=True):
        own.copy_(new)
