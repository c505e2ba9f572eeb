"""A billion parameters in seconds, and never two copies of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bench.quantize import llama, octavo_w8a16, time_once

pytestmark = pytest.mark.slow


def test_a_billion_parameters() -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'octavo[hf]'")
    source = llama()
    size = sum(parameter.nbytes for parameter in source.parameters())
    assert size > 2e9
    rounds: list[dict[str, Any]] = []
    # Of a machine with other work the fastest round is the one that says what octavo takes; the first warms up.
    while len(rounds) < 2 or (len(rounds) < 8 and min(one["seconds"] for one in rounds) > 2):
        model = copy.deepcopy(source)
        rounds.append(time_once(model, octavo_w8a16))
        codes = model.model.layers[15].mlp.up_proj.weight
        assert codes.dtype == torch.int8
        del model
    assert min(one["seconds"] for one in rounds) <= 2
    if rounds[0]["peak_rise"] is None:
        pytest.skip("the peak of a process's memory is known on Linux only")
    assert max(one["peak_rise"] for one in rounds) < 0.1 * size
