"""Linear layers that stay float, computed by a faster kernel for few rows on CPUs.

    y = x @ weight.T + bias      x [..., K], weight [N, K], bias [N]

When a model with int8 layers decodes, the layers that are still float take a large part of the time: above all the
output head, which has as many weights as several blocks. For one row of x in bf16 torch reads weights at a half to two
thirds of the memory bandwidth, for a few rows in fp16 and fp32 at a tenth to a half (docs/kernels.md). Where
`ops.float_linear` has a faster kernel, and no gradient is wanted, it is used; everywhere else `torch.nn.Linear`
computes as before.
"""

from __future__ import annotations

from torch import Tensor, nn

from octavo import ops
from octavo.stand_ins import FLOATS, share_contents

__all__ = ["FloatLinear", "float_linears"]


_LEAST = 2**18
"""Elements of a weight. For a smaller one, such as a router's, the call takes longer than the computation."""


class FloatLinear(nn.Linear):
    """`torch.nn.Linear` that uses a kernel of this package where that is faster. It holds the parameters and attributes
    of the layer that it replaces, and returns their dtype, from sums in fp32.

    replaces: name of the class that it stands for, in reports.
    """

    replaces = "Linear"

    @staticmethod
    def of(layer: nn.Linear) -> FloatLinear:
        """The stand-in for `layer`, which holds the same parameters and attributes, not copies of them."""
        new = FloatLinear.__new__(FloatLinear)
        nn.Module.__init__(new)
        share_contents(new, layer)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., K] float -> [..., N]."""
        y = ops.float_linear(input, self.weight, self.bias)
        return super().forward(input) if y is None else y


def float_linears(model: nn.Module) -> dict[str, FloatLinear]:
    """Stand-ins for the float linear layers of `model`: module name -> stand-in. `model` is not modified, and may be on
    `meta`.

    Only instances of `nn.Linear` itself are replaced, not of derived classes, and only large ones.
    """
    return {
        name: FloatLinear.of(module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and _is_plain(module)
    }


def _is_plain(layer: nn.Linear) -> bool:
    """Whether the layer holds a large float weight and a bias (or None), and nothing that they are computed from."""
    weight = layer._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.dtype in FLOATS
        and weight.numel() >= _LEAST
        and layer._parameters.keys() == {"weight", "bias"}
        and not layer._modules
        and not layer._buffers
    )
