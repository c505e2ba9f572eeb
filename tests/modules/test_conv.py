"""Convolutions with int8 weights: padding of every kind, sizes, and input without a batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from octavo.errors import QuantizeError
from tests.modules.test_modules import made, quantized


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding(mode: str, padding: int | str, dims: int) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    for kernel in (3, 4):  # "same" pads an even kernel more on one side
        layer = conv(2, 3, kernel, padding=padding, padding_mode=mode, dilation=1 if mode != "zeros" else 2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*even kernel lengths.*")
            int8, truth = quantized(layer)
            x = torch.randn(2, 2, *[9] * dims)
            torch.testing.assert_close(int8(x), truth(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(int8(x[1]), truth(x)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "conv transpose 1d", "conv transpose 2d"])
def test_one_image_without_a_batch(kind: str) -> None:
    int8, truth, x = made(kind)
    torch.testing.assert_close(int8(x[0]), truth(x[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv transpose 1d", "conv transpose 2d"])
def test_no_images(kind: str) -> None:
    int8, truth, x = made(kind)
    assert int8(x[:0]).shape == truth(x[:0]).shape


@pytest.mark.parametrize("output_size", [(10, 9), (11, 10), (2, 6, 10, 10), None])
def test_output_size_of_a_transposed_convolution(output_size: tuple[int, ...] | None) -> None:
    int8, truth = quantized(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1))
    x = torch.randn(2, 4, 5, 5)
    if output_size == (10, 9):
        size = list(output_size)
        torch.testing.assert_close(int8(x, output_size=size), truth(x, output_size=size), rtol=1e-5, atol=1e-5)
    elif output_size == (11, 10):
        for layer in (int8, truth):
            with pytest.raises(ValueError, match="requested an output size"):
                layer(x, output_size=list(output_size))
    else:
        size = None if output_size is None else list(output_size)
        torch.testing.assert_close(int8(x, output_size=size), truth(x, output_size=size), rtol=1e-5, atol=1e-5)


def test_a_wrong_image_is_refused() -> None:
    int8, _, _ = made("conv2d")
    with pytest.raises(QuantizeError, match=r"input: shape is \[1, 3, 7, 7\], expected \[B, 4, \*D\] or \[4, \*D\]"):
        int8(torch.randn(1, 3, 7, 7))
    with pytest.raises(QuantizeError, match="with 2 dimensions in D"):
        int8(torch.randn(4, 7))
