"""Which GPUs the kernels serve, and which get the tiles of Hopper: asked of a GPU that need not be there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.ops import triton as kernels
from octavo.ops.triton import launch

ASKED_ANEW = kernels.why_not_here.__wrapped__


def gpu_of(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tensor on such a GPU, as far as anyone asks."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(kernels, "why_not_here", ASKED_ANEW)
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_tiles_of_hopper(capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """227 KB of shared memory: CUDA C++ Programming Guide, table of compute capabilities; 12.0 has 99."""
    assert launch.is_hopper(gpu_of(capability, monkeypatch)) is expected


def test_no_tiles_of_hopper_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI300 is a CUDA device to torch, of capability 9.4."""
    x = gpu_of((9, 4), monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not launch.is_hopper(x)


def test_the_reference_serves_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of((7, 5), monkeypatch)
    why = kernels.why_not_here()
    assert why == "the kernels need GPUs of compute capability 8.0, one here has 7.5"
    kernel, fallback = (lambda: lambda x: ("kernel", x)), lambda x: ("reference", x)
    assert kernels._when_called(kernel, fallback)(1) == ("reference", 1)
    gpu_of((8, 0), monkeypatch)
    assert kernels.why_not_here() is None
    assert kernels._when_called(kernel, fallback)(1) == ("kernel", 1)


def test_an_op_is_answered_directly_where_that_is_not_declined() -> None:
    def kernel(x: int) -> tuple[str, int]:
        return "kernel", x

    answer = kernels._fastest(lambda: kernel, {1: "directly"}.get)
    assert answer(1) == "directly" and answer(2) == ("kernel", 2)
    assert kernels._fastest(lambda: kernel, None) is kernel
