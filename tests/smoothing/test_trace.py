"""A trace holds every product with a weight, and what the model returned, of as much of a batch as is needed."""

from __future__ import annotations

import torch

from octavo.smoothing.trace import Product, short, traced
from tests.smoothing.test_pairs import Net, X


def test_a_long_batch_is_cut() -> None:
    tokens = torch.zeros(5, 400, dtype=torch.int64)
    assert short(tokens).shape == (2, 128)
    assert short({"input_ids": tokens, "attention_mask": tokens + 1})["attention_mask"].shape == (2, 128)
    assert short({"input_ids": tokens, "attention_mask": tokens})["input_ids"].shape == (2, 400)
    places = torch.arange(400).expand(5, 400)
    lengths = torch.tensor([[300], [50], [9], [9], [9]])
    for mask, first in ((places < lengths, 0), (places >= 400 - lengths, 400 - 128)):
        cut = short({"input_ids": places, "attention_mask": mask.long()})
        assert cut["input_ids"].tolist() == [list(range(first, first + 128))] * 2
        assert cut["attention_mask"].sum(1).tolist() == [128, 50]
    images, lengths = torch.zeros(6, 3, 8, 8), torch.ones(6)
    assert short(images).shape == (4, 3, 8, 8)
    cut, (more,), flag = short((images, [lengths], True))
    assert (cut.shape, more.shape, flag) == ((4, 3, 8, 8), (4,), True)
    assert short({"pixel_values": images, "size": 8})["pixel_values"].shape == (4, 3, 8, 8)
    # No batch, or one whose items cannot be told.
    rows, nothing = torch.zeros(9, 4), torch.tensor(0.0)
    for whole in (X, images[0], rows, (images, rows), (images, nothing), {"input_ids": tokens, "images": images}, ()):
        assert short(whole) is whole


def test_products_are_what_weights_were_multiplied_by() -> None:
    model = Net()
    found, (result,) = traced(model, X)
    assert [product.sink.param for product in found] == ["a.weight", "b.weight", "head.weight"]
    assert isinstance(found[0], Product)
    torch.testing.assert_close(found[0].x.view_as(X), model.norm(X))
    torch.testing.assert_close(result, model(X))
