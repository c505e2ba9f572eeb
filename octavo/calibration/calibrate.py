"""Run a float model on sample inputs, and keep what quantizing its layers' inputs needs to know: `Stats`.

    stats = octavo.calibrate(model, batches)
    octavo.smooth(model, stats, alpha="auto")            # uses the channels' ranges, and follows them
    octavo.quantize(model, "w8a8-static", stats=stats)   # uses the tensors' ranges

Under torch.distributed every process takes its share of the batches (those whose index is its rank, modulo the number
of processes), and all end with the same Stats, equal to those of one process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo.calibration.expert_inputs import ExpertsObserver, observe_experts, rows_of_each
from octavo.calibration.observers import Observer, observe
from octavo.calibration.stats import Stats, largest_of_columns, refuse_infinite, watched_modules
from octavo.errors import CalibrateError, OctavoWarning, QuantizeError
from octavo.experts import ExpertsSpec, argument_names, arguments, spec_of
from octavo.feeding import (
    Progress,
    check_batches,
    check_module,
    check_progress,
    device_of,
    eval_mode,
    feed,
    first_tensor,
    hooked,
    padding_masks,
)
from octavo.layers import is_stack
from octavo.model_code.products import products_as_calls

__all__ = ["calibrate", "check_is_float"]

ROWS = 256
"""Rows of a layer's input that are kept, to measure errors on."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rows: int = ROWS,
    route_all_experts: bool = False,
    progress: Progress | None = None,
) -> Stats:
    """Run `model` on `batches` once, and keep what int8 inputs need to know of each layer's input.

    model: float, on any device; not modified. It runs in eval mode and without gradients.
    batches: iterable of tensors, tuples (positional arguments) or dicts (keyword arguments), of any lengths. Positions
        that a dict's `attention_mask` (for a decoder, `decoder_attention_mask`) marks with 0 are not counted.
    rows: whole input rows that are kept of each layer, drawn evenly from all tokens; errors are measured on them. The
        experts of a stack share them, at least 8 (or `rows`) for each.
    route_all_experts: keep statistics of every token in every expert of a stack, so that none is without. It takes the
        up projection of every expert for every token; the model itself runs as its routers say.
    progress: called with (batches done, number of batches or 0).
    Returns: the statistics, in the computer's own memory.
    Raises: CalibrateError for a NaN or inf, naming the layer that it entered, for a model without linear layers, if no
        batch came, or none with a token that counts, for `rows` that are no number from 0 up, and for
        `route_all_experts` where there are no experts; EvaluateError for batches that are of another type, or a model
        on `meta`; QuantizeError for a model that is int8 already, and for what is no module.
    Warns: OctavoWarning if there are experts that no token was routed to; `Stats.unrouted` lists them.
    """
    check_is_float(model)
    check_batches(batches)
    check_progress(progress)
    if not isinstance(rows, int) or rows < 0:
        raise CalibrateError(f"rows is {rows!r}, expected a number, 0 or more, of rows of each layer's input to keep")
    layers = watched_modules(model)
    if not layers:
        raise CalibrateError("the model has no linear layer to calibrate; expected nn.Linear or transformers' Conv1D")
    stacks = {name: layer for name, layer in layers.items() if is_stack(layer)}
    if route_all_experts and not stacks:
        raise CalibrateError("route_all_experts is True, and the model has no stack of experts; leave it out")
    watch = _Watch(rows, route_all_experts)
    device = device_of(model, "model")
    rank, processes = _share()
    total = operator.length_hint(batches)  # 0 for a generator, and for a DataLoader of an IterableDataset
    example, count = None, 0
    seen = hooked(layers, _input_hook(watch)), hooked(stacks, _experts_hook(watch))
    with eval_mode(model), products_as_calls(model), seen[0], seen[1]:
        for count, batch in enumerate(batches, start=1):
            example = batch if count == 1 else example
            if (count - 1) % processes == rank:
                watch.begin(padding_masks(model, batch), count - 1)
                feed(model, batch, device, f"batch {count - 1}: the model")
                watch.end(batch)
            if progress is not None:
                progress(count, total)
    if not count:
        raise CalibrateError("batches is empty, expected at least one; an iterator can be read only once")
    downs = [_down(name, spec) for name, layer in stacks.items() if (spec := spec_of(layer)) is not None]
    stats = _merged(watch, layers, downs, rows, example)
    if not stats.observers:
        raise CalibrateError(
            f"batches: got {count}, of which no token reached a linear layer; expected some that are no padding (those "
            "have 1 in an attention_mask), and a model that calls its layers"
        )
    stats.columns = largest_of_columns(layers)
    if stats.unrouted and rank == 0:
        _warn_of_unrouted(stats)
    return stats


