"""Experts of a class that nobody told of, known by what it does: it is run on a few tokens, and its products watched.

    weighted    for e in range(E):                                                                      LongCat's
                    gate, up = F.linear(x[tokens of e], self.gate_up_proj[e]).chunk(2, -1)
                    y[tokens of e] += weights of e * F.linear(act(gate) * up, self.down_proj[e])
    split       cat([F.linear(rows, self.weight[e]) for e, rows in enumerate(x.split(sizes))])          JetMoe's

Meanwhile the weights are on `meta`, so that their sizes cost nothing. What is multiplied by a part of one, `self.up[e]`
or its transpose, tells by that part which expert's weight it is and how it lies, and gets its product with a random
weight of rank 1 in its place. What is returned, and what goes into the down projection, has to be what int8 experts
would make of these products. Tokens are of many sizes, so that a clamp shows.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from octavo.alike import Held, holding
from octavo.stand_ins import attributes, is_plain_value, random

__all__ = ["WatchedExperts", "own_gate", "watched_experts"]

Gate = Callable[[nn.Module, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class WatchedExperts:
    """What was seen of a class; the fields are those of `octavo.experts.ExpertsSpec`."""

    up: tuple[str, ...]
    down: str
    gate: Gate
    transposed: bool
    routing: Literal["weighted", "split"]
    identity: bool = False


def watched_experts(layer: nn.Module) -> WatchedExperts | None:
    """How `layer`, which may be on `meta`, holds its experts; None if it is not seen to be a stack of experts."""
    params = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
    if not params or layer._buffers or any(is_lazy(parameter) or parameter.dim() != 3 for parameter in params.values()):
        return None
    cls: Any = type(layer)
    held = _held_by(layer)
    children = tuple((name, type(child), _held_by_activation(child)) for name, child in layer._modules.items())
    if held is None or any(its is None for _, _, its in children):
        return None
    return _watched(cls, held, children, tuple((name, tuple(each.shape)) for name, each in params.items()))


def own_gate(layer: Any, h: Tensor) -> Tensor:
    """The gate of a class that has it as a method, under transformers' name for it."""
    return layer._apply_gate(h)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Act:
    """act(one half) * the other, or act(h) where `half` is None. act: name of the layer's own activation, or of one of
    torch's functions."""

    act: str
    half: int | None

    def __call__(self, layer: nn.Module, h: Tensor) -> Tensor:
        act = getattr(layer, self.act, None) or getattr(F, self.act)
        if self.half is None:
            return act(h)  # type: ignore[no-any-return]
        halves = h.chunk(2, -1)
        return act(halves[self.half]) * halves[1 - self.half]  # type: ignore[no-any-return]


def _as_it_is(layer: nn.Module, h: Tensor) -> Tensor:
    return h


def _gates(layer: nn.Module) -> Iterator[Gate]:
    """What may stand between the projections of `layer`."""
    if hasattr(layer, "_apply_gate"):
        yield own_gate
    held = {**layer._modules, **attributes(layer)}
    for act in (*(name for name, each in held.items() if callable(each)), "silu", "gelu", "relu"):
        yield from (_Act(act, half) for half in (0, 1, None))


# -- a layer of the class, without weights -----------------------------------------------------------------------------

_Children = tuple[tuple[str, Any, Any], ...]
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_FUNCTIONS = (FunctionType, BuiltinFunctionType, functools.partial)


def _held_by(module: nn.Module) -> Held | None:
    """What a module holds besides parameters and modules; None if that is more than plain values and functions."""
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes(module).items()}
    plain = all(is_plain_value(value) or isinstance(value, _FUNCTIONS) for value in held.values())
    return tuple(held.items()) if plain else None


def _held_by_activation(child: nn.Module | None) -> Held | None:
    """The same of a child that has no tensors; None of another."""
    if child is None or child._parameters or child._buffers or child._modules:
        return None
    return _held_by(child)


def _without_weights(cls: Any, held: Held, children: _Children, shapes: _Shapes) -> nn.Module:
    layer = holding(cls, held, {name: torch.empty(shape, device="meta") for name, shape in shapes})
    for name, child, its in children:
        layer.add_module(name, holding(child, its, {}))
    return layer


