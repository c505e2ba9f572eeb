"""`import octavo` is cheap: next to torch it takes no time, and it loads nothing that was not asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BUDGET = 0.050
"""Seconds of CPU that octavo may add to `import torch`."""

UNASKED = {"transformers", "triton", "lm_eval", "compressed_tensors", "gguf", "peft", "rich", "yaml", "huggingface_hub"}

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import octavo
from octavo import *
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
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
    """Seconds that `import octavo` and its names took in a fresh interpreter, and the modules that they brought."""
    # As an installed package has it: compiled once, and not again in every process.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env=env)
    seconds, modules = json.loads(run.stdout)
    return seconds, modules


def test_import_adds_little_time_and_no_third_party() -> None:
    fastest = float("inf")
    for _ in range(8):
        seconds, modules = probe()
        assert "octavo" in modules
        assert UNASKED.intersection(name.partition(".")[0] for name in modules) == set()
        # The fastest run has the least of other processes in it.
        fastest = min(fastest, seconds)
        if fastest < BUDGET:
            return
    raise AssertionError(
        f"import octavo adds {fastest * 1e3:.0f} ms to import torch, at most {BUDGET * 1e3:.0f} allowed"
    )
