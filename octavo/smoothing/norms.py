"""Normalization layers, whatever their class: which modules are one, and whether they scale by w or by 1 + w.

y = x / rms(x) * weight             Llama, Qwen, ...; a LayerNorm subtracts the mean first and adds a bias
y = x / rms(x) * (1 + weight)       Gemma, whose weights are stored around zero
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["is_norm", "scales_by_one_plus"]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization over the last dimension, of whatever class: it is called a norm, and holds
    nothing but vectors."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    return (
        "norm" in type(module).__name__.lower()
        and not any(True for _ in module.children())
        and all(p.dim() == 1 for p in module.parameters())
        and not isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    )


def scales_by_one_plus(norm: nn.Module, weight: nn.Parameter) -> bool:
    """Whether the norm's output for a weight of zeros is not zero (its bias aside)."""
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype).unsqueeze(0)
    bias = norm._parameters.get("bias")
    before = weight.data
    try:
        with torch.no_grad():
            weight.data = torch.zeros_like(before)
            y = norm.forward(x)  # its hooks are for who runs the model
    except Exception:  # it wants more than x, whatever its way to say so: the proof is the judge then
        return False
    finally:
        weight.data = before
    return bool((y - bias if bias is not None else y).any())
