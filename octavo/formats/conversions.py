"""Tensors that are stored in another form than the model has them: the model's library converts them when it loads
them.

    layers.0.attn.qkv.weight  [3H, H]  on disk  ->  layers.0.attn.q_proj.weight, k_proj, v_proj  [H, H] each
    experts.gate_up_proj [E, H, 2I]    on disk  ->  the same transposed  [E, 2I, H]
    conv.weight_g, conv.weight_v       on disk  ->  conv.weight = g * v / |v|, as the int8 layer has it

Codes cannot be converted like that, because each weight has its own scales. So an int8 checkpoint stores int8 weights
in the form that the model has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from octavo.computed_weights import ComputedWeight, computed_weight
from octavo.formats.checkpoint import CheckpointReader, TensorInfo

__all__ = ["AsInModel", "Conversion", "DtypeOf", "computed_weights"]

DtypeOf = Callable[[str], torch.dtype | None]
"""Name of a tensor on disk -> the dtype in which the model's library loads it; None for its own."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion of tensors on disk into tensors of the model, such as a fused q, k and v that is cut in three.

    sources: names on disk. convert: these tensors by name -> the tensors of the model by name.
    """

    sources: tuple[str, ...]
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def computed_weights(modules: Mapping[str, nn.Module], params: Mapping[str, str | None]) -> list[Conversion]:
    """The conversions for layers that compute their weight: from the stored parameters to that weight.

    modules: of the model, by name. params: name on disk -> name in the model.
    """
    on_disk = {param: name for name, param in params.items()}
    found = []
    for name, layer in modules.items():
        if computed := computed_weight(layer):
            parts = {part: on_disk.get(f"{name}.{part}") for part in computed.parts}
            sources = {part: source for part, source in parts.items() if source}
            if len(sources) == len(parts):
                compute = partial(_compute, f"{name}.weight", computed, sources)
                found.append(Conversion(tuple(sources.values()), compute))
    return found


def _compute(
    name: str, computed: ComputedWeight, sources: Mapping[str, str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {name: computed.compute({part: tensors[source] for part, source in sources.items()})}


class AsInModel:
    """A view of a checkpoint in which the tensors of some layers are converted to the form that the model has. It has
    the reading methods of CheckpointReader.

    layers: names of these layers. made: name of each converted tensor -> its conversion.
    dtype_of: name on disk -> the dtype to cast a float tensor to, or None for its own.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        conversions: Iterable[Conversion],
        layers: Collection[str],
        dtype_of: DtypeOf = lambda name: None,
    ) -> None:
        self._reader = reader
        self._dtype_of = dtype_of
        self.path = reader.path
        self.made: dict[str, Conversion] = {}
        self._infos: dict[str, TensorInfo] = {}
        for conversion in conversions:
            infos = [self._source(name) for name in conversion.sources]
            empty = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos}
            made = conversion.convert(empty)
            if any(name.rpartition(".")[0] in layers for name in made):
                for name, tensor in made.items():
                    self.made[name] = conversion
                    self._infos[name] = TensorInfo(
                        name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, infos[0].file
                    )
        sources = {name for conversion in self.made.values() for name in conversion.sources}
        self.names = [name for name in reader.names if name not in sources] + list(self.made)
        self._there = set(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._there

    def info(self, name: str) -> TensorInfo:
        return self._infos.get(name) or self._source(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self.made:
            return self._read(name)
        conversion = self.made[name]
        return conversion.convert({source: self._read(source) for source in conversion.sources})[name]

    def _source(self, name: str) -> TensorInfo:
        """`info` of a tensor on disk, with the dtype that it is cast to; `nbytes` is its size on disk."""
        info = self._reader.info(name)
        dtype = self._dtype_of(name) if info.dtype.is_floating_point else None
        return dataclasses.replace(info, dtype=dtype or info.dtype)

    def _read(self, name: str) -> Tensor:
        return self._reader.tensor(name).to(self._source(name).dtype)
