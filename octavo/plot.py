"""Pictures of activations: the range of each input channel, before and after smoothing.

The inputs of layers that need it most are shown: of each family (layers whose names differ in numbers only) the layer
with the largest outlier ratio, that is its largest channel amax over its median channel amax, and of the families
those with the largest ratios. Ranges are shown relative to the median channel, because it is not their size but their
unevenness that int8 suffers from, and sorted, the outliers first; both axes are logarithmic.
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
    """Write a PNG of 1200 x 800 pixels with the channel ranges of up to four layers, whole or not at all; an existing
    file is replaced.

    before: as calibration saw them. after: of the same layers in the smoothed model, of which those that it changed
        are shown; None shows `before` alone.
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
    """An empty picture, which has nothing to do with the backend and the windows that matplotlib may have.

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
    """One input, and the layers that are fed it. channels: amax of each, [K]."""

    channels: Sequence[float]
    layers: list[str]
    ratio: float


def _write_whole(path: Path, content: bytes) -> None:
    """A device or a pipe, which nothing may take the place of, is written to itself."""
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
    """The inputs to show, the most uneven first."""
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
    median = statistics.median(channels) or 1.0  # of mostly dead channels the range itself is shown
    heights = [amax / median for amax in sorted(channels, reverse=True)]
    label = f"{when}: largest {_number(max(channels))}, {_number(outlier_ratio(channels))} x the median"
    axes.plot(range(1, len(heights) + 1), heights, color=color, label=label, linewidth=2)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"
