"""What every benchmark on a GPU needs: a GPU, and octavo's own kernels there."""

from __future__ import annotations

import torch

from bench.record import Skipped
from octavo.ops import backends

__all__ = ["need_gpu"]


def need_gpu() -> None:
    """Raises: Skipped without a CUDA device, or where the reference would be timed in the place of the kernels."""
    if not torch.cuda.is_available():
        raise Skipped("needs a CUDA device")
    serving = {row.op: row for row in backends() if row.device == "cuda"}
    if serving["w8a16_linear"].backend != "triton":
        raise Skipped(f"the kernels for GPUs do not serve: {serving['w8a16_linear'].why}")
