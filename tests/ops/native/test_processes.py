"""Forks, threads that are told how many, and what is chosen when the library is loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from octavo.errors import QuantizeError
from octavo.ops import native
from tests.ops.native.kernels import FORCED, ISAS, WITH_KERNELS
from tests.ops.native.run_python import ROOT, run_python

pytestmark = WITH_KERNELS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork(isa: str) -> None:
    program = """
import os, torch
from octavo import ops
torch.set_num_threads(2)
weight, scale = torch.randint(-128, 128, (600, 1100), dtype=torch.int8), torch.rand(600, 1)
x = torch.randn(40, 1100)
before = ops.w8a16_linear(x, weight, scale)
child = os.fork()
if not child:
    torch.set_num_threads(1)  # as the workers of a DataLoader do: OpenMP's threads do not survive a fork
    os._exit(0 if torch.equal(ops.w8a16_linear(x, weight, scale), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ops.w8a16_linear(x, weight, scale), before)
"""
    done = run_python(program, OCTAVO_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_the_number_of_threads_is_obeyed() -> None:
    program = """
import statistics, time, torch
from octavo import ops
weight, scale, x = torch.zeros(4096, 4096, dtype=torch.int8), torch.ones(4096, 1), torch.randn(16, 4096).bfloat16()
for threads in (1, 2):
    torch.set_num_threads(threads)
    ops.w8a16_linear(x, weight, scale)
    shares = []
    for _ in range(25):
        all_threads, this_thread = time.process_time(), time.thread_time()
        ops.w8a16_linear(x, weight, scale)
        shares.append((time.process_time() - all_threads) / (time.thread_time() - this_thread))
    print(statistics.median(shares))
"""
    done = run_python(program, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr
    one, two = (float(line) for line in done.stdout.split())
    assert one < 1.1 and 1.5 < two < 2.5


def test_an_instruction_set_that_nobody_knows() -> None:
    serving = native.select(FORCED).isa
    with pytest.raises(QuantizeError, match=r"OCTAVO_ISA is 'mmx', expected one of: .*scalar"):
        native.select("mmx")
    assert native.select(FORCED).isa == serving
    done = run_python("import octavo.ops", OCTAVO_ISA="mmx")
    assert done.returncode and "OCTAVO_ISA is 'mmx', expected one of:" in done.stderr


def test_an_instruction_set_that_this_machine_lacks() -> None:
    lacking = [name for name in ("amx", "avx512", "avxvnni", "avx2") if name not in ISAS]
    if not lacking:
        pytest.skip("this machine has them all")
    with pytest.raises(QuantizeError, match=rf"OCTAVO_ISA is '{lacking[0]}', (but .*(lacks|denied)|expected one of)"):
        native.select(lacking[0])


def test_without_the_library(tmp_path: Path) -> None:
    """One warning, and the reference answers."""
    shutil.copytree(ROOT / "octavo", tmp_path / "octavo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch
    from octavo import ops
    weight, x = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.ones(2, 3)
    assert ops.w8a16_linear(x, weight, torch.ones(1, 1)).tolist() == [[2.0], [2.0]]
mine = [str(one.message) for one in seen if "octavo" in str(one.message)]
assert len(mine) == 1 and "without its native kernels" in mine[0] and "OCTAVO_BACKEND=reference" in mine[0], mine
rows = [row for row in ops.backends() if row.op == "w8a16_linear" and row.device == "cpu"]
assert [row.backend for row in rows] == ["reference"] and "liboctavo.so is missing" in rows[0].why, rows
"""
    done = run_python(program, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, which comes with compilers")
def test_loading_the_library_asks_for_no_instruction_set() -> None:
    """What runs then, and all that it calls, has no vectors that only some processors have."""
    library = next((ROOT / "octavo" / "ops").glob("liboctavo*"))
    listing = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"^\w+ <([^>]+)>:\n(.*?)(?:\n\n|\Z)", listing, re.M | re.S))
    todo, seen = [name for name in functions if name.startswith("_GLOBAL__sub_I")], set[str]()
    assert todo
    while todo:
        seen.add(name := todo.pop())
        code = functions[name]
        assert not re.search(r"%[yz]mm|\tv[a-z0-9]+ ", code), name
        called = re.findall(r"\t(?:call|jmp) +\w+ <([^>+]+)>", code)
        todo += [each for each in called if each in functions and each not in seen]
