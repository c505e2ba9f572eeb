"""Classes whose forward writes out what the layer that they derive from does anyway.

    class Linear(nn.Linear):                                    Whisper's and timm's
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

It reads the weight, and an int8 layer has none; but what it does with it, an int8 layer does by itself, for which the
layer is a plain one. Whether it is one is asked of the layer itself, whatever its class is called: its forward is run
with a few random weights, and has to give the bits that the forward of the float class gives (`octavo/alike.py`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from octavo.alike import MADE_AND_DESCRIBED, computes_the_same, held_by
from octavo.computed_weights import computes_in_forward

__all__ = ["is_written_out"]


def is_written_out(layer: nn.Module, base: Any) -> bool:
    """Whether `layer`, of a class that derives from `base`, has nothing of its own but a forward, which computes what
    that of `base` does, with the weight or with what it computes of it (`octavo/computed_weights.py`). It may be on
    `meta`."""
    cls: Any = type(layer)
    if not issubclass(cls, base):
        return True  # what it computes is all that `kind_of` knows it by
    if computes_in_forward(layer):
        return True
    own: Any = cls.__mro__[: cls.__mro__.index(base)]
    weight = layer._parameters.get("weight")
    if (
        not issubclass(base, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding))
        or not any({"forward", "_conv_forward"} & vars(cls).keys() for cls in own)
        or any(vars(cls).keys() - MADE_AND_DESCRIBED for cls in own)
        or weight is None
        or not layer._parameters.keys() <= {"weight", "bias"}
        or (held := held_by(layer)) is None
    ):
        return False
    has_bias = layer._parameters.get("bias") is not None
    return computes_the_same(cls, base, held, tuple(weight.shape[2:]), has_bias)
