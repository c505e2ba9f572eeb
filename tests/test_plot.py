"""The picture shows the layers that need it most, and is a PNG of the size that it says."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import pytest

from octavo import MissingExtra, plot
from octavo.plot import channel_ranges, outlier_ratio

RANGES = {
    "layers.0.q": [1.0, 2.0, 50.0],
    "layers.0.k": [1.0, 2.0, 50.0],
    "layers.1.q": [1.0, 2.0, 9.0],
    "layers.0.down": [1.0, 2.0, 200.0],
    "layers.1.down": [1.0, 2.0, 800.0],
    "head": [1.0, 2.0, 4.0],
    "a": [1.0, 2.0, 3.0],
    "b": [2.0, 2.0, 2.0],
}


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the panels of the picture that was written last."""
    pytest.importorskip("matplotlib")
    found: list[str] = []
    new_figure = plot.new_figure

    def watched() -> object:
        figure = new_figure()
        save = figure.savefig

        def savefig(*args: object, **options: object) -> None:
            found[:] = [axes.get_title() for axes in figure.axes]
            save(*args, **options)

        monkeypatch.setattr(figure, "savefig", savefig)
        return figure

    monkeypatch.setattr(plot, "new_figure", watched)
    return found


def test_of_each_family_the_most_uneven_layer_is_shown_once(titles: list[str], tmp_path: Path) -> None:
    channel_ranges(RANGES, None, tmp_path / "x.png")
    assert titles == ["layers.1.down", "layers.0.q, k", "head", "a"]


def test_only_what_smoothing_changed_is_shown(titles: list[str], tmp_path: Path) -> None:
    after = {**RANGES, "layers.0.q": [1.0, 1.0, 1.0], "layers.0.k": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]}
    channel_ranges(RANGES, after, tmp_path / "x.png")
    assert titles == ["layers.0.q, k", "b"]
    channel_ranges(RANGES, RANGES, tmp_path / "x.png")
    assert len(titles) == 4


def test_the_file_is_a_png_of_1200_by_800(titles: list[str], tmp_path: Path) -> None:
    file = tmp_path / "ranges"  # whatever its name
    channel_ranges({"mostly dead": [0.0, 0.0, 1.0], "dead": [0.0, 0.0, 0.0]}, None, file)
    assert titles == ["mostly dead"]
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (1200, 800)


def test_a_disk_that_is_full_keeps_what_was_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    resource = pytest.importorskip("resource")
    (tmp_path / "old.png").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for name in ("new.png", "old.png"):
            with pytest.raises(OSError, match="File too large") as caught:
                channel_ranges(RANGES, None, tmp_path / name)
            assert caught.value.filename == str(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"old.png": b"old"}


def test_a_link_stays_one_and_a_device_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "link.png").symlink_to(tmp_path / "file.png")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("link.png", "null"):
        channel_ranges(RANGES, None, tmp_path / name)
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "file.png").read_bytes().startswith(b"\x89PNG")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("channels", "ratio"), [([1.0, 2.0, 8.0], 4), ([3.0], 1), ([0.0, 0.0, 1.0], math.inf), ([0.0, 0.0], 1)]
)
def test_outlier_ratio(channels: list[float], ratio: float) -> None:
    assert outlier_ratio(channels) == ratio


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"octavo\[plot\]"):
        channel_ranges(RANGES, None, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
