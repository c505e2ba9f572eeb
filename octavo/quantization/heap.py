"""Freed memory stays with the process, so that eager PyTorch finds it again.

The output of a layer is megabytes, which are freed a moment later and allocated again by the next layer. glibc returns
free memory at the end of the heap to the system once there is more than twice the size of the largest block that was
ever mapped and freed (M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in mallopt(3)). The next output then consists of new pages,
which the system has to clear, with a page fault each. With int8 products that is a tenth of the time of a prefill
(docs/kernels.md).

Freeing one block of nearly 32 MiB, the largest that glibc adapts to, raises the two thresholds of the process to 64 and
32 MiB. Other allocators ignore it, and so does glibc if MALLOC_* in the environment or mallopt set the thresholds.
"""

from __future__ import annotations

import torch

__all__ = ["keep_freed_memory"]

_LARGEST_LEARNED_FROM = 32 * 2**20 - 8192
"""Bytes; 32 MiB less what the allocator adds."""


def keep_freed_memory() -> None:
    """Let up to 64 MiB of freed memory stay with the process. The block allocated for it is never written to."""
    torch.empty(_LARGEST_LEARNED_FROM, dtype=torch.uint8, device="cpu")
