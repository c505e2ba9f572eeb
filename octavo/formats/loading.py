"""Read a checkpoint folder into a float model of the same structure: its layers become int8 as they are on disk.

`stored_decisions` turns what lies on disk into the decisions that `octavo.quantize.plan` would have made, so that
loading swaps layers by the same code as quantizing does. `load_into` is for any module; a transformers model is built
and loaded by `octavo.integrations`, with the same decisions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.coverage import REASONS_ATTRIBUTE, Coverage
from octavo.errors import CheckpointError
from octavo.formats import compressed_tensors as layout
from octavo.formats.checkpoint import CheckpointReader
from octavo.formats.saving import COVERAGE_FILE
from octavo.layers import kind_of
from octavo.modules import Codes
from octavo.quantize import Decision, Progress, install, output_heads
from octavo.recipe import Scheme, WeightArgs

__all__ = ["Rename", "int8_names", "load_into", "restore_reasons", "scheme_of", "stored_decisions"]

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
            f"{folder}: does not hold {left[0]} ({len(left)} such: buffers that are not saved), and the model is on "
            "meta; build the model with its weights, not on meta"
        )
    restore_reasons(model, Path(folder))
    return model


def read_codes(reader: CheckpointReader, name: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Codes (int8), scale (fp32) and the scale's dtype on disk of the float parameter `name`."""
    parts = (f"{name}_packed", f"{name}_scale", f"{name}_shape")
    return layout.decode(name, {part: reader.tensor(part) for part in parts})


def _check_codes(reader: CheckpointReader, name: str) -> None:
    """Raise what `read_codes` would for damaged codes or scales, without reading the codes."""
    packed = reader.info(f"{name}_packed")
    parts = {part: reader.tensor(part) for part in (f"{name}_scale", f"{name}_shape")}
    layout.decode(name, {packed.name: torch.empty(packed.shape, dtype=packed.dtype, device="meta"), **parts})


def restore_reasons(model: nn.Module, folder: Path, rename: Rename = lambda name: name) -> None:
    """Give a loaded model the reasons that its float layers had when it was quantized."""
    file = folder / COVERAGE_FILE
    if file.is_file():
        try:
            rows = Coverage.from_dict(json.loads(file.read_text(encoding="utf-8"))).rows
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error!r}; remove it, it only tells why") from error
        reasons = {
            rename(row.name) or row.name: (row.reason, row.asked) for row in rows if row.reason and not row.scheme
        }
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
    Raises: CheckpointError for int8 weights that are damaged, that no layer of the model can have, or of another shape.
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
        _check_codes(reader, on_disk)
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
    layers = [(decision, model.get_submodule(decision.name)) for decision in decisions]
    int8_ids = {id(getattr(layer, param)) for decision, layer in layers for param in decision.kind.params_of(layer)}
    state = model.state_dict(keep_vars=True)
    swapped = {name for name, tensor in state.items() if id(tensor) in int8_ids}  # one layer may have several names
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
        got, expected = list(reader.info(name).shape), list(state[name].shape)
        if got != expected:
            raise CheckpointError(f"{where}: {name!r} has shape {got}, the model's has {expected}")
    return {name: sharing[id(state[name])] for name in stored}


def _assign(places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
    """Put a loaded tensor into every place of the model that holds it, so that tied ones stay tied."""
    first, short = places[0]
    old = first._parameters.get(short)
    if old is None:
        for module, attribute in places:
            module._buffers[attribute] = tensor
    else:
        parameter = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for module, attribute in places:
            module._parameters[attribute] = parameter
