"""Embeddings with int8 tables."""

from __future__ import annotations

import torch
from torch import nn

from octavo.modules import (
    QuantEmbedding,
)
from tests.modules.test_modules import quantized


def test_padding_idx_is_kept() -> None:
    int8, truth = quantized(nn.Embedding(11, 6, padding_idx=3))
    assert isinstance(int8, QuantEmbedding)
    assert int8.padding_idx == 3
    assert not int8(torch.tensor([3])).any()
    indices = torch.arange(11)
    assert torch.equal(int8(indices), truth(indices))
