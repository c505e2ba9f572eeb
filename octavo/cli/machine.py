"""The hardware and versions that a measurement was taken on."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from octavo import __version__

__all__ = ["describe_machine", "machine_line"]


def describe_machine() -> dict[str, Any]:
    """CPU, cores, torch's threads, the vector instructions that torch uses, GPU, and versions, in JSON types."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version_of("transformers"),
        "octavo": __version__,
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in one line for people."""
    return (
        f"{machine['cpu']}, cores: {machine['cores']}, threads: {machine['threads']}, "
        f"CPU capability: {machine['cpu_capability']}; GPU: {machine['gpu'] or 'none'}; torch {machine['torch']}, "
        f"octavo {machine['octavo']}"
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
