"""`import octavo` is cheap: next to torch it takes no time, and it loads nothing that was not asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BUDGET = 0.06
"""Of the processor time that `import torch` takes, what `import octavo` may add: a ratio, so that a slow machine counts
for both."""

UNASKED = {"transformers", "triton", "lm_eval", "compressed_tensors", "gguf", "peft", "rich", "yaml", "huggingface_hub"}

PROBE = """
import gc, json, sys, time
start = time.process_time()
import torch
before = set(sys.modules)
gc.collect()  # of torch's objects, which may be due at any import after it, and takes longer than ours
middle = time.process_time()
import octavo
from octavo import *
end = time.process_time()
print(json.dumps([(end - middle) / (middle - start), sorted(set(sys.modules) - before)]))
"""


def test_the_package_itself_does_not_wait_for_torch() -> None:
    # `octavo --help` imports octavo first.
    probe = "import sys, octavo; assert 'torch' not in sys.modules; octavo.quantize; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_who_does_not_compile_does_not_wait_for_torchs_compiler() -> None:
    # What `octavo generate` and `octavo bench` import: seconds, with the compiler.
    pytest.importorskip("transformers")
    probe = "import sys, octavo.integrations.generation; assert 'torch._inductor' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)


def probe() -> tuple[float, list[str]]:
    """What `import octavo` and its names took in a fresh interpreter, as a share of what torch took, and the modules
    that they brought."""
    # As an installed package has it: compiled once, and not again in every process.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env=env)
    share, modules = json.loads(run.stdout)
    return share, modules


def test_import_adds_little_time_and_no_third_party() -> None:
    least = float("inf")
    for _ in range(8):
        share, modules = probe()
        assert "octavo" in modules
        assert UNASKED.intersection(name.partition(".")[0] for name in modules) == set()
        # The run with the least has the least of other processes in it.
        least = min(least, share)
        if least < BUDGET:
            return
    raise AssertionError(f"import octavo adds {least:.0%} to import torch, at most {BUDGET:.0%} allowed")
