"""What tests of kernels for compute capability 9 share: the interpreter plays one, and launches are noted."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from octavo.ops.triton import launch as launching

__all__ = ["as_on_hopper", "launched"]


def as_on_hopper(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen as for compute capability 9; skipped on a GPU that has less."""
    if device == "cuda" and not launching.is_hopper(torch.empty(1, device=device)):
        pytest.skip("needs compute capability 9")
    monkeypatch.setattr(launching, "is_hopper", lambda x: True)


def launched(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that `module` launches from now on."""
    names = []
    launch = launching.launch

    def noting(kernel: Any, *args: Any, **meta: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(module, "launch", noting)
    return names
