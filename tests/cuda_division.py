"""How CUDA devices divide a tensor by a number, for tests on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CudaDivision"]


class CudaDivision(TorchDispatchMode):
    """x / number is x * (1 / number) within it, as it is there; x / tensor is rounded to the nearest."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * torch.ones_like(args[0]).div_(args[1])
        return func(*args, **(kwargs or {}))
