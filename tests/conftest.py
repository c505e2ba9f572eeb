"""What every test may ask for: real models, real text; and what holds for all of them (offline, reproducible)."""

from __future__ import annotations

import os

# Read once, when huggingface_hub is imported: so they are set before anything that may import it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# The tokenizers' threads and a test that forks do not go together, and the warning about it would be an error.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# Read when triton is imported: without a GPU its kernels run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from examples.models import cache_folder, minilm_folder, smollm2_checkpoint
from octavo.cli.text import sample_text

# A red test must be the doing of the change under test: examples are the same in each run. To search for new ones:
# pytest --hypothesis-profile=default
hypothesis.settings.register_profile("octavo", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("octavo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test starts from the same seed, and leaves torch's global state as it was."""
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a bf16 transformers checkpoint. Made once for all runs; not to be written to."""
    _need("transformers", "gguf", "accelerate")
    try:
        return smollm2_checkpoint(cache_folder())
    except FileNotFoundError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a fp32 transformers checkpoint inside an installed package; not to be written to."""
    _need("transformers")
    try:
        return minilm_folder()
    except FileNotFoundError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def text() -> str:
    """A third of a megabyte of English paragraphs: Python's own documentation, or the file that OCTAVO_TEXT names."""
    if path := os.environ.get("OCTAVO_TEXT"):
        return Path(path).read_text(encoding="utf-8")
    return sample_text()


@pytest.fixture
def compiled_eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile makes its graphs, and runs them as they are: quick, and all that fullgraph asks for is asked."""
    compile = torch.compile

    def without_inductor(
        function: Callable[..., Any], *, fullgraph: bool, dynamic: bool, options: dict[str, Any]
    ) -> Callable[..., Any]:
        of_dynamo = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager", options=of_dynamo)

    monkeypatch.setattr(torch, "compile", without_inductor)
    yield
    torch._dynamo.reset()


def _need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}: pip install 'octavo[hf]'")
