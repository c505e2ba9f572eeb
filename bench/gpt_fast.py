"""gpt-fast's int8 layers by their formulas, as rivals: meant to be compiled, for Inductor fuses the widening.

WeightOnlyInt8Linear          F.linear(x, weight.to(x.dtype)) * scales                    (gpt-fast, quantize.py)
ConditionalFeedForwardInt8    the experts of each token gathered, then einsum, * scales   (mixtral-moe/quantize.py)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import ops

__all__ = ["Int8Experts", "Int8Linear", "use_gpt_fast"]


class Int8Linear(nn.Module):
    """weight: int8 [N, K]. scales: [N] of x's dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        codes, scale = ops.quantize_weight(layer.weight.detach())
        self.register_buffer("weight", codes)
        self.register_buffer("scales", scale.flatten().to(layer.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(dtype=x.dtype)) * self.scales


class Int8Experts(nn.Module):
    """A Mixtral block of transformers, T tokens of which each gathers the weights of its A experts.

    up: int8 [E, 2I, H], gate and up projection. down: int8 [E, H, I]. Their scales: [E, 2I], [E, H].
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            weight = layer.get_parameter(name).detach()
            codes, scale = zip(*(ops.quantize_weight(one) for one in weight), strict=True)
            self.register_buffer(name, torch.stack(codes))
            self.register_buffer(f"{name}_scales", torch.stack(scale).squeeze(-1).to(weight.dtype))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up = torch.einsum("ti,taoi->tao", x, self.gate_up_proj[index].to(x.dtype)) * self.gate_up_proj_scales[index]
        gate, up = up.chunk(2, -1)
        down = torch.einsum("tao,taio->tai", F.silu(gate) * up, self.down_proj[index].to(x.dtype))
        return (down * self.down_proj_scales[index] * weights.unsqueeze(-1).to(x.dtype)).sum(1)


def use_gpt_fast(model: nn.Module) -> None:
    """Put gpt-fast's layers in the place of the model's linear layers and Mixtral experts; routers stay float."""
    for name, module in list(model.named_modules()):
        router = name.endswith(".mlp.gate")
        kind = Int8Linear if type(module) is nn.Linear and not router else None
        kind = Int8Experts if type(module).__name__ == "MixtralExperts" else kind
        if kind is not None:
            model.set_submodule(name, kind(module))
