"""Memory: how much of it this process took, and how fast it is, to which what a model reads per second is held.

CPU     resident bytes          speed: torch.sum over a GiB of fp32, bytes read
CUDA    bytes that torch took   speed: a copy of a GiB on the device, bytes read and written
"""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

import torch

__all__ = ["BYTES", "MemoryStream", "peak_memory"]

BYTES = 1 << 30
"""More than any cache holds."""


def peak_memory(device: str) -> int:
    """Bytes of memory that this process has held at most: of the GPU on "cuda", otherwise resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux adds to ru_maxrss what the process was before it became this program: a copy of its parent.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MemoryStream:
    """A GiB of memory on `device`, to be streamed through."""

    def __init__(self, device: str) -> None:
        self._data = torch.ones(BYTES // 4, dtype=torch.float32, device=device)
        self._copy = torch.empty_like(self._data) if device == "cuda" else None
        self.bytes_per_s()  # threads, kernels and pages are made at the first pass

    def bytes_per_s(self) -> float:
        """Bytes that went over the memory's wires in one pass, per second."""
        if self._copy is None:
            start = time.perf_counter()
            self._data.sum()
            return BYTES / (time.perf_counter() - start)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._copy.copy_(self._data)
        torch.cuda.synchronize()
        return 2 * BYTES / (time.perf_counter() - start)
