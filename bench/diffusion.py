"""Diffusion models under octavo and torchao: one step of denoising."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import octavo
from bench.goals import human_time
from bench.record import Skipped, kernels_of
from octavo.tables import Table

TITLE = "Diffusion models"
HOW = """
One step of models of diffusers with random weights, in the shapes of published ones, batch 2 (as with guidance), in
bf16: PixArt's transformer (28 layers of 1152, 1024 tokens, an image of 512 x 512), six layers of Flux's (two of both
streams and four of one, of 3072, 1024 tokens of an image and 256 of text; batch 1), and the UNet of Stable Diffusion
1.5 (an image of 512 x 512). All runtimes in turns in one process, medians of the rounds, each warmed up by one step.
torchao's is compiled by `torch.compile`, since it is meant to be; of the UNet that takes many minutes here, and torchao
leaves its convolutions float, so it is left out there. Error: of what a step returns, against bf16's.
"""
ROUNDS = 5
TOLERANCE = 0.2
"""Largest error with which a time counts."""
BF16, W8A16, W8A8 = "bf16", "octavo w8a16", "octavo w8a8"
TORCHAO = "torchao Int8DynamicActivation, compiled"


def _pixart() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=64, num_layers=28, attention_head_dim=72, num_attention_heads=16, cross_attention_dim=1152,
        caption_channels=4096, in_channels=4, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 64, 64),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "timestep": torch.tensor([500, 500]),
    }


def _flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(num_layers=2, num_single_layers=4)
    rows = torch.arange(1024)
    return model, {
        "hidden_states": torch.randn(1, 1024, 64),
        "encoder_hidden_states": torch.randn(1, 256, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros(1024), rows // 32, rows % 32], dim=1),
        "txt_ids": torch.zeros(256, 3),
        "guidance": None,
    }


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return model, {
        "sample": torch.randn(2, 4, 64, 64),
        "encoder_hidden_states": torch.randn(2, 77, 768),
        "timestep": torch.tensor(500),
    }


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], bool]] = {
    "PixArt's transformer": (_pixart, True),
    "Flux's, six layers": (_flux, True),
    "Stable Diffusion's UNet": (_unet, False),
}
"""Name -> what builds it with its inputs, and whether torchao's is compiled and timed."""


def measure() -> Iterator[dict[str, Any]]:
    try:
        import diffusers  # noqa: F401
        import torchao  # noqa: F401
    except ImportError as reason:
        raise Skipped(f"{reason}; pip install 'octavo[bench,diffusers]'") from reason
    kernels = {op: kernels_of(op) for op in ("w8a16_linear", "w8a8_linear", "w8a16_conv")}
    models = {}
    for name, (build, with_torchao) in MODELS.items():
        models[name] = _race(build, with_torchao)
        yield {"kernels": kernels, "models": models}


@torch.no_grad()
def _race(build: Callable[[], tuple[nn.Module, dict[str, Any]]], with_torchao: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # half of the memory while it is built
    model, inputs = build()
    torch.set_default_dtype(torch.float32)
    model = model.to(torch.bfloat16).eval()
    inputs = {name: _half(value) for name, value in inputs.items()}
    runtimes: dict[str, Any] = {BF16: model}
    weights = {}
    for name, scheme in ((W8A16, "w8a16"), (W8A8, "w8a8")):
        runtimes[name] = copy.deepcopy(model)
        report = octavo.quantize(runtimes[name], scheme)
        weights[name] = report.bytes_after / report.bytes_before
    if with_torchao:
        runtimes[TORCHAO] = _torchao(copy.deepcopy(model))
    expected = _step(model, inputs)
    errors = {name: float((_step(one, inputs) - expected).norm() / expected.norm()) for name, one in runtimes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(ROUNDS):
        for name, one in runtimes.items():
            start = time.perf_counter()
            _step(one, inputs)
            seconds[name].append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": weights,
        "errors": errors,
        "seconds": {name: statistics.median(of) for name, of in seconds.items()},
    }


def _half(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def _torchao(model: nn.Module) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


def _step(model: Any, inputs: dict[str, Any]) -> Tensor:
    y: Tensor = model(**inputs, return_dict=False)[0].double()
    return y


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for name, of in found["models"].items():
        for runtime, seconds in of["seconds"].items():
            error = of["errors"][runtime]
            ratio = f"{of['seconds'][BF16] / seconds:.2f}" if error <= TOLERANCE else "wrong"
            size = f"{of['bytes'][runtime]:.2f}" if runtime in of["bytes"] else ""
            label = f"{name}, {of['parameters'] / 1e9:.2f} billion parameters" if runtime == BF16 else ""
            rows.append((label, runtime, human_time(seconds), ratio, size, f"{error:.3f}"))
    columns = ("model", "", "a step", "times as fast as bf16", "bytes", "error")
    kernels = "; ".join(f"{op}: {by}" for op, by in found["kernels"].items())
    return [Table(f"Kernels: {kernels}", columns, tuple(rows), "llrrrr")]
