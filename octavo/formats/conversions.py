"""Tensors that are others on disk than in the model: its library converts them when it loads them.

    layers.0.attn.qkv.weight  [3H, H]  on disk  ->  layers.0.attn.q_proj.weight, k_proj, v_proj  [H, H] each
    experts.gate_up_proj [E, H, 2I]    on disk  ->  the same turned around  [E, 2I, H]

Codes cannot be converted so: each weight has scales of its own. So an int8 checkpoint holds what the model has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from octavo.formats.checkpoint import CheckpointReader, TensorInfo

__all__ = ["AsInModel", "Conversion"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Tensors that the model's library makes others of when it loads them: a fused q, k and v are cut in three.

    sources: their names on disk. convert: these tensors -> what becomes of them, under their names in the model.
    """

    sources: tuple[str, ...]
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


class AsInModel:
    """A checkpoint of float tensors in which those of the layers that are to be int8 stand as they do in the model. It
    reads as a CheckpointReader does.

    int8: names of these layers. made: name of a tensor that is converted -> its conversion.
    """

    def __init__(self, reader: CheckpointReader, conversions: Iterable[Conversion], int8: Collection[str]) -> None:
        self._reader = reader
        self.path = reader.path
        self.made: dict[str, Conversion] = {}
        self._infos: dict[str, TensorInfo] = {}
        for conversion in conversions:
            infos = [reader.info(name) for name in conversion.sources]
            empty = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos}
            made = conversion.convert(empty)
            if any(name.rpartition(".")[0] in int8 for name in made):
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
        return self._infos.get(name) or self._reader.info(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self.made:
            return self._reader.tensor(name)
        conversion = self.made[name]
        return conversion.convert({source: self._reader.tensor(source) for source in conversion.sources})[name]
