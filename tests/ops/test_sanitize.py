"""`make sanitize`: no kernel touches what is not its own, or does what C++ leaves undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which("make") or not shutil.which(compiler):
        pytest.skip(f"needs make and {compiler}")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    built = subprocess.run(
        [compiler, "-fsanitize=address,undefined", probe, "-o", tmp_path / "probe"], capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"{compiler} has no AddressSanitizer and UBSan: {built.stderr[-200:]}")
    make = ["make", f"-j{os.cpu_count()}", "sanitize", f"CXX={compiler}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "scalar: every shape right" in done.stdout
    both = [f"{kernels}: every shape right" in done.stdout for kernels in ("avx2", "avxvnni, emulated")]
    assert both in ([True, True], [False, False])
    # The emulated tiles stand next to AVX-512, and are left out only where that is.
    right = [f"{kernels}: every shape right" in done.stdout for kernels in ("avx512", "amx, emulated")]
    assert right in ([True, True], [False, False])
