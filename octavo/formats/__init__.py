"""Models on disk: `save` any model with int8 layers, `load_into` a model of the same structure.

The layout is that of compressed-tensors (`compressed_tensors.py`) in a folder of sharded safetensors
(`checkpoint.py`). A transformers model is loaded by `octavo.integrations.hub.load`, which also knows how to build it.
Files are quantized without a model by `stream.py`; gpt-fast's own layout is in `gpt_fast.py`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.coverage import REASONS_ATTRIBUTE, Coverage, coverage
from octavo.errors import CheckpointError, OctavoWarning, QuantizeError
from octavo.formats import compressed_tensors as layout
from octavo.formats.checkpoint import CheckpointReader, CheckpointWriter, copy_companions, new_folder
from octavo.layers import kind_of
from octavo.modules import Codes, QuantModule
from octavo.quantize import Decision, Progress, install, output_heads
from octavo.recipe import Scheme, WeightArgs

__all__ = [
    "COVERAGE_FILE",
    "describe_layout",
    "int8_names",
    "load_into",
    "restore_reasons",
    "save",
    "state_dict",
    "stored_decisions",
    "write_descriptions",
]

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
    tied_to = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if name in codes:
            yield name, codes[name]
        elif name not in scales:
            same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            is_copy = tensor.numel() > 0 and (same in seen or _shares(state, name, tied_to.get(name)))
            seen.setdefault(same, name)
            if not is_copy:
                yield name, (tensor, None, tensor.dtype)


def _shares(state: Mapping[str, Tensor], name: str, source: str | None) -> bool:
    return source in state and state[source].data_ptr() == state[name].data_ptr()


def _describe_model(model: nn.Module, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write the files that the model and the tokenizer describe themselves with; returns the content of config.json."""
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
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
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    (folder / COVERAGE_FILE).write_text(report.to_json() + "\n", encoding="utf-8")


# -- loading -------------------------------------------------------------------------------------------------------------


Rename = Callable[[str], str | None]
"""Name of a tensor on disk -> name of the parameter that it is loaded into; None if it is a part of one."""


def int8_names(reader: CheckpointReader, rename: Rename = lambda name: name) -> dict[str, str]:
    """Int8 parameters of the checkpoint: name in the model -> name on disk (without `_packed`, `_scale`, `_shape`).

    Raises: CheckpointError for a quantized checkpoint of another format.
    """
    config = (reader.config or {}).get("quantization_config")
    if config is not None:
        layout.check_readable(config, str(reader.path / "config.json"))
    on_disk = [name.removesuffix("_packed") for name in reader.names if name.endswith("_packed")]
    return {rename(name) or name: name for name in on_disk}


def load_into(folder: str | Path, model: nn.Module, *, progress: Progress | None = None) -> nn.Module:
    """Load a checkpoint written by `save` into a freshly built float model of the same structure, in place.

    model: as it was before it was quantized, with any weights, or on `meta` (then it takes the checkpoint's memory
        only). Its float tensors get the dtypes of the checkpoint.
    Returns: `model`, its layers int8 as in the checkpoint.
    Raises: CheckpointError, before the model is changed, for a folder that cannot be read or does not fit the model:
        missing or unexpected tensors, other shapes, int8 weights for layers that cannot have them.
    """
    with CheckpointReader(folder) as reader:
        int8 = int8_names(reader)
        decisions = stored_decisions(reader, model, int8)
        floats = _float_places(reader, model, int8, decisions)

        def codes_of(decision: Decision, layer: nn.Module) -> tuple[Codes, torch.dtype]:
            codes, dtype = {}, torch.float32
            for param in decision.kind.params_of(layer):
                weight, scale, dtype = read_codes(reader, f"{decision.name}.{param}")
                codes[param] = (weight, scale)
            return codes, dtype

        for name, places in floats.items():
            _assign(places, reader.tensor(name))
        install(model, decisions, codes_of=codes_of, progress=progress)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{folder}: does not hold {left[0]} ({len(left)} such: buffers that are not saved), and the model is on meta; "
            "build the model with its weights, not on meta"
        )
    restore_reasons(model, Path(folder))
    return model