def check_is_float(model: nn.Module) -> None:
    """Raise QuantizeError for a model that holds int8 layers, and for what is no module."""
    check_module(model)
    if any(hasattr(module, "quantized_params") for module in model.modules()):
        raise QuantizeError(
            "the model holds int8 layers; calibrate the float model, and smooth it first, then quantize"
        )


def _warn_of_unrouted(stats: Stats) -> None:
    idle = sum(map(len, stats.unrouted.values()))
    count = sum(len(seen.tokens) for seen in stats.experts.values())
    warnings.warn(
        f"{idle} of {count} experts, in {len(stats.unrouted)} of {len(stats.experts)} layers, saw no token of the "
        "calibration and will not be smoothed; calibrate on more text, or route all tokens to all experts "
        "(route_all_experts)",
        OctavoWarning,
        stacklevel=3,  # the caller of octavo.calibrate
    )


STRUCTURES = 16
"""At most so many batches are kept for a new structure of arguments: a number among them may differ in every batch."""


@dataclasses.dataclass(frozen=True)
class _CodePath:
    """A batch that took another path through the model's code than those before it: it reached other layers (`names`),
    or gave the model arguments of another structure."""

    index: int
    names: frozenset[str]
    structure: object
    batch: Any


class _CodePaths:
    """The paths through the model's code that batches have taken so far."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._structures: set[object] = set()

    def add(self, names: frozenset[str], structure: object) -> bool:
        """Add a batch's path. Returns: whether it is a new one."""
        more = structure not in self._structures and len(self._structures) < STRUCTURES
        is_new = more or not names <= self._names
        self._names |= names
        if more:
            self._structures.add(structure)
        return is_new


def _structure(value: Any) -> object:
    """What in a model's arguments may make it branch: everything but the sizes and values of tensors."""
    if isinstance(value, Tensor):
        return Tensor, value.dtype, value.dim()
    if isinstance(value, Mapping):
        return dict, frozenset((name, _structure(item)) for name, item in value.items())
    if isinstance(value, tuple | list):
        return list, tuple(map(_structure, value))
    return type(value), value if value is None or isinstance(value, bool | int | float | str) else None


