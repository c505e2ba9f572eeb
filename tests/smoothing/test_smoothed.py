"""What smoothing divided outputs by is what the two float models' outputs differ by."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.calibration.calibrate import calibrate
from octavo.quantization.quantize import quantize
from octavo.smoothing.smooth import smooth
from octavo.smoothing.smoothed import smooth_scales
from tests.outliers import ARCHITECTURES, inject, outputs

pytestmark = pytest.mark.filterwarnings("ignore::octavo.errors.OctavoWarning")  # embeddings stay float


def linear_outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What the linear layers of a float model put out when they ran first, [rows, N]."""
    found: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        found.setdefault(name, output.detach().flatten(0, -2))

    handles = [
        layer.register_forward_hook(partial(keep, name))
        for name, layer in model.named_modules()
        if type(layer).__name__ in ("Linear", "Conv1D")
    ]
    outputs(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "whisper"])
def test_int8_weights_tell_what_the_outputs_were_divided_by(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    batch, other = architecture.batch(9), architecture.batch(12)
    inject(architecture, model)
    original = copy.deepcopy(model)
    stats = calibrate(model, [batch])
    smooth(model, stats)
    smoothed = copy.deepcopy(model)
    quantize(model, "w8a8")
    before, after = linear_outputs(original, other), linear_outputs(smoothed, other)
    ratios = {name: (y.norm(dim=0) / after[name].norm(dim=0)).log2().round().exp2() for name, y in before.items()}
    expected = {name: ratio for name, ratio in ratios.items() if (ratio != 1).any()}
    found = smooth_scales(original, model, other)
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert smooth_scales(smoothed, model, other) == {}
