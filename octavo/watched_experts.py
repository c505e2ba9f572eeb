"""Recognize experts of an unknown class by what it does: run a layer on a few tokens and watch its matrix products.

    weighted    for e in range(E):                                                                      LongCat's
                    gate, up = F.linear(x[tokens of e], self.gate_up_proj[e]).chunk(2, -1)
                    y[tokens of e] += weights of e * F.linear(act(gate) * up, self.down_proj[e])
                up, down = x @ self.mlp.w1.view(E, I, H)[e].T, h @ self.mlp.w2.view(E, I, H)[e]         DBRX's
    split       cat([F.linear(rows, self.weight[e]) for e, rows in enumerate(x.split(sizes))])          JetMoe's

The weights are 3-D, or 2-D with one expert's rows after another's, and belong to the layer or to one child of it.

The layer runs with weights on `meta`, so that large ones cost no memory. A product with a part of a weight
(`self.up[e]` or its transpose) shows, by the offset and strides of that part, which expert it is and whether the weight
is transposed; the product returns x times a random rank-1 matrix instead. The class is accepted if the inputs of its
down projections and its output are what int8 experts would compute from these products. Tokens are of many magnitudes,
so that a clamp would be noticed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from octavo.alike import Held, holding
from octavo.stand_ins import attributes, has_hooks, is_plain_value, random

__all__ = ["WatchedExperts", "own_gate", "watched_experts"]

Gate = Callable[[nn.Module, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class WatchedExperts:
    """How a class holds its experts, as it was observed. The fields are those of `octavo.experts.ExpertsSpec`."""

    up: tuple[str, ...]
    down: str
    gate: Gate
    transposed: tuple[str, ...]
    routing: Literal["weighted", "split"]
    identity: bool = False
    experts: int = 0


def watched_experts(layer: nn.Module) -> WatchedExperts | None:
    """How `layer` holds its experts; None if it does not behave like a stack of experts. It may be on `meta`."""
    if (params := _stacks_of(layer)) is None or next(layer.buffers(), None) is not None:
        return None
    modules = dict(layer.named_modules(remove_duplicate=False))
    held = {name: _held_by(module) for name, module in modules.items()}
    if None in held.values() or None in layer._modules.values() or len(list(layer.parameters())) > len(params):
        return None
    holder = next(iter(params)).rpartition(".")[0]
    if holder and has_hooks(modules[holder]):  # they would no longer run: int8 experts do not call the child
        return None
    described = tuple((name, type(module), held[name]) for name, module in modules.items())
    return _watched(described, tuple((name, tuple(each.shape)) for name, each in params.items()))


def _stacks_of(layer: nn.Module) -> dict[str, nn.Parameter] | None:
    """The parameters of the layer, or of the only child that has any; None if their dimensions rule experts out.

    A single 2-D parameter does not count: it may be any weight.
    """
    around = {f"{name}.": child for name, child in layer._modules.items() if child is not None}
    params = {
        prefix + name: parameter
        for prefix, module in {"": layer, **around}.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    dims = {parameter.dim() for parameter in params.values() if not is_lazy(parameter)}
    in_one = len({name.rpartition(".")[0] for name in params}) == 1 and not any(map(is_lazy, params.values()))
    return params if in_one and (dims == {3} or (dims == {2} and len(params) > 1)) else None


def own_gate(layer: Any, h: Tensor) -> Tensor:
    """The gate of a class that has it as a method, named as in transformers."""
    return layer._apply_gate(h)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Act:
    """act(one half of h) * the other half, or act(h) if `half` is None.

    act: name of an activation that the layer or a child holds (`is_held`), or of a function in `torch.nn.functional`.
    """

    act: str
    is_held: bool
    half: int | None

    def __call__(self, layer: nn.Module, h: Tensor) -> Tensor:
        act = attrgetter(self.act)(layer if self.is_held else F)
        if self.half is None:
            return act(h)  # type: ignore[no-any-return]
        halves = h.chunk(2, -1)
        return act(halves[self.half]) * halves[1 - self.half]  # type: ignore[no-any-return]


def _as_it_is(layer: nn.Module, h: Tensor) -> Tensor:
    return h


def _gates(layer: nn.Module) -> Iterator[Gate]:
    """Candidates for what is computed between the projections of `layer`."""
    if hasattr(layer, "_apply_gate"):
        yield own_gate
    acts = [(name, True) for name, module in layer.named_modules() if name and not module._parameters]
    for prefix, module in layer.named_modules():
        held = (f"{prefix}.{name}".lstrip(".") for name, each in attributes(module).items() if callable(each))
        acts += [(name, True) for name in held]
    for act, is_held in (*acts, ("silu", False), ("gelu", False), ("relu", False)):
        yield from (_Act(act, is_held, half) for half in (0, 1, None))


# -- a layer of the class, without weights -----------------------------------------------------------------------------

_Described = tuple[tuple[str, Any, Any], ...]
"""Of a layer and each module in it: name, class, and what it holds besides parameters and modules."""
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_FUNCTIONS = (FunctionType, BuiltinFunctionType, functools.partial)


def _held_by(module: nn.Module) -> Held | None:
    """What a module holds besides parameters and modules; None if not all of it is plain values and functions."""
    held = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes(module).items()}
    plain = all(is_plain_value(value) or isinstance(value, _FUNCTIONS) for value in held.values())
    return tuple(held.items()) if plain else None


def _without_weights(described: _Described, shapes: _Shapes) -> nn.Module:
    made: dict[str, nn.Module] = {}
    for name, cls, held in described:
        made[name] = holding(cls, held, {})
        if name:
            made[name.rpartition(".")[0]].add_module(name.rpartition(".")[2], made[name])
    for name, shape in shapes:
        holder, _, short = name.rpartition(".")
        made[holder].register_parameter(short, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return made[""]


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
    """Records products with parts of `stacks`, which are on `meta`. Raises: TypeError for any other use of a part."""

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
        is_whole = stack.shape[1:] in (lies, lies[1:]) and weight.stride() in ((1, n), (k, 1)) and first % (n * k) == 0
        if not is_whole:
            raise TypeError(f"{list(weight.shape)} is not all of an expert's weight in {name}")
        return _Product(name, first // (n * k), transposed, x, _times(x, name, first // (n * k), n))


def _times(x: Tensor, name: str, expert: int, n: int) -> Tensor:
    """x W^T [S, N], where W is a random matrix of rank 1 that stands for the weight of that expert."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{name} {expert}".encode()))
    rows, columns = random(n, generator=generator), random(x.shape[-1], generator=generator)
    return ((x.double() * columns).sum(-1, keepdim=True) * rows).to(x.dtype)


