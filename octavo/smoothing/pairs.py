"""Find the pairs of layers between which smoothing can move scale: one layer's outputs are divided by factors, and the
weights that those outputs are multiplied by take the factors back.

No architecture is listed. The model is watched while it runs: once unchanged, then once for each family of layers
(layers whose names differ only in numbers), with the output channels of that family multiplied by known powers of two.
At every multiplication by a weight, the input is compared with the input of the unchanged run:

    unchanged                        the layer does not feed this weight
    multiplied by the same powers    the weight is a *sink*: its columns can take the factors back
    anything else                    a *leak*: the output also goes somewhere else (a residual, a softmax, ...)

After the comparison the input of the unchanged run is put back, so that the trial of one layer does not affect the
next. A layer with sinks and no leak is the source of a `Pair`. Powers of two scale exactly in every float dtype (except
for the smallest numbers of fp16), so the comparison is for equality. They range from 1/4 to 1024, so that an activation
that is linear only near zero or only far from it (relu6, a clamp) is seen not to pass factors on, even if the example
itself stays in the linear range.

This finds norm -> {q, k, v}, norm -> {gate, up, router, experts}, up -> down and v -> o (also with grouped heads and
several layouts of a fused q/k/v) and fc1 -> relu -> fc2. It also finds that the norms of BERT feed a residual as well,
so that nothing can be folded there.

The two projections inside a stack of experts cannot be scaled from outside. There only the gate between them is run, on
numbers from tiny to huge, to see which part of the up projection it passes on channel by channel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.experts import ExpertsSpec, held_for, spec_of
from octavo.feeding import eval_mode, first_tensor, hooked
from octavo.layers import EXPERTS, is_stack, kind_of, users_of_parameters
from octavo.smoothing.layouts import Layout, numbers_of, partial_layouts
from octavo.smoothing.norms import is_norm
from octavo.smoothing.trace import (
    TOKENS,
    Product,
    Recorder,
    Sink,
    Trace,
    equal,
    every_product_visible,
    fed,
    largest_of,
    tensors_of,
)
from octavo.tables import in_general

__all__ = ["Pair", "find_pairs"]


@dataclasses.dataclass
class Pair:
    """A layer, and the weights that take back what its output is divided by; or the reason why there are none.

    source: name of a norm or a linear layer; for a pair inside a stack of experts, of the stack's up projection.
    sinks: in the order in which they ran; none if there is a `reason`.
    experts: name of the stack that the pair is inside of; its experts have factors of their own. None for the others.
    """

    source: str
    layout: Layout | None = None
    sinks: tuple[Sink, ...] = ()
    reason: str | None = None
    experts: str | None = None

    @property
    def sink_names(self) -> tuple[str, ...]:
        """What reports call the sinks: their layers; inside a stack of experts the down projection."""
        return tuple(sink.layer if self.experts is None else sink.param for sink in self.sinks)


def find_pairs(model: nn.Module, example: Any, progress: Callable[[int, int], None] | None = None) -> list[Pair]:
    """The pairs of `model`, in the order in which their sources run on `example`; norms without any, with a reason.

    model: float, not modified. example: a batch. progress: called with (families done, families in all).
    """
    with eval_mode(model), every_product_visible(model):
        with Recorder(model) as recorder:
            output = fed(model, example)
        base = Trace(recorder.products, tensors_of(output))
        search = _Search(model, base, lambda: fed(model, example))
        families = search.families()
        for done, family in enumerate(families, 1):
            search.try_family(family)
            if progress is not None:
                progress(done, len(families))
        search.try_experts()
    return search.pairs()


# -- searching ------------------------------------------------------------------------------------------------------


class _Search:
    """Tries the layers of a model as sources, family by family."""

    def __init__(self, model: nn.Module, base: Trace, run: Callable[[], Any]) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._base, self._output = base
        self._run = run
        self._users, self._held_for = users_of_parameters(model), held_for(model)
        reached = {product.sink.param for product in self._base}
        self._unreached = [
            (name, p.shape) for name, p in model.named_parameters() if p.dim() >= 2 and name not in reached
        ]
        self._norm_inputs: dict[str, list[Tensor]] = {}
        self._widths: dict[str, int] = {}
        self._order: list[str] = []
        self._found: dict[str, Pair] = {}
        self._run_once()

    def _run_once(self) -> None:
        """Run the model, and note the inputs of norms, the order in which the sources run and their output widths."""

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.is_floating_point() and output.dim():
                    if name not in self._widths:
                        self._order.append(name)
                    self._widths[name] = output.shape[-1]
                    x = first_tensor(args, kwargs)
                    if is_norm(module) and x is not None:
                        self._norm_inputs.setdefault(name, []).append(x.clone())

            return hook

        specs = {name: spec_of(module) for name, module in self._modules.items() if is_stack(module)}
        stacks = {name: self._modules[name] for name, spec in specs.items() if spec is not None and spec.up}
        watched = {**self._sources(), **stacks}
        with hooked(watched, lambda name, module: module.register_forward_hook(note(name), with_kwargs=True)):
            self._run()

    def _sources(self) -> dict[str, nn.Module]:
        found = {}
        for name, module in self._modules.items():
            kind = kind_of(module)
            linear = kind is not None and kind.int8_input and kind.name != EXPERTS
            if (linear and module._parameters.get("weight") is not None) or is_norm(module):
                found[name] = module
        return found

    def families(self) -> list[list[str]]:
        """Sources of one width whose names differ in numbers only, in the order in which the first of each runs."""
        grouped: dict[tuple[str, int], list[str]] = {}
        for name in self._order:
            if not is_stack(self._modules[name]) and self._width_is_known(name):
                grouped.setdefault((in_general(name), self._widths[name]), []).append(name)
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
        open_ = list(names)
        for layout in self._layouts(names[0]):
            for pair in self._trial(open_, layout):
                known = self._found.get(pair.source)
                if known is None or pair.reason is None:
                    self._found[pair.source] = pair
            open_ = [name for name in open_ if self._found[name].reason is not None]
            if not open_:
                break

    def try_experts(self) -> None:
        """Find the pairs up -> down inside the stacks of experts."""
        for name in self._order:
            layer = self._modules[name]
            if is_stack(layer):
                spec = spec_of(layer)
                assert spec is not None
                self._found[name] = self._experts_pair(name, layer, spec)

    def _experts_pair(self, name: str, layer: nn.Module, spec: ExpertsSpec) -> Pair:
        prefix = f"{name}." if name else ""
        try:
            passed = _passed_on(layer, spec)
            reason = "its gate passes no part of it on channel by channel"
        except RuntimeError as error:  # a norm inside it, of another dtype
            passed, reason = None, f"its gate cannot be run on its own in fp32: {error}"
        if passed is None:
            return Pair(prefix + spec.up[-1], reason=reason, experts=name)
        up, layout = passed
        for param in (up, spec.up_bias, spec.down):
            users = self._users[id(layer.get_parameter(param))] if param else []
            others = [user for user in users if user != f"{prefix}{param}"]
            if others:
                return Pair(prefix + up, reason=f"{prefix}{param} is also {others[0]}", experts=name)
        sink = Sink(prefix + spec.down, name, 1 if spec.down in spec.transposed else 2)
        return Pair(prefix + up, layout, (sink,), experts=name)

    def _layouts(self, name: str) -> list[Layout]:
        n = self._widths[name]
        every = torch.arange(n)
        same = Layout("all", every, every)
        if is_norm(self._modules[name]):
            return [same]
        parent = self._modules[name.rpartition(".")[0]]
        widths = {product.x.shape[-1] for product in self._base if product.sink.layer != name and _near(name, product)}
        return [same, *(layout for k in sorted(widths) for layout in partial_layouts(n, k, numbers_of(parent)))]

    def _trial(self, names: list[str], layout: Layout) -> list[Pair]:
        """Run the model with the outputs of `names` multiplied by powers of two, and see where they arrive."""
        sources = {name: self._modules[name] for name in names}
        norms = {name: self._modules[name] for name in self._norm_inputs}
        trial = _Trial(self._base, self._norm_inputs, layout, sources)
        with (
            hooked(norms, lambda name, m: m.register_forward_pre_hook(trial.norm_hook(name), with_kwargs=True)),
            hooked(sources, lambda name, m: m.register_forward_hook(trial.source_hook(name))),
            Recorder(self._model, trial.on_product),
        ):
            try:
                output = tensors_of(self._run())
            except Exception as error:  # NaN where the model forbids it, in whatever way it does
                trial.blame(f"the model fails without it: {error}")
                output = self._output
        changed = len(output) != len(self._output) or not all(map(_same, self._output, output))
        suspects = [name for name in names if changed and len(names) > 1 and trial.is_clean(name)]
        if changed and not suspects:
            trial.blame("reaches the model's output")
        return [self._trial([n], layout)[0] if n in suspects else self._judged(n, layout, trial) for n in names]

    def _judged(self, name: str, layout: Layout, trial: _Trial) -> Pair:
        if name in trial.leaks:
            return Pair(name, reason=trial.leaks[name])
        sinks = tuple(dict.fromkeys(trial.sinks.get(name, ())))
        if not sinks:
            return Pair(name, reason="reaches no weight")
        for sink in sinks:
            if any(product.sink == sink and i not in trial.scaled[name] for i, product in enumerate(self._base)):
                return Pair(name, reason=f"{sink.layer} is fed by other layers too")
        own = [f"{name}.{param}" for param, value in self._modules[name]._parameters.items() if value is not None]
        for param in (*own, *(sink.param for sink in sinks)):
            others = [user for user in self._users[id(self._model.get_parameter(param))] if user != param]
            if others:
                return Pair(name, reason=f"{param} is also {others[0]}")
        unreached = self._unreached_like(sinks)
        if isinstance(unreached, str):
            return Pair(name, reason=unreached)
        return Pair(name, layout, (*sinks, *unreached))

    def _unreached_like(self, sinks: tuple[Sink, ...]) -> list[Sink] | str:
        """Weights that the example did not reach, but several siblings of theirs: experts that were not routed to.
        Where only one sibling was reached (is it one of several experts, or of several blocks?), why there is no pair.
        """
        siblings: dict[str, list[Sink]] = {}
        for sink in sinks:
            for pattern in _patterns(sink.param):
                siblings.setdefault(pattern, []).append(sink)
        found = []
        for name, shape in self._unreached:
            like = max((siblings.get(pattern, []) for pattern in _patterns(name)), key=len, default=[])
            if like and self._model.get_parameter(like[0].param).shape == shape:
                if len(like) == 1:
                    return f"{name}, which the example did not reach, may be fed by it like {like[0].param}"
                holder = name.rpartition(".")[0]
                found.append(Sink(name, self._held_for.get(holder, holder), like[0].axis))
        return found

    def pairs(self) -> list[Pair]:
        """What was found: all pairs, no weight in two of them; and the norms that have none."""
        feeder: dict[str, str] = {}
        found = []
        for name in self._order:
            pair = self._found[name]
            taken = next((sink.param for sink in pair.sinks if sink.param in feeder), None)
            if taken is not None:
                pair = Pair(name, reason=f"{taken} takes the factors of {feeder[taken]} already")
            feeder.update((sink.param, name) for sink in pair.sinks)
            if pair.reason is None or pair.experts is not None or is_norm(self._modules[name]):
                found.append(pair)
        return found


class _Trial:
    """One run with scaled outputs: who reached what. Each source has powers of its own, by which it is known."""

    def __init__(
        self,
        base: list[Product],
        norm_inputs: Mapping[str, list[Tensor]],
        layout: Layout,
        sources: Mapping[str, nn.Module],
    ) -> None:
        self._base = base
        self._norm_inputs = norm_inputs
        self._norm_calls = dict.fromkeys(norm_inputs, 0)
        self._layout = layout
        self._powers = {
            name: _powers(len(layout.rows), seed, module.get_parameter("weight").dtype)
            for seed, (name, module) in enumerate(sources.items())
        }
        self._active = ""
        self.leaks: dict[str, str] = {}
        self.sinks: dict[str, list[Sink]] = {}
        self.scaled: dict[str, set[int]] = {}

    def blame(self, reason: str) -> None:
        """The source that ran last must have caused it."""
        if self._active:
            self.leaks.setdefault(self._active, reason)

    def is_clean(self, name: str) -> bool:
        """Whether a source has sinks, and was not blamed for anything."""
        return name in self.sinks and name not in self.leaks

    def source_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self._active = name
            self.scaled.setdefault(name, set())
            factors = torch.ones(output.shape[-1])
            factors[self._layout.rows] = self._powers[name]
            return output * factors.to(output)

        return hook

    def norm_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = self._norm_calls[name]
            self._norm_calls[name] += 1
            known = self._norm_inputs[name]
            x = first_tensor(args, kwargs)
            if x is None or call >= len(known) or known[call].shape != x.shape:
                self.blame("changes which layers run")
                return None
            if _same(known[call], x):
                return None
            self.blame(f"also reaches {name} on another way (a residual?)")
            with contextlib.suppress(RuntimeError):  # in place, for the model's own code may hold the tensor
                x.copy_(known[call])
                return None
            swapped = [known[call] if value is x else value for value in args]
            return tuple(swapped), {key: known[call] if value is x else value for key, value in kwargs.items()}

        return hook

    def on_product(self, index: int, sink: Sink, x: Tensor) -> Tensor:
        if index >= len(self._base) or self._base[index].sink != sink or self._base[index].x.shape != x.shape:
            self.blame("changes which layers run")
            return x
        base = self._base[index].x
        if _same(base, x):
            return x
        source = self._source_of(x, base)
        if source is None:
            self.blame(f"reaches {sink.layer} other than channel by channel")
        else:
            self.sinks.setdefault(source, []).append(sink)
            self.scaled[source].add(index)
        return base.clone()

    def _source_of(self, x: Tensor, base: Tensor) -> str | None:
        """The source whose powers `base` was multiplied by, most likely that which ran last; None if there is none."""
        channels = self._layout.channels
        if x.shape[-1] != len(channels):
            return None
        for name in sorted(self.scaled, key=lambda name: name != self._active):
            if _same(base, x / self._powers[name][channels].to(x)):
                return name
        return None


def _powers(rows: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Random powers of two, 1/4 to 1024: fp32 [rows]. In fp16, where 1024 times an outlier is inf, 1/4 to 2."""
    exponents = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(seed))
    return 2.0 ** (exponents * (1 if dtype == torch.float16 else 4) - 2)


