"""Freed memory stays with the process, so that eager PyTorch finds it again.

What a layer returns is megabytes, freed a moment later and asked for again by the next. glibc gives what is free at the
end of the heap back to the system as soon as that is twice the largest block that was ever mapped and freed
(M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in mallopt(3)), and then the next layer's output is new pages, which the system
clears, one fault each. With int8 products that is a tenth of the time of a prefill (docs/kernels.md).

To free one block of nearly 32 MiB, the largest from which glibc learns, raises both for the process, to 32 and 64 MiB,
as it would be by any program that frees one. Other allocators take no notice, and neither does glibc where MALLOC_* in
the environment or mallopt said what the thresholds are to be.
"""

from __future__ import annotations

import torch

__all__ = ["keep_freed_memory"]

_LARGEST_LEARNED_FROM = 32 * 2**20 - 8192
"""Bytes, with room for what the allocator adds."""


def keep_freed_memory() -> None:
    """Let up to 64 MiB of freed memory stay with the process. No page of the block is touched."""
    torch.empty(_LARGEST_LEARNED_FROM, dtype=torch.uint8, device="cpu")