# -- watching ----------------------------------------------------------------------------------------------------------

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


@dataclasses.dataclass(frozen=True)
class _Product:
    """x [S, K] was multiplied by the weight of `expert` in the stack `name`, and y returned."""

    name: str
    expert: int
    transposed: bool
    x: Tensor
    y: Tensor


class _Watch(TorchFunctionMode):
    """Products with parts of `stacks`, which are on `meta`. Raises: TypeError where a part is used in another way."""

    def __init__(self, stacks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(stack): name for name, stack in stacks.items()}
        self.seen: list[_Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = {each.is_meta for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        if len(on_meta) < 2 or func is Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, part, *bias = args
        if (func is not F.linear and func not in _MATMULS) or any(each is not None for each in bias) or kwargs:
            raise TypeError(f"{func} of a weight is no product")
        self.seen.append(self._product(x, part if func is F.linear else part.T))
        return self.seen[-1].y

    def _product(self, x: Tensor, weight: Tensor) -> _Product:
        """weight [N, K], a view."""
        stack = weight._base
        (n, k), first = weight.shape, weight.storage_offset()
        name = self._names.get(id(stack))
        transposed = weight.stride() == (1, n)
        lies = (k, n) if transposed else (n, k)
        if stack is None or name is None or x.shape[1:] != (k,):
            raise TypeError(f"{list(x.shape)} is multiplied by {list(weight.shape)}")
        if stack.shape[1:] != lies or first % (n * k):
            raise TypeError(f"{list(weight.shape)} is not all of an expert's weight in {name}")
        return _Product(name, first // (n * k), transposed, x, _times(x, name, first // (n * k), n))


def _times(x: Tensor, name: str, expert: int, n: int) -> Tensor:
    """x W^T [S, N] with a random W of rank 1 in the place of that expert's."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{name} {expert}".encode()))
    rows, columns = random(n, generator=generator), random(x.shape[-1], generator=generator)
    return ((x.double() * columns).sum(-1, keepdim=True) * rows).to(x.dtype)


def _run(layer: nn.Module, x: Tensor, *routing: Any) -> tuple[Tensor, list[_Product]] | None:
    """What `layer` returns, and its products of any rows; None if it cannot be run so, does anything else, or does not
    keep to x's dtype, which is fp32 here and may be bf16."""
    products: list[_Product] = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in routing]
        rows, before = x.to(dtype, copy=True), dict(vars(layer.to(dtype)))
        try:
            with _Watch(dict(layer.named_parameters())) as watch:
                y = layer.forward(rows, *given)
        except Exception:  # whatever it wants, it is not what experts are given
            return None
        if not isinstance(y, Tensor) or y.dtype != dtype or vars(layer) != before or not torch.equal(rows, x.to(dtype)):
            return None
        products = [product for product in watch.seen if len(product.x)]
    return y, products


# -- what is seen ------------------------------------------------------------------------------------------------------

_TOKENS = 16


@functools.cache
def _watched(cls: Any, held: Held, children: _Children, shapes: _Shapes) -> WatchedExperts | None:
    """The same of a class, what a layer of it holds, and the shapes of its weights."""
    try:
        takes = list(inspect.signature(cls.forward).parameters.values())[1:]
    except ValueError:  # a function of a library in C may have no signature
        return None
    see = {3: _weighted, 2: _split}.get(len(takes))
    if see is None or any(each.default is not each.empty for each in takes):
        return None
    experts = min(shape[0] for _, shape in shapes)
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        layer = _without_weights(cls, held, children, shapes)
        for width in sorted({size for _, shape in shapes for size in shape[1:]}):
            seen = [see(layer.train(mode), _tokens(width), experts) for mode in (False, True)]
            if seen[0] is not None and seen[0] == seen[1]:
                return seen[0]
    return None


def _tokens(width: int) -> Tensor:
    """fp32 [T, width], from 1/16 to 2048."""
    x = random(_TOKENS, width, generator=torch.Generator("cpu").manual_seed(0))
    return x * 2.0 ** (torch.arange(_TOKENS) % 16 - 4).unsqueeze(1)


def _some(experts: int) -> list[int]:
    """Those that get tokens: all, if they are few."""
    return sorted({i * (experts - 1) // (_TOKENS - 1) for i in range(_TOKENS)})


def _split(layer: nn.Module, x: Tensor, experts: int) -> WatchedExperts | None:
    """Of a layer that is a linear one for each expert."""
    some = _some(experts)
    rows = dict(zip(some, x.tensor_split(len(some)), strict=True))
    run = _run(layer, x, [len(rows.get(e, ())) for e in range(experts)])
    if run is None or [product.expert for product in run[1]] != some or len(layer._parameters) > 1:
        return None
    first, *others = run[1]
    if any(product.transposed != first.transposed for product in others):
        return None
    expected = torch.cat([_times(rows[e], first.name, e, first.y.shape[-1]) for e in some])
    return WatchedExperts((), first.name, _as_it_is, first.transposed, "split") if _nearly(run[0], expected) else None


def _weighted(layer: nn.Module, x: Tensor, experts: int) -> WatchedExperts | None:
    """Of a layer that sums up what a token's experts return, each with up, gate and down projection."""
    some = torch.tensor(_some(experts))
    index = some[(torch.arange(_TOKENS).unsqueeze(1) + torch.arange(min(2, experts))) % len(some)]
    weights = random(*index.shape, generator=torch.Generator("cpu").manual_seed(1))
    run = _run(layer, x, index, weights)
    found = _projections(layer, run[1], some.tolist()) if run else None
    if run is None or found is None:
        return None
    widths = {product.name: product.y.shape[-1] for product in run[1]}
    if not _nearly(run[0], _expected(layer, found, widths, x, index, weights)):
        return None
    index[:, -1] = experts  # of which there are no weights
    if (beyond := _run(layer, x, index, weights)) is None:
        return found
    others = _expected(layer, found, widths, x, index[:, :-1], weights[:, :-1])
    if _nearly(beyond[0], others + x * weights[:, -1:]):
        return dataclasses.replace(found, identity=True)
    return found if _nearly(beyond[0], others) else None


def _projections(layer: nn.Module, products: list[_Product], some: list[int]) -> WatchedExperts | None:
    """What products each expert is made of, if all are of the same: each weight once, down last."""
    by_expert = [[product for product in products if product.expert == e] for e in some]
    orders = {tuple(product.name for product in each) for each in by_expert}
    names = orders.pop()
    if orders or len(names) < 2 or sorted(names) != sorted(layer._parameters):
        return None
    if len({product.transposed for product in products}) > 1:
        return None
    gate = next((each for each in _gates(layer) if _is_gate(each, layer, by_expert)), None)
    return None if gate is None else WatchedExperts(names[:-1], names[-1], gate, products[0].transposed, "weighted")


def _is_gate(gate: Gate, layer: nn.Module, by_expert: list[list[_Product]]) -> bool:
    """Whether it makes what the down projections are given of what the up projections return."""
    try:
        made = [(gate(layer, torch.cat([each.y for each in up], -1)), down.x) for *up, down in by_expert]
    except Exception:  # it may be no function of one tensor
        return False
    return all(_nearly(y, x, ulps=4) for y, x in made)


def _expected(
    layer: nn.Module, found: WatchedExperts, widths: Mapping[str, int], x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """What such experts return, [T, H]. widths: N of each weight."""
    y = torch.zeros_like(x)
    for token, chosen in enumerate(index.tolist()):
        for a, e in enumerate(chosen):
            h = torch.cat([_times(x[token : token + 1], name, e, widths[name]) for name in found.up], -1)
            down = _times(found.gate(layer, h), found.down, e, widths[found.down])
            y[token] += (weights[token, a] * down)[0]
    return y


def _nearly(y: Tensor, expected: Tensor, ulps: int = 64) -> bool:
    """Whether each row is the same but for rounding."""
    if y.shape != expected.shape:
        return False
    off = (y.float() - expected.float()).abs().amax(-1)
    return bool((off <= ulps * torch.finfo(expected.dtype).eps * expected.float().abs().amax(-1)).all())
