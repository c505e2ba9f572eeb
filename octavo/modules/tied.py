"""Layers that share the weight of another layer (tied embeddings): they hold no codes, in memory or on disk."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from octavo.errors import QuantizeError
from octavo.modules.base import QuantModule
from octavo.modules.embedding import QuantEmbedding
from octavo.modules.linear import QuantLinear

__all__ = ["TiedQuantEmbedding", "TiedQuantLinear"]


class _Tied:
    """Mixin that reads codes and scale from the layer that owns them, so that both use one table wherever it is
    moved."""

    _owner: tuple[QuantModule]  # in a tuple, so that the owner is not registered as a submodule

    @property
    def weight(self) -> Tensor:
        return self.codes_and_scale()[0]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # transformers' tie_weights assigns the owner's table; that is allowed, because it changes nothing.
        shown: Any = self._owner[0].weight
        if (value.shape, value.data_ptr()) != (shown.shape, shown.data_ptr()):
            raise QuantizeError(f"this {type(self).__name__} shares the table of another layer; assign to that one")

    @property
    def weight_scale(self) -> Tensor:
        return self.codes_and_scale()[1]

    def codes_and_scale(self, param: str = "weight") -> tuple[Tensor, Tensor]:
        return self._owner[0].codes_and_scale(param)


class TiedQuantLinear(_Tied, QuantLinear):  # type: ignore[misc, override]  # read-only: they are the owner's
    """A QuantLinear (such as an output head) whose weight is another layer's."""

    def __init__(self, layer: nn.Module, owner: QuantModule) -> None:
        self._owner = (owner,)
        QuantModule.__init__(self, layer, {}, owner.scheme, owner.float_dtype)
        self.register_parameter("bias", layer._parameters.get("bias"))
        self.out_features, self.in_features = self.codes_and_scale()[0].shape


class TiedQuantEmbedding(_Tied, QuantEmbedding):  # type: ignore[misc, override]
    """A QuantEmbedding whose table is another layer's."""

    def __init__(self, layer: nn.Module, owner: QuantModule) -> None:
        self._owner = (owner,)
        QuantEmbedding.__init__(self, layer, {}, owner.scheme, owner.float_dtype)
