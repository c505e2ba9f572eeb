"""A process for each thing that is measured, so that models, memory and compiled code are not shared."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from typing import Any

from octavo.cli import bench_worker

__all__ = ["Worker", "own_process"]

Worker = Callable[..., Any]
"""Called with a function, its arguments and `limit`, seconds or None; the function runs in the worker's process."""


@contextlib.contextmanager
def own_process() -> Iterator[Worker]:
    """A worker with a new process, which ends with the context, and when a call takes longer than its limit."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=bench_worker.prepare, initargs=(False,)) as pool:
        process = pool.submit(os.getpid).result()

        def call(function: Callable[..., Any], *args: Any, limit: float | None = None) -> Any:
            try:
                return pool.submit(function, *args).result(timeout=limit)
            except TimeoutError:
                os.kill(process, signal.SIGKILL)
                raise

        yield call