class _Watch:
    """Collects what the hooks see. A tensor that several layers are fed is observed once."""

    def __init__(self, rows: int, route_all_experts: bool) -> None:
        self.rows = rows
        self.route_all_experts = route_all_experts
        self.observers: dict[str, Observer] = {}
        self.experts: dict[str, ExpertsObserver] = {}
        self.history: dict[str, Any] = {}
        self.paths: list[_CodePath] = []
        self._known_paths = _CodePaths()
        self._masks: list[Tensor] = []
        self._batch = 0
        self._calls: dict[str, int] = {}
        self._stacks: dict[str, str] = {}
        self._last: tuple[weakref.ref[Tensor], int | None, int, Observer] | None = None
        self._events = 0

    def begin(self, masks: list[Tensor], index: int) -> None:
        self._masks = [mask for mask in masks if mask.dim() == 2]
        self._batch = index
        self._calls = {}

    def end(self, batch: Any) -> None:
        names, structure = frozenset(self._calls), _structure(batch)
        if self._known_paths.add(names, structure):
            self.paths.append(_CodePath(self._batch, names, structure, batch))
        for name in self._calls:  # in the order in which they ran: the first one named is where a NaN or inf arose
            refuse_infinite(name, self.observers[name].amax, f"batch {self._batch}")
            if name in self._stacks:
                down = self._stacks[name]
                for e, amax in enumerate(self.experts[down].amax):
                    refuse_infinite(f"{down}[{e}]", amax, f"batch {self._batch}")

    def see(self, name: str, module: nn.Module, x: Tensor) -> None:
        call = self._calls[name] = self._calls.get(name, -1) + 1
        event, seen = self._observed(module, x, call)
        before = self.observers.get(name)
        self.observers[name] = dataclasses.replace(seen) if before is None else before.merged(seen, self.rows)
        self.history.setdefault(name, hashlib.blake2b(digest_size=16)).update(f"{event},".encode())

    def see_experts(self, name: str, layer: nn.Module, spec: ExpertsSpec, call: Sequence[Any]) -> None:
        """Observe a call of a stack of experts, after `see`. call: its arguments, in order."""
        x = call[0].reshape(-1, call[0].shape[-1])
        rows = rows_of_each(self.rows, len(spec.stack(layer, spec.down)))
        seen = observe_experts(
            layer,
            spec,
            call[0],
            call[1:],
            self._counts(layer, x),
            seed=self._batch * 4096 + self._calls[name],
            rows=rows,
            route_all=self.route_all_experts,
        )
        down = self._stacks[name] = _down(name, spec)
        before = self.experts.get(down)
        self.experts[down] = seen if before is None else before.merged(seen, rows)

    def _observed(self, module: nn.Module, x: Tensor, call: int) -> tuple[int, Observer]:
        last = self._last
        version = None if x.is_inference() else x._version
        if last is not None and version is not None and last[0]() is x and last[1] == version:
            return last[2], last[3]
        self._events += 1
        counts = self._counts(module, x)
        flat = x.reshape(-1, x.shape[-1])
        seen = observe(flat if counts is None else flat[counts], self._batch * 4096 + call, self.rows)
        self._last = (weakref.ref(x), version, self._events, seen)
        return self._events, seen

    def _counts(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Which rows of x [..., K] are not padding: bool, one for each row; None if all count."""
        spec = spec_of(module)
        if spec is not None and spec.routing == "split":  # rows are sorted by expert: which token each is is not known
            return None
        copies = len(spec.stack(module, spec.down)) if spec is not None and spec.routing == "sorted" else 1
        counts: list[Tensor] = []
        for mask in self._masks:
            if x.dim() >= 3 and x.shape[:2] == mask.shape:
                counts.append(mask.reshape(-1).to(x.device).repeat_interleave(x.shape[2:-1].numel()))
            elif x.dim() == 2 and len(x) == copies * mask.numel():  # flattened to [tokens, K], as for experts
                counts.append(mask.reshape(-1).to(x.device).repeat(copies))
        # Encoder and decoder may have equal numbers of tokens. Which mask is whose is not known then: both count.
        return torch.stack(counts).any(0) if counts else None


def _down(name: str, spec: ExpertsSpec) -> str:
    """Name in the model of the down weights of the experts `name`."""
    return f"{name}.{spec.down}" if name else spec.down


def _input_hook(watch: _Watch) -> Callable[[str, nn.Module], RemovableHandle]:
    def register(name: str, module: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            if x is not None and x.dim() and x.shape[-1]:
                watch.see(name, module, x)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    return register


def _experts_hook(watch: _Watch) -> Callable[[str, nn.Module], RemovableHandle]:
    def register(name: str, layer: nn.Module) -> RemovableHandle:
        spec, names = spec_of(layer), argument_names(type(layer))
        assert spec is not None

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watch.see_experts(name, layer, spec, arguments(names, args, kwargs))

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    return register


# -- several processes ------------------------------------------------------------------------------------------------


def _share() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _merged(watch: _Watch, layers: Iterable[str], downs: Iterable[str], rows: int, example: Any) -> Stats:
    """The statistics of all processes together. downs: names of the weights of experts whose inputs are kept."""
    parts: list[tuple[dict[str, Observer], dict[str, str], dict[str, ExpertsObserver], list[_CodePath]]] = [
        (
            {name: seen.cpu() for name, seen in watch.observers.items()},
            {name: history.hexdigest() for name, history in watch.history.items()},
            {name: seen.cpu() for name, seen in watch.experts.items()},
            watch.paths,
        )
    ]
    processes = _share()[1]
    if processes > 1:
        everyone: list[Any] = [None] * processes
        torch.distributed.all_gather_object(everyone, parts[0])
        parts = everyone
    observers: dict[str, Observer] = {}
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in layers:
        found = [seen[name] for seen, *_ in parts if name in seen and seen[name].tokens]  # experts are run on none, too
        if found:
            observers[name] = found[0]
            for other in found[1:]:
                observers[name] = observers[name].merged(other, rows)
            groups.setdefault(tuple(histories.get(name) for _, histories, *_ in parts), []).append(name)
    shared = tuple(tuple(group) for group in groups.values() if len(group) > 1)
    experts: dict[str, ExpertsObserver] = {}
    for _, _, stacks, _ in parts:
        for name, seen in stacks.items():
            before = experts.get(name)
            experts[name] = seen if before is None else before.merged(seen, rows_of_each(rows, len(seen.amax)))
    experts = {name: experts[name] for name in downs if name in experts}
    further = _on_other_paths([path for *_, paths in parts for path in paths])
    unreached = tuple(name for name in layers if name not in observers)
    return Stats(observers, unreached, shared, example, further, experts)


def _on_other_paths(paths: list[_CodePath]) -> tuple[Any, ...]:
    """The batches of all processes, except the very first, that took a path that no batch before them took."""
    known = _CodePaths()
    new = [path for path in sorted(paths, key=lambda path: path.index) if known.add(path.names, path.structure)]
    return tuple(path.batch for path in new if path.index)
