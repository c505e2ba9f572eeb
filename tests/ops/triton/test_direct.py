"""A row without the dispatcher: the bits of the op, started as Triton starts it, and only where nobody would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from octavo import ops
from octavo.ops.triton import direct
from octavo.ops.triton.linear import w8a16_linear

HERE = Path(__file__).parent
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def operands(
    n: int, k: int, device: str, dtype: torch.dtype = torch.bfloat16, groups: int = 1, bias: torch.dtype | None = None
) -> Operands:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scale = torch.rand(n, groups, device=device) + 0.1
    return (
        torch.randn(1, 1, k, device=device).to(dtype), codes, scale,
        None if bias is None else torch.randn(n, device=device).to(bias),
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    n=st.sampled_from([1, 3, 64]),
    k_and_groups=st.sampled_from([(1, 1), (33, 1), (64, 1), (64, 2), (96, 12)]),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, torch.bfloat16, torch.float32]),
)
def test_the_bits_of_the_op(
    device: str, n: int, k_and_groups: tuple[int, int], dtype: torch.dtype, bias: torch.dtype | None
) -> None:
    k, groups = k_and_groups
    given_ = operands(n, k, device, dtype, groups, bias)
    for _ in range(2):  # started anew, and from what is kept
        y = direct.w8a16_row(*given_)
        assert y is not None and y.shape == (1, 1, n)
        assert torch.equal(y, w8a16_linear(*given_))


def test_what_is_not_as_usual_is_left_to_the_op(device: str) -> None:
    x, codes, scale, _ = operands(32, 64, device)
    bias = torch.randn(64, device=device)
    misplaced = torch.randn(65, device=device).bfloat16()[1:].view(1, 64)
    for unusual in (
        (x.expand(2, 1, 64).contiguous(), codes, scale, None),
        (x[..., :63].contiguous(), codes, scale, None),
        (x.double(), codes, scale, None),
        (torch.randn(64, 1, device=device).T.expand(1, 64)[:, ::1].to(torch.int8), codes, scale, None),
        (misplaced, codes, scale, None),
        (x, codes.T.contiguous().T, scale, None),
        (x, codes, torch.rand(32, 2, device=device)[:, ::2], None),
        (x, codes, scale.double(), None),
        (x, codes, scale, bias[::2]),
        (x, torch.empty(0, 64, dtype=torch.int8, device=device), scale[:0], None),
        (x.view(64, 1), codes, scale, None),
    ):
        assert direct.w8a16_row(*unusual) is None


class Compiled:
    """Stands for a compiled kernel: notes what it is run on."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append((grid, *args))


def test_one_look_up_serves_all_layers_of_a_shape(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Compiled] = []

    def start(*_: Any) -> tuple[Compiled, int, tuple[int, ...]]:
        kernels.append(Compiled())
        return kernels[-1], 8, (1, 2, 3)

    monkeypatch.setattr(direct, "start_row", start)
    monkeypatch.setattr(direct, "_started", {})
    one, other = operands(32, 64, device), operands(32, 64, device)
    for given_ in (one, other, one):
        y = direct.w8a16_row(*given_)
    (kernel,) = kernels
    assert y is not None and [call[1:4] for call in kernel.calls] == [other[:3], one[:3]]
    grid, *_, bias, last, n, k, stride = kernel.calls[-1]
    assert grid == (8, 1, 1) and bias is None and last is y and (n, k, stride) == (1, 2, 3)
    for given_ in (
        operands(32, 64, device, torch.float16),
        operands(32, 64, device, groups=2),
        operands(32, 64, device, bias=torch.bfloat16),
        operands(32, 64, device, bias=torch.float32),
        operands(32, 128, device),
        operands(16, 64, device),
    ):
        direct.w8a16_row(*given_)
    assert len(kernels) == 7 and not any(kernel.calls for kernel in kernels[1:])


def test_kept_kernels_are_run_as_triton_runs_them() -> None:
    """By the real compiler, in a process of its own: in this one the kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, HERE / "direct_calls.py"], env={**os.environ, "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "alike"]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_whoever_listens_is_heard() -> None:
    x = torch.randn(2, 3)
    assert not ops._nothing_listens(x)  # a gradient may be wanted
    with torch.no_grad():
        assert ops._nothing_listens(x)
        assert not ops._nothing_listens(torch.nn.Parameter(x))
        with Watching():
            assert not ops._nothing_listens(x)
        with torch.device("cpu"):
            assert not ops._nothing_listens(x)
        seen: list[bool] = []

        def note(row: torch.Tensor) -> torch.Tensor:
            seen.append(ops._nothing_listens(row))
            return row + 0

        torch.vmap(note)(x)
        with pytest.warns(DeprecationWarning):
            torch.jit.trace(note, (x,), check_trace=False)
        assert seen == [False, False]
        compiled = torch.compile(lambda row: row + ops._nothing_listens(row), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), x)
    with torch.inference_mode():
        assert ops._nothing_listens(x)


@pytest.mark.gpu
def test_modules_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import octavo

    layer = torch.nn.Sequential(torch.nn.Linear(256, 128)).bfloat16().cuda()
    octavo.quantize(layer, "w8a16")
    taken: list[bool] = []
    row = direct.w8a16_row

    def counted(*args: Any) -> torch.Tensor | None:
        y = row(*args)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(ops.triton, "w8a16_row", counted)
    x = torch.randn(1, 1, 256, device="cuda").bfloat16()
    expected = layer(x)  # with gradients: by the op
    assert not taken
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(recorded, layer(x))
    assert taken == [True] * 5
