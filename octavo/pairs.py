"""Which layer's output channels can be scaled down, and which weights up in return? Found by watching the model run.

No architecture is listed here. The model runs once as it is; then, for each family of layers (those whose names differ
in numbers only), once more with the output channels of that family divided by known powers of two. Wherever a tensor is
multiplied by a weight, what arrives is held against what arrived before:

    unchanged                        that weight is not fed by the layer
    divided by the same powers       it is a *sink*: its columns can take the factors back
    anything else                    a *leak*: the layer's output goes another way too (a residual, a softmax, ...)

What arrived is then replaced by what had arrived before, so that one layer's trial does not reach the next. A layer
with sinks and no leak is one side of a `Pair`. Powers of two scale exactly in every float dtype: a test for equality is
a test for equality.

This finds norm -> {q, k, v}, norm -> {gate, up, router, experts}, up -> down and v -> o (grouped heads and the fused
q/k/v of several layouts too), fc1 -> relu -> fc2, and, just as well, that BERT's norms have a residual for a second
consumer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.feeding import at_rest, device_of, feed
from octavo.layers import kind_of

__all__ = ["Layout", "Pair", "Sink", "find_pairs", "is_norm", "products", "short"]


@dataclasses.dataclass(frozen=True)
class Sink:
    """A weight whose columns a pair's factors are multiplied onto.

    param: its name in the model. layer: name of the module that owns it. axis: the dimension that the input's channels
    run along (1 of an nn.Linear's [N, K]).
    """

    param: str
    layer: str
    axis: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a source's output channels become a sink's input channels.

    rows: int64 [S], the output channels that are scaled. channels: int64 [K], for each input channel of the sinks the
    entry of `rows` that feeds it (a grouped key-value head feeds several query heads).
    """

    name: str
    rows: Tensor
    channels: Tensor


@dataclasses.dataclass
class Pair:
    """A layer, and the weights that take back what its output is divided by; or the reason why there are none.

    source: name of a norm or a linear layer. sinks: in the order in which they ran; none if there is a `reason`.
    """

    source: str
    layout: Layout | None = None
    sinks: tuple[Sink, ...] = ()
    reason: str | None = None


def find_pairs(model: nn.Module, example: Any, progress: Callable[[int, int], None] | None = None) -> list[Pair]:
    """The pairs of `model`, in the order in which their sources run on `example`; norms without any, with a reason.

    model: float, not modified. example: a batch. progress: called with (families done, families in all).
    """
    device = device_of(model, "model")
    example = short(example)
    with at_rest(model), _plain_experts(model):
        base = _Run(model)
        with base.watching():
            output = feed(model, example, device, "the model")
        search = _Search(model, base, _floats(output), lambda: feed(model, example, device, "the model"))
        families = search.families()
        for done, family in enumerate(families, 1):
            search.try_family(family)
            if progress is not None:
                progress(done, len(families))
    return search.pairs()


def products(model: nn.Module, example: Any) -> tuple[list[Product], list[Tensor]]:
    """Run `model` on `example`: every product with a weight, in order, and the floating-point outputs."""
    with at_rest(model), _plain_experts(model):
        run = _Run(model)
        with run.watching():
            output = feed(model, short(example), device_of(model, "model"), "the model")
    return run.products, _floats(output)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization over the last dimension, of whatever class: it is called a norm, and holds
    nothing but vectors."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    called = re.search(r"norm", type(module).__name__, re.IGNORECASE)
    parameters = [p for p in module.parameters() if p is not None]
    return (
        called is not None
        and not any(True for _ in module.children())
        and all(p.dim() == 1 for p in parameters)
        and not isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    )


_TOKENS = 128
_SEQUENCES = 2


def short(example: Any) -> Any:
    """The first tokens of a batch of token ids [B, T], alone or in a dict; any other batch as it is."""
    if isinstance(example, Tensor):
        return example[:_SEQUENCES, :_TOKENS] if example.dtype == torch.int64 and example.dim() == 2 else example
    if isinstance(example, Mapping) and isinstance(example.get("input_ids"), Tensor):
        shape = example["input_ids"].shape
        if len(shape) != 2 or any(not isinstance(v, Tensor) or v.shape != shape for v in example.values()):
            return example
        cut = {name: value[:_SEQUENCES, :_TOKENS] for name, value in example.items()}
        mask = cut.get("attention_mask")
        # With padding on the left the first tokens may be none at all.
        return cut if mask is None or bool(mask.all()) else {k: v[:_SEQUENCES] for k, v in example.items()}
    return example


# -- watching ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Product:
    """One multiplication by a weight: `x` [..., K] is a copy of what was multiplied."""

    sink: Sink
    x: Tensor


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
"""Op -> the positions of x and of the weight among its arguments, and the weight's dimension that K runs along."""

_COPIES = (_aten._to_copy, _aten.clone)


class _Run(TorchDispatchMode):
    """Records the products of one run; or, given `expected`, tells `on_product` of them, which may replace x."""

    def __init__(self, model: nn.Module, on_product: Callable[[int, Sink, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._count = 0
        self._on_product = on_product
        self._weights: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                self._register(name, parameter)

    def watching(self) -> _Run:
        """The context to run the model in."""
        return self

    def _register(self, name: str, tensor: Tensor) -> None:
        self._weights.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))

    def _weight(self, tensor: Any) -> tuple[str, Tensor] | None:
        if not isinstance(tensor, Tensor):
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
            if copied is not None and result.shape == copied[1].shape:  # a weight in another dtype is that weight
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
            sink = Sink(name, name.rpartition(".")[0], axes[0])
            if self._on_product is None:
                self.products.append(Product(sink, args[x_at].clone()))
            else:
                args[x_at] = self._on_product(self._count, sink, args[x_at])
            self._count += 1
        return args


@contextlib.contextmanager
def _plain_experts(model: Any) -> Iterator[None]:
    """transformers' experts one after the other while this is open, and not in a kernel that hides its products."""
    config = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    switch = getattr(model, "set_experts_implementation", None)
    if before in (None, "eager") or not callable(switch):
        yield
        return
    switch("eager")
    try:
        yield
    finally:
        switch(before)


def _floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, however nested; a cache that is no container is left out."""
    if isinstance(output, Tensor):
        return [output.detach().clone()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for name, value in output.items() if name != "past_key_values" for tensor in _floats(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in _floats(value)]
    return []


# -- searching ------------------------------------------------------------------------------------------------------


class _Search:
    """Tries the layers of a model as sources, family by family."""

    def __init__(self, model: nn.Module, base: _Run, output: list[Tensor], run: Callable[[], Any]) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._base = base.products
        self._output = output
        self._run = run
        self._users = _users(model)
        self._norm_inputs: dict[str, list[Tensor]] = {}
        self._widths: dict[str, int] = {}
        self._order: list[str] = []
        self._found: dict[str, Pair] = {}
        self._look()

    def _look(self) -> None:
        """What enters the norms, and the sources in the order in which they run, with the width of their output."""

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.is_floating_point() and output.dim():
                    if name not in self._widths:
                        self._order.append(name)
                    self._widths[name] = output.shape[-1]
                    if is_norm(module) and args and isinstance(args[0], Tensor):
                        self._norm_inputs.setdefault(name, []).append(args[0].clone())

            return hook

        with _hooked(self._sources(), lambda name, module: module.register_forward_hook(note(name))):
            self._run()

    def _sources(self) -> dict[str, nn.Module]:
        found = {}
        for name, module in self._modules.items():
            kind = kind_of(module)
            if is_norm(module) or (kind is not None and kind.int8_input):
                found[name] = module
        return found

    def families(self) -> list[list[str]]:
        """Sources whose names differ in numbers only, in the order in which the first of each runs."""
        grouped: dict[str, list[str]] = {}
        for name in self._order:
            if self._width_is_known(name):
                grouped.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
        return list(grouped.values())

    def _width_is_known(self, name: str) -> bool:
        module = self._modules[name]
        weight = module._parameters.get("weight")
        if is_norm(module) and (weight is None or weight.shape != (self._widths[name],)):
            why = "has no weight to fold into" if weight is None else "does not scale the channels of its output"
            self._found[name] = Pair(name, reason=why)
            return False
        return True

    def try_family(self, names: list[str]) -> None:
        """Find the pairs of the sources `names`."""
        candidates = self._layouts(names[0])
        open_ = list(names)
        for layout in candidates:
            for pair in self._trial(open_, layout):
                known = self._found.get(pair.source)
                if known is None or pair.reason is None:
                    self._found[pair.source] = pair
            open_ = [name for name in open_ if self._found[name].reason is not None]
            if not open_:
                break

    def _layouts(self, name: str) -> list[Layout]:
        n = self._widths[name]
        every = torch.arange(n)
        same = Layout("all", every, every)
        if is_norm(self._modules[name]):
            return [same]
        parent = self._modules[name.rpartition(".")[0]]
        widths = {product.x.shape[-1] for product in self._base if product.sink.layer != name and _near(name, product)}
        return [same, *(layout for k in sorted(widths) for layout in _partial_layouts(n, k, _numbers_of(parent)))]

    def _trial(self, names: list[str], layout: Layout) -> list[Pair]:
        """Run the model with the outputs of `names` divided by powers of two, and see where they arrive."""
        names = [name for name in names if self._widths[name] > int(layout.rows.max())]
        trial = _Trial(self._base, self._norm_inputs, layout)
        trial_run = _Run(self._model, trial.on_product)
        sources = {name: self._modules[name] for name in names}
        norms = {name: self._modules[name] for name in self._norm_inputs}
        with (
            _hooked(norms, lambda name, module: module.register_forward_pre_hook(trial.norm_hook(name))),
            _hooked(sources, lambda name, module: module.register_forward_hook(trial.source_hook(name))),
            trial_run.watching(),
        ):
            try:
                output = _floats(self._run())
            except (RuntimeError, ValueError, IndexError) as error:  # NaN where the model's own code forbids it
                trial.blame(f"the model fails without it: {error}")
                output = self._output
        for before, after in zip(self._output, output, strict=True):
            if before.shape != after.shape or not _same(before, after):
                trial.blame("reaches the model's output")
        return [self._judged(name, layout, trial) for name in names]

    def _judged(self, name: str, layout: Layout, trial: _Trial) -> Pair:
        if name in trial.leaks:
            return Pair(name, reason=trial.leaks[name])
        sinks = tuple(dict.fromkeys(trial.sinks.get(name, ())))
        if not sinks:
            return Pair(name, reason="reaches no weight")
        for sink in sinks:
            if any(product.sink == sink and i not in trial.scaled[name] for i, product in enumerate(self._base)):
                return Pair(name, reason=f"{sink.layer} is fed by other layers too")
            others = [user for user in self._users[id(self._model.get_parameter(sink.param))] if user != sink.param]
            if others:
                return Pair(name, reason=f"{sink.param} is also {others[0]}")
        return Pair(name, layout, (*sinks, *self._unreached_like(sinks)))

    def _unreached_like(self, sinks: tuple[Sink, ...]) -> list[Sink]:
        """Weights that the example did not reach, but whose siblings are sinks: experts that were not routed to."""
        reached = {product.sink.param for product in self._base}
        like: dict[str, Sink] = {}
        for sink in sinks:
            pattern = re.sub(r"\\\.\d+(?=\\\.[^.]*\\\.weight$)", r"\\.\\d+", re.escape(sink.param))
            for name, parameter in self._model.named_parameters():
                if name not in reached and re.fullmatch(pattern, name):
                    shape = self._model.get_parameter(sink.param).shape
                    if parameter.shape == shape:
                        like[name] = Sink(name, name.rpartition(".")[0], sink.axis)
        return list(like.values())

    def pairs(self) -> list[Pair]:
        """What was found: all pairs, and the norms that have none."""
        return [
            self._found[name]
            for name in self._order
            if self._found[name].reason is None or is_norm(self._modules[name])
        ]


class _Trial:
    """One run with scaled outputs: who reached what."""

    def __init__(self, base: list[Product], norm_inputs: Mapping[str, list[Tensor]], layout: Layout) -> None:
        self._base = base
        self._norm_inputs = norm_inputs
        self._norm_calls = dict.fromkeys(norm_inputs, 0)
        self._layout = layout
        generator = torch.Generator().manual_seed(len(layout.rows))
        exponents = torch.randint(0, 4, (len(layout.rows),), generator=generator)
        exponents[0] = 1  # so that something is scaled
        self._powers = 2.0**exponents
        self._active = ""
        self.leaks: dict[str, str] = {}
        self.sinks: dict[str, list[Sink]] = {}
        self.scaled: dict[str, set[int]] = {}

    def blame(self, reason: str) -> None:
        """The source that ran last must have caused it."""
        if self._active:
            self.leaks.setdefault(self._active, reason)

    def source_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self._active = name
            self.scaled.setdefault(name, set())
            factors = torch.ones(output.shape[-1])
            factors[self._layout.rows] = 1 / self._powers
            return output * factors.to(output)

        return hook

    def norm_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            call = self._norm_calls[name]
            self._norm_calls[name] += 1
            known = self._norm_inputs[name]
            if call >= len(known) or not args or known[call].shape != args[0].shape:
                self.blame("changes which layers run")
                return None
            if _same(known[call], args[0]):
                return None
            self.blame(f"also reaches {name} on another way (a residual?)")
            with contextlib.suppress(RuntimeError):  # in place, for the model's own code may hold the tensor
                args[0].copy_(known[call])
                return None
            return (known[call], *args[1:])

        return hook

    def on_product(self, index: int, sink: Sink, x: Tensor) -> Tensor:
        if index >= len(self._base) or self._base[index].sink != sink or self._base[index].x.shape != x.shape:
            self.blame("changes which layers run")
            return x
        base = self._base[index].x
        if _same(base, x):
            return x
        channels = self._layout.channels
        if self._active and x.shape[-1] == len(channels) and _same(base, x * self._powers[channels].to(x)):
            self.sinks.setdefault(self._active, []).append(sink)
            self.scaled[self._active].add(index)
        else:
            self.blame(f"reaches {sink.layer} other than channel by channel")
        return base.clone()


def _same(base: Tensor, x: Tensor) -> bool:
    """Equal; on an accelerator, whose sums may differ between runs, nearly so."""
    if base.device.type == "cpu":
        return torch.equal(base, x)
    return torch.allclose(base.float(), x.float(), rtol=1e-2, atol=1e-3 * float(base.abs().max()))


def _near(name: str, product: Product) -> bool:
    """Whether a product belongs to the block that layer `name` is in."""
    return product.sink.layer.rpartition(".")[0] == name.rpartition(".")[0]


def _numbers_of(module: nn.Module) -> set[int]:
    """The whole numbers that a module (and its config) holds: the size of a head and their number are among them."""
    places = [vars(module), getattr(getattr(module, "config", None), "__dict__", {})]
    return {v for place in places for v in place.values() if isinstance(v, int) and not isinstance(v, bool) and v > 0}


def _partial_layouts(n: int, k: int, numbers: set[int]) -> Iterator[Layout]:
    """Ways in which a linear layer with N outputs may feed one with K inputs through a part of its outputs, or several
    times over; `numbers` may be sizes or counts of heads."""
    if n < k and k % n == 0:  # values of grouped heads
        for head in _head_sizes(n, k, numbers):
            yield Layout(f"heads of {head}", torch.arange(n), _grouped(n, k, head))
    if n == 2 * k:  # gate and up in one
        yield Layout("second half", torch.arange(k, n), torch.arange(k))
        yield Layout("first half", torch.arange(k), torch.arange(k))
        yield Layout("odd", torch.arange(1, n, 2), torch.arange(k))
    values = (n - k) // 2
    if n > k and (n - k) % 2 == 0 and values and k % values == 0:  # q, k and v in one
        for head in _head_sizes(values, k, numbers):
            yield Layout(f"last, heads of {head}", torch.arange(n - values, n), _grouped(values, k, head))
        for head in _head_sizes(values, k, numbers):
            group = k // values + 2  # query heads of a key-value head, its key and its value
            rows = torch.arange(n).view(-1, group, head)[:, -1].reshape(-1)
            yield Layout(f"interleaved, heads of {head}", rows, _grouped(values, k, head))


def _head_sizes(values: int, k: int, numbers: set[int]) -> list[int]:
    sizes = {v for v in numbers if values % v == 0 and v > 1} | {k // v for v in numbers if k % v == 0}
    return sorted(size for size in sizes if size > 1 and values % size == 0)


def _grouped(values: int, k: int, head: int) -> Tensor:
    """For each of K channels, in heads, the value channel that feeds it: key-value head i feeds K / values heads."""
    channel = torch.arange(k)
    return channel // (head * (k // values)) * head + channel % head


def _users(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> the names of it."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    return users


@contextlib.contextmanager
def _hooked(modules: Mapping[str, nn.Module], register: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    handles = []
    try:
        for name, module in modules.items():
            handles.append(register(name, module))
        yield
    finally:
        for handle in handles:
            handle.remove()
