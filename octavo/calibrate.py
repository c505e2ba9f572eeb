"""Run a float model on sample inputs, and keep what quantizing its layers' inputs needs to know: `Stats`.

    stats = octavo.calibrate(model, batches)
    octavo.smooth(model, stats, alpha="auto")            # uses the channels' ranges, and follows them
    octavo.quantize(model, "w8a8-static", stats=stats)   # uses the tensors' ranges

Watched are the inputs of linear layers (and transformers' Conv1D), and of modules with weights of their own that are no
layer octavo knows: routers and experts. Memory is a few rows a layer, whatever the number of tokens.

Under torch.distributed every process takes its share of the batches (those whose index is its rank, modulo the number
of processes), and all end with the same Stats, equal to those of one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from octavo.errors import CalibrateError
from octavo.feeding import at_rest, check_batches, device_of, feed, first_tensor, padding_mask
from octavo.layers import kind_of
from octavo.observers import Observer, ObserverKind, observe

__all__ = ["Stats", "calibrate"]

Progress = Callable[[int, int], None]
"""Called with (batches done, number of batches or 0)."""

ROWS = 256
"""Rows of a layer's input that are kept, to measure errors on."""


@dataclasses.dataclass
class Stats:
    """What calibration saw.

    observers: layer's name -> its inputs. unreached: layers that no batch reached. shared: groups of layers that were
    fed the very same tensor, at every call. example: the first batch, by which `octavo.smooth` finds its way through
    the model; None for statistics that came without one.
    """

    observers: dict[str, Observer]
    unreached: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    example: Any = None

    def siblings(self, name: str) -> tuple[str, ...]:
        """The layers that are always fed the same tensor as layer `name`, itself among them."""
        return next((group for group in self.shared if name in group), (name,))

    def input_scale(self, name: str, dtype: torch.dtype, observer: ObserverKind = "absmax") -> Tensor:
        """The static scale of layer `name`: amax / 127, rounded *up* to `dtype`, in which it is stored; fp32 [1].

        Raises: CalibrateError for a layer that no batch reached, or whose inputs were all 0: it has no scale.
        """
        seen = self.observers.get(name)
        largest = seen.largest(observer) if seen else 0.0
        if largest == 0:
            what = "its inputs were all 0" if seen else "no batch reached it"
            raise CalibrateError(f"{name}: has no static scale, {what}; calibrate on inputs that reach it")
        wanted = torch.tensor([largest / 127], dtype=torch.float32)
        stored = wanted.to(dtype)
        if stored.float() < wanted:  # rounding down would clip the largest values
            stored = torch.nextafter(stored, torch.full_like(stored, torch.inf))
        return stored.float()

    def save(self, path: str | Path) -> Path:
        """Write the statistics as one safetensors file, whole or not at all; an existing one is replaced.

        Raises: CalibrateError if the folder cannot be written to, or the example batch holds what no file can.
        """
        tensors: dict[str, Tensor] = {}
        for name, seen in self.observers.items():
            if self.siblings(name)[0] == name:  # its siblings were fed the same
                tensors |= {f"{name}:{part}": getattr(seen, part).contiguous() for part in _PARTS}
        about = {
            "format": _FORMAT,
            "tokens": {name: seen.tokens for name, seen in self.observers.items()},
            "unreached": self.unreached,
            "shared": self.shared,
            "example": _flattened(self.example, tensors),
        }
        _write_whole(Path(path), tensors, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Read what `save` wrote. Raises: CalibrateError naming the file for anything else."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("octavo", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        except (OSError, SafetensorError, ValueError) as error:
            raise CalibrateError(f"{path}: cannot be read as calibration statistics: {error}") from error
        if about.get("format") != _FORMAT:
            raise CalibrateError(f"{path}: holds no calibration statistics; make them with `octavo calibrate`")
        stats = cls({}, tuple(about["unreached"]), tuple(map(tuple, about["shared"])))
        for name, tokens in about["tokens"].items():
            owner = stats.siblings(name)[0]
            stats.observers[name] = Observer(**{part: tensors[f"{owner}:{part}"] for part in _PARTS}, tokens=tokens)
        stats.example = _restored(about["example"], tensors)
        return stats

    def save_act_scales(self, path: str | Path) -> None:
        """Write SmoothQuant's own `act_scales/*.pt`: layer's name -> amax of each input channel, fp32 [K]."""
        torch.save({name: seen.amax for name, seen in self.observers.items()}, path)

    @classmethod
    def load_act_scales(cls, path: str | Path) -> Stats:
        """Read SmoothQuant's `act_scales/*.pt`. It holds channel amax only: smoothing needs a `batch` to go with it,
        and alpha="auto", the other observers and the measured repair need a calibration of one's own.

        Raises: CalibrateError naming the file for anything else.
        """
        try:
            scales = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged pickle raises differs between releases
            raise CalibrateError(f"{path}: cannot be read as a file of act_scales: {error}") from error
        if not isinstance(scales, Mapping) or not all(
            isinstance(name, str) and isinstance(t, Tensor) and t.dim() == 1 and t.is_floating_point()
            for name, t in scales.items()
        ):
            raise CalibrateError(f"{path}: expected a dict of layer's name -> amax of each input channel [K]")
        for name, amax in scales.items():
            _refuse_infinite(name, amax)
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(
            {
                name: Observer(
                    amax.float(), torch.zeros(8192, dtype=torch.int64), amax.new_zeros(0, len(amax)), empty, 0
                )
                for name, amax in scales.items()
            }
        )


def calibrate(model: nn.Module, batches: Iterable[Any], *, rows: int = ROWS, progress: Progress | None = None) -> Stats:
    """Run `model` on `batches` once, and keep what int8 inputs need to know of each layer's input.

    model: float, on any device; not modified. It runs in eval mode and without gradients.
    batches: iterable of tensors, tuples (positional arguments) or dicts (keyword arguments), of any lengths. Positions
        that a dict's `attention_mask` (for a decoder, `decoder_attention_mask`) marks with 0 are not counted.
    rows: whole input rows that are kept of each layer, drawn evenly from all tokens; errors are measured on them.
    progress: called with (batches done, number of batches or 0).
    Returns: the statistics, in the computer's own memory.
    Raises: CalibrateError for a NaN or inf, naming the layer that it entered, and if no batch came; EvaluateError for
        batches that the model cannot be fed.
    """
    check_batches(batches)
    layers = {name: module for name, module in model.named_modules() if is_watched(module)}
    if not layers:
        raise CalibrateError("the model has no linear layer to calibrate; expected nn.Linear or transformers' Conv1D")
    watch = _Watch(rows)
    device = device_of(model, "model")
    rank, processes = _share()
    total = len(batches) if isinstance(batches, Sized) else 0
    example, count = None, 0
    with at_rest(model), _hooks(layers, watch):
        for count, batch in enumerate(batches, start=1):
            example = batch if count == 1 else example
            if (count - 1) % processes == rank:
                watch.begin(batch, count - 1)
                feed(model, batch, device, f"batch {count - 1}: the model")
                watch.end()
            if progress is not None:
                progress(count, total)
    if not count:
        raise CalibrateError("batches is empty, expected at least one; an iterator can be read only once")
    return _merged(watch, layers, rows, example)


def is_watched(module: nn.Module) -> bool:
    """Whether calibration keeps statistics of the module's input: it multiplies it by a weight."""
    kind = kind_of(module)
    if kind is not None:
        return kind.int8_input
    return any(p is not None and p.dim() >= 2 and p.is_floating_point() for p in module._parameters.values())


class _Watch:
    """Collects what the hooks see. A tensor that several layers are fed is looked at once."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.observers: dict[str, Observer] = {}
        self.history: dict[str, Any] = {}
        self._masks: list[Tensor] = []
        self._batch = 0
        self._calls: dict[str, int] = {}
        self._last: tuple[weakref.ref[Tensor], int, int, Observer] | None = None
        self._events = 0

    def begin(self, batch: Any, index: int) -> None:
        masks = (padding_mask(batch, name) for name in ("attention_mask", "decoder_attention_mask"))
        self._masks = [mask for mask in masks if mask is not None and mask.dim() == 2]
        self._batch = index
        self._calls = {}

    def end(self) -> None:
        for name in self._calls:  # in the order in which they ran: the first is where it began
            _refuse_infinite(name, self.observers[name].amax, f"batch {self._batch}")

    def see(self, name: str, x: Tensor) -> None:
        call = self._calls[name] = self._calls.get(name, -1) + 1
        event, seen = self._observed(x, call)
        before = self.observers.get(name)
        self.observers[name] = dataclasses.replace(seen) if before is None else before.merged(seen, self.rows)
        self.history.setdefault(name, hashlib.blake2b(digest_size=16)).update(f"{event},".encode())

    def _observed(self, x: Tensor, call: int) -> tuple[int, Observer]:
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2], last[3]
        self._events += 1
        seen = observe(self._without_padding(x), self._batch * 4096 + call, self.rows)
        self._last = (weakref.ref(x), x._version, self._events, seen)
        return self._events, seen

    def _without_padding(self, x: Tensor) -> Tensor:
        for mask in self._masks:
            if x.dim() >= 3 and x.shape[:2] == mask.shape:
                return x[mask.to(x.device)].flatten(0, -2)
            if x.dim() == 2 and len(x) == mask.numel():  # tokens in one row, as mixtures of experts have them
                return x[mask.reshape(-1).to(x.device)]
        return x.reshape(-1, x.shape[-1])


@contextlib.contextmanager
def _hooks(layers: Mapping[str, nn.Module], watch: _Watch) -> Iterator[None]:
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_seer(name, watch), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seer(name: str, watch: _Watch) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and x.dim() and x.shape[-1]:
            watch.see(name, x)

    return hook


def _refuse_infinite(name: str, amax: Tensor, where: str = "the statistics") -> None:
    if not bool(torch.isfinite(amax).all()):
        found = "NaN" if bool(torch.isnan(amax).any()) else "inf"
        channel = int((~torch.isfinite(amax)).nonzero()[0])
        raise CalibrateError(
            f"{name}: {where} holds {found} in its input (channel {channel}), expected finite activations; run the "
            "model in fp32 or bf16, or look for the layer before it that overflows"
        )


# -- several processes ------------------------------------------------------------------------------------------------


def _share() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _merged(watch: _Watch, layers: Iterable[str], rows: int, example: Any) -> Stats:
    """What all processes saw."""
    parts: list[tuple[dict[str, Observer], dict[str, str]]] = [
        (
            {name: seen.cpu() for name, seen in watch.observers.items()},
            {name: history.hexdigest() for name, history in watch.history.items()},
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
        found = [seen[name] for seen, _ in parts if name in seen]
        if found:
            observers[name] = found[0]
            for other in found[1:]:
                observers[name] = observers[name].merged(other, rows)
            groups.setdefault(tuple(histories.get(name) for _, histories in parts), []).append(name)
    shared = tuple(tuple(group) for group in groups.values() if len(group) > 1)
    return Stats(observers, tuple(name for name in layers if name not in observers), shared, example)


# -- on disk ------------------------------------------------------------------------------------------------------

_FORMAT = "octavo-stats-1"
_PARTS = ("amax", "histogram", "rows", "order")
"""The tensors of an Observer, by which they are called in the file."""


def _flattened(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved into `tensors`."""
    if isinstance(value, Tensor):
        name = f"example:{sum(key.startswith('example:') for key in tensors)}"
        tensors[name] = value.detach().cpu().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _flattened(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {"list": [_flattened(item, tensors) for item in value]}
    if value is None or isinstance(value, str | int | float):
        return {"value": value}
    raise CalibrateError(
        f"the first batch holds a {type(value).__name__}, which a file cannot; expected tensors, numbers, strings, and "
        "lists and dicts of them"
    )


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restored(item, tensors) for key, item in content.items()}
    if kind == "list":
        return [_restored(item, tensors) for item in content]
    return content


def _write_whole(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    try:
        handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, unfinished, metadata={"octavo": json.dumps(about)})
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as error:
        raise CalibrateError(f"{path}: cannot be written: {error}") from error
