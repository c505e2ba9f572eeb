"""Folders and files that appear whole or not at all, with errors of the disk in the user's words.

They are built next to their destination under a hidden name, synced, and renamed when complete. If the run is killed,
the destination is complete or does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from octavo.atomic import replacing
from octavo.errors import CheckpointError

__all__ = ["new_file", "new_folder"]


@contextlib.contextmanager
def new_folder(dst: str | Path) -> Iterator[Path]:
    """Build the folder `dst` whole or not at all: yields a hidden folder next to it, which becomes `dst` at the end.

    dst: must not exist, but for an empty folder; parents are created.
    Raises: CheckpointError if `dst` exists, cannot be created or replaced, or the disk fills up meanwhile. After any
        exception in the body nothing is left of it. (A run that is killed leaves the hidden folder, which is in
        nobody's way.)
    """
    _refuse_in_use(Path(dst))
    with _replacing(Path(dst), lambda dst: any(dst.iterdir()) if dst.is_dir() else os.path.lexists(dst)) as temporary:
        temporary.mkdir()
        yield temporary


def _refuse_in_use(dst: Path) -> None:
    """Raise CheckpointError for a folder that cannot be replaced (a mount point), or should not be: the current
    folder."""
    is_mount, is_current = partial(os.path.ismount, os.path.realpath(dst)), partial(dst.samefile, ".")
    for what, is_that in (("a mount point", is_mount), ("the current folder", is_current)):
        if dst.is_dir() and is_that():
            raise CheckpointError(
                f"{dst}: is {what}, expected one that can be replaced whole; give a path in it, such as {dst / 'int8'}"
            )


@contextlib.contextmanager
def new_file(dst: str | Path) -> Iterator[Path]:
    """As `new_folder` for one file: yields the path of a hidden file to write, which becomes `dst` at the end."""
    with _replacing(Path(dst), os.path.lexists) as temporary:
        temporary.touch()
        yield temporary


@contextlib.contextmanager
def _replacing(given: Path, is_taken: Callable[[Path], bool]) -> Iterator[Path]:
    dst = temporary = Path(os.path.realpath(given))  # of links in a circle the first, where Path.resolve would raise
    try:
        if is_taken(dst):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(dst))
        with _parents_of(dst), replacing(dst) as temporary:
            with _called(given, temporary):
                yield temporary
            _sync_tree(temporary)
        _sync(dst.parent)
    except (OSError, SafetensorError) as error:
        explained = _explain(_as_os_error(error), given, dst, temporary)
        if explained is None:
            raise
        raise explained from error


@contextlib.contextmanager
def _parents_of(dst: Path) -> Iterator[None]:
    """Create missing parent folders of `dst`; after an exception those that were created are removed again."""
    made = [folder for folder in dst.parents if not folder.exists()]
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


@contextlib.contextmanager
def _called(given: Path, temporary: Path) -> Iterator[None]:
    """Errors raised inside name the path that the user asked for, not the hidden one."""
    try:
        yield
    except CheckpointError as error:
        if str(temporary) not in str(error):
            raise
        raise CheckpointError(str(error).replace(str(temporary), str(given))) from error


def _as_os_error(error: OSError | SafetensorError) -> OSError:
    """The system's error; safetensors has it only in its message: "... (os error 28)"."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _explain(error: OSError, given: Path, dst: Path, temporary: Path) -> CheckpointError | None:
    """The error to raise for an OSError while `dst` was built; None if it is not about `dst`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(folder for folder in dst.parents if folder.is_dir())).free
        return CheckpointError(
            f"{given}: the disk is full ({error.strerror}, {free / 1e6:.0f} MB are free), nothing was kept; "
            "free some space or choose another disk"
        )
    if error.errno == errno.EFBIG:
        return CheckpointError(
            f"{given}: a file would be larger than the disk, or the limit on files (ulimit -f), allows, nothing was "
            "kept; give a smaller max_shard_size, raise the limit or choose another disk"
        )
    met = [str(path) for path in (error.filename, error.filename2) if path]
    about = {path.replace(str(temporary), str(dst)) for path in met}
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and str(dst) in about:
        return CheckpointError(f"{given}: already exists; choose another path or remove it")
    refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
    if error.errno in refusals or any(path.startswith(str(temporary)) for path in met):
        where = ", ".join(sorted(about)) or str(dst)
        return CheckpointError(
            f"{given}: not written: {where}: {error.strerror}; choose another path or change the permissions"
        )
    return None


def _sync_tree(path: Path) -> None:
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder, name))
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until the disk holds the file, or the folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
