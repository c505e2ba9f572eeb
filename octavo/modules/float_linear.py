"""Linear layers that stay float, which read their weights at the speed of memory where torch does not.

    y = x @ weight.T + bias      x [..., K], weight [N, K], bias [N]

A token of a model whose layers are int8 waits for what is still float: for the output head above all, which is as many
weights as several of its blocks. On CPUs torch reads them at a half to two thirds of memory's speed in bf16 for a row
of x, in fp16 and fp32 at a tenth to a half for a few (docs/kernels.md). Where this package has a kernel that is
faster and nobody wants a gradient (`ops.float_linear`), that does it; elsewhere `torch.nn.Linear` does, as before.
"""

from __future__ import annotations

from torch import Tensor, nn

from octavo import ops
from octavo.stand_ins import FLOATS, share_contents

__all__ = ["FloatLinear", "float_linears"]


_LEAST = 2**18
"""Weights of a layer: with fewer, a router's, calling any kernel is what takes time."""


class FloatLinear(nn.Linear):
    """`torch.nn.Linear` that multiplies by a kernel of this package where that is faster. It has the other layer's
    parameters and attributes, and computes in their dtype, from sums in fp32.

    replaces: the class that it stands for.
    """

    replaces = "Linear"

    @staticmethod
    def of(layer: nn.Linear) -> FloatLinear:
        """The stand-in for `layer`. It holds what `layer` holds, and is no copy."""
        new = FloatLinear.__new__(FloatLinear)
        nn.Module.__init__(new)
        share_contents(new, layer)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., K] float -> [..., N]."""
        y = ops.float_linear(input, self.weight, self.bias)
        return super().forward(input) if y is None else y


def float_linears(model: nn.Module) -> dict[str, FloatLinear]:
    """What can stand for float linear layers of `model`, which is not modified and may be on `meta`: module name ->
    stand-in. Each is an `nn.Linear` itself, not of a class that derives from it, with the `forward` of that, and large
    enough that time goes into its weights."""
    return {
        name: FloatLinear.of(module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and _is_plain(module)
    }


def _is_plain(layer: nn.Linear) -> bool:
    """Whether the layer holds a float weight and a bias of its own, and nothing that they are computed of."""
    weight = layer._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.dtype in FLOATS
        and weight.numel() >= _LEAST
        and layer._parameters.keys() == {"weight", "bias"}
        and not layer._modules
        and not layer._buffers
    )
