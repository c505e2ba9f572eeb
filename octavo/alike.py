"""What a layer computes is asked of the layer, whatever its class is called: another of the class is given a few random
weights, and has to return the bits that a plain layer returns.

    class Linear(nn.Module):                                    torch_geometric's, DeepSeek's, Gemma's
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

derives from no layer of torch's, and is a linear layer (`is_linear`). Classes that derive from the layer which they
write out are for `model_code/written_out.py`.
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
"""The attributes of a layer, lists as tuples."""

MADE_AND_DESCRIBED = {
    "forward", "_conv_forward", "extra_repr", "reset_parameters", "__init__", "__repr__", "__module__", "__qualname__",
    "__doc__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__annotate__", "__constants__",
    "__static_attributes__", "__firstlineno__",
}  # fmt: skip
"""What a class may say besides its forward without doing something else: how it is made and described, and what Python
notes of it."""

_MADE_OR_KEPT = re.compile(r"^_*(init|reset)|^_(save_to|load_from)_state_dict$")
"""The same of a class that derives from no layer, and does by itself what else one would: it may wait for its shape."""


def held_by(layer: nn.Module) -> Held | None:
    """What `layer` holds besides parameters; None if that is more than numbers, strings and the like."""
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes(layer).items()}
    if layer._modules or layer._buffers or not all(map(is_plain_value, held.values())):
        return None
    return tuple(held.items())


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer`, of a class that derives from no layer of torch's, computes what `nn.Linear` does with its weight
    [N, K] and bias, and does nothing else. It may be on `meta`."""
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
    """Whether nothing of a class, or of those that it derives from, is more than a forward, and how it is made and
    kept."""
    own = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    members = [(name, member) for base in own for name, member in vars(base).items()]
    return not any(base.__module__.startswith("torch.") for base in own) and all(
        name in MADE_AND_DESCRIBED or _MADE_OR_KEPT.search(name) or is_plain_value(member) for name, member in members
    )


@functools.cache
def computes_the_same(cls: Any, base: Any, held: Held, kernel: tuple[int, ...], has_bias: bool) -> bool:
    """Whether the forward of a layer of class `cls`, which holds `held`, gives the bits that that of `base`, a linear
    layer, a convolution or an embedding, does; and has its state."""
    try:
        with torch.no_grad():
            return all(
                _does_with(holding(cls, held, params), holding(base, held, params), x)
                for x, params in _samples(base, dict(held), kernel, has_bias)
            )
    except Exception:  # whatever it wants, it is not what a plain layer is given
        return False


def holding(cls: Any, held: Held, params: Mapping[str, Tensor | None]) -> nn.Module:
    """A layer of the class `cls` that holds these."""
    layer: nn.Module = cls.__new__(cls)
    nn.Module.__init__(layer)
    vars(layer).update(held)
    for name, values in params.items():
        layer.register_parameter(name, None if values is None else nn.Parameter(values, requires_grad=False))
    return layer


def _samples(
    base: Any, held: dict[str, Any], kernel: tuple[int, ...], has_bias: bool
) -> Iterator[tuple[Tensor, dict[str, Tensor | None]]]:
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
        yield from ((x, {"weight": weight.to(dtype), "bias": bias}) for x in inputs)


def _does_with(layer: nn.Module, plain: nn.Module, x: Tensor) -> bool:
    """Whether `layer` makes of x what `plain` does, in both modes; where the dtypes are such that this takes no x, a
    result of x's dtype, as an int8 layer does."""
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
