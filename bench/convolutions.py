"""Convolutions in bf16 by octavo's kernel, next to torch's: alone, and in whole models."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from bench.goals import human_time
from bench.record import Skipped
from examples.crepe import crepe, sound_frames
from octavo import ops
from octavo.cli.op_speed import Way, Weights, close_to, race
from octavo.ops import backends
from octavo.primitives import quantize_weight
from octavo.tables import Table

TITLE = "Convolutions"
HOW = """
`F.conv1d` and `F.conv2d` of torch with bf16 weights, `w8a16_conv`, and what answers it where there is no kernel (the
reference: torch's convolution in fp32), all from the same bf16 images, in turns in one process, medians of the rounds.
Weights and images are as a model has them, from whatever cache they fit. Each layer's result was held to float64
before. The models are in bf16 and in w8a16, in turns too: CREPE with its published weights, transformers' ResNet-50 and
wav2vec 2.0 with random ones. Error: of what they return, against bf16's.
"""

LAYERS: dict[str, tuple[list[int], list[int], int, int]] = {
    "ResNet-50, 3x3 of 64": ([1, 64, 56, 56], [64, 64, 3, 3], 1, 1),
    "ResNet-50, 3x3 of 256": ([1, 256, 14, 14], [256, 256, 3, 3], 1, 1),
    "ResNet-50, 1x1 of 1024": ([1, 1024, 14, 14], [256, 1024, 1, 1], 1, 0),
    "ResNet-50, 7x7 at the start": ([1, 3, 224, 224], [64, 3, 7, 7], 2, 3),
    "diffusion, 3x3 of 320": ([1, 320, 64, 64], [320, 320, 3, 3], 1, 1),
    "ViT-B, patches of 16x16": ([1, 3, 224, 224], [768, 3, 16, 16], 16, 0),
    "Whisper, first": ([1, 80, 3000], [512, 80, 3], 1, 1),
    "Whisper, second": ([1, 512, 3000], [512, 512, 3], 2, 1),
}
"""Name -> image, weight, stride and padding."""
ROUNDS = 7

BF16, OURS, REFERENCE = "torch, bf16", "w8a16_conv", "the reference"


def measure() -> dict[str, Any]:
    try:
        import transformers  # noqa: F401
    except ImportError as reason:
        raise Skipped(f"{reason}; pip install 'octavo[hf]'") from reason
    return {
        "kernels": next(f"{row.backend} ({row.why})" for row in backends() if row.op == "w8a16_conv"),
        "layers": {name: _race(*layer) for name, layer in LAYERS.items()},
        "models": {name: _model(*built) for name, build in MODELS.items() if (built := _built(build))},
    }


def _race(image: list[int], kernel: list[int], stride: int, padding: int) -> dict[str, float]:
    chance = torch.Generator().manual_seed(0)
    dims = len(image) - 2
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d)[dims - 1]
    x, weight = torch.randn(image, generator=chance).bfloat16(), torch.randn(kernel, generator=chance).bfloat16()
    codes, scale = quantize_weight(weight)
    wide = codes.double() * scale.double().view(-1, *[1] * (dims + 1))
    in_float = close_to(convolve(x.double(), weight.double(), None, stride, padding))
    in_int8 = close_to(convolve(x.double(), wide, None, stride, padding))
    geometry = [stride] * dims, [padding] * dims, [1] * dims, 1
    operands: Weights = itertools.repeat((x,))
    return race(
        [
            Way(BF16, lambda x: convolve(x, weight, None, stride, padding), operands, in_float),
            Way(OURS, lambda x: ops.w8a16_conv(x, codes, scale, None, *geometry), operands, in_int8),
            Way(
                REFERENCE,
                lambda x: torch.ops.octavo_reference.w8a16_conv(x, codes, scale, None, *geometry),
                operands,
                in_int8,
            ),
        ]
    )


def _resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig()), {"pixel_values": torch.randn(1, 3, 224, 224)}


def _wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config()), {"input_values": torch.randn(1, 80_000)}


def _crepe() -> tuple[nn.Module, dict[str, Tensor]]:
    return crepe(), {"frames": sound_frames(320)[:128]}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "CREPE, 128 frames of sound": _crepe,
    "ResNet-50, one image": _resnet,
    "wav2vec 2.0 base, 5 s of sound": _wav2vec2,
}


def _built(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> tuple[nn.Module, dict[str, Tensor]] | None:
    torch.manual_seed(0)
    try:
        return build()
    except FileNotFoundError:  # the package with its weights is not installed
        return None


@torch.no_grad()
def _model(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    model, batch = model.bfloat16().eval(), {name: x.bfloat16() for name, x in batch.items()}
    int8 = copy.deepcopy(model)
    report = octavo.quantize(int8, "w8a16")
    expected, got = (_output(one(**batch)) for one in (model, int8))
    times: dict[str, list[float]] = {BF16: [], OURS: []}
    for _ in range(ROUNDS):
        for name, one in ((BF16, model), (OURS, int8)):
            start = time.perf_counter()
            one(**batch)
            times[name].append(time.perf_counter() - start)
    return {
        "seconds": {name: statistics.median(of) for name, of in times.items()},
        "bytes": report.bytes_after / report.bytes_before,
        "error": float((got - expected).norm() / expected.norm()),
    }


def _output(found: Any) -> Tensor:
    return (found if isinstance(found, Tensor) else found[0]).double()


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    layers = [
        (
            name,
            human_time(of[BF16]),
            human_time(of[REFERENCE]),
            human_time(of[OURS]),
            _ratio(of, BF16),
            _ratio(of, REFERENCE),
        )
        for name, of in found["layers"].items()
    ]
    models = [
        (
            name,
            human_time(of[BF16]),
            human_time(of[OURS]),
            _ratio(of, BF16),
            f"{one['bytes']:.2f}x",
            f"{one['error']:.3f}",
        )
        for name, one in found["models"].items()
        for of in (one["seconds"],)
    ]
    columns = ("layer", BF16, REFERENCE, OURS, "times as fast as bf16", "as the reference")
    return [
        Table(f"Convolutions alone; kernels: {found['kernels']}", columns, tuple(layers), "lrrrrr"),
        Table("Models", ("model", "bf16", "w8a16", "times as fast", "bytes", "error"), tuple(models), "lrrrrr"),
    ]


def _ratio(seconds: dict[str, float], rival: str) -> str:
    return f"{seconds[rival] / seconds[OURS]:.2f}"