def _run(layer: nn.Module, x: Tensor, *routing: Any) -> tuple[Tensor, list[_Product]] | None:
    """The output of `layer`, and its products with at least one row, in fp32.

    None if it fails on these arguments in bf16 or fp32, uses its weights in another way, changes its own state or x, or
    returns another dtype than x's.
    """
    products: list[_Product] = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in routing]
        rows, before = x.to(dtype, copy=True), _state(layer.to(dtype))
        try:
            with _Watch(dict(layer.named_parameters())) as watch:
                y = layer.forward(rows, *given)
        except Exception:  # it wants other arguments than experts
            return None
        if not isinstance(y, Tensor) or y.dtype != dtype:
            return None
        if _state(layer) != before or not torch.equal(rows, x.to(dtype)):
            return None
        products = [product for product in watch.seen if len(product.x)]
    return y, products


def _state(layer: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in layer.modules()]


# -- what is seen ------------------------------------------------------------------------------------------------------

_TOKENS = 16


@functools.cache
def _watched(described: _Described, shapes: _Shapes) -> WatchedExperts | None:
    """As `watched_experts`, for layers of the same classes, contents and weight shapes."""
    try:
        takes = list(inspect.signature(described[0][1].forward).parameters.values())[1:]
    except ValueError:  # functions written in C may have no signature
        return None
    see = {3: _weighted, 2: _split}.get(len(takes))
    if see is None or any(each.default is not each.empty for each in takes):
        return None
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        layer = _without_weights(described, shapes)
        for width in sorted({size for _, shape in shapes for size in shape[1:]}):
            for x in _tokens(width):
                seen = [see(layer.train(mode), x) for mode in (False, True)]
                if seen[0] is not None and seen[0] == seen[1]:
                    return seen[0]
    return None


def _tokens(width: int) -> tuple[Tensor, Tensor]:
    """Tokens fp32 [T, width] with magnitudes from 1/16 to 2048; and the same as [2, T / 2, width], which some classes
    need."""
    x = random(_TOKENS, width, generator=torch.Generator("cpu").manual_seed(0))
    x = x * 2.0 ** (torch.arange(_TOKENS) % 16 - 4).unsqueeze(1)
    return x, x.view(2, -1, width)


def _number_of_experts(layer: nn.Module, x: Tensor) -> int | None:
    """E of a layer with "weighted" routing. If the weights are 2-D, the first expert's product shows how many rows each
    expert has."""
    stacks = dict(layer.named_parameters())
    if all(stack.dim() == 3 for stack in stacks.values()):
        return min(map(len, stacks.values()))
    run = _run(layer, x, torch.zeros(_TOKENS, 1, dtype=torch.int64), torch.ones(_TOKENS, 1))
    found = {divmod(stacks[each.name].numel(), each.x.shape[-1] * each.y.shape[-1]) for each in (run[1] if run else ())}
    experts, rest = found.pop() if len(found) == 1 else (0, 1)
    return None if rest else experts


