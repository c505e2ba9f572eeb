"""The weight of an int8 layer as an object that torch's functions can multiply with.

    qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))      BEiT, EVA, Swin V2
    return F.conv2d(self.pad(x), self.weight, self.bias, self.stride)                           TensorFlow's padding
    F.multi_head_attention_forward(x, x, x, ..., q_proj_weight=self.q_proj.weight, ...)         WavLM, fairseq, ESM

It is for model code that passes a layer's weight to such a function instead of calling the layer. The object is not a
tensor, but torch calls the `__torch_function__` of any argument that has one. So these functions compute what the int8
layer would, with the bias and geometry that they are given. For all other uses it behaves like a tensor of the shape
and dtype of the float weight, without values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from octavo.modules.base import QuantModule
from octavo.stand_ins import same_code

__all__ = ["ATTENTION", "PRODUCTS", "Int8Weight", "shows_int8_weight"]

PRODUCTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("Linear", "Embedding"),
    F.conv1d: ("Conv1d",),
    F.conv2d: ("Conv2d",),
    F.conv3d: ("Conv3d",),
}
"""Functions of (input, weight, bias, geometry) -> the kinds of layers whose int8 weight they can be given."""

_attention: Any = F.multi_head_attention_forward
ATTENTION = same_code(_attention, {**_attention.__globals__, "has_torch_function": lambda _: False}, None)
"""torch's function without its check for `__torch_function__` at the beginning: the check happens at each product in
it."""

_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Int8Weight:
    """The `weight` of the int8 layer `layer`; it has the attributes of the tensor `shown`."""

    def __init__(self, layer: Any, shown: Tensor) -> None:
        self.layer = layer
        self.shown = shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shown, name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.multi_head_attention_forward:
            return ATTENTION(*args, **(kwargs or {}))
        given: dict[str, Any] = {**dict(zip(_PARAMETERS, args, strict=False)), **(kwargs or {})}
        weight = given.pop("weight", None)
        if function in PRODUCTS and isinstance(weight, cls):
            return weight.layer.product(**given)
        shown = [each.shown if isinstance(each, cls) else each for each in args]
        return function(*shown, **{key: v.shown if isinstance(v, cls) else v for key, v in (kwargs or {}).items()})


def shows_int8_weight(layer: nn.Module) -> bool:
    """Whether `layer` is an int8 layer whose `weight` is an `Int8Weight`."""
    return isinstance(layer, QuantModule) and isinstance(getattr(layer, "weight", None), Int8Weight)
