"""How much a layer's output suffers when its weight and input become int8, measured on inputs that calibration kept.

    error = mean over tokens of |y' - y|^2 / |y|^2      y = x W^T in float, y' with both quantized
    SQNR  = -10 log10(error), in dB

Every token counts alike, whatever its size. That matters where a few tokens are huge (in Llama-like models the inputs
of some `down_proj` are 1000 times the usual at the first token): they fix a static scale, under which the codes of all
other tokens are 0, while the sum of squared errors over all tokens hardly moves, for they are most of the signal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.ops import quantize_weight
from octavo.primitives import dequantize, quantize
from octavo.recipe import Scheme

__all__ = ["CATASTROPHE_DB", "OUTPUTS", "evenly", "output_error", "rounded_input"]

CATASTROPHE_DB = 22.0
"""Layers that static inputs leave with less SQNR than this get other inputs. Measured on SmolLM2-135M after smoothing:
a tenth of the layers are below it, every one a down_proj, and they make most of the loss."""

OUTPUTS = 1024
"""Errors are measured on so many of a layer's output channels, evenly spaced."""


def evenly(weight: Tensor, outputs: int = OUTPUTS) -> Tensor:
    """At most `outputs` rows of a weight [N, K], evenly spaced, in fp32."""
    return weight[:: -(-len(weight) // outputs)].float()


def output_error(weight: Tensor, y: Tensor, x_rounded: Tensor, scheme: Scheme) -> float:
    """The error at the head of this file.

    weight: fp32 [N, K]. y: fp32 [T, N], the float output. x_rounded: fp32 [T, K], the input as its codes stand for it.
    A token whose output is 0 does not count.
    """
    codes, scale = quantize_weight(weight, scheme.weight.granularity)  # no int8 inputs meet weights in groups
    difference = torch.addmm(y, x_rounded, dequantize(codes, scale).T, beta=-1)
    signal = y.square().sum(-1)
    counts = signal > 0
    ratio = difference.square().sum(-1)[counts] / signal[counts]
    return ratio.mean().item() if len(ratio) else 0.0


def rounded_input(x: Tensor, scheme: Scheme, amax: Tensor) -> Tensor:
    """x as its codes under `scheme` stand for it: fp32 [T, K]. amax: the largest magnitude of a static input, 0-d."""
    if scheme.input is None:
        return x
    if not scheme.input.dynamic:
        largest = amax.reshape(1)
    elif scheme.input.granularity == "per_token":
        largest = x.abs().amax(-1, keepdim=True)
    else:
        largest = x.abs().amax().reshape(1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return dequantize(quantize(x, scale), scale)