def read_codes(reader: CheckpointReader, name: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Codes (int8), scale (fp32) and the scale's dtype on disk of the float parameter `name`."""
    parts = (f"{name}_packed", f"{name}_scale", f"{name}_shape")
    return layout.decode(name, {part: reader.tensor(part) for part in parts})


def restore_reasons(model: nn.Module, folder: Path) -> None:
    """Give a loaded model the reasons that its float layers had when it was quantized."""
    file = folder / COVERAGE_FILE
    if file.is_file():
        rows = Coverage.from_dict(json.loads(file.read_text(encoding="utf-8"))).rows
        reasons = {row.name: (row.reason, row.asked) for row in rows if row.reason and not row.scheme}
        setattr(model, REASONS_ATTRIBUTE, reasons)


def scheme_of(reader: CheckpointReader, name: str) -> Scheme:
    """The scheme of the int8 parameter `name`, by the shape of its scale."""
    columns = reader.info(f"{name}_scale").shape[-1]
    shape = reader.tensor(f"{name}_shape").tolist()
    if columns == 1:
        return Scheme("w8a16")
    return Scheme("w8a16", WeightArgs("per_group", shape[-1] // columns))


def stored_decisions(reader: CheckpointReader, model: nn.Module, int8: Mapping[str, str]) -> list[Decision]:
    """What to swap in a float model: the layers that own int8 weights in the checkpoint, and those tied to one.

    int8: as `int8_names` gives it.
    Raises: CheckpointError for int8 weights that no layer of the model can have, or of another shape.
    """
    where = str(reader.path)
    decisions: dict[str, Decision] = {}
    owner_of: dict[int, str] = {}
    modules = dict(model.named_modules())
    heads = output_heads(model)
    for name, on_disk in int8.items():
        prefix, _, param = name.rpartition(".")
        layer = modules.get(prefix)
        kind = kind_of(layer) if layer is not None else None
        if layer is None or kind is None or param not in kind.params_of(layer):
            raise CheckpointError(f"{where}: holds int8 codes for {on_disk!r}, and the model has no such layer")
        rows = kind.rows(getattr(layer, param).detach().to("meta"), layer)
        got = reader.tensor(f"{on_disk}_shape").tolist()
        if got != list(rows.shape):
            raise CheckpointError(f"{where}: {on_disk!r} has shape {got}, the model's has {list(rows.shape)}")
        label = "OutputHead" if prefix in heads else kind.name
        decisions[prefix] = Decision(prefix, kind, label, scheme_of(reader, on_disk))
        owner_of[id(getattr(layer, param))] = prefix
    for name, layer in modules.items():
        kind = kind_of(layer)
        owner = owner_of.get(id(layer._parameters.get("weight"))) if kind else None
        if kind and owner is not None and name != owner:
            label = "OutputHead" if name in heads else kind.name
            decisions[name] = Decision(name, kind, label, decisions[owner].scheme, owner=owner)
    return [decisions[name] for name in modules if name in decisions]


def _float_places(
    reader: CheckpointReader, model: nn.Module, int8: Mapping[str, str], decisions: list[Decision]
) -> dict[str, list[tuple[nn.Module, str]]]:
    """Float tensor of the checkpoint -> every (module, attribute) of the model that it belongs to."""
    where = str(reader.path)
    swapped = {f"{d.name}.{p}" for d in decisions for p in d.kind.params_of(model.get_submodule(d.name))}
    state = model.state_dict(keep_vars=True)
    sharing: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, tensor in state.items():
        prefix, _, short = name.rpartition(".")
        sharing.setdefault(id(tensor), []).append((model.get_submodule(prefix), short))
    packed = {f"{name}{part}" for name in int8 for part in ("_packed", "_scale", "_shape")}
    stored = [name for name in reader.names if name not in packed]
    unexpected = [name for name in stored if name not in state or name in swapped]
    found = {id(state[name]) for name in stored if name in state}
    missing = [name for name, tensor in state.items() if name not in swapped and id(tensor) not in found]
    if unexpected or missing:
        raise CheckpointError(
            f"{where}: does not fit the model: "
            + "; ".join(
                f"{len(names)} tensors {what}, such as {names[0]!r}"
                for what, names in (("the model lacks", unexpected), ("the checkpoint lacks", missing))
                if names
            )
        )
    for name in stored:
        if reader.info(name).shape != tuple(state[name].shape):
            raise CheckpointError(
                f"{where}: {name!r} has shape {list(reader.info(name).shape)}, the model's has {list(state[name].shape)}"
            )
    return {name: sharing[id(state[name])] for name in stored}


def _assign(places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
    """Put a loaded tensor into every place of the model that holds it, so that tied ones stay tied."""
    first, short = places[0]
    old = first._parameters.get(short)
    value = tensor if old is None else nn.Parameter(tensor, requires_grad=old.requires_grad)
    for module, attribute in places:
        (module._buffers if old is None else module._parameters)[attribute] = value
