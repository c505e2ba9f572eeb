"""Memory: how much of it this process used, and its bandwidth, the bound on the weights that a model reads per second.

        memory used                 bandwidth
CPU     resident bytes              torch.sum over 1 GiB of fp32: bytes read
CUDA    bytes that torch allocated  a copy of 1 GiB on the device: bytes read and written
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
    """Peak memory of this process in bytes: the GPU's on "cuda", otherwise resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # On Linux, ru_maxrss includes the time before exec, when the process was a copy of its parent. VmHWM does not.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MemoryStream:
    """1 GiB of memory on `device`, to measure bandwidth with."""

    def __init__(self, device: str) -> None:
        self._data = torch.ones(BYTES // 4, dtype=torch.float32, device=device)
        self._copy = torch.empty_like(self._data) if device == "cuda" else None
        self.bytes_per_s()  # the first pass starts threads, loads kernels and maps pages

    def bytes_per_s(self) -> float:
        """Bytes per second moved to and from memory in one pass."""
        if self._copy is None:
            start = time.perf_counter()
            self._data.sum()
            return BYTES / (time.perf_counter() - start)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._copy.copy_(self._data)
        torch.cuda.synchronize()
        return 2 * BYTES / (time.perf_counter() - start)
