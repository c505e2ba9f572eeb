"""Ops without the dispatcher: their bits, started as Triton starts them, and only where nobody would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.knobs import HookChain

import octavo
from octavo import ops
from octavo.ops import dispatch
from octavo.ops.reference import LONGEST_EXACT
from octavo.ops.triton import direct, int8_linear, launch, linear, quantize, vector
from octavo.ops.triton.launch import Started
from octavo.ops.triton.linear import InTiles
from tests.ops.triton.hopper import as_on_hopper

HERE = Path(__file__).parent
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BIASES = st.sampled_from([None, torch.bfloat16, torch.float32])
Layer = tuple[Tensor, Tensor, Tensor | None]


def layer(n: int, k: int, device: str, groups: int = 1, bias: torch.dtype | None = None) -> Layer:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scale = torch.rand(n, groups, device=device) + 0.1
    return codes, scale, None if bias is None else torch.randn(n, device=device).to(bias)


def rows(m: int, k: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, m, k, device=device).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    n=st.sampled_from([1, 3, 64]),
    k_and_groups=st.sampled_from([(1, 1), (33, 1), (64, 1), (64, 2), (96, 12)]),
    dtype=st.sampled_from(DTYPES),
    bias=BIASES,
)
def test_w8a16(
    device: str, n: int, k_and_groups: tuple[int, int], dtype: torch.dtype, bias: torch.dtype | None
) -> None:
    k, groups = k_and_groups
    x, operands = rows(1, k, device, dtype), layer(n, k, device, groups, bias)
    for _ in range(2):  # started anew, and from what is kept
        y = direct.w8a16_linear(x, *operands)
        assert y is not None and y.shape == (1, 1, n)
        assert torch.equal(y, linear.w8a16_linear(x, *operands))


@pytest.mark.parametrize("m", [2, 16, 40, 80])
@settings(max_examples=10, deadline=None)
@given(
    n=st.sampled_from([1, 3, 70]),
    k_and_groups=st.sampled_from([(1, 1), (33, 1), (64, 2), (96, 12), (1200, 1), (1024, 8)]),
    dtype=st.sampled_from(DTYPES),
    bias=BIASES,
)
def test_w8a16_of_a_few_rows(
    m: int, device: str, n: int, k_and_groups: tuple[int, int], dtype: torch.dtype, bias: torch.dtype | None
) -> None:
    """With K in parts and whole."""
    k, groups = k_and_groups
    x, operands = rows(m, k, device, dtype), layer(n, k, device, groups, bias)
    for _ in range(2):
        y = direct.w8a16_linear(x, *operands)
        assert y is not None and y.shape == (1, m, n)
        assert torch.equal(y, linear.w8a16_linear(x, *operands))


@settings(max_examples=6, deadline=None)
@given(n=st.sampled_from([1, 3, 80]), k=st.sampled_from([16, 144]), dtype=st.sampled_from(DTYPES[:2]), bias=BIASES)
def test_w8a16_of_many_rows(device: str, n: int, k: int, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    x, operands = rows(linear.LEAST_ROWS_ON_HOPPER, k, device, dtype), layer(n, k, device, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        as_on_hopper(device, patch)
        for _ in range(2):
            y = direct.w8a16_linear(x, *operands)
            assert y is not None and y.shape == (*x.shape[:-1], n)
            assert torch.equal(y, linear.w8a16_linear(x, *operands))


@pytest.mark.parametrize("m", [1, 2, 16, 40, 80])
@settings(max_examples=10, deadline=None)
@given(
    n=st.sampled_from([1, 3, 80]),
    k=st.sampled_from([16, 64, 144, 1200]),
    dtype=st.sampled_from(DTYPES),
    bias=BIASES,
    each_row=st.booleans(),
)
def test_w8a8(
    m: int, device: str, n: int, k: int, dtype: torch.dtype, bias: torch.dtype | None, each_row: bool
) -> None:
    x, x_scale = quantize.quantize_per_token(rows(m, k, device))
    x_scale = x_scale if each_row else x_scale[0, 0].clone()
    operands = layer(n, k, device, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        as_on_hopper(device, patch)
        for _ in range(2):
            y = direct.w8a8_linear(x, x_scale, *operands, dtype)
            assert y is not None and y.shape == (1, m, n) and y.dtype == dtype
            assert torch.equal(y, int8_linear.w8a8_linear(x, x_scale, *operands, dtype))


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 4096), (5, 9000), (7, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_per_token(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    for _ in range(2):
        found = direct.quantize_per_token(x)
        assert found is not None
        for one, expected in zip(found, quantize.quantize_per_token(x), strict=True):
            assert one.shape == expected.shape and torch.equal(one, expected)


class Derived(Tensor):
    pass


def misplaced(x: Tensor) -> Tensor:
    """A copy that begins between multiples of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_what_is_not_as_usual_is_left_to_the_op(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (codes, scale, _), bias = rows(1, 64, device), layer(32, 64, device), torch.randn(64, device=device)
    for unusual in (
        (rows(2, 64, device)[:, ::2].expand(1, 2, 64), codes, scale, None),
        (rows(2, 64, device)[..., :63], codes, scale, None),
        (rows(2, 64, device)[:, :0], codes, scale, None),
        (rows(1, 63, device), codes, scale, None),
        (x.double(), codes, scale, None),
        (misplaced(x), codes, scale, None),
        (x, codes.T.contiguous().T, scale, None),
        (x, codes.float(), scale, None),
        (x, codes, torch.rand(32, 2, device=device)[:, ::2], None),
        (x, codes, scale.double(), None),
        (x, codes, scale, bias[::2]),
        (x, codes, scale, bias[:1].clone()),
        (x, codes, scale[:8], None),
        (x, codes, torch.rand(32, 3, device=device), None),
        (torch._neg_view(x), codes, scale, None),
        (x, codes.as_subclass(Derived), scale, None),
        (x, codes[:0], scale[:0], None),
        (x.view(64, 1), codes, scale, None),
    ):
        assert direct.w8a16_linear(*unusual) is None
    many = rows(linear.LEAST_ROWS_ON_HOPPER, 64, device)
    assert direct.w8a16_linear(many, codes, scale, None) is None  # not on Hopper
    x, x_scale = quantize.quantize_per_token(x)
    wide = many.float()
    long = torch.ones(2, LONGEST_EXACT + 1, dtype=torch.int8, device=device)
    many, scales = quantize.quantize_per_token(rows(80, 64, device))
    as_on_hopper(device, monkeypatch)
    assert direct.w8a16_linear(wide, codes, scale, None) is None
    assert direct.w8a16_linear(wide.half(), codes, torch.rand(32, 2, device=device), None) is None
    assert direct.w8a16_linear(wide.half(), codes, scale, None) is not None
    assert direct.w8a8_linear(many, scales, codes, scale, None, torch.bfloat16) is not None
    for unusual8 in (
        (many[:, :64].contiguous(), scales[:, :40].contiguous(), codes, scale, None, torch.bfloat16),
        (many, scales[:, :40].contiguous(), codes, scale, None, torch.bfloat16),
        (x, x_scale.double(), codes, scale, None, torch.bfloat16),
        (x, x_scale, codes, torch.rand(32, 2, device=device), None, torch.bfloat16),
        (x, x_scale, codes, scale, None, torch.float64),
        (x.float(), x_scale, codes, scale, None, torch.bfloat16),
        (many[:0], scales[:0], codes, scale, None, torch.bfloat16),
        (long, long[:, :1].float(), long, long[:, :1].float(), None, torch.bfloat16),
    ):
        assert direct.w8a8_linear(*unusual8) is None
    monkeypatch.setattr(launch, "is_hopper", lambda x: False)
    monkeypatch.setattr(direct, "_kept", {})
    assert direct.w8a8_linear(many, scales, codes, scale, None, torch.bfloat16) is None
    assert direct.rms_norm(bias, bias, 1e-6, True) is not None
    for x, weight in ((bias.double(), bias.double()), (bias, bias.half()), (bias, bias[:32].clone()), (bias, bias[:1])):
        assert direct.rms_norm(x, weight, 1e-6, True) is None
    assert direct.rms_norm(rows(1, 20000, device), rows(1, 20000, device)[0, 0], 1e-6, True) is None
    assert direct.gated(bias, bias, 1.0, 0.0) is not None
    for gate, up in (
        (bias.double(), bias.double()), (bias, bias.half()), (bias, bias[:32].clone()), (bias[::2], bias[::2]),
        (bias[:0], bias[:0]), (bias, misplaced(bias)),
    ):  # fmt: skip
        assert direct.gated(gate, up, 1.0, 0.0) is None
    heads = rows(1, 64, device).view(1, 2, 2, 16)
    angles = rows(1, 32, device).view(1, 2, 16)
    assert direct.rotary(heads.transpose(1, 2), heads.transpose(1, 2), angles, angles) is not None
    for q, k, cos in (
        (heads, heads, angles), (heads.double().transpose(1, 2), heads.double().transpose(1, 2), angles.double()),
        (heads[:0].transpose(1, 2), heads[:0].transpose(1, 2), angles), (heads, heads, misplaced(angles)),
    ):  # fmt: skip
        assert direct.rotary(q, k, cos, cos) is None
    for x in (torch.tensor(1.0, device=device), bias.double(), bias[::2], bias[:0], misplaced(bias)):
        assert direct.quantize_per_token(x) is None


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_whoever_hangs_on_launches_is_left_to_triton(hook: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = HookChain()
    monkeypatch.setattr(direct.knobs.runtime, hook, chain)
    x, operands = rows(1, 64, device), layer(32, 64, device)
    assert direct.w8a16_linear(x, *operands) is not None
    chain.add(lambda metadata: None)
    assert direct.w8a16_linear(x, *operands) is None


class Compiled:
    """Stands for a compiled kernel: notes what it is run on."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.calls.append(args)


def test_one_look_up_serves_all_layers_of_a_shape(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Compiled] = []

    def start(*_: Any) -> Started:
        kernels.append(Compiled())
        return Started(kernels[-1], (8,), (1, 2, 3))

    monkeypatch.setattr(vector, "start_row", start)
    monkeypatch.setattr(direct, "_kept", {})
    streams = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(direct, "driver", SimpleNamespace(active=streams))
    one, other = ((rows(1, 64, device), *layer(32, 64, device)) for _ in range(2))
    for operands in (one, other, one):
        y = direct.w8a16_linear(*operands)
    (kernel,) = kernels
    for call, (x, codes, scale, _) in zip(kernel.calls, (other, one), strict=True):
        assert call[:9] == (8, 1, 1, f"stream of {x.get_device()}", "function", "metadata", None, None, None)
        assert call[9:14] == (x.data_ptr(), None, codes.data_ptr(), scale.data_ptr(), None) and call[15:] == (1, 2, 3)
    assert y is not None and kernel.calls[-1][14] == y.data_ptr()
    x = one[0]
    for operands in (
        (x.half(), *layer(32, 64, device)),
        (x, *layer(32, 64, device, groups=2)),
        (x, *layer(32, 64, device, bias=torch.bfloat16)),
        (x, *layer(32, 64, device, bias=torch.float32)),
        (rows(1, 128, device), *layer(32, 128, device)),
        (x, *layer(16, 64, device)),
    ):
        direct.w8a16_linear(*operands)
    assert len(kernels) == 7 and not any(kernel.calls for kernel in kernels[1:])
    monkeypatch.setattr(direct, "MOST_KEPT", 7)
    direct.w8a16_linear(x, *layer(48, 64, device))
    assert len(direct._kept) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_parts_of_k_go_to_memory_of_their_own(groups: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second kernel adds up what the first has left there; a group's scale is in it already."""
    multiply, add = Compiled(), Compiled()
    both = Started(multiply, (3, 5), (1, 2)), Started(add, (4, 6), (7,))
    launched = InTiles(*both, (5, 4, 32), torch.float32, torch.device(device))
    monkeypatch.setattr(linear, "start_tiles", lambda *_: launched)
    monkeypatch.setattr(direct, "_kept", {})
    streams = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(direct, "driver", SimpleNamespace(active=streams))
    empty, made = torch.empty, []

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        made.append(empty(*args, **kwargs))
        return made[-1]

    x, (codes, scale, bias) = rows(4, 64, device), layer(32, 64, device, groups, torch.float32)
    direct.w8a16_linear(x, codes, scale, bias)
    monkeypatch.setattr(torch, "empty", noting)
    y = direct.w8a16_linear(x, codes, scale, bias)
    assert y is not None and bias is not None
    (sums,) = made
    assert sums.shape == (5, 4, 32) and sums.dtype == torch.float32
    (multiplied,), (added,) = multiply.calls, add.calls
    stream = f"stream of {x.get_device()}"
    assert multiplied[:4] == (3, 5, 1, stream) and added[:4] == (4, 6, 1, stream)
    assert multiplied[9:] == (x.data_ptr(), codes.data_ptr(), scale.data_ptr(), bias.data_ptr(), sums.data_ptr(), 1, 2)
    of_scale = scale.data_ptr() if groups == 1 else None
    assert added[9:] == (sums.data_ptr(), None, of_scale, bias.data_ptr(), y.data_ptr(), 7)


def test_kept_kernels_are_run_as_triton_runs_them() -> None:
    """By the real compiler, in a process of its own: in this one the kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, HERE / "direct_calls.py"], env={**os.environ, "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["37", "alike"]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_whoever_listens_is_heard() -> None:
    x = torch.randn(2, 3)
    assert not dispatch.may_bypass_dispatcher(x)  # a gradient may be wanted
    with torch.no_grad():
        assert dispatch.may_bypass_dispatcher(x)
        assert not dispatch.may_bypass_dispatcher(torch.nn.Parameter(x))
        with Watching():
            assert not dispatch.may_bypass_dispatcher(x)
        with torch.device("cpu"):
            assert not dispatch.may_bypass_dispatcher(x)
        with torch.profiler.profile():
            assert not dispatch.may_bypass_dispatcher(x)
        seen: list[bool] = []

        def note(row: Tensor) -> Tensor:
            seen.append(dispatch.may_bypass_dispatcher(row))
            return row + 0

        torch.vmap(note)(x)
        torch.vmap(lambda _: note(x))(x)
        with pytest.warns((DeprecationWarning, FutureWarning), match="`torch.jit.trace` is deprecated"):
            torch.jit.trace(note, (x,), check_trace=False)
        assert seen == [False] * 3
        compiled = torch.compile(lambda row: row + dispatch.may_bypass_dispatcher(row), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), x)
    with torch.inference_mode():
        assert dispatch.may_bypass_dispatcher(x)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize("m", [1, 8, 100])
def test_modules_take_it(m: int, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if m > 64:
        as_on_hopper("cuda", monkeypatch)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128)).bfloat16().cuda()
    octavo.quantize(model, scheme)
    taken: dict[str, list[bool]] = {}
    for op, function in list(ops.triton.DIRECT.items()):

        def counted(*args: Any, op: str = op, function: Any = function) -> Any:
            result = function(*args)
            taken.setdefault(op, []).append(result is not None)
            return result

        monkeypatch.setitem(ops.triton.DIRECT, op, counted)
    x = rows(m, 256, "cuda")
    expected = model(x)  # with gradients: by the ops
    assert not taken
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x.clone()), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(recorded, model(x.clone()))
    if scheme == "w8a8":
        assert taken == {"w8a8_linear": [True] * 5, "quantize_per_token": [True] * 5}
    else:
        assert taken == {"w8a16_linear": [True] * 5}
