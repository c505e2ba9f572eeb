"""Two small classifiers of handwritten digits, trained here in seconds: a convolutional network and a transformer.

    train, test = digits()                1797 images of 8 x 8 (scikit-learn's, from UCI): half to train, half held out
    model = trained(Convolutions, train)  seeded, plain Adam

Between them they hold what vision models are made of: full, depthwise and pointwise convolutions, batch norm, patches,
`nn.TransformerEncoder` with its packed attention weights, linear heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Convolutions", "Patches", "digits", "trained"]

Images = tuple[Tensor, Tensor]
"""Images fp32 [B, 1, 8, 8] in [0, 1] and their labels int64 [B]."""
Model = TypeVar("Model", bound=nn.Module)


class Convolutions(nn.Sequential):
    """Images [B, 1, 8, 8] to logits [B, 10]: a full convolution, then two depthwise-separable ones (MobileNet's)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            *_separable(32, 64),
            nn.MaxPool2d(2),
            *_separable(64, 128),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        )


def _separable(before: int, after: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class Patches(nn.Module):
    """Images [B, 1, 8, 8] to logits [B, 10]: 16 patches of 2 x 2 and a two-layer transformer over them (ViT's)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(x).mean(1))


def digits() -> tuple[Images, Images]:
    """The images to train on (898), and those held out (899). Raises: ImportError when scikit-learn is missing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    # Neighbours in the file are of one writer: halves that are cut, not drawn, share one writer at most.
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def trained(build: Callable[[], Model], images: Images, *, epochs: int = 30, shift: int = 0, seed: int = 0) -> Model:
    """A model that `build` makes, trained on `images` by Adam, in eval mode; the same weights for the same seed.

    shift: pixels that a batch is moved by at most, either way, drawn anew each time.
    """
    x, y = images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
        slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                down, right = torch.randint(-shift, shift + 1, (2,)).tolist()
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch].roll((down, right), (2, 3))), y[batch]).backward()
                optimizer.step()
            slower.step()
    return model.eval()
