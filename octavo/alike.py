"""Recognize layers that compute what a plain torch layer does, whatever their class is called: another layer of the
class is made with a few random weights, and has to return the same bits as the plain layer.

    class Linear(nn.Module):                                    torch_geometric's, DeepSeek's, Gemma's
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

does not derive from a layer of torch, and is a linear layer (`is_linear`). For classes that do derive from the layer
whose forward they write out, see `model_code/written_out.py`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.stand_ins import FLOATS, attributes, is_plain_value, random, same_bits

__all__ = ["MADE_AND_DESCRIBED", "Held", "computes_the_same", "held_by", "holding", "is_linear"]

Held = tuple[tuple[str, Any], ...]
"""(name, value) of the attributes of a layer, with lists as tuples, so that it is hashable."""

MADE_AND_DESCRIBED = {
    "forward", "_conv_forward", "extra_repr", "reset_parameters", "__init__", "__repr__", "__module__", "__qualname__",
    "__doc__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__annotate__", "__constants__",
    "__static_attributes__", "__firstlineno__",
}  # fmt: skip
"""Members that a class may define without changing what its layers compute: the forward that is compared, how a layer
is made and described, and what Python itself adds."""

_MADE_OR_KEPT = re.compile(r"^_*(init|reset)|^_(save_to|load_from)_state_dict$")
"""Further such members for classes that derive from no torch layer: initialization (maybe lazy), and state dicts."""


def held_by(layer: nn.Module) -> Held | None:
    """The attributes of `layer`; None if it holds children, buffers or attributes that are not plain values."""
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes(layer).items()}
    if layer._modules or layer._buffers or not all(map(is_plain_value, held.values())):
        return None
    return tuple(held.items())


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer`, whose class derives from no layer of torch, computes what `nn.Linear` does with its weight [N,
    K] and bias, and does nothing else. It may be on `meta`."""
    if isinstance(layer, torch.jit.ScriptModule):
        return False
    cls: Any = type(layer)
    weight = layer._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.dim() == 2
        and layer._parameters.keys() <= {"weight", "bias"}
        and (held := held_by(layer)) is not None
        and _only_runs_forward(cls)
        and computes_the_same(cls, nn.Linear, held, (), layer._parameters.get("bias") is not None)
    )


@functools.cache
def _only_runs_forward(cls: Any) -> bool:
    """Whether a class and its bases define nothing but a forward, and how a layer is made, described and stored."""
    own = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    members = [(name, member) for base in own for name, member in vars(base).items()]
    return not any(base.__module__.startswith("torch.") for base in own) and all(
        name in MADE_AND_DESCRIBED or _MADE_OR_KEPT.search(name) or is_plain_value(member) for name, member in members
    )


@functools.cache
def computes_the_same(cls: Any, base: Any, held: Held, kernel: tuple[int, ...], has_bias: bool) -> bool:
    """Whether a layer of class `cls` with the attributes `held` returns the same bits, and has the same state dict, as
    a layer of class `base`: a linear layer, convolution or embedding. kernel: the kernel size of a convolution."""
    try:
        with torch.no_grad():
            return all(
                _does_with(holding(cls, held, params), holding(base, held, params), x)
                for x, params in _samples(base, dict(held), kernel, has_bias)
            )
    except Exception:  # whatever it wants, it is not what a plain layer is given
        return False


def holding(cls: Any, held: Held, params: Mapping[str, Tensor | None]) -> nn.Module:
    """A layer of class `cls` with these attributes and parameters, made without its constructor."""
    layer: nn.Module = cls.__new__(cls)
    nn.Module.__init__(layer)
    vars(layer).update(held)
    for name, values in params.items():
        layer.register_parameter(name, None if values is None else nn.Parameter(values, requires_grad=False))
    return layer


def _samples(
    base: Any, held: dict[str, Any], kernel: tuple[int, ...], has_bias: bool
) -> Iterator[tuple[Tensor, dict[str, Tensor | None]]]:
    """Small inputs x, each with a weight and a bias, in all combinations of x's dtype with the weight's. (Where they
    differ only some classes take x.)"""
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
        yield from ((x, {"weight": weight.to(dtype), "bias": bias}) for x in inputs)


def _does_with(layer: nn.Module, plain: nn.Module, x: Tensor) -> bool:
    """Whether `layer` returns for x what `plain` does, in train and eval mode, and changes nothing. Where x has another
    dtype than the weight, which `plain` refuses, `layer` has to refuse too or return x's dtype, as an int8 layer
    does."""
    weight = layer.get_parameter("weight")
    if not _same_state(layer.state_dict(), plain.state_dict()):
        return False
    for mode in (False, True):
        given, before = x.clone(), dict(vars(layer.train(mode)))
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        try:
            y = layer.forward(given)
        except RuntimeError:
            if x.is_floating_point() and x.dtype != weight.dtype:
                continue
            raise
        if not torch.equal(given, x) or vars(layer) != before or not _same_state(layer.state_dict(), state):
            return False
        if x.is_floating_point() and x.dtype != weight.dtype:
            if not (isinstance(y, Tensor) and y.dtype == x.dtype):
                return False
        elif not same_bits(plain.train(mode).forward(x), y):
            return False
    return True


def _same_state(state: Mapping[str, Any], plain: Mapping[str, Tensor]) -> bool:
    return state.keys() == plain.keys() and all(same_bits(tensor, state[name]) for name, tensor in plain.items())
