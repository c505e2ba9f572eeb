"""Measure the error at a layer's output when its weight and input become int8, on inputs that calibration kept.

    error = mean over tokens of |y' - y|^2 / |y|^2      y = x W^T in float, y' with both quantized
    SQNR  = -10 log10(error), in dB

Every token counts the same, whatever its size. That matters where a few tokens are huge (in Llama-like models the
inputs of some `down_proj` are 1000 times the usual size at the first token). Under a static scale set by them the codes
of all other tokens are 0; but the sum of squared errors over all tokens hardly changes, because the huge ones dominate
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.ops import quantize_weight
from octavo.primitives import dequantize, quantize
from octavo.recipe import Scheme

__all__ = ["CATASTROPHE_DB", "OUTPUTS", "evenly", "output_error", "rounded_input"]

CATASTROPHE_DB = 22.0
"""A layer whose SQNR with static inputs is below this gets dynamic or float inputs. Measured on SmolLM2-135M after
smoothing: a tenth of the layers are below it, all of them down_proj, and they cause most of the loss."""

OUTPUTS = 1024
"""Errors are measured on at most so many output channels of a layer, evenly spaced."""


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
    """x fp32 [T, K], quantized under `scheme` and dequantized again: fp32 [T, K]. amax: 0-d, the clipping point of a
    static input."""
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
