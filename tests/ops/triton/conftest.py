"""Where the Triton kernels run in these tests: on a GPU, or in Triton's interpreter, on tensors of the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")


@pytest.fixture(scope="session")
def device() -> str:
    """Of the tensors that kernels are given: "cuda", or "cpu" where `TRITON_INTERPRET` interprets them."""
    return "cuda" if torch.cuda.is_available() else "cpu"
