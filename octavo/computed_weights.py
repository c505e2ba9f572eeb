"""Convolutions that compute their weight from other parameters each time they run. It changes in training only.

    weight_norm             g * v / |v|                     torch's parametrization, or its older version, a hook
    standardization         g * (v - mean) / std            per output channel: BiT, NFNets

When such a layer becomes int8, the computed weight is quantized; the parameters that it is computed from are no longer
needed, in memory or on disk. weight_norm (fairseq, HiFi-GAN, DAC, EnCodec) is recognized by torch's names for it. A
class that computes its weight in its forward is recognized by what it does: run with random parameters on a few inputs,
it has to call one convolution, with the same weight for all inputs, and to return what that returns.

    x ------------------> [pad] --> conv(x, w, bias, stride, padding, dilation, groups) --> y
    v, g --> compute --> w

It may pad x itself as TensorFlow's "same" does at any stride (NFNets), see `same_upper`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from octavo.alike import MADE_AND_DESCRIBED, Held, held_by, holding
from octavo.stand_ins import random, same_bits

__all__ = [
    "ComputedWeight", "computed_weight", "computes_in_forward", "merge_older_weight_norm", "pads_same_upper",
    "parts_of", "same_upper", "weight_of",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ComputedWeight:
    """How a weight is computed. parts: names of the layer's parameters that it depends on. compute: these by name ->
    the weight."""

    parts: tuple[str, ...]
    compute: Callable[[Mapping[str, Tensor]], Tensor]


def computed_weight(layer: nn.Module) -> ComputedWeight | None:
    """How the weight of `layer` is computed; None if it is a parameter, or if more than the weight is computed. `layer`
    may be on `meta`."""
    return _weight_norm_of(layer) or _of_forward(layer)


def parts_of(layer: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that the weight of `layer` is computed from; () if it is not computed."""
    computed = computed_weight(layer)
    return computed.parts if computed else ()


def weight_of(layer: nn.Module, param: str) -> Tensor:
    """The parameter `param` of a layer, or the weight that the layer computes in its place."""
    computed = _of_forward(layer) if param == "weight" else None  # under weight_norm it is an attribute
    if computed is None:
        weight: Tensor = attrgetter(param)(layer)  # of experts a child may hold it
        return weight.detach()
    return computed.compute({part: layer.get_parameter(part).detach() for part in computed.parts})


# -- weight_norm -----------------------------------------------------------------------------------------------------


def _weight_norm_of(layer: nn.Module) -> ComputedWeight | None:
    if parametrize.is_parametrized(layer):
        made: nn.ModuleDict = layer.parametrizations  # type: ignore[assignment]
        steps = [step for each in made.values() for step in each]  # type: ignore[attr-defined]
        if list(made) != ["weight"] or [type(step) for step in steps] != [parametrizations._WeightNorm]:
            return None
        return _normed("parametrizations.weight.original0", "parametrizations.weight.original1", steps[0].dim)
    hooks = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    if [hook.name for hook in hooks] != ["weight"] or not {"weight_g", "weight_v"} <= layer._parameters.keys():
        return None
    return _normed("weight_g", "weight_v", hooks[0].dim)


def _normed(norm: str, direction: str, dim: int) -> ComputedWeight:
    return ComputedWeight((norm, direction), lambda parts: torch._weight_norm(parts[direction], parts[norm], dim))


def merge_older_weight_norm(layer: nn.Module) -> None:
    """Turn a weight computed by the older weight_norm into a parameter: as an attribute it is that of the last run."""
    if not parametrize.is_parametrized(layer) and _weight_norm_of(layer):
        remove_weight_norm(layer)


# -- computed in the forward of a class ------------------------------------------------------------------------------

_Padding = Literal["its own", "same_upper"]


def computes_in_forward(layer: nn.Module) -> bool:
    """Whether the forward of `layer` computes its weight, and otherwise does what a plain convolution does, except for
    padding."""
    return _of_forward(layer) is not None


def pads_same_upper(layer: nn.Module) -> bool:
    """Whether the forward of `layer` computes its weight, and pads x by `same_upper`."""
    return _seen_of(layer) == "same_upper"


def same_upper(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The padding of x [B, C, *sizes] in TensorFlow's "same" (ONNX: SAME_UPPER), in the form that F.pad takes.

    There are ceil(size / stride) outputs per dimension; an odd amount of padding has its extra element at the end.
    """
    padding: list[int] = []
    for size, k, step, apart in zip(sizes, kernel, stride, dilation, strict=True):
        total = max((-(-size // step) - 1) * step + apart * (k - 1) + 1 - size, 0)
        padding = [total // 2, total - total // 2, *padding]  # the last dimension comes first
    return padding


_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """The arguments of a call of a convolution, and its result y."""

    y: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


class _Watch(TorchFunctionMode):
    """While open, convolutions record their arguments and return an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Convolution] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        given = {"x" if key == "input" else key: value for key, value in (kwargs or {}).items()}
        self.seen.append(_Convolution(torch.empty(0), *args, **given))
        return self.seen[-1].y


def _of_forward(layer: nn.Module) -> ComputedWeight | None:
    if _seen_of(layer) is None:
        return None
    parts = tuple(name for name in layer._parameters if name != "bias")
    held = held_by(layer)
    assert held is not None
    return ComputedWeight(parts, functools.partial(_compute, type(layer), held, layer._parameters["bias"] is not None))


