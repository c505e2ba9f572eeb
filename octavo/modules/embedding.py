"""Embeddings with an int8 table; a row is dequantized when it is looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.modules.base import Codes, QuantModule
from octavo.recipe import Scheme

__all__ = ["QuantEmbedding"]


class QuantEmbedding(QuantModule):
    """Lookup in an int8 table; only the rows looked up are dequantized.

    weight: int8 [V, H]. weight_scale: fp32 [V, 1].
    """

    op_names: tuple[str, ...] = ("w8a16_embedding",)
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        self.num_embeddings, self.embedding_dim = self.codes_and_scale()[0].shape
        self.padding_idx = layer.padding_idx
        self._follow_casts(self.codes_and_scale()[0].device)

    def forward(self, input: Tensor) -> Tensor:
        """[...] int -> [..., H] of the dtype that the model was cast to."""
        return ops.w8a16_embedding(input, *self.codes_and_scale(), self._float.dtype)

    def product(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., H] float -> [..., V] of the same dtype: the logits of a head that is written as
        `F.linear(input, embedding.weight)`."""
        return ops.w8a16_linear(input, *self.codes_and_scale(), bias)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"
