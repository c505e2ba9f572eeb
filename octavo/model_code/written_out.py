"""Classes whose forward writes out what the layer that they derive from does anyway.

    class Linear(nn.Linear):                                    Whisper's and timm's
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

It reads the weight, and an int8 layer has none; but what it does with it, an int8 layer does by itself, for which the
layer is a plain one. Whether it is one is asked of the layer itself, whatever its class is called: its forward is run
with a few random weights, and has to give the bits that the forward of the float class gives.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from octavo.stand_ins import FLOATS, attributes, is_plain_value, random, same_bits

__all__ = ["is_written_out"]


def is_written_out(layer: nn.Module, base: Any) -> bool:
    """Whether `layer`, of a class that derives from `base`, has nothing of its own but a forward, which computes what
    that of `base` does. It may be on `meta`."""
    cls: Any = type(layer)
    own: Any = cls.__mro__[: cls.__mro__.index(base)]
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes(layer).items()}
    weight = layer._parameters.get("weight")
    if (
        not issubclass(base, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding))
        or not any({"forward", "_conv_forward"} & vars(cls).keys() for cls in own)
        or any(vars(cls).keys() - _MAY_HAVE for cls in own)
        or weight is None
        or not layer._parameters.keys() <= {"weight", "bias"}
        or not all(map(is_plain_value, held.values()))
        or layer._modules
        or layer._buffers
    ):
        return False
    has_bias = layer._parameters.get("bias") is not None
    kernel = tuple(weight.shape[2:])
    return _gives_the_same(cls, base, tuple(held.items()), kernel, has_bias)


_MAY_HAVE = {
    "forward", "_conv_forward", "extra_repr", "reset_parameters", "__init__", "__repr__", "__module__", "__qualname__",
    "__doc__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__annotate__", "__constants__",
    "__static_attributes__", "__firstlineno__",
}  # fmt: skip
"""What a class may say without doing something else: how it is made and described, and what Python notes of it."""


@functools.cache
def _gives_the_same(
    cls: Any, base: Any, held: tuple[tuple[str, Any], ...], kernel: tuple[int, ...], has_bias: bool
) -> bool:
    try:
        with torch.no_grad():
            return all(
                _does_with(_holding(cls, held, weight, bias), _holding(base, held, weight, bias), x)
                for x, weight, bias in _samples(base, dict(held), kernel, has_bias)
            )
    except Exception:  # whatever it wants, it is not what a plain layer is given
        return False


def _holding(cls: Any, held: tuple[tuple[str, Any], ...], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the class `cls` that holds these."""
    layer: nn.Module = cls.__new__(cls)
    nn.Module.__init__(layer)
    vars(layer).update(held)
    for name, values in (("weight", weight), ("bias", bias)):
        layer.register_parameter(name, None if values is None else nn.Parameter(values, requires_grad=False))
    return layer


def _samples(
    base: Any, held: dict[str, Any], kernel: tuple[int, ...], has_bias: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Inputs x, weights and biases, of few channels. Where x is of another dtype than the weight only some classes take
    it."""
    generator = torch.Generator("cpu").manual_seed(0)
    for x_dtype, dtype in itertools.product(FLOATS, repeat=2):
        if issubclass(base, nn.Embedding):
            weight = random(max(7, (held["padding_idx"] or 0) + 1), 5, generator=generator)
            ids = torch.arange(60, device="cpu").view(2, 30) % 7
            inputs = [ids, ids[:, :3]] if x_dtype == dtype else []
        elif issubclass(base, nn.Linear):
            weight = random(4, 5, generator=generator)
            inputs = [random(*shape, 5, generator=generator).to(x_dtype) for shape in ((), (30,), (2, 3), (2, 2, 3))]
        else:
            groups = held["groups"]
            weight = random(2 * groups, 2, *kernel, generator=generator)
            sizes = [step * (k - 1) + 3 for step, k in zip(held["dilation"], kernel, strict=True)]
            inputs = [random(2, 2 * groups, *sizes, generator=generator).to(x_dtype)]
        bias = random(len(weight), generator=generator).to(dtype) if has_bias else None
        yield from ((x, weight.to(dtype), bias) for x in inputs)


def _does_with(layer: nn.Module, plain: nn.Module, x: Tensor) -> bool:
    """Whether `layer` makes of x what `plain` does, in both modes; where the dtypes are such that this takes no x, a
    result of x's dtype, as an int8 layer does."""
    weight = layer.get_parameter("weight")
    for mode in (False, True):
        given, before = x.clone(), dict(vars(layer.train(mode)))
        try:
            y = layer.forward(given)
        except RuntimeError:
            if x.is_floating_point() and x.dtype != weight.dtype:
                continue
            raise
        if not torch.equal(given, x) or vars(layer) != before:
            return False
        if x.is_floating_point() and x.dtype != weight.dtype:
            if not (isinstance(y, Tensor) and y.dtype == x.dtype):
                return False
        elif not same_bits(plain.train(mode).forward(x), y):
            return False
    return True