def _same(base: Tensor, x: Tensor) -> bool:
    """Equal; floats nearly so on an accelerator, whose sums may differ between runs, and in fp16, whose smallest have
    fewer digits."""
    if (base.device.type == "cpu" and base.dtype != torch.float16) or not base.is_floating_point():
        return equal(base, x)
    if base.shape != x.shape:
        return False
    return torch.allclose(base.float(), x.float(), rtol=1e-2, atol=1e-3 * largest_of(base), equal_nan=True)


_TINY = 1e-30
"""Nearer to 0 than this, fp32 has fewer digits, and a power of two may cost some."""


def _passed_on(layer: nn.Module, spec: ExpertsSpec) -> tuple[str, Layout] | None:
    """The up projection of a float stack, and those of its output channels, that the gate does nothing to but multiply
    each by what does not depend on it; None if there are none.

    The gate is run in fp32, where no factor is too large, on tokens from 1/16 to 2048: no clamp is above them all.
    """
    widths = {name: spec.stack(layer, name).shape[1] for name in spec.up}
    n, k = sum(widths.values()), spec.stack(layer, spec.down).shape[2]
    device = layer.get_parameter(spec.down).device
    size = 2.0 ** (torch.arange(TOKENS) % 16 - 4).unsqueeze(1)
    h = (torch.randn(TOKENS, n, generator=torch.Generator().manual_seed(0)) * size).to(device)
    base = spec.gate(layer, h.clone())
    every = torch.arange(n)
    for layout in (Layout("all", every, every),) if n == k else partial_layouts(n, k, set()):
        powers = _powers(k, 0, torch.float32).to(device)
        scaled = h.clone()
        scaled[:, layout.rows.to(device)] *= powers
        same = torch.allclose(spec.gate(layer, scaled), base * powers, rtol=0, atol=_TINY)
        if bool(base.any(0).all()) and same:
            first = 0
            for name, width in widths.items():
                if first <= int(layout.rows.min()) and int(layout.rows.max()) < first + width:
                    return name, Layout(layout.name, layout.rows - first, layout.channels)
                first += width
    return None


def _near(name: str, product: Product) -> bool:
    """Whether a product belongs to the block that layer `name` is in."""
    return product.sink.layer.rpartition(".")[0] == name.rpartition(".")[0]


_NUMBER = re.compile(r"\b\d+\b")


def _patterns(name: str) -> list[str]:
    """The name with each of its numbers in turn left open."""
    return [f"{name[: found.start()]}*{name[found.end() :]}" for found in _NUMBER.finditer(name)]
