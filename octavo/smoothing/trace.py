"""Record what a run of a model multiplies by which of its weights, and what it returns: its `Trace`.

All products with a parameter are recorded, whoever computes them, because torch's dispatcher is watched
(TorchDispatchMode) and not the layers. Smoothing compares traces to find out how layers are connected, and to prove
that it changed nothing. Of a long batch only the first tokens are run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.experts import held_for
from octavo.feeding import device_of, eval_mode, feed, on_tensors, same_random_numbers

__all__ = [
    "TOKENS", "Product", "Recorder", "Sink", "Trace", "equal", "every_product_visible", "fed", "largest_of", "short",
    "tensors_of", "traced",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sink:
    """A weight whose columns can be multiplied by the factors of a pair.

    param: its name in the model. layer: name of the module that computes with it. axis: the dimension of the input
    channels (1 for the weight [N, K] of nn.Linear).
    """

    param: str
    layer: str
    axis: int


@dataclasses.dataclass
class Product:
    """One multiplication by a weight. x: [..., K], a copy of the input. experts: for a stack [E, ...], the experts
    whose weights were used."""

    sink: Sink
    x: Tensor
    experts: slice


class Trace(NamedTuple):
    """products: in the order in which they were computed. returned: the tensors that the model returned."""

    products: list[Product]
    returned: list[Tensor]


def traced(model: nn.Module, example: Any) -> Trace:
    """The trace of a run of `model` on the first tokens of `example`."""
    with eval_mode(model), every_product_visible(model), Recorder(model) as recorder:
        output = fed(model, example)
    return Trace(recorder.products, tensors_of(output))


def fed(model: nn.Module, example: Any) -> Any:
    """What `model` returns for the first tokens of `example`. If it draws random numbers, they are the same every
    time."""
    device = device_of(model, "model")
    with same_random_numbers(device):
        return feed(model, short(example), device, "the model")


TOKENS = 128
"""At most so many tokens of each sequence are run."""

_SEQUENCES = 2
_ITEMS = 4
"""At most so many items of a batch of images or sounds are run. (An unbatched image has at most 4 channels.)"""


def short(example: Any) -> Any:
    """A shorter batch, because a trace keeps the inputs of all layers: the first tokens of token ids [B, T], alone or
    in a dict; the first items of a batch in which all tensors are [B, ...]. Any other batch is returned as it is."""
    if isinstance(example, Tensor) and example.dtype == torch.int64 and example.dim() == 2:
        return example[:_SEQUENCES, :TOKENS]
    if isinstance(example, Mapping) and isinstance(example.get("input_ids"), Tensor):
        shape = example["input_ids"].shape
        if len(shape) != 2 or any(not isinstance(v, Tensor) or v.shape != shape for v in example.values()):
            return example
        kept = {name: value[:_SEQUENCES] for name, value in example.items()}
        mask = kept.get("attention_mask")
        if mask is None or bool(mask[:, :1].all()):
            return {name: value[:, :TOKENS] for name, value in kept.items()}
        # With padding on the left the first tokens may be padding only.
        return {name: value[:, -TOKENS:] for name, value in kept.items()} if bool(mask[:, -1:].all()) else kept
    shapes: list[torch.Size] = []
    on_tensors(example, lambda tensor: shapes.append(tensor.shape))
    of_one_length = len({shape[:1] for shape in shapes}) == 1
    if of_one_length and max(map(len, shapes)) >= 3 and shapes[0][0] > _ITEMS:
        return on_tensors(example, lambda tensor: tensor[:_ITEMS])
    return example


_aten = torch.ops.aten
_OPERANDS = {
    _aten.mm: (0, 1, -2),
    _aten.addmm: (1, 2, -2),
    _aten.bmm: (0, 1, -2),
    _aten.baddbmm: (1, 2, -2),
    _aten._grouped_mm: (0, 1, -2),
    _aten.linear: (0, 1, -1),
    _aten.mv: (1, 0, -1),
    _aten.addmv: (2, 1, -1),
}
"""Op -> the positions of x and of the weight among its arguments, and the dimension of the weight that has size K."""

_COPIES = (_aten._to_copy, _aten.clone)


class Recorder(TorchDispatchMode):
    """Records the products of one run; or, if given, calls `on_product` for each, which returns the x to use."""

    def __init__(self, model: nn.Module, on_product: Callable[[int, Sink, Tensor], Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []
        self._count = 0
        self._held_for = held_for(model)
        self._on_product = on_product
        self._weights: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.layout == torch.strided:
                self._register(name, parameter)

    def _register(self, name: str, tensor: Tensor) -> None:
        self._weights.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))

    def _weight(self, tensor: Any) -> tuple[str, Tensor] | None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        for name, weight in self._weights.get(tensor.untyped_storage().data_ptr(), ()):
            start = weight.storage_offset()
            if start <= tensor.storage_offset() < start + max(1, weight.numel()):
                return name, weight
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func.overloadpacket
        if op in _OPERANDS:
            args = self._multiply(op, list(args))
        result = func(*args, **(kwargs or {}))
        if op in _COPIES:
            copied = self._weight(args[0])
            if copied is not None and result.shape == copied[1].shape:  # a weight cast to another dtype is still it
                self._register(copied[0], result)
        return result

    def _multiply(self, op: Any, args: list[Any]) -> list[Any]:
        x_at, w_at, k_dim = _OPERANDS[op]
        weight = self._weight(args[w_at])
        if weight is None or self._weight(args[x_at]) is not None:
            return args
        name, whole = weight
        k, stride = args[w_at].shape[k_dim], args[w_at].stride(k_dim)
        axes = [a for a in range(whole.dim()) if whole.shape[a] == k and whole.stride(a) == stride]
        if axes:
            holder = name.rpartition(".")[0]
            sink = Sink(name, self._held_for.get(holder, holder), axes[0])
            if self._on_product is None:
                self.products.append(Product(sink, args[x_at].clone(), _slices(whole, args[w_at])))
            else:
                args[x_at] = self._on_product(self._count, sink, args[x_at])
            self._count += 1
        return args


def _slices(stack: Tensor, weight: Tensor) -> slice:
    """The range of experts of `stack` [E, ...] that its view `weight` covers."""
    first = int(weight.storage_offset() - stack.storage_offset()) // max(1, stack.stride(0))
    return slice(first, first + max(1, weight.numel() // stack[0].numel()))


@contextlib.contextmanager
def every_product_visible(model: Any) -> Iterator[None]:
    """While open, products are computed by ordinary torch ops on the parameters themselves: without the grouped kernels
    of transformers' experts, and without autocast's cache of cast weights (which would also miss a fold)."""
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        with _plain_experts(model):
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)


@contextlib.contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """While open, transformers' experts run one after the other ("eager"), in all parts of a model that have a
    config."""
    switched: list[tuple[Any, str]] = []
    for part in model.modules():
        used = getattr(getattr(part, "config", None), "_experts_implementation", None)
        if used not in (None, "eager") and callable(getattr(part, "set_experts_implementation", None)):
            switched.append((part, used))
    try:
        for part, _ in switched:
            part.set_experts_implementation("eager")
        yield
    finally:
        for part, used in switched:
            part.set_experts_implementation(used)


_FOR_THE_MODEL_ITSELF = ("cache", "past_key_values", "encoder_last_hidden_state")
"""Outputs of transformers' models that are only fed back to the model, where the factors in them cancel out."""