def _some(experts: int) -> list[int]:
    """The experts that get tokens: all of them if there are at most 16, else 16 spread evenly."""
    return sorted({i * (experts - 1) // (_TOKENS - 1) for i in range(_TOKENS)})


def _split(layer: nn.Module, x: Tensor) -> WatchedExperts | None:
    """For a layer that is one linear layer per expert."""
    (stack, *others) = layer.parameters()
    if others or stack.dim() != 3 or x.dim() != 2:
        return None
    experts = len(stack)
    some = _some(experts)
    rows = dict(zip(some, x.tensor_split(len(some)), strict=True))
    run = _run(layer, x, [len(rows.get(e, ())) for e in range(experts)])
    if run is None or [product.expert for product in run[1]] != some:
        return None
    first = run[1][0]
    transposed = _turned(run[1])
    if transposed is None:
        return None
    expected = torch.cat([_times(rows[e], first.name, e, first.y.shape[-1]) for e in some])
    return WatchedExperts((), first.name, _as_it_is, transposed, "split") if _nearly(run[0], expected) else None


def _turned(products: list[_Product]) -> tuple[str, ...] | None:
    """Names of the stacks that are transposed; None if a stack is used in both ways."""
    turned = dict.fromkeys(product.name for product in products if product.transposed)
    return tuple(turned) if all(product.transposed == (product.name in turned) for product in products) else None


def _weighted(layer: nn.Module, x: Tensor) -> WatchedExperts | None:
    """For a layer that returns the weighted sum of a token's experts, each an up projection, a gate and a down
    projection."""
    experts = _number_of_experts(layer, x)
    if experts is None:
        return None
    some = torch.tensor(_some(experts))
    index = some[(torch.arange(_TOKENS).unsqueeze(1) + torch.arange(min(2, experts))) % len(some)]
    weights = random(*index.shape, generator=torch.Generator("cpu").manual_seed(1))
    run = _run(layer, x, index, weights)
    found = _projections(layer, run[1], some.tolist()) if run else None
    if run is None or found is None:
        return None
    if layer.get_parameter(found.down).dim() == 2:
        found = dataclasses.replace(found, experts=experts)
    widths = {product.name: product.y.shape[-1] for product in run[1]}
    if not _nearly(run[0], _expected(layer, found, widths, x, index, weights)):
        return None
    index[:, -1] = experts  # beyond the last: is that an identity expert?
    if (beyond := _run(layer, x, index, weights)) is None:
        return found
    others = _expected(layer, found, widths, x, index[:, :-1], weights[:, :-1])
    if _nearly(beyond[0], others + x * weights[:, -1].view(*x.shape[:-1], 1)):
        return dataclasses.replace(found, identity=True)
    return found if _nearly(beyond[0], others) else None


def _projections(layer: nn.Module, products: list[_Product], some: list[int]) -> WatchedExperts | None:
    """The projections, if every expert uses each weight once, in the same order, the down projection last."""
    by_expert = [[product for product in products if product.expert == e] for e in some]
    orders = {tuple(product.name for product in each) for each in by_expert}
    names = orders.pop()
    if orders or len(names) < 2 or sorted(names) != sorted(name for name, _ in layer.named_parameters()):
        return None
    if (transposed := _turned(products)) is None:
        return None
    gate = next((each for each in _gates(layer) if _is_gate(each, layer, by_expert)), None)
    return None if gate is None else WatchedExperts(names[:-1], names[-1], gate, transposed, "weighted")


def _is_gate(gate: Gate, layer: nn.Module, by_expert: list[list[_Product]]) -> bool:
    """Whether it computes the inputs of the down projections from the outputs of the up projections."""
    try:
        made = [(gate(layer, torch.cat([each.y for each in up], -1)), down.x) for *up, down in by_expert]
    except Exception:  # not every callable is a function of one tensor
        return False
    return all(_nearly(y, x, ulps=4) for y, x in made)


def _expected(
    layer: nn.Module, found: WatchedExperts, widths: Mapping[str, int], x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """What experts of this description return, in x's shape. widths: N of each weight."""
    shape, x = x.shape, x.flatten(0, -2)
    y = torch.zeros_like(x)
    for token, chosen in enumerate(index.tolist()):
        for a, e in enumerate(chosen):
            h = torch.cat([_times(x[token : token + 1], name, e, widths[name]) for name in found.up], -1)
            down = _times(found.gate(layer, h), found.down, e, widths[found.down])
            y[token] += (weights[token, a] * down)[0]
    return y.view(shape)


def _nearly(y: Tensor, expected: Tensor, ulps: int = 64) -> bool:
    """Whether each row is equal up to rounding."""
    if y.shape != expected.shape:
        return False
    off = (y.float() - expected.float()).abs().amax(-1)
    return bool((off <= ulps * torch.finfo(expected.dtype).eps * expected.float().abs().amax(-1)).all())
