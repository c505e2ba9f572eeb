"""Freed memory stays: asked of glibc's own statistics, in a process whose heap nobody has used before."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import ctypes, json, torch, octavo
    from torch import nn

    class Statistics(ctypes.Structure):  # mallinfo2(3)
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "uordblks", "free", "keepcost"
        )]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Statistics
    {quantize}
    before = mallinfo().mapped
    outputs = [torch.ones(3 * 2**20) for _ in range(4)]  # 12 MiB each
    mapped = mallinfo().mapped - before
    del outputs
    print(json.dumps([mapped, mallinfo().free]))
"""


def statistics(quantize: str) -> tuple[int, int]:
    """Of 48 MiB of outputs: bytes that were mapped for them, and that the heap has free afterwards."""
    program = textwrap.dedent(PROGRAM.format(quantize=quantize))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    mapped, kept = json.loads(done.stdout)
    return mapped, kept


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another allocator than glibc's, or before 2.33"
)
def test_what_a_pass_frees_stays_for_the_next() -> None:
    mapped, kept = statistics("octavo.quantize(nn.Sequential(nn.Linear(8, 8)), 'w8a16')")
    assert mapped == 0 and kept > 40 * 2**20
    mapped, kept = statistics("")
    assert mapped > 40 * 2**20 and kept < 8 * 2**20, "it does so by itself: octavo.quantization.heap has nothing to do"
