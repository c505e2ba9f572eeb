"""Read a checkpoint folder into a float model of the same structure: its layers become int8 as they are on disk.

`stored_decisions` turns what lies on disk into the decisions that `octavo.quantization.plan` would have made, so that
loading swaps layers by the same code as quantizing does. `load_into` is for any module; a transformers model is built
and loaded by `octavo.integrations`, with the same decisions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.computed_weights import parts_of
from octavo.errors import CheckpointError
from octavo.experts import spec_of
from octavo.feeding import Progress, check_progress
from octavo.formats import compressed_tensors as layout
from octavo.formats.checkpoint import CheckpointReader, TensorInfo
from octavo.formats.conversions import AsInModel, Conversion
from octavo.formats.experts import Part, stored_expert_parts
from octavo.formats.saving import COVERAGE_FILE, OnDisk, fingerprint
from octavo.layers import EXPERTS, kind_of, name_in_files
from octavo.modules import Codes, QuantModule
from octavo.quantization.coverage import REASONS_ATTRIBUTE, Coverage
from octavo.quantization.install import install
from octavo.quantization.plan import Decision, output_heads
from octavo.recipe import ATTENTION, InputArgs, Scheme, WeightArgs

__all__ = [
    "Rename",
    "codes_info",
    "int8_names",
    "load_into",
    "read_experts",
    "refuse_lost_buffers",
    "restore_reasons",
    "scheme_of",
    "stored_attention",
    "stored_coverage",
    "stored_decisions",
    "stored_parts",
    "stored_shape",
]

_BUILD = "build the model that it was saved from"
"""The fix that errors name where checkpoint and model do not fit each other."""

Rename = Callable[[str], str | None]
"""Name of a tensor on disk -> name of the parameter that it becomes; None if it is only a part of one."""


def stored_attention(config: Mapping[str, Any]) -> str:
    """How attention is computed, "float" or "int8", by a config.json's `quantization_config`.

    Raises: CheckpointError for anything else.
    """
    attention = config.get("attention", "float")
    if attention not in ATTENTION:
        raise CheckpointError(
            f"config.json: quantization_config.attention is {attention!r}, expected one of "
            f"{', '.join(map(repr, ATTENTION))}; correct it, or leave it out for float attention"
        )
    return str(attention)


def int8_names(reader: CheckpointReader, rename: Rename = lambda name: name) -> dict[str, str]:
    """Int8 parameters of the checkpoint: name in the model -> name on disk (without `_packed`).

    Raises: CheckpointError for a quantized checkpoint of another format.
    """
    config = (reader.config or {}).get("quantization_config")
    if config is not None:
        layout.check_readable(config, str(reader.path / "config.json"))

    def is_plain(name: str) -> bool:
        param = name.rpartition(".")[2]  # "weight", "weight_ih_l0", "in_proj_weight"
        known = f"{name}_scale" in reader or (config is not None and param == "weight")
        is_one = param.startswith("weight") or param.endswith("_weight")
        return known and is_one and reader.info(name).dtype == torch.int8

    def is_packed(name: str) -> bool:  # and no buffer of the model that has such a name
        weight = name.removesuffix("_packed")
        return weight != name and (f"{weight}_scale" in reader or f"{weight}_shape" in reader)

    on_disk = [name.removesuffix("_packed") for name in reader.names if is_packed(name) or is_plain(name)]
    return {rename(name) or name: name for name in on_disk}


def load_into(
    folder: str | Path,
    model: nn.Module,
    *,
    rename: Rename = lambda name: name,
    on_disk: OnDisk | None = None,
    conversions: Callable[[list[str]], list[Conversion]] = lambda names: [],
    progress: Progress | None = None,
) -> nn.Module:
    """Load a checkpoint written by `save` into a freshly built float model of the same structure, in place.

    model: as it was before it was quantized, with any weights, or on `meta` (then it takes the checkpoint's memory
        only). Its float tensors get the dtypes of the checkpoint.
    rename: from names on disk to names in the model. on_disk: the other way, as for `save`.
    conversions: (names on disk) -> the conversions for those that are stored in another form than the model has.
    Returns: `model`, its layers int8 as in the checkpoint.
    Raises: CheckpointError, before the model is changed, for a model that is int8 already, and for a folder that cannot
        be read or does not fit the model: missing or unexpected tensors, other shapes, int8 weights for layers that
        cannot have them, different weights for layers that the model ties.
    """
    check_progress(progress)
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise CheckpointError(f"{folder}: the model holds int8 layers already; build it anew, as a float model")
    with CheckpointReader(folder) as reader:
        report = stored_coverage(reader)
        saved = model.state_dict().keys()
        int8 = {name: stored for name, stored in int8_names(reader, rename).items() if f"{stored}_packed" not in saved}
        parts = stored_expert_parts(model, on_disk, int8)
        decisions = stored_decisions(reader, model, int8, parts)
        codes = {part for name in int8.values() for part in stored_parts(reader, name)}
        layers = dict(model.named_modules())
        tensors = AsInModel(reader, conversions([name for name in reader.names if name not in codes]), layers)
        stored = {
            name if name in tensors.made else rename(name) or name: name for name in tensors.names if name not in codes
        }
        floats = _float_places(tensors, stored, model, int8, decisions)
        refuse_lost_buffers(folder, model)

        def codes_of(decision: Decision, layer: nn.Module) -> tuple[Codes, torch.dtype]:
            codes, dtype = {}, torch.float32
            for param in decision.kind.params_of(layer):
                if decision.kind.name == EXPERTS:
                    weight, scale, dtype = read_experts(reader, f"{decision.name}.{param}", parts)
                else:
                    weight, scale, dtype = _codes(reader, int8[f"{decision.name}.{param}"])
                codes[param] = (weight, scale)
            return codes, dtype

        for name, places in floats.items():
            _assign(places, tensors.tensor(stored[name]))
        install(model, decisions, codes_of=codes_of, progress=progress)
    restore_reasons(model, report, rename)
    return model


def refuse_lost_buffers(path: str | Path, model: nn.Module) -> None:
    """Raise CheckpointError for a model on meta with non-persistent buffers: no file has values for them."""
    saved = model.state_dict().keys()
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved]
    if lost:
        raise CheckpointError(
            f"{path}: does not hold {lost[0]} ({len(lost)} such: buffers that are not saved), and the model is on "
            "meta; build the model with its weights, not on meta"
        )


def read_experts(reader: CheckpointReader, param: str, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor, torch.dtype]:
    """Read a stack of experts from its parts: codes int8 [E, N, K], scale fp32 [E, N, 1], and the stored scale's dtype.

    Raises: CheckpointError for a part that is damaged.
    """
    own = {name: part.rows for name, part in parts.items() if part.param == param}
    total = sum(map(len, own.values()))
    codes = scale = dtype = None
    for name, rows in own.items():
        part, part_scale, dtype = _codes(reader, name)
        if codes is None or scale is None:
            codes = torch.empty(total, part.shape[1], dtype=torch.int8, device=part.device)
            scale = torch.empty(total, 1, device=part.device)
        codes[rows], scale[rows] = part, part_scale
    assert codes is not None and scale is not None and dtype is not None
    experts = 1 + max(int(re.findall(r"\.(\d+)\.", name)[-1]) for name in own)
    return codes.view(experts, -1, codes.shape[1]), scale.view(experts, -1, 1), dtype


def _codes(reader: CheckpointReader, name: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """(codes, scale in fp32, dtype of the stored scale) of the int8 parameter `name`."""
    return layout.decode(name, {part: reader.tensor(part) for part in stored_parts(reader, name)})


def stored_parts(reader: CheckpointReader, name: str) -> list[str]:
    """Names of the tensors that make up the int8 parameter `name` on disk."""
    codes = codes_info(reader, name).name
    return [part for part in layout.parts_of(name) if part in reader and (part != name or part == codes)]


def codes_info(reader: CheckpointReader, name: str) -> TensorInfo:
    """`TensorInfo` of the stored codes of the int8 parameter `name`, packed or not."""
    packed = f"{name}_packed"
    return reader.info(packed if packed in reader else name)


def stored_shape(reader: CheckpointReader, name: str) -> tuple[int, ...]:
    """The unpacked shape of the codes of the int8 parameter `name`. Raises CheckpointError if it is damaged."""
    codes = codes_info(reader, name)
    if codes.name == name:
        return codes.shape
    return layout.decode_shape(reader.tensor(f"{name}_shape"), f"{name}_shape")


def _check_codes(reader: CheckpointReader, name: str) -> None:
    """Raise what `decode` would raise for damaged codes or scales, without reading the codes."""
    codes = codes_info(reader, name)
    reader.info(f"{name}_scale")  # if there is none, this error names the file
    parts = {part: reader.tensor(part) for part in stored_parts(reader, name) if part != codes.name}
    layout.decode(name, {**parts, codes.name: torch.empty(codes.shape, dtype=codes.dtype, device="meta")})


def stored_coverage(reader: CheckpointReader) -> Coverage | None:
    """The coverage stored beside the weights; None if there is none, or if it is of weights that were there before.

    Raises: CheckpointError if it is damaged.
    """
    file = (reader.path if reader.path.is_dir() else reader.path.parent) / COVERAGE_FILE
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        report = Coverage.from_dict(told)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a coverage: {error!r}; remove it, it only tells what is float and why"
        ) from error
    infos = map(reader.info, reader.names)
    is_of_these = told.get("weights") in (None, fingerprint({info.name: (info.dtype, info.shape) for info in infos}))
    return report if is_of_these else None


def restore_reasons(model: nn.Module, report: Coverage | None, rename: Rename = lambda name: name) -> None:
    """Restore on a loaded model why layers stayed float, and why an int8 layer has another scheme than was asked for.

    report: from `stored_coverage`. rename: from names on disk to names in the model.
    """
    if report is None:
        return
    told = {rename(row.name) or row.name: row for row in report.rows if row.reason}
    reasons = {name: (row.reason, row.asked) for name, row in told.items() if not row.scheme}
    setattr(model, REASONS_ATTRIBUTE, reasons)
    for prefix, layer in model.named_modules():
        for param in layer.codes() if isinstance(layer, QuantModule) else ():
            row = told.get(f"{prefix}.{param}")
            layer.note = row.reason if row else None


def scheme_of(
    reader: CheckpointReader, name: str, *, module: str | None = None, classes: Collection[str] = ("Linear",)
) -> Scheme:
    """The scheme of the int8 parameter `name`: the weight's from the shape of its scale, the input's from the config.

    module: name of the layer in the model, where it is not the one on disk. classes: names of its class and bases.
    Raises: CheckpointError for weights in groups under int8 inputs, and as `compressed_tensors.inputs_of` does.
    """
    inputs = _inputs_of(reader, name, module, classes)
    scale = reader.info(f"{name}_scale").shape
    columns = scale[-1] if len(scale) == 2 else 1
    if columns == 1:
        return layout.stored_scheme(WeightArgs(), inputs)
    if inputs is not None:
        raise CheckpointError(
            f"{reader.path}: {name}_scale has shape {list(scale)}, for weights in groups, under int8 inputs; expected "
            "one scale for each row of the weight: quantize the float model with octavo instead"
        )
    return layout.stored_scheme(WeightArgs("per_group", stored_shape(reader, name)[-1] // columns), None)


def _inputs_of(reader: CheckpointReader, name: str, module: str | None, classes: Collection[str]) -> InputArgs | None:
    config = (reader.config or {}).get("quantization_config")
    if config is not None:
        names = {name.rpartition(".")[0], module or name.rpartition(".")[0]}
        return layout.inputs_of(config, names, classes)
    if codes_info(reader, name).name != name:
        return None
    static = layout.input_scale_name(name) in reader
    return InputArgs("per_tensor", dynamic=False) if static else InputArgs()


def _input_scale(reader: CheckpointReader, name: str, scheme: Scheme) -> Tensor | None:
    """The stored scale of a layer's static inputs, fp32 [1]; None for other schemes. name: that of the layer's
    weight."""
    scale = layout.input_scale_name(name)
    zero_point = scale.replace("input_scale", "input_zero_point")
    there = scale in reader
    if scheme.input is not None and zero_point in reader:
        raise CheckpointError(
            f"{reader.path}: {zero_point!r} means asymmetric inputs, expected symmetric ones; quantize the float model "
            "with octavo instead"
        )
    if there != scheme.is_static:
        raise CheckpointError(
            f"{reader.path}: {scale!r} is {'there' if there else 'missing'}, and the config says that the layer's "
            f"inputs are {'static' if scheme.is_static else 'not static'}; download or quantize the checkpoint again"
        )
    return layout.decode_input_scale(reader.tensor(scale), scale) if there else None


def stored_decisions(
    reader: CheckpointReader, model: nn.Module, int8: Mapping[str, str], parts: Mapping[str, Part]
) -> list[Decision]:
    """The decisions for a float model by what the checkpoint holds: which layers become int8, and which are tied to
    one.

    int8: as `int8_names` gives it. parts: as `stored_expert_parts` does.
    Raises: CheckpointError for int8 weights that are damaged, that no layer of the model can have, or of another shape,
        and for two that differ where the model has one.
    """
    where = str(reader.path)
    decisions: dict[str, Decision] = {}
    owner_of: dict[object, str] = {}
    modules = dict(model.named_modules())
    heads = output_heads(model)
    for prefix in _stacks(reader, int8, parts):
        decisions[prefix] = _experts_decision(reader, prefix, modules[prefix], parts)
    for name, on_disk in int8.items():
        codes = codes_info(reader, on_disk).name
        if codes != on_disk and on_disk in reader:
            raise CheckpointError(
                f"{where}: holds {on_disk!r} ({reader.info(on_disk).dtype}) and its int8 codes, {codes!r}, expected "
                "one of the two; download the checkpoint again, or remove the one that is not meant from the file"
            )
        if on_disk in parts:
            continue
        prefix, _, param = name.rpartition(".")
        layer = modules.get(prefix)
        kind = kind_of(layer) if layer is not None else None
        if layer is None or kind is None or param not in kind.params_of(layer):
            raise CheckpointError(
                f"{where}: holds int8 codes for {on_disk!r}, and the model has no such layer; {_BUILD}"
            )
        rows = kind.rows(getattr(layer, param).detach().to("meta"), layer)
        got = stored_shape(reader, on_disk)
        if got != tuple(rows.shape):
            raise CheckpointError(
                f"{where}: {on_disk!r} has shape {list(got)}, the model's has {list(rows.shape)}; {_BUILD}"
            )
        _check_codes(reader, on_disk)
        label = "OutputHead" if prefix in heads else name_in_files(layer, kind)
        classes = [base.__name__ for base in type(layer).__mro__]
        scheme = kind.effective(scheme_of(reader, on_disk, module=prefix, classes=classes))
        input_scale = _input_scale(reader, on_disk, scheme)
        decisions[prefix] = Decision(prefix, kind, label, scheme, input_scale=input_scale)
        weight = layer._parameters.get(param)
        if weight is None:
            continue  # computed by weight_norm, so not shared with another layer
        first = owner_of.setdefault(id(weight), prefix)  # of a tied weight that is stored twice
        if first != prefix and not _are_one(reader, int8, decisions[first], decisions[prefix]):
            raise _untied(where, int8[f"{first}.{param}"], on_disk)
        owner_of.setdefault(_memory(weight), prefix)
    for name, layer in modules.items():
        kind = kind_of(layer)
        weight = layer._parameters.get("weight") if kind is not None and kind.name in _TIED_KINDS else None
        if kind is None or weight is None:
            continue
        owner = owner_of.get(id(weight))
        if owner is None and f"{name}.weight" not in reader:
            owner = owner_of.get(_memory(weight))
        if owner is not None and name != owner:
            label = "OutputHead" if name in heads else kind.name
            decisions[name] = Decision(name, kind, label, decisions[owner].scheme, owner=owner)
    return [decisions[name] for name in modules if name in decisions]


_TIED_KINDS = ("Linear", "Embedding")
"""Kinds of layers that can share codes."""


def _are_one(reader: CheckpointReader, int8: Mapping[str, str], first: Decision, other: Decision) -> bool:
    """Whether two layers that share a parameter, and are both stored, have the same codes and scales on disk."""
    if {first.kind.name, other.kind.name} - {*_TIED_KINDS} or first.scheme != other.scheme:
        return False
    if first.scheme is None or first.scheme.input is not None:
        return False
    (codes, scale, _), (others, others_scale, _) = (_codes(reader, int8[f"{d.name}.weight"]) for d in (first, other))
    return torch.equal(codes, others) and torch.equal(scale, others_scale)


def _stacks(reader: CheckpointReader, int8: Mapping[str, str], parts: Mapping[str, Part]) -> list[str]:
    """Names of the modules whose experts are int8 on disk. Raises CheckpointError if only some experts of one are."""
    there = set(int8.values())
    stacks = {parts[name].layer for name in there if name in parts}
    for name, part in parts.items():
        if part.layer in stacks and name not in there:
            raise CheckpointError(
                f"{reader.path}: {name!r} is missing or float, and others of these experts are int8; download or "
                "quantize the checkpoint again"
            )
    return sorted(stacks)


def _experts_decision(reader: CheckpointReader, prefix: str, layer: nn.Module, parts: Mapping[str, Part]) -> Decision:
    kind = kind_of(layer)
    assert kind is not None
    own = {name: part for name, part in parts.items() if part.layer == prefix}
    schemes = set()
    for name, part in own.items():
        spec = spec_of(layer)
        assert spec is not None
        k = spec.stack(layer, part.short).shape[-1]
        got = stored_shape(reader, name)
        if got != (len(part.rows), k):
            raise CheckpointError(
                f"{reader.path}: {name!r} has shape {list(got)}, the model's has {[len(part.rows), k]}; {_BUILD}"
            )
        _check_codes(reader, name)
        scheme = scheme_of(reader, name)
        if (scheme.weight.group_size or k) < k:
            raise CheckpointError(
                f"{reader.path}: {name!r} has a scale for each {scheme.weight.group_size} of its {k} columns, and "
                "experts run with one a row; quantize the float checkpoint again, with a scale per channel"
            )
        schemes.add(kind.effective(scheme))
    if len(schemes) > 1:
        raise CheckpointError(f"{reader.path}: the experts of {prefix!r} have several schemes, expected one")
    return Decision(prefix, kind, kind.name, schemes.pop())


def _float_places(
    reader: AsInModel, stored: Mapping[str, str], model: nn.Module, int8: Mapping[str, str], decisions: list[Decision]
) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of a float tensor -> all places of the model, as (module, attribute), that it is loaded into.

    stored: for the float tensors, name in the model -> name in `reader`.
    Raises: CheckpointError if checkpoint and model do not fit.
    """
    where = str(reader.path)
    layers = [(decision, model.get_submodule(decision.name)) for decision in decisions]
    params = [(layer, param) for decision, layer in layers for param in decision.kind.params_of(layer)]
    int8_ids = {id(attrgetter(param)(layer)) for layer, param in params}
    state = model.state_dict(keep_vars=True)
    for _, layer in layers:  # for a computed weight the parameters that it is computed from
        int8_ids |= {id(layer.get_parameter(part)) for part in parts_of(layer)}
    swapped = {name for name, tensor in state.items() if id(tensor) in int8_ids}  # one layer may have several names
    unexpected = [name for name in stored if name not in state or name in swapped]
    tied = [name for name in unexpected if name in swapped and name not in int8]
    if tied:
        raise CheckpointError(
            f"{where}: holds {tied[0]!r} in float, which the model ties to a weight that is int8 there; load it into a "
            "model that does not tie the two"
        )
    sources = _sources(state, [name for name in stored if name in state])
    missing = [name for name in state if name not in swapped and name not in sources]
    if unexpected or missing:
        raise CheckpointError(
            f"{where}: does not fit the model: "
            + "; ".join(
                f"{len(names)} tensors {what}, such as {names[0]!r}"
                for what, names in (("the model lacks", unexpected), ("the checkpoint lacks", missing))
                if names
            )
            + f"; {_BUILD}"
        )
    for name, on_disk in stored.items():
        got, expected = list(reader.info(on_disk).shape), list(state[name].shape)
        if got != expected:
            raise CheckpointError(f"{where}: {on_disk!r} has shape {got}, the model's has {expected}; {_BUILD}")
        dtype, own = reader.info(on_disk).dtype, state[name].dtype
        if own.is_floating_point and not dtype.is_floating_point:
            raise CheckpointError(f"{where}: {on_disk!r} is {dtype}, the model's is {own}; the file is corrupt")
        source = stored[sources[name]]
        if source != on_disk and not torch.equal(reader.tensor(source), reader.tensor(on_disk)):
            raise _untied(where, source, on_disk)
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name in state:
        if name not in swapped:
            prefix, _, short = name.rpartition(".")
            places.setdefault(sources[name], []).append((model.get_submodule(prefix), short))
    return places


