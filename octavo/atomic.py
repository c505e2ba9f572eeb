"""Outputs appear whole or not at all: built under a hidden name beside their own, which they get when complete."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a hidden file or folder to make, which takes the place of `path` at the end.

    After any exception in the body nothing is left of it, and `path` is as it was. (A run that is killed leaves it.)
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            unfinished.unlink()
