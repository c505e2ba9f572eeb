"""Recurrent layers in int8 next to torch's, in float and in its own dynamic int8."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import octavo
from bench.goals import human_time
from bench.record import kernels_of
from octavo.cli.op_speed import Way, race
from octavo.primitives import dequantize
from octavo.tables import Table

TITLE = "Recurrent layers"
HOW = """
`nn.LSTM` and `nn.GRU` with random weights, in fp32 and in bf16; the same from `octavo.quantize(model, "w8a16")`; from
`octavo.quantize(model, "w8a8")`, in fp32 but for the products, as torch's `quantize_dynamic` does it. All from the same
input, in turns in one process, medians of the rounds. A step reads weights that the step before has read: they lie in
whatever cache they fit. Each result was held to float64 before, that of w8a16 to the weights which its codes stand for.
"""
CASES = {
    "LSTM of 512, 2 layers (EnCodec's), 150 steps": (nn.LSTM, 512, 2, 150, 1),
    "the same, 16 sequences": (nn.LSTM, 512, 2, 150, 16),
    "LSTM of 640, 2 layers (a transducer's), a step": (nn.LSTM, 640, 2, 1, 1),
    "LSTM of 1024, 100 steps": (nn.LSTM, 1024, 1, 100, 1),
    "LSTM of 2048, 20 steps": (nn.LSTM, 2048, 1, 20, 1),
    "GRU of 256, 2 layers, 150 steps": (nn.GRU, 256, 2, 150, 1),
    "GRU of 1024, 100 steps": (nn.GRU, 1024, 1, 100, 1),
}
TORCH_FP32, TORCH_BF16, TORCH_INT8 = "torch, fp32", "torch, bf16", "torch, dynamic int8"
OCTAVO_FP32, OCTAVO_BF16, OCTAVO_INT8 = "w8a16, fp32", "w8a16, bf16", "w8a8"


def measure() -> dict[str, Any]:
    return {
        "kernels": kernels_of("w8a16_linear"),
        "layers": {name: _layer(*case) for name, case in CASES.items()},
    }


def _layer(cls: Callable[..., nn.Module], hidden: int, layers: int, steps: int, sequences: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": cls(hidden, hidden, layers)}).eval()
    x = torch.randn(steps, sequences, hidden)
    half = copy.deepcopy(model).bfloat16()
    ways = [_way(TORCH_FP32, model, x, model, 1e-4), _way(TORCH_BF16, half, x.bfloat16(), half, 0.03)]
    ways.append(_way(TORCH_INT8, _dynamic(model), x, model, 0.1))
    ways.append(_way(OCTAVO_INT8, _quantized(model, "w8a8"), x, model, 0.1))
    for name, source, tolerance in ((OCTAVO_FP32, model, 1e-4), (OCTAVO_BF16, half, 0.03)):
        int8 = _quantized(source, "w8a16")
        ways.append(_way(name, int8, x.to(next(source.parameters()).dtype), _rounded(source, int8), tolerance))
    return race(ways)


def _quantized(model: nn.Module, scheme: str) -> nn.Module:
    int8 = copy.deepcopy(model)
    octavo.quantize(int8, scheme)
    return int8


def _way(name: str, model: nn.Module, x: Tensor, truth: nn.Module, tolerance: float) -> Way:
    """tolerance: of the error, relative to the result of `truth` in float64, as norms."""
    layer: Any = model["layer"]  # type: ignore[index]
    with torch.no_grad():
        expected = copy.deepcopy(truth).double()["layer"](x.double())[0]  # type: ignore[operator]
    return Way(
        name,
        lambda: layer(x)[0],
        itertools.repeat(()),
        lambda y: bool((y.double() - expected).norm() <= tolerance * expected.norm()),
    )


def _rounded(model: nn.Module, int8: nn.Module) -> nn.Module:
    """The float model with the weights that the codes stand for."""
    truth = copy.deepcopy(model).double()
    for name, codes in int8["layer"].codes().items():  # type: ignore[index]
        truth["layer"].get_parameter(name).data = dequantize(*codes).double()  # type: ignore[index]
    return truth


def _dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(copy.deepcopy(model), {nn.LSTM, nn.GRU})  # type: ignore[no-any-return]


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    pairs = ((OCTAVO_FP32, TORCH_FP32), (OCTAVO_BF16, TORCH_BF16), (OCTAVO_INT8, TORCH_INT8))
    rows = [
        (
            name,
            *(human_time(of[rival]) for _, rival in pairs),
            *(f"{human_time(of[way])} ({of[rival] / of[way]:.2f}x)" for way, rival in pairs),
        )
        for name, of in found["layers"].items()
    ]
    head = ("", *(rival for _, rival in pairs), *(way for way, _ in pairs))
    title = f"In brackets: times as fast as torch's in the same order; kernels: {found['kernels']}"
    return [Table(title, head, tuple(rows), "l" + "r" * (len(head) - 1))]