@torch.no_grad()
def _compute(cls: Any, held: Held, has_bias: bool, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that a layer of class `cls` with the parameters `parts` passes to its convolution."""
    weight = parts["weight"]
    bias = weight.new_zeros(len(weight)) if has_bias else None
    with _Watch() as watch:
        holding(cls, held, {**parts, "bias": bias}).forward(_smallest(weight, dict(held)))
    return watch.seen[0].weight


def _smallest(weight: Tensor, held: Mapping[str, Any]) -> Tensor:
    sizes = [apart * (k - 1) + 1 for apart, k in zip(held["dilation"], weight.shape[2:], strict=True)]
    return weight.new_zeros(1, held["in_channels"], *sizes)


def _seen_of(layer: nn.Module) -> _Padding | None:
    """How a layer that computes its weight in its forward pads x; None if it is not such a layer."""
    cls: Any = type(layer)
    base: Any = next((base for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, base)), None)
    own = cls.__mro__[: cls.__mro__.index(base)] if base else ()
    weight = layer._parameters.get("weight")
    if (
        not any("forward" in vars(each) for each in own)
        or any(vars(each).keys() - MADE_AND_DESCRIBED for each in own)
        or weight is None
        or "bias" not in layer._parameters
        or any(parameter is None for name, parameter in layer._parameters.items() if name != "bias")
        or (held := held_by(layer)) is None
    ):
        return None
    shapes = tuple((name, None if each is None else tuple(each.shape)) for name, each in layer._parameters.items())
    return _padding_of(cls, held, shapes)


@functools.cache
def _padding_of(cls: Any, held: Held, shapes: tuple[tuple[str, tuple[int, ...] | None], ...]) -> _Padding | None:
    """The same for a layer of class `cls` with the attributes `held` and random parameters of these shapes."""
    settings = dict(held)
    if not all(isinstance(settings.get(name), tuple) for name in ("kernel_size", "stride", "dilation")):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    params = {name: None if shape is None else random(*shape, generator=generator) for name, shape in shapes}
    layer, weight = holding(cls, held, params), params["weight"]
    assert weight is not None
    first: Tensor | None = None
    paddings: set[str] = set()
    for x in _inputs(weight, settings, generator):
        for mode in (False, True) if first is None else (False,):
            seen = _runs(layer.train(mode), x)
            if seen is None or (padding := _pads(x, seen, settings)) is None:
                return None
            if first is not None and not same_bits(first, seen.weight):
                return None
            first = seen.weight
            paddings.add(padding)
    if not _keeps_dtype(cls, held, params):
        return None
    if first is None or same_bits(first, weight) or first.shape != weight.shape:
        return None
    if paddings <= {"its own", "none"}:
        return "its own"
    return "same_upper" if paddings <= {"same_upper", "none"} else None


def _keeps_dtype(cls: Any, held: Held, params: Mapping[str, Tensor | None]) -> bool:
    """Whether a layer with bf16 parameters convolves a bf16 x with a bf16 weight, as an int8 layer would."""
    narrow = {name: None if each is None else each.bfloat16() for name, each in params.items()}
    weight = narrow["weight"]
    assert weight is not None
    seen = _runs(holding(cls, held, narrow), _smallest(weight, dict(held)))
    return seen is not None and seen.x.dtype == seen.weight.dtype == torch.bfloat16


def _inputs(weight: Tensor, settings: Mapping[str, Any], generator: torch.Generator) -> Iterator[Tensor]:
    """Random inputs of sizes at which the ways to pad differ."""
    batch, channels, *sizes = _smallest(weight, settings).shape
    for more in {0, 1, 2, *settings["stride"], *(2 * step + 1 for step in settings["stride"])}:
        yield random(batch, channels, *(size + more + i for i, size in enumerate(sizes)), generator=generator)


@torch.no_grad()
def _runs(layer: nn.Module, x: Tensor) -> _Convolution | None:
    """The call of a convolution in the forward of `layer`; None unless there is exactly one, its result is returned,
    and nothing is changed."""
    before, given = dict(vars(layer)), x.clone()
    params = {name: None if each is None else each.clone() for name, each in layer._parameters.items()}
    try:
        with _Watch() as watch:
            y = layer.forward(given)
    except Exception:  # whatever it wants, it is not what a plain layer is given
        return None
    if len(watch.seen) != 1 or y is not watch.seen[0].y or vars(layer) != before or not same_bits(x, given):
        return None
    if any(each is not None and not same_bits(each, layer._parameters[name]) for name, each in params.items()):
        return None
    (seen,) = watch.seen
    return seen if seen.bias is layer._parameters["bias"] else None


def _pads(x: Tensor, seen: _Convolution, settings: Mapping[str, Any]) -> str | None:
    """How x was padded: "its own" (by the layer's settings), "same_upper", or "none" where these come to the same. None
    if in another way, or if the convolution was called with other settings than the layer's."""
    kernel, stride, dilation = (settings[name] for name in ("kernel_size", "stride", "dilation"))

    def each(value: Any) -> Any:
        return value if isinstance(value, str) else (value,) * len(kernel) if isinstance(value, int) else tuple(value)

    if (each(seen.stride), each(seen.dilation), seen.groups) != (stride, dilation, settings["groups"]):
        return None
    nothing = (0,) * len(kernel)
    own = settings["padding_mode"] == "zeros" and each(seen.padding) == settings["padding"] and same_bits(x, seen.x)
    upper = each(seen.padding) == nothing and same_bits(
        F.pad(x, same_upper(x.shape[2:], kernel, stride, dilation)), seen.x
    )
    return "none" if own and upper else "its own" if own else "same_upper" if upper else None
