"""Outputs appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.atomic import replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_folder_appear_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with replacing(tmp_path / "file") as unfinished:
        unfinished.write_text("new")
        assert (tmp_path / "file").read_text() == "old" and unfinished.name.startswith(".")
    with replacing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "part").touch()
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["part"]
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("made", ["nothing", "file", "folder"])
def test_nothing_is_left_of_what_was_not_finished(made: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as unfinished:
        if made == "file":
            unfinished.write_text("half")
        elif made == "folder":
            unfinished.mkdir()
            (unfinished / "part").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
