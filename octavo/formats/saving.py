"""Write a model with int8 layers as a checkpoint folder: safetensors, config.json, what stayed float and why.

    model.layers.0.mlp.up_proj (QuantLinear)  ->  its codes and scales, as compressed_tensors.py lays them out
    a norm, a bias, a float layer             ->  as it is
    weights that two layers share             ->  once, under the name of the first

config.json is the model's own with a `quantization_config` added, so that transformers and vLLM load a folder whose
int8 layers are all linear; a folder with others (convolutions, embeddings) is marked as octavo's own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.coverage import Coverage, coverage
from octavo.errors import OctavoWarning, QuantizeError
from octavo.formats import compressed_tensors as layout
from octavo.formats.checkpoint import CheckpointWriter, copy_companions, new_folder
from octavo.modules import QuantModule
from octavo.quantize import Progress
from octavo.recipe import Scheme

__all__ = ["COVERAGE_FILE", "describe_layout", "quantization_config", "save", "state_dict", "write_descriptions"]

COVERAGE_FILE = "octavo_coverage.json"
"""Beside the weights: what is float, and why (`Coverage.to_json`)."""

ECOSYSTEM_KINDS = frozenset({"Linear", "OutputHead"})
"""Layer kinds that compressed-tensors' readers (transformers, vLLM) load. A checkpoint with others is marked with
octavo's own quant_method, so that no other reader takes it for what it is not."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Path:
    """Write a quantized model as a checkpoint folder: safetensors, config.json, tokenizer and generation files.

    model: has at least one int8 layer. For a transformers model the folder loads in transformers and vLLM.
    folder: must not exist (an empty one may).
    tokenizer: tokenizer or processor to save along. Without one, the files beside the model's own checkpoint are
        copied, if it was loaded from a local folder.
    max_shard_size: bytes, or "5GB".
    Returns: the folder's path.
    Raises: QuantizeError if no layer is int8; CheckpointError if the folder exists or cannot be written whole.
    Warns: OctavoWarning if a layer's kind keeps transformers and vLLM from loading the folder.
    """
    report = coverage(model)
    layers = _int8_layers(model)
    if not layers:
        raise QuantizeError("the model has no int8 layer to save; call octavo.quantize(model, 'w8a16') first")
    tensors = dict(_stored(model, layers))
    with new_folder(folder) as temporary:
        plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, (tensor, scale, dtype) in tensors.items():
            if scale is None:
                plan[name] = (tensor.dtype, tuple(tensor.shape))
            else:
                plan.update(layout.packed_layout(name, tuple(tensor.shape), tuple(scale.shape), dtype))
        with CheckpointWriter(temporary, plan, max_shard_size=max_shard_size) as writer:
            for done, (name, (tensor, scale, dtype)) in enumerate(tensors.items(), 1):
                encoded = {name: tensor} if scale is None else layout.encode(name, tensor, scale, dtype)
                for stored_name, stored in encoded.items():
                    writer.write(stored_name, stored)
                if progress:
                    progress(done, len(tensors))
        config = _describe_model(model, temporary, tokenizer)
        is_transformers = "model_type" in config
        config["quantization_config"] = describe_layout(model, ecosystem=is_transformers)
        write_descriptions(temporary, config, report)
    return Path(folder)


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a quantized model as `save` lays them out, in memory: int8 weights packed, shared ones once."""
    layers = _int8_layers(model)
    encoded: dict[str, Tensor] = {}
    for name, (tensor, scale, dtype) in _stored(model, layers):
        encoded.update({name: tensor} if scale is None else layout.encode(name, tensor, scale, dtype))
    return encoded


def describe_layout(model: nn.Module, *, ecosystem: bool) -> dict[str, Any]:
    """The `quantization_config` of a quantized model. ecosystem: whether others may read it, if its layers allow."""
    layers = _int8_layers(model)
    owners = {name: (layer.replaces, layer.scheme) for name, layer in layers.items() if layer.codes()}
    # Linear layers that hold no codes of their own: a reader of the config must leave them alone.
    unquantized = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (name in layers and name not in owners)
    ]
    return quantization_config(owners, unquantized, ecosystem=ecosystem)


def quantization_config(
    layers: Mapping[str, tuple[str, Scheme]], unquantized: list[str], *, ecosystem: bool
) -> dict[str, Any]:
    """config.json's `quantization_config`, marked as octavo's own if a layer's kind is beyond other readers.

    layers: int8 layer's name -> (its kind, its scheme). unquantized: names of Linear layers without codes.
    Warns: OctavoWarning if `ecosystem` was hoped for and a layer's kind forbids it.
    """
    foreign = sorted({kind for kind, _ in layers.values()} - ECOSYSTEM_KINDS)
    if ecosystem and foreign:
        warnings.warn(
            f"int8 layers of kind {', '.join(foreign)} are read by octavo only: transformers and vLLM will not load "
            f"this checkpoint. For one that they load, quantize with ignore={foreign}",
            OctavoWarning,
            stacklevel=4,
        )
    return layout.quantization_config(layers, unquantized, ecosystem=ecosystem and not foreign)


def _int8_layers(model: nn.Module) -> dict[str, QuantModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}


Stored = tuple[Tensor, Tensor | None, torch.dtype]
"""A float tensor (scale None), or codes with their scale and the dtype that the scale has on disk."""


def _stored(model: nn.Module, layers: Mapping[str, QuantModule]) -> Iterable[tuple[str, Stored]]:
    """What goes to disk, in the order of the model: codes with their scales, and each shared tensor once."""
    codes: dict[str, Stored] = {}
    for prefix, layer in layers.items():
        for param, (weight, scale) in layer.codes().items():
            codes[f"{prefix}.{param}"] = (weight, scale, layer.float_dtype)
    scales = {f"{name}_scale" for name in codes}
    state = model.state_dict()
    copies = _copies(state, getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in state.items():
        if name in codes:
            yield name, codes[name]
        elif name not in scales and name not in copies:
            yield name, (tensor, None, tensor.dtype)


def _copies(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> set[str]:
    """Names of the tensors that another name holds too. `tied`: target -> source, where the model has a say in which
    of the names is the tensor's own."""
    sharing: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            sharing.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append(name)
    # A stable sort: of several sources the first of the model.
    return {name for names in sharing.values() for name in sorted(names, key=lambda name: name in tied)[1:]}


def _describe_model(model: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write the files that the model and the tokenizer describe themselves with; returns the content of config.json."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return {}
    source = Path(str(getattr(config, "_name_or_path", "") or ""))
    if tokenizer is None and source.is_dir() and str(source) != ".":
        copy_companions(source, folder)
    described = json.loads(config.to_json_string())
    described.pop("quantization_config", None)
    described["architectures"] = [type(model).__name__]
    if getattr(model, "can_generate", lambda: False)() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return described


def write_descriptions(folder: Path, config: dict[str, Any], report: Coverage) -> None:
    """Write config.json and, beside it, the coverage."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / COVERAGE_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
