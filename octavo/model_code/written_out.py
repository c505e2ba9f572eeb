"""Classes whose forward only writes out what the torch layer that they derive from does anyway.

    class Linear(nn.Linear):                                    Whisper's and timm's
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

This forward reads the weight, which an int8 layer does not have. But an int8 layer does the same by itself, so the
layer can be treated as a plain one. Such classes are recognized by what they compute: with a few random weights the
forward has to return the same bits as that of the torch class (`octavo/alike.py`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from octavo.alike import MADE_AND_DESCRIBED, computes_the_same, held_by
from octavo.computed_weights import computes_in_forward

__all__ = ["is_written_out"]


def is_written_out(layer: nn.Module, base: Any) -> bool:
    """Whether the class of `layer` adds nothing to `base` but a forward that computes what that of `base` does, maybe
    with a computed weight (`octavo/computed_weights.py`). `layer` may be on `meta`."""
    cls: Any = type(layer)
    if not issubclass(cls, base):
        return True  # `kind_of` has recognized it by what it computes
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