def _sources(state: Mapping[str, Tensor], stored: list[str]) -> dict[str, str]:
    """Name in the model -> name of the stored tensor that it is loaded from.

    For a parameter with several names it is the first that is stored. A parameter that shares memory with another
    (`b.data = a.data`) uses its own stored tensor, or that of the other if it has none.
    """
    by_id: dict[int, str] = {}
    by_memory: dict[object, str] = {}
    for name in stored:
        by_id.setdefault(id(state[name]), name)
        by_memory.setdefault(_memory(state[name]), name)
    sources = {name: by_id.get(id(tensor)) or by_memory.get(_memory(tensor)) for name, tensor in state.items()}
    return {name: source for name, source in sources.items() if source is not None}


def _memory(tensor: Tensor) -> object:
    """A key that is equal for tensors that are the same view of the same memory, on `meta` too."""
    if not isinstance(tensor, Tensor):  # what a module's get_extra_state returned
        return id(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _untied(where: str, name: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {name!r} and {other!r} are weights of their own, and the model ties them; load the checkpoint "
        "into a model that does not"
    )


def _assign(places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
    """Put a loaded tensor into all of its places in the model, so that tied parameters stay tied."""
    # dict: what a module of torch.jit holds in place of one has no get.
    before = [dict(module._parameters).get(short) for module, short in places]
    parameters = {id(old): nn.Parameter(tensor, requires_grad=old.requires_grad) for old in before if old is not None}
    for (module, short), old in zip(places, before, strict=True):
        if old is None:
            module._buffers[short] = tensor
        else:
            module._parameters[short] = parameters[id(old)]
