"""Quantize a checkpoint from file to file, one tensor at a time: no model is built, memory is twice the largest tensor.

What a tensor is (the weight of a linear layer, an embedding, a transposed GPT-2 layer) is not guessed from its name. A
skeleton of the model, without weights, tells it, and the plan is made on the skeleton by the same code as in
`quantize`. The result is bit-identical to quantizing the loaded model and saving it. Only tensors that the model has no
place for (a head for another task) are handled differently: they are copied as they are, and reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.computed_weights import parts_of
from octavo.errors import CheckpointError, QuantizeError
from octavo.experts import held_for, routers, spec_of
from octavo.feeding import Progress, check_module, check_progress
from octavo.formats import compressed_tensors as layout
from octavo.formats.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from octavo.formats.companions import copy_companions
from octavo.formats.conversions import AsInModel, Conversion, DtypeOf, computed_weights
from octavo.formats.experts import Part, expert_parts
from octavo.formats.loading import Rename
from octavo.formats.outputs import new_folder
from octavo.formats.saving import OnDisk, quantization_config, write_descriptions
from octavo.layers import EXPERTS, LINEAR, kind_of
from octavo.ops import quantize_weight
from octavo.quantization.coverage import Coverage, Row, why_float
from octavo.quantization.plan import Decision, plan
from octavo.quantization.quantize import warn_unasked
from octavo.recipe import Recipe, Scheme

__all__ = ["quantize_files"]


def quantize_files(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    skeleton: nn.Module,
    *,
    rename: Rename = lambda name: name,
    on_disk: OnDisk | None = None,
    conversions: Callable[[list[str]], list[Conversion]] = lambda names: [],
    dtype_of: DtypeOf = lambda name: None,
    max_shard_size: int | str = "5GB",
    stem: str = "model",
    progress: Progress | None = None,
) -> Coverage:
    """Quantize the safetensors checkpoint `src` into the new folder `dst`.

    src: a float checkpoint's folder, or one .safetensors file. dst: must not exist.
    skeleton: the model that the checkpoint is of, with or without weights (on `meta`); not modified.
    rename: from names on disk to names in the skeleton. on_disk: the other way, as for `save`.
    conversions: (names on disk) -> the conversions for those that are stored in another form than the model has.
    dtype_of: name on disk -> dtype to cast a float tensor to before it is quantized: scales are rounded to the dtype in
        which the model would be loaded.
    stem: what the names of the weights' files begin with.
    Returns: the coverage, with bytes as on disk.
    Raises: CheckpointError for a source that is damaged, already quantized or not of this model, and for a
        destination that exists or cannot be written whole; RecipeError and QuantizeError as `octavo.quantize` does,
        and QuantizeError for a scheme with static inputs.
    Warns: OctavoWarning as `octavo.quantize` and `octavo.save` do.
    """
    check_module(skeleton)
    check_progress(progress)
    with CheckpointReader(src) as reader:
        _refuse_quantized(reader)
        decisions = plan(skeleton, recipe)
        _refuse_static(decisions)
        tensors = _Tensors(reader, skeleton, decisions, rename, on_disk, conversions, dtype_of)
        config = dict(reader.config or {})
        config["quantization_config"] = quantization_config(
            tensors.layers(),
            tensors.unquantized(),
            ecosystem="model_type" in config,
            names=tensors.names(),
            parts=tensors.parts,
            attention=recipe.attention,
        )
        with new_folder(dst) as temporary:
            copy_companions(src, temporary)
            stored_tensors = tensors.stored()
            with CheckpointWriter(temporary, stored_tensors, max_shard_size=max_shard_size, stem=stem) as writer:
                for done, name in enumerate(tensors.kept, 1):
                    for stored_name, stored in tensors.encode(name).items():
                        writer.write(stored_name, stored)
                    if progress:
                        progress(done, len(tensors.kept))
            report = Coverage(tuple(tensors.rows()))
            write_descriptions(temporary, config, report, stored_tensors)
    warn_unasked(report)
    return report


def _refuse_quantized(reader: CheckpointReader) -> None:
    config = (reader.config or {}).get("quantization_config")
    low = [name for name in reader.names if reader.info(name).dtype.itemsize == 1 and "weight" in name]
    packed = [name for name in reader.names if name.endswith("weight_packed")]
    if config or low or packed:
        method = config.get("quant_method") if isinstance(config, dict) else None
        found = f"quant_method {method!r}" if config else f"tensor {(low or packed)[0]!r}"
        raise CheckpointError(f"{reader.path}: is already quantized ({found}); give the float checkpoint")


def _refuse_static(decisions: list[Decision]) -> None:
    for decision in decisions:
        if decision.scheme is not None and decision.scheme.is_static:
            raise QuantizeError(
                f"{decision.name}: {decision.scheme} has static inputs, whose scales only a model that runs can give; "
                "load the float model, then stats = octavo.calibrate(model, batches), octavo.quantize(model, recipe, "
                "stats=stats) and octavo.save, or take 'w8a8', which needs no calibration"
            )


def _refuse_other_shape(info: TensorInfo, expected: torch.Size) -> None:
    if info.shape != expected:
        raise CheckpointError(
            f"{info.file}: {info.name!r} has shape {list(info.shape)}, the model's {list(expected)}; config.json and "
            "the weights are of different models"
        )


class _Tensors:
    """The tensors of a float checkpoint, and what becomes of each under a plan."""

    def __init__(
        self,
        reader: CheckpointReader,
        skeleton: nn.Module,
        decisions: list[Decision],
        rename: Rename,
        on_disk: OnDisk | None,
        conversions: Callable[[list[str]], list[Conversion]],
        dtype_of: DtypeOf,
    ) -> None:
        self._skeleton = skeleton
        self._modules = dict(skeleton.named_modules())
        self._routers, self._held_for = routers(skeleton), held_for(skeleton)
        self._decisions = {decision.name: decision for decision in decisions}
        self._experts = expert_parts(skeleton, on_disk)
        others = [name for name in reader.names if name not in self._experts]
        int8 = {decision.name for decision in decisions if decision.scheme}
        int8 |= {holder for holder, layer in self._held_for.items() if layer in int8}
        params = {name: rename(name) for name in others}
        computed = computed_weights(self._modules, params)
        for name in (source for conversion in computed for source in conversion.sources):
            _refuse_other_shape(reader.info(name), skeleton.get_parameter(params[name] or "").shape)
        self._reader = AsInModel(reader, [*conversions(others), *computed], int8, dtype_of)
        self._param = {name: name if name in self._reader.made else rename(name) for name in self._reader.names}
        self.parts = [name for name, param in self._param.items() if param is None and not self._stack_of(name)]
        self._shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._refuse_other_shapes()
        self._refuse_missing()
        self._own = self._own_names()
        self.kept = [name for name in self._reader.names if not self._is_copy(name)]
        for name in self.kept:
            if self._scheme(name):
                self._shapes[name] = self._int8_shapes(name)

    def _refuse_other_shapes(self) -> None:
        for name in self._reader.names:
            if (owner := self._owner(name)) is not None:
                _refuse_other_shape(self._reader.info(name), owner.shape)

    def _refuse_missing(self) -> None:
        """Raise CheckpointError if the files lack a parameter: it would get random values when the result is loaded."""
        if self.parts:
            return  # only the library that merges these parts knows which parameters they make up
        there = {id(self._owner(name)) for name in self._reader.names}
        lacking = {part.param for name, part in self._experts.items() if name not in self._reader}
        there |= {
            id(self._skeleton.get_parameter(part.param)) for part in self._experts.values() if part.param not in lacking
        }
        for name in self._reader.made:
            layer = self._modules[name.rpartition(".")[0]]
            there |= {id(layer.get_parameter(part)) for part in parts_of(layer)}
        optional = getattr(self._skeleton, "_keys_to_ignore_on_load_missing", None) or ()
        missing = [
            name
            for name, parameter in self._skeleton.named_parameters()
            if id(parameter) not in there and not any(re.search(pattern, name) for pattern in optional)
        ]
        if missing:
            raise CheckpointError(
                f"{self._reader.path}: {len(missing)} parameters of {type(self._skeleton).__name__} are missing, such "
                f"as {missing[0]!r}; download the checkpoint again, or correct architectures in its config.json"
            )

    def _own_names(self) -> dict[int, str]:
        """id of a parameter -> the name on disk under which it is kept, where the checkpoint has it under several."""
        tied = getattr(self._skeleton, "all_tied_weights_keys", None) or {}
        own: dict[int, str] = {}
        for name in sorted(self._reader.names, key=lambda name: self._param[name] in tied):
            owner = self._owner(name)
            if owner is not None:
                own.setdefault(id(owner), name)
        return own

    def _experts_of(self, name: str) -> Decision | None:
        """The decision for the stack of experts that the tensor is a part of; None if it is not such a part."""
        part = self._experts.get(name)
        return self._decisions.get(part.layer) if part else None

    def _stack_of(self, name: str) -> Decision | None:
        """The same, if the stack is to be int8."""
        decision = self._experts_of(name)
        return decision if decision and decision.scheme else None

    def _layer_of(self, name: str) -> tuple[Decision | None, nn.Module | None, str]:
        """(decision, layer, parameter): the layer that the tensor belongs to, and which parameter it is, or helps to
        compute."""
        prefix, _, short = (self._param[name] or "").rpartition(".")
        layer, computed, of = prefix.rpartition(".parametrizations.")
        if computed:
            prefix, short = layer, of
        if prefix in self._held_for:
            holder, prefix = prefix, self._held_for[prefix]
            short = f"{holder}.{short}".removeprefix(f"{prefix}.")
        decision = self._decisions.get(prefix)
        return decision, self._modules[prefix] if decision else None, short

    def _owner(self, name: str) -> Tensor | None:
        """The parameter or buffer of the skeleton that the tensor is loaded into; None if there is none."""
        prefix, _, short = (self._param[name] or "").rpartition(".")
        module = self._modules.get(prefix)
        if module is None or short in module._non_persistent_buffers_set:
            return None
        parameter = module._parameters.get(short)
        return module._buffers.get(short) if parameter is None else parameter

    def _scheme(self, name: str) -> Scheme | None:
        if stack := self._stack_of(name):
            return stack.scheme
        decision, layer, short = self._layer_of(name)
        if decision is None or layer is None or short not in decision.kind.params_of(layer):
            return None
        return decision.scheme

    def _is_copy(self, name: str) -> bool:
        """Whether the tensor is a second copy of one that the model holds once (a tied output head)."""
        owner = self._owner(name)
        if owner is None or self._own[id(owner)] == name:
            return False
        own = self._own[id(owner)]
        if not torch.equal(self._reader.tensor(own), self._reader.tensor(name)):
            raise CheckpointError(
                f"{self._reader.path}: {name!r} and {own!r} differ, and the model ties them to one weight; "
                "set tie_word_embeddings to false in config.json if both are meant"
            )
        return True

    def _int8_shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the codes and of the scale that the tensor will have."""
        info = self._reader.info(name)
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{info.file}: {name!r} is {info.dtype}, expected a float weight")
        if self._stack_of(name):
            expected = self._shape_of_part(name)
            if info.shape != expected:
                raise CheckpointError(
                    f"{info.file}: {name!r} has shape {list(info.shape)}, the model's experts {list(expected)}; "
                    "config.json and the weights are of different models"
                )
            return expected, (expected[0], 1)
        decision, layer, param = self._layer_of(name)
        assert decision and decision.scheme and layer is not None
        empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
        codes, scale = decision.kind.quantize_param(layer, param, empty, decision.scheme, name)
        return tuple(codes.shape), tuple(scale.shape)

    def _shape_of_part(self, name: str) -> tuple[int, int]:
        part = self._experts[name]
        layer = self._modules[part.layer]
        spec = spec_of(layer)
        assert spec is not None
        return len(part.rows), spec.stack(layer, part.short).shape[-1]

    def _parts_of(self, name: str) -> dict[str, Part]:
        """The parts that a stack of experts is cut into, if the tensor is a whole stack; {} for other tensors."""
        own = {} if self._stack_of(name) else self._experts
        return {at: part for at, part in own.items() if part.param == self._param[name]}

    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every tensor that will be written -> (dtype, shape)."""
        planned: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in self.kept:
            info = self._reader.info(name)
            scheme = self._scheme(name)
            if scheme is not None and (cut := self._parts_of(name)):
                for at, part in cut.items():
                    n, k = len(part.rows), self._shapes[name][0][-1]
                    planned.update(layout.stored_layout(at, (n, k), (n, 1), info.dtype, scheme))
            elif scheme is not None:
                planned.update(layout.stored_layout(name, *self._shapes[name], info.dtype, scheme))
            else:
                planned[name] = (info.dtype, info.shape)
        return planned

    def encode(self, name: str) -> dict[str, Tensor]:
        """Read tensor `name`, and quantize it if the plan says so. Returns: the tensors to write."""
        tensor = self._reader.tensor(name)
        if name not in self._shapes:
            return {name: tensor}
        dtype = tensor.dtype
        if stack := self._stack_of(name):
            assert stack.scheme is not None
            codes, scale = quantize_weight(tensor, name=name)
            return layout.encode(name, codes, scale, dtype, stack.scheme)
        decision, layer, param = self._layer_of(name)
        assert decision and decision.scheme and layer is not None
        codes, scale = decision.kind.quantize_param(layer, param, tensor, decision.scheme, name)
        del tensor  # the float weight is not needed while the codes are packed
        cut = self._parts_of(name)
        if not cut:
            return layout.encode(name, codes, scale, dtype, decision.scheme)
        codes, scale = codes.flatten(0, 1), scale.flatten(0, 1)
        encoded: dict[str, Tensor] = {}
        for at, part in cut.items():
            encoded |= layout.encode(at, codes[part.rows], scale[part.rows], dtype, decision.scheme)
        return encoded

    def rows(self) -> list[Row]:
        """The coverage: a row for every float (or complex) tensor on disk."""
        dtypes = {name: self._reader.info(name).dtype for name in self._reader.names}
        return [self._row(name) for name, dtype in dtypes.items() if dtype.is_floating_point or dtype.is_complex]

    def _row(self, name: str) -> Row:
        info, param = self._reader.info(name), self._param[name] or ""
        module = self._modules.get(param.rpartition(".")[0])
        owner = self._owner(name)
        after = info.dtype.itemsize * math.prod(info.shape)
        if name in self._shapes:
            decision = self._stack_of(name) or self._layer_of(name)[0]
            assert decision is not None
            codes, scale = (torch.Size(shape).numel() for shape in self._shapes[name])
            int8 = codes + scale * info.dtype.itemsize
            return Row(name, decision.label, info.shape, info.nbytes, int8, str(decision.scheme), decision.note)
        if (experts := self._experts_of(name)) and experts.reason:
            return Row(name, experts.label, info.shape, info.nbytes, after, None, experts.reason, experts.asked)
        if module is None or owner is None:
            reason = f"not a parameter of {type(self._skeleton).__name__} as it lies on disk"
            return Row(name, "?", info.shape, info.nbytes, after, None, reason)
        kind = type(module).__name__
        if name not in self.kept:
            scheme = self._scheme(name)
            tied = f"tied to {self._own[id(owner)]}"
            return Row(name, kind, info.shape, 0, 0, str(scheme) if scheme else None, tied, asked=True)
        decision, layer, short = self._layer_of(name)
        reason, asked = why_float(module, owner, router=param.rpartition(".")[0] in self._routers)
        if decision and decision.reason and layer is not None and short in decision.kind.params_of(layer):
            reason, asked = decision.reason, decision.asked
        return Row(name, kind, info.shape, info.nbytes, after, None, reason, asked)

    def layers(self) -> dict[str, tuple[str, Scheme]]:
        """Name of a layer that holds codes -> (kind, scheme)."""
        with_codes = {(self._param[name] or "").rpartition(".")[0] for name in self._shapes}
        found = {
            decision.name: (decision.label, decision.scheme)
            for decision in self._decisions.values()
            if decision.scheme and decision.name in with_codes and decision.kind.name != EXPERTS
        }
        for name, part in self._experts.items():  # each weight of an expert is a layer of its own on disk
            decision = self._decisions.get(part.layer)
            if decision and decision.scheme:
                found[name.rpartition(".")[0]] = (part.kind(decision.label), decision.scheme)
        return found

    def unquantized(self) -> list[str]:
        """Names of the linear and tied layers that hold no codes of their own."""
        int8 = self.layers()
        tied = {name for name, made in self._decisions.items() if made.scheme and made.kind.name != EXPERTS}
        return [
            name
            for name, module in self._modules.items()
            if name not in int8 and (kind_of(module) is LINEAR or name in tied or name in self._routers)
        ]

    def names(self) -> dict[str, str]:
        """Layer's name in the model -> on disk, where it differs."""
        layers = {(param or "").rpartition(".")[0]: name.rpartition(".")[0] for name, param in self._param.items()}
        return {name: on_disk for name, on_disk in layers.items() if name and name != on_disk}
