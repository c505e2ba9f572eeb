"""Outputs appear whole or not at all, and what the disk refuses is explained."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from octavo.errors import CheckpointError
from octavo.formats.checkpoint import CheckpointWriter
from octavo.formats.outputs import new_file, new_folder


def test_a_new_folder_appears_at_the_end_only(tmp_path: Path) -> None:
    dst = tmp_path / "parent" / "out"
    with new_folder(dst) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert folder.parent == dst.parent and folder.name.startswith(".")
        assert not dst.exists()
    assert (dst / "sub" / "a.txt").read_text() == "a"
    assert [path.name for path in dst.parent.iterdir()] == ["out"]


def test_a_new_file_appears_at_the_end_only(tmp_path: Path) -> None:
    dst = tmp_path / "parent" / "out.pth"
    with new_file(dst) as file:
        file.write_text("a")
        assert not dst.exists()
    assert dst.read_text() == "a"
    assert [path.name for path in dst.parent.iterdir()] == ["out.pth"]


def test_outputs_have_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").touch()
    with new_folder(tmp_path / "folder"), new_file(tmp_path / "file"):
        pass
    for ours, plain in (("folder", "plain"), ("file", "plain.txt")):
        assert stat.S_IMODE((tmp_path / ours).stat().st_mode) == stat.S_IMODE((tmp_path / plain).stat().st_mode)


class Output(NamedTuple):
    new: Any
    write: Callable[[Path], object]


OUTPUTS = [
    pytest.param(Output(new_folder, lambda path: (path / "half").write_text("half")), id="new_folder"),
    pytest.param(Output(new_file, lambda path: path.write_text("half")), id="new_file"),
]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, OSError])
def test_after_any_exception_nothing_is_left(tmp_path: Path, output: Output, error: type[BaseException]) -> None:
    with pytest.raises(error), output.new(tmp_path / "out") as path:
        output.write(path)
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_exists_is_not_touched(tmp_path: Path, output: Output) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    for name in ("file", "folder"):
        with (
            pytest.raises(CheckpointError, match=f"{name}: already exists; choose another path or remove it"),
            output.new(tmp_path / name),
        ):
            pytest.fail("the body must not run")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "old"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "old").read_text() == "old"


def test_an_empty_folder_may_be_replaced_by_a_folder_and_not_by_a_file(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    dst.mkdir()
    with pytest.raises(CheckpointError, match="already exists"), new_file(dst):
        pytest.fail("the body must not run")
    with new_folder(dst) as folder:
        (folder / "a").touch()
    assert (dst / "a").exists()


def test_a_folder_that_cannot_be_replaced_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"is the current folder.*such as int8"), new_folder("."):
        pytest.fail("the body must not run")
    monkeypatch.chdir("/")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)  # to mount one takes root
    with pytest.raises(CheckpointError, match=r"is a mount point.*such as .*/int8"), new_folder(tmp_path):
        pytest.fail("the body must not run")
    with new_folder(tmp_path / "int8"):
        pass


def test_what_comes_to_exist_meanwhile_is_not_touched(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    with pytest.raises(CheckpointError, match="out: already exists"), new_folder(dst) as folder:
        (folder / "mine").touch()
        dst.mkdir()
        (dst / "theirs").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_the_leftover_of_a_killed_run_is_in_nobodys_way(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as killed, new_folder(tmp_path / "other"):
        shutil.copytree(killed, tmp_path / "leftover")
    (tmp_path / "out").rmdir()
    (tmp_path / "leftover").rename(killed)
    with new_folder(tmp_path / "out") as folder:
        assert folder != killed
    assert (tmp_path / "out").is_dir()


def test_a_relative_destination_and_a_link_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder("out") as folder:
        (folder / "a").touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with new_folder("link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "out" / "a").exists() and (tmp_path / "target" / "a").exists()


@pytest.mark.parametrize("output", OUTPUTS)
def test_links_in_a_circle_are_there(tmp_path: Path, output: Output) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(CheckpointError, match="one: already exists; choose another path"), output.new(tmp_path / "one"):
        pytest.fail("the body must not run")
    with pytest.raises(CheckpointError, match=r"one/in: not written: .*one: "), output.new(tmp_path / "one" / "in"):
        pytest.fail("the body must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"out: the disk is full .*MB are free.*free some space"),
        (errno.EFBIG, r"out: a file would be larger than .* allows.*; give a smaller max_shard_size"),
        (errno.EDQUOT, r"out: the disk is full .*MB are free.*free some space"),
        (errno.EACCES, r"out: not written: .*Permission denied; choose another path or change the permissions"),
        (errno.EROFS, r"out: not written: .*Read-only file system"),
        (errno.ENOENT, r"out: not written: .*No such file"),  # as in a folder of the system, which takes no others
    ],
)
def test_the_disks_refusals_are_explained(tmp_path: Path, output: Output, code: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised, output.new(tmp_path / "deep" / "out") as path:
        output.write(path)
        raise OSError(code, os.strerror(code), str(path))
    assert path.name not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", OUTPUTS)
def test_of_the_parents_only_those_that_were_made_go_after_an_exception(tmp_path: Path, output: Output) -> None:
    (tmp_path / "old").mkdir()
    for parent in ("old", "old/new/new", "new/kept/new"):
        with pytest.raises(ZeroDivisionError), output.new(tmp_path / parent / "out") as path:
            output.write(path)
            if "kept" in parent:
                (tmp_path / "new" / "kept" / "theirs").touch()
            raise ZeroDivisionError
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert found == ["new", "new/kept", "new/kept/theirs", "old"]
    name = "n" * 300
    with pytest.raises(CheckpointError, match="File name too long"), output.new(tmp_path / "more" / name / "out"):
        pytest.fail("the body must not run")
    assert not (tmp_path / "more").exists()


def test_no_error_names_the_hidden_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where one output is made inside of another, as when a model that was calibrated is saved."""
    monkeypatch.chdir(tmp_path)
    plan = {"a": (torch.uint8, (2 * shutil.disk_usage(tmp_path).total,))}
    with pytest.raises(CheckpointError) as raised, new_folder("out") as outer, new_folder(outer) as inner:
        CheckpointWriter(inner, plan)
    assert str(raised.value).startswith("out: the disk is full: ")
    with pytest.raises(CheckpointError) as raised, new_folder("out") as outer, new_folder(outer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(raised.value).startswith("out: the disk is full (")


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_parent_that_is_a_file_is_explained(tmp_path: Path, output: Output) -> None:
    (tmp_path / "file").write_text("old")
    for dst in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(CheckpointError, match=r"out: not written: .*file"), output.new(dst):
            pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "old"


def test_an_error_that_is_not_about_the_destination_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), new_folder(tmp_path / "out"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
