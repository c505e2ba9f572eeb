"""Run by `test_direct.py`: a kernel that was kept gets what Triton gives it at a call of its own.

The compiler is the real one, for a GPU that need not be there (`ahead_of_time.py`); what would start a kernel notes its
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ahead_of_time import BF16, FP16, FP32, NoGpu, codes, floats, scale
from triton.compiler.compiler import CompiledKernel, LazyDict
from triton.runtime import driver

from octavo.ops.triton import direct

started: list[tuple[Any, ...]] = []


def main() -> None:
    driver.set_active(NoGpu(90))
    CompiledKernel._init_handles = init_handles
    alike = 0
    for operands in calls():
        outputs = [direct.w8a16_row(*operands) for _ in range(2)]
        by_triton, kept = (
            ["y" if any(argument is y for y in outputs) else argument for argument in call] for call in started
        )
        assert len(by_triton) == len(kept) and all(map(same, by_triton, kept)), (by_triton, kept)
        started.clear()
        alike += 1
    print(alike, "alike")


def init_handles(self: Any) -> None:
    """As if the kernel were on a GPU."""
    self.function, self._run = self.hash, lambda *args: started.append(args)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, LazyDict):  # what profilers are told
        return isinstance(other, LazyDict) and one.get() == other.get()
    return one is other or (type(one) is type(other) and one == other)


def calls() -> Iterator[tuple[Any, ...]]:
    yield floats(BF16, 1, 4096), codes(4096, 4096), scale(4096, 1), None
    yield floats(BF16, 1, 1, 4096), codes(32000, 4096), scale(32000, 1), None
    yield floats(FP16, 1, 4096), codes(4096, 4096), scale(4096, 32), floats(FP16, 4096)
    yield floats(FP32, 4096), codes(11008, 4096), scale(11008, 1), floats(BF16, 11008)
    yield floats(BF16, 1, 100), codes(7, 100), scale(7, 1), None
    yield floats(BF16, 1, 1), codes(1, 1), scale(1, 1), floats(FP32, 1)


if __name__ == "__main__":
    main()
