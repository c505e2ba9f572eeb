"""Pictures of activations: the range of each input channel, before and after smoothing.

The outlier ratio of a layer's input is its largest channel amax over its median channel amax. The pictures show the
inputs with the largest ratios, one from each family (layers whose names differ in numbers only). Ranges are relative to
the median channel, because int8 suffers from their unevenness, not their size. They are sorted, the outliers first, and
both axes are logarithmic.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.atomic import replacing
from octavo.errors import MissingExtra
from octavo.tables import in_general

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["channel_ranges", "new_figure", "outlier_ratio"]

Ranges = Mapping[str, Sequence[float]]
"""Layer's name -> amax of each of its input channels, [K]."""

_PANELS = 4
_BEFORE, _AFTER = "#c44e52", "#2a6fb0"


def channel_ranges(before: Ranges, after: Ranges | None, path: str | Path) -> None:
    """Write a PNG of 1200 x 800 pixels with the channel ranges of up to four layers.

    The file is written whole or not at all; an existing one is replaced.
    before: the ranges that calibration saw. after: those of the same layers in the smoothed model. Only layers whose
        ranges changed are shown then; None shows `before` alone.
    Raises: MissingExtra without matplotlib; OSError naming the file if it cannot be written.
    """
    figure = new_figure()
    alive = {name: channels for name, channels in before.items() if any(channels)}
    changed = {name: channels for name, channels in alive.items() if after is None or after[name] != channels}
    for place, one in enumerate(_most_uneven(changed or alive), 1):
        _draw(figure.add_subplot(2, 2, place), one, None if after is None else after[one.layers[0]])
    figure.suptitle("Largest magnitude of each input channel" + (", before and after smoothing" if after else ""))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    _write_whole(Path(path), picture.getvalue())


def new_figure() -> Figure:
    """An empty figure, independent of matplotlib's backend and open windows.

    Raises: MissingExtra without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib is needed to draw a plot: pip install 'octavo[plot]'") from error
    return Figure(figsize=(12, 8), dpi=100, layout="constrained")


def outlier_ratio(channels: Sequence[float]) -> float:
    """Largest channel amax over the median one; 1 where all are 0, inf where more than half are."""
    top, median = max(channels), statistics.median(channels)
    if median == 0:
        return float("inf") if top > 0 else 1.0
    return top / median


@dataclasses.dataclass
class _Input:
    """One input, and the layers that it feeds. channels: the amax of each channel, [K]."""

    channels: Sequence[float]
    layers: list[str]
    ratio: float


def _write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary file and rename it; a device or a pipe, which must not be replaced, is written directly."""
    place = path.resolve()
    try:
        if place.exists() and not place.is_file():
            place.write_bytes(content)
        else:
            with replacing(place) as unfinished:
                unfinished.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _most_uneven(ranges: Ranges) -> list[_Input]:
    """The inputs to show, largest outlier ratio first."""
    inputs: dict[tuple[float, ...], _Input] = {}
    for name, channels in ranges.items():
        one = inputs.setdefault(tuple(channels), _Input(channels, [], outlier_ratio(channels)))
        one.layers.append(name)
    families: dict[str, _Input] = {}
    for one in sorted(inputs.values(), key=lambda one: -one.ratio):
        families.setdefault(in_general(one.layers[0]), one)
    return list(families.values())[:_PANELS]


def _draw(axes: Axes, one: _Input, after: Sequence[float] | None) -> None:
    _draw_curve(axes, one.channels, "before", _BEFORE)
    if after is not None:
        _draw_curve(axes, after, "after", _AFTER)
    first, *others = one.layers
    axes.set_title(", ".join([first, *(name.rpartition(".")[2] for name in others)]), fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("channels, sorted by range")
    axes.set_ylabel("amax / median channel's amax")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)


def _draw_curve(axes: Axes, channels: Sequence[float], when: str, color: str) -> None:
    median = statistics.median(channels) or 1.0  # where most channels are dead, show the range itself
    heights = [amax / median for amax in sorted(channels, reverse=True)]
    label = f"{when}: largest {_number(max(channels))}, {_number(outlier_ratio(channels))} x the median"
    axes.plot(range(1, len(heights) + 1), heights, color=color, label=label, linewidth=2)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"
