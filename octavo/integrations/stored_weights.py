"""Find out which weights of an empty model are in the files, before transformers loads them: what is tied, what is
new."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from octavo import formats
from octavo.errors import CheckpointError
from octavo.formats.checkpoint import CheckpointReader
from octavo.integrations.stored_names import loading_names, of_kind, renaming
from octavo.quantization.plan import Decision

__all__ = ["leave_new_ones", "refuse_int8", "refuse_other_dtypes", "tie"]


def refuse_int8(files: Iterable[str]) -> None:
    """Raise CheckpointError if files that are to be quantized hold int8 codes already: transformers, which goes by the
    config, would report the weights as missing and initialize new ones."""
    for file in (file for file in files if Path(file).suffix == ".safetensors"):
        with CheckpointReader(file) as reader:
            int8 = formats.int8_names(reader)
        if int8:
            raise CheckpointError(
                f"{file}: holds int8 codes ({min(int8)}, ...), expected float weights to quantize; load it without "
                "quantization_config, and of a part of a model (a tower) the whole model first"
            )


def refuse_other_dtypes(reader: CheckpointReader, model: PreTrainedModel, int8: Collection[str]) -> None:
    """Raise CheckpointError for a weight that has a scale but no int8 codes in the files: transformers would load what
    is stored under its name as float, without the scale.

    int8: names on disk of the weights that have codes.
    """
    state, rename = model.state_dict(), renaming(model)
    for name in reader.names:
        weight = name.removesuffix("_scale")
        if weight == name or weight in int8 or rename(name) in state or rename(weight) not in state:
            continue
        found = f"is {reader.info(weight).dtype}" if weight in reader else "is missing"
        raise CheckpointError(
            f"{reader.path}: {weight!r} {found}, expected int8 codes, for its scale is there ({name!r}); download or "
            "quantize the checkpoint again"
        )


def leave_new_ones(decisions: list[Decision], model: PreTrainedModel, files: Iterable[str]) -> None:
    """Keep layers float whose weight is not in the files (a head for a new task): transformers initializes them
    randomly, to be trained. Does nothing if the files are not safetensors."""
    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        return
    rules = get_model_conversion_mapping(model)
    state = model.state_dict(keep_vars=True)
    converted = loading_names(model, rules, state)
    converters = of_kind(rules, WeightConverter)
    targets = {source: rule.target_patterns for rule in converters for source in rule.source_patterns}
    there: set[int] = set()
    for file in files:
        with CheckpointReader(file) as reader:
            for name in reader.names:
                first, pattern = converted(name)
                one, *others = targets.get(pattern or "", [first])
                if others and one not in first:
                    return  # a pattern and not a name: which other tensors the rule makes is not known
                made = [first, name, *(first.replace(one, other) for other in others)]
                there |= {id(state[each]) for each in made if each in state}
    for decision in decisions:
        layer = model.get_submodule(decision.name)
        weights = [state.get(f"{decision.name}.{param}") for param in decision.kind.params_of(layer)]
        if decision.scheme and not any(weight is None or id(weight) in there for weight in weights):
            decision.scheme, decision.owner, decision.asked = None, None, True
            decision.reason = "not in the checkpoint: it is new, and to be trained"


def tie(model: PreTrainedModel, files: Iterable[str]) -> None:
    """Tie the weights of the empty model now, which transformers would do after loading, so that layers that share a
    weight get one int8 table.

    By transformers' rules: two weights that are both in the files and differ are not tied, whatever the config says; if
    only one is in the files, it is the source.
    """
    tied = model.all_tied_weights_keys
    with contextlib.ExitStack() as stack:
        safetensors = [file for file in files if tied and Path(file).suffix == ".safetensors"]
        stored = _stored_tied(model, [stack.enter_context(CheckpointReader(file)) for file in safetensors])
        for target, source in list(tied.items()):
            one, other = stored.get(target), stored.get(source)
            if one and other and not _are_equal(one, other):
                del tied[target]
                continue
            if one and not other and list(tied.values()).count(source) == 1:
                del tied[target]
                target, source = source, target
                tied[target] = source
            parent, _, name = target.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_parameter(source))


_Read = Callable[[], Tensor]


def _stored_tied(model: PreTrainedModel, readers: list[CheckpointReader]) -> dict[str, dict[str, _Read]]:
    """Name of a tied parameter -> its tensors in the files: suffix of the name ("", "_packed" or "_scale") -> a
    function that reads the tensor."""
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    rename = renaming(model)
    stored: dict[str, dict[str, _Read]] = {}
    for reader in readers:
        for name in reader.names:
            end = next(end for end in ("_packed", "_scale", "") if name.endswith(end))
            if (param := rename(name.removesuffix(end))) in tied:
                stored.setdefault(str(param), {})[end] = partial(reader.tensor, name)
    return stored


def _are_equal(one: Mapping[str, _Read], other: Mapping[str, _Read]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[end](), other[end]()) for end in one)
