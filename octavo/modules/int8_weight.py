"""The weight of an int8 layer, for code outside of the layer that multiplies with it.

    qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))      BEiT, EVA, Swin V2
    return F.conv2d(self.pad(x), self.weight, self.bias, self.stride)                           TensorFlow's padding
    F.multi_head_attention_forward(x, x, x, ..., q_proj_weight=self.q_proj.weight, ...)         WavLM, fairseq, ESM

It is no tensor: torch asks whatever it is handed for a `__torch_function__`, and so these functions compute what the
int8 layer would, with the bias, and the geometry, that they are given. To anything else it is what the float weight
looks like from outside: a tensor of its shape and dtype, without values.
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
"""Functions of an input, a weight, a bias and a geometry -> the kinds of layers whose int8 weights they take."""

_attention: Any = F.multi_head_attention_forward
ATTENTION = same_code(_attention, {**_attention.__globals__, "has_torch_function": lambda _: False}, None)
"""Torch's function as it is, but that it does not ask what it is handed before it multiplies."""

_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Int8Weight:
    """The `weight` of an int8 layer, that looks like the tensor `shown`."""

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
    """Whether it is an int8 layer whose `weight` is an `Int8Weight`."""
    return isinstance(layer, QuantModule) and isinstance(getattr(layer, "weight", None), Int8Weight)