def tensors_of(output: Any, seen: dict[int, object] | None = None) -> list[Tensor]:
    """Copies of all tensors in an output, however nested, except those that are only fed back to the model; complex
    ones as real pairs. seen: id -> the objects visited so far, since an object may contain itself."""
    if isinstance(output, Tensor):
        kept = output.detach().clone()
        return [torch.view_as_real(kept.resolve_conj()) if kept.is_complex() else kept]
    seen = {} if seen is None else seen
    if id(output) in seen or callable(output) or isinstance(output, ModuleType) or _is_cache(output):
        return []
    seen[id(output)] = output
    return [tensor for part in _parts(output) for tensor in tensors_of(part, seen)]


def _is_cache(output: object) -> bool:
    return any("Cache" in cls.__name__ for cls in type(output).__mro__)


def _parts(output: Any) -> Iterable[Any]:
    """The parts of an output that is not a tensor."""
    if isinstance(output, Mapping):
        return [value for name, value in output.items() if name not in _FOR_THE_MODEL_ITSELF]
    if isinstance(output, tuple | list):
        return output
    if dataclasses.is_dataclass(output):
        return [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    return vars(output).values() if hasattr(output, "__dict__") else ()  # a namespace, a distribution


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether all elements are equal, or NaN in both: what a model computes for padding may be NaN."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def largest_of(x: Tensor) -> float:
    """The largest finite magnitude in x; 0 if there is none."""
    return float(x.abs().nan_to_num(0.0, 0.0).max()) if x.numel() else 0.0
