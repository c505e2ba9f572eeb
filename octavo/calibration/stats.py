"""The statistics that calibration collects, `Stats`, in memory and on disk; and which layers they are collected for.

Observed are the inputs of linear layers (and transformers' Conv1D), of stacks of experts, and of each expert's down
projection; also of modules that hold weights themselves and are no kind of layer that octavo knows, such as routers.
Their memory is that of a few rows per layer, whatever the number of tokens.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from octavo.atomic import replacing
from octavo.calibration.expert_inputs import ExpertsObserver
from octavo.calibration.observers import Observer, ObserverKind
from octavo.errors import CalibrateError
from octavo.experts import held_for
from octavo.layers import kind_of, why_not

__all__ = [
    "Stats",
    "check_stats",
    "columns_of",
    "is_watched",
    "largest_of_columns",
    "refuse_infinite",
    "watched_modules",
]


@dataclasses.dataclass
class Stats:
    """The statistics of a model's activations.

    observers: layer's name -> what was kept of its inputs [..., K], see octavo.calibration.observers.
    unreached: names of layers that no token reached.
    shared: groups of layers that were fed the very same tensor at every call.
    example: the first batch, which `octavo.smooth` runs to analyze the model; None for statistics without one.
    further: batches that may take other paths through the model's code, on which smoothing is checked too. They reached
        layers that no earlier batch did, or have arguments of another structure: other names, flags, numbers, dtypes or
        numbers of dimensions (at most 16 batches for the latter).
    experts: name of a stack of down projections -> its inputs, expert by expert.
    columns: layer's name -> the largest magnitude of each column of its weight, fp32 [K]. By it a model is told from
        its smoothed version.
    """

    observers: dict[str, Observer]
    unreached: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    example: Any = None
    further: tuple[Any, ...] = ()
    experts: dict[str, ExpertsObserver] = dataclasses.field(default_factory=dict)
    columns: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def unrouted(self) -> dict[str, tuple[int, ...]]:
        """Name of a stack of down projections -> its experts that saw no token; smoothing leaves these as they are."""
        return {name: seen.unrouted for name, seen in self.experts.items() if seen.unrouted}

    def check_are_of(self, model: nn.Module) -> None:
        """Raise CalibrateError if these are the statistics of another model: one with other layers or input sizes, or
        one that is smoothed while `model` is not (or the other way round)."""
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        strange = [name for name in self.observers if name not in modules]
        strange += [name for name in self.experts if name not in parameters]
        if strange:
            raise CalibrateError(
                f"stats are of another model: it has no layer {strange[0]!r} ({len(strange)} such); calibrate this one"
            )
        for name, seen in self.observers.items():
            columns = columns_of(modules[name])
            if columns not in (None, len(seen.amax)):
                raise CalibrateError(
                    f"stats are of another model: {name!r} had {len(seen.amax)} input channels, expected {columns}; "
                    "calibrate this one"
                )
        if any(len(seen.rows) for seen in self.observers.values()):  # SmoothQuant's files have linear layers only
            missing = watched_modules(model).keys() - self.observers.keys() - set(self.unreached)
            if missing:
                raise CalibrateError(
                    f"stats are of another model: they do not know {min(missing)!r} ({len(missing)} such); calibrate "
                    "this one"
                )

        known = {name: modules[name] for name in self.columns if name in modules}
        for name, now in largest_of_columns(known).items():
            if _is_smoothed(self.columns[name], now):
                raise CalibrateError(
                    f"stats are of another model: the columns of {name!r} differ from theirs by powers of two, so that "
                    "one of the two was smoothed; calibrate this one, or give the stats that octavo.smooth was given, "
                    "which follow"
                )

    def siblings(self, name: str) -> tuple[str, ...]:
        """The layers that are always fed the same tensor as layer `name`, itself among them."""
        return next((group for group in self.shared if name in group), (name,))

    def input_scale(self, name: str, dtype: torch.dtype, observer: ObserverKind = "absmax") -> Tensor:
        """The static scale of layer `name`, fp32 [1]: amax / 127, rounded *up* to `dtype`, in which files store it.

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
            if self.siblings(name)[0] == name:  # layers that share an input are stored once
                tensors |= {f"{name}:{part}": getattr(seen, part).contiguous() for part in _PARTS}
        for name, experts in self.experts.items():
            tensors |= {f"{name}:{part}": value.contiguous() for part, value in vars(experts).items()}
        tensors |= {f"{name}:columns": largest for name, largest in self.columns.items()}
        about = {
            "format": _FORMAT,
            "tokens": {name: seen.tokens for name, seen in self.observers.items()},
            "unreached": self.unreached,
            "shared": self.shared,
            "experts": list(self.experts),
            "columns": list(self.columns),
            "example": _flattened(_plain(self.example), tensors),
            "further": [_flattened(_plain(batch), tensors) for batch in self.further],
        }
        _write_whole(Path(path), partial(save_file, tensors, metadata={"octavo": json.dumps(about)}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Read what `save` wrote. Raises: CalibrateError naming the file for anything else."""
        if Path(path).is_dir():
            raise CalibrateError(f"{path}: is a folder, expected the file of statistics that `octavo calibrate` wrote")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("octavo", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        except (OSError, SafetensorError, ValueError) as error:
            raise CalibrateError(f"{path}: cannot be read as calibration statistics: {error}") from error
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            raise CalibrateError(f"{path}: holds no calibration statistics; make them with `octavo calibrate`")
        try:
            return cls._of(about, tensors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CalibrateError(f"{path}: is damaged ({error!r}); make it again with `octavo calibrate`") from error

    @classmethod
    def _of(cls, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> Stats:
        """The statistics that `save` wrote as `about` and `tensors`."""
        stats = cls({}, tuple(about["unreached"]), tuple(map(tuple, about["shared"])))
        for name, tokens in about["tokens"].items():
            owner = stats.siblings(name)[0]
            stats.observers[name] = Observer(**{part: tensors[f"{owner}:{part}"] for part in _PARTS}, tokens=tokens)
        parts = [field.name for field in dataclasses.fields(ExpertsObserver)]
        for name in about["experts"]:
            stats.experts[name] = ExpertsObserver(**{part: tensors[f"{name}:{part}"] for part in parts})
        stats.columns = {name: tensors[f"{name}:columns"] for name in about.get("columns", ())}
        stats.example = _restored(about["example"], tensors)
        stats.further = tuple(_restored(batch, tensors) for batch in about.get("further", ()))
        return stats

    def save_act_scales(self, path: str | Path) -> None:
        """Write SmoothQuant's own `act_scales/*.pt`: layer's name -> amax of each input channel, fp32 [K].

        Raises: CalibrateError if it cannot be written.
        """
        scales = io.BytesIO()  # torch.save to a file does not report a full disk as such
        torch.save({name: seen.amax for name, seen in self.observers.items()}, scales)
        _write_whole(Path(path), lambda file: file.write_bytes(scales.getvalue()))

    @classmethod
    def load_act_scales(cls, path: str | Path) -> Stats:
        """Read SmoothQuant's `act_scales/*.pt`. It holds only the amax of channels: `smooth` then needs a `batch`, and
        alpha="auto", observers other than absmax and the measured repair need a calibration by octavo.

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
            refuse_infinite(name, amax)
        return cls({name: Observer.of_amax(amax.float()) for name, amax in scales.items()})


def check_stats(stats: object) -> None:
    """Raise CalibrateError if `stats` is not a Stats."""
    if not isinstance(stats, Stats):
        raise CalibrateError(
            f"stats is a {type(stats).__name__}, expected what octavo.calibrate returned; octavo.Stats.load reads a "
            "file of it"
        )


# -- which layers ------------------------------------------------------------------------------------------------


def watched_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose inputs calibration observes, by name.

    A child that only holds the weights of the experts around it (`held_for`) is not one of them: it gets no tokens.
    """
    holders = held_for(model)
    return {name: module for name, module in model.named_modules() if is_watched(module) and name not in holders}


def is_watched(module: nn.Module) -> bool:
    """Whether calibration observes the input of `module`: whether the module multiplies it by a weight."""
    kind = kind_of(module)
    if kind is not None:
        return kind.int8_input
    if isinstance(module, torch.jit.ScriptModule):
        return False  # which takes no hooks
    if any(True for child in module.children() for _ in child.parameters()):
        return False  # a block, or a model that holds a table of positions, does not multiply its input by a weight
    return any(p is not None and p.dim() >= 2 and p.is_floating_point() for p in module._parameters.values())


def columns_of(module: nn.Module) -> int | None:
    """K of a layer that has one weight [N, K]; None for other modules."""
    kind, weight = kind_of(module), module._parameters.get("weight")
    if kind is None or weight is None or weight.dim() != 2:
        return None
    return kind.rows(weight, module).shape[1]


def largest_of_columns(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Name of each linear layer that can be int8 -> the largest magnitude of each column of its weight, fp32 [K]."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        kind = kind_of(layer)
        if kind is not None and kind.int8_input and columns_of(layer) and why_not(layer, kind) is None:
            weight = layer.get_parameter("weight").detach()
            if weight.numel() and not weight.is_meta:
                found[name] = kind.rows(weight, layer).abs().amax(0).float().cpu()
    return found


def _is_smoothed(before: Tensor, now: Tensor) -> bool:
    """Whether columns [K] differ by powers of two, more than rounding to another dtype explains."""
    if before.shape != now.shape:
        return False
    alive = (before > 0) & (now > 0)
    log2 = (now[alive] / before[alive]).log2()
    return bool(((log2 - log2.round()).abs() < 0.01).all()) and bool(log2.round().any())


def refuse_infinite(name: str, amax: Tensor, where: str = "the statistics") -> None:
    if not bool(torch.isfinite(amax).all()):
        found = "NaN" if bool(torch.isnan(amax).any()) else "inf"
        channel = int((~torch.isfinite(amax)).nonzero()[0])
        raise CalibrateError(
            f"{name}: {where} holds {found} in its input (channel {channel}), expected finite activations; run the "
            "model in fp32 or bf16, or look for the layer before it that overflows"
        )


# -- on disk ------------------------------------------------------------------------------------------------------

_FORMAT = "octavo-stats-2"
_PARTS = ("amax", "histogram", "rows", "order")
"""Fields of Observer that are tensors, and suffixes of their names in the file."""


def _plain(batch: Any) -> Any:
    """A batch of keyword arguments as a dict, whatever kind of mapping it is."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _flattened(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A batch, or a part of one, in JSON's types; its tensors are added to `tensors`.

    Raises: CalibrateError for types that would not come back as they were, such as a named tuple or an encoder's
        output.
    """
    if isinstance(value, Tensor):
        name = f"example:{sum(key.startswith('example:') for key in tensors)}"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if type(value) in (dict, OrderedDict):
        return {"dict": {str(key): _flattened(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return {"tuple" if isinstance(value, tuple) else "list": [_flattened(item, tensors) for item in value]}
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
    if kind in ("list", "tuple"):
        items = [_restored(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file that has the name `path` when it is complete."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with replacing(path) as unfinished:
            unfinished.touch()
            mode = unfinished.stat().st_mode  # by the umask; safetensors makes files that only their owner can read
            write(unfinished)
            unfinished.chmod(mode)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if any(
            os.strerror(number) in why for number in (errno.ENOSPC, errno.EDQUOT)
        ):  # safetensors has no error number
            raise CalibrateError(f"{path}: the disk is full ({why}); free some space or choose another disk") from error
        raise CalibrateError(
            f"{path}: cannot be written: {why}; choose another path or change the permissions"
        ) from error
