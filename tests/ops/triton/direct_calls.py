"""Run by `test_direct.py`: a kernel that was kept gets what Triton gives it at a call of its own.

The compiler is the real one, for a GPU that need not be there (`ahead_of_time.py`); what would start a kernel notes its
arguments. `python tests/ops/triton/direct_calls.py time` prints what both take, without starting anything.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ahead_of_time import BF16, FP16, FP32, NoGpu, codes, floats, launch, scale
from torch import Tensor
from triton.compiler.compiler import CompiledKernel, LazyDict
from triton.knobs import HookChain
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.ops import triton as kernels
from octavo.ops.triton import direct

started: list[tuple[Any, ...]] = []


def main() -> None:
    as_with_a_gpu(started.append)
    scratch = noted_scratch()
    alike = 0
    for function, operands in calls():
        kept = len(direct._kept)
        scratch.clear()
        results = [function(*operands) for _ in range(2)]
        assert len(direct._kept) == kept + 1
        outputs = [result if isinstance(result, tuple) else (result,) for result in results]
        first, again = scratch[: len(scratch) // 2], scratch[len(scratch) // 2 :]
        outputs = [(*output, *made) for output, made in zip(outputs, (first, again), strict=True)]
        launches = [[named(argument, outputs) for argument in call] for call in started]
        count = len(launches) // 2
        assert count == 1 + len(first) == 1 + len(again)  # what goes to scratch is added up
        for by_triton, by_itself in zip(launches[:count], launches[count:], strict=True):
            assert len(by_triton) == len(by_itself) and all(map(same, by_triton, by_itself)), (by_triton, by_itself)
        started.clear()
        alike += 1
    print(alike, "alike")


def noted_scratch() -> list[Tensor]:
    """What is made from now on by `torch.empty`, as it is for parts of a product; outputs are made otherwise."""
    made: list[Tensor] = []
    empty = torch.empty

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        made.append(empty(*args, **kwargs))
        return made[-1]

    torch.empty = noting
    return made


def measure() -> None:
    """Microseconds of a call: of the function that answers the op, and of the one that does without the dispatcher."""
    as_with_a_gpu(lambda args: None)
    with torch.no_grad():
        for function, operands in calls():
            op = function.__name__
            if op not in kernels.OPS:
                continue
            both = [
                min(timeit.repeat(lambda one=one, with_=operands: one(*with_), number=300, repeat=9)) / 300 * 1e6
                for one in (kernels.OPS[op](), function)
            ]
            print(f"{op:20} {tuple(operands[0].shape)!s:16} {both[0]:6.1f} {both[1]:6.1f}")


def as_with_a_gpu(start: Callable[[tuple[Any, ...]], None]) -> None:
    """Kernels are compiled for compute capability 9; `start` is given what would start one."""

    def init_handles(self: Any) -> None:
        self.function, self._run = self.hash, lambda *args: start(args)

    driver.set_active(NoGpu(90))
    launch.is_hopper = lambda x: True
    CompiledKernel._init_handles = init_handles


def named(argument: Any, outputs: list[tuple[Tensor, ...]]) -> Any:
    """A tensor as its address, an output by its place, for the two calls have their own; and nothing for hooks on which
    nothing hangs, nor for what they would be told."""
    if isinstance(argument, LazyDict) or (isinstance(argument, HookChain) and not argument.calls):
        return None
    place = argument.data_ptr() if isinstance(argument, Tensor) else argument
    known = {one.data_ptr(): f"output {at}" for output in outputs for at, one in enumerate(output)}
    return known.get(place, place) if isinstance(place, int) else place


def same(one: Any, other: Any) -> bool:
    if isinstance(one, TensorDescriptor):
        return (one.base.data_ptr(), one.shape, one.strides, one.block_shape) == (
            other.base.data_ptr(), other.shape, other.strides, other.block_shape,
        )  # fmt: skip
    return one is other or (type(one) is type(other) and one == other)


def calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for operands in (
        (floats(BF16, 1, 4096), codes(4096, 4096), scale(4096, 1), None),
        (floats(BF16, 1, 1, 4096), codes(32000, 4096), scale(32000, 1), None),
        (floats(FP16, 1, 4096), codes(4096, 4096), scale(4096, 32), floats(FP16, 4096)),
        (floats(FP32, 4096), codes(11008, 4096), scale(11008, 1), floats(BF16, 11008)),
        (floats(BF16, 1, 100), codes(7, 100), scale(7, 1), None),
        (floats(BF16, 1, 1), codes(1, 1), scale(1, 1), floats(FP32, 1)),
        (floats(BF16, 1, 2048, 4096), codes(11008, 4096), scale(11008, 1), None),
        (floats(FP16, 300, 4096), codes(4096, 4096), scale(4096, 1), floats(FP32, 4096)),
        (floats(BF16, 8, 1, 4096), codes(4096, 4096), scale(4096, 1), None),
        (floats(BF16, 4, 4096), codes(32000, 4096), scale(32000, 1), floats(BF16, 32000)),
        (floats(FP16, 33, 4096), codes(1024, 4096), scale(1024, 32), floats(FP16, 1024)),
        (floats(FP32, 2, 3, 100), codes(7, 100), scale(7, 1), floats(FP32, 7)),
        (floats(BF16, 17, 96), codes(7, 96), scale(7, 12), None),
        (floats(BF16, 2, 1), codes(1, 1), scale(1, 1), None),
        (floats(BF16, 200, 4096), codes(4096, 4096), scale(4096, 1), None),
    ):
        yield direct.w8a16_linear, operands
    for operands in (
        (codes(1, 4096), scale(1, 1), codes(4096, 4096), scale(4096, 1), None, BF16),
        (codes(1, 1, 4096), scale(1), codes(4096, 4096), scale(4096, 1), floats(BF16, 4096), FP32),
        (codes(1, 2048, 4096), scale(1, 2048, 1), codes(11008, 4096), scale(11008, 1), None, BF16),
        (codes(512, 4096), scale(512, 1), codes(4096, 4096), scale(4096, 1), floats(FP32, 4096), FP16),
        (codes(777, 4096), scale(1), codes(4096, 4096), scale(4096, 1), None, BF16),
        (codes(8, 1, 4096), scale(8, 1, 1), codes(4096, 4096), scale(4096, 1), floats(BF16, 4096), BF16),
        (codes(4, 4096), scale(1), codes(32000, 4096), scale(32000, 1), None, FP16),
        (codes(64, 1001), scale(64, 1), codes(33, 1001), scale(33, 1), None, FP32),
        (codes(2, 1), scale(2, 1), codes(1, 1), scale(1, 1), None, BF16),
    ):
        yield direct.w8a8_linear, operands
    for x in (floats(BF16, 1, 4096), floats(BF16, 1, 2048, 4096), floats(FP32, 3, 7, 20000), floats(FP16, 33)):
        yield direct.quantize_per_token, (x,)
    for x in (floats(BF16, 1, 4096), floats(FP16, 1, 2048, 4096), floats(FP32, 3, 7, 33)):
        yield direct.rms_norm, (x, floats(x.dtype, x.shape[-1]), 1e-6, x.dtype == BF16)
    for x in (floats(BF16, 1, 11008), floats(FP16, 1, 2048, 11008), floats(FP32, 3, 7, 33)):
        yield direct.gated, (x, x.clone(), 1.0, 0.0)
    for dtype, batch, tokens in ((BF16, 1, 1), (BF16, 1, 2048), (FP16, 3, 7)):
        q, k = (floats(dtype, batch, tokens, heads, 128).transpose(1, 2) for heads in (32, 8))
        yield direct.rotary, (q, k, floats(dtype, batch, tokens, 128), floats(dtype, batch, tokens, 128))


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["time"] else main()
