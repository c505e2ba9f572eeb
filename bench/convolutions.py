"""Convolutions by octavo's kernels, next to torch's: alone, and in whole models."""

from __future__ import annotations

import copy
import dataclasses
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
from bench.record import Skipped, kernels_of, multiplies_bf16
from examples.crepe import crepe, sound_frames
from octavo import ops
from octavo.cli.op_speed import Way, Weights, close_to, race
from octavo.primitives import quantize_weight
from octavo.tables import Table

TITLE = "Convolutions"
HOW = """
Torch's convolutions with float weights, `w8a16_conv` or `w8a16_conv_transpose`, and what answers those where there is
no kernel (the reference: torch's convolution in fp32), all from the same images, in turns in one process, medians of
the rounds; in bf16, if torch has instructions for it. Weights and images are as a model has them, from whatever cache
they fit. Each layer's result was held to float64 before. The models are float ones and in w8a16, in turns too, in bf16
and in fp32: CREPE with its published weights, and transformers' with random ones. Error: of what they return, against
the float model's.
"""


@dataclasses.dataclass(frozen=True)
class Layer:
    image: list[int]
    weight: list[int]  # as octavo has it: output channels first
    stride: int = 1
    padding: int = 0
    groups: int = 1
    transposed: bool = False

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        dims = len(self.image) - 2
        return [self.stride] * dims, [self.padding] * dims, [1] * dims

    def torch(self, x: Tensor, weight: Tensor) -> Tensor:
        """By torch, with its own layout of the weight."""
        kind = f"conv{'_transpose' if self.transposed else ''}{len(self.image) - 2}d"
        return getattr(F, kind)(x, weight, None, self.stride, self.padding, groups=self.groups)  # type: ignore[no-any-return]

    def layout(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1).contiguous() if self.transposed else weight

    def int8(self, namespace: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        if self.transposed:
            no_more = [0] * (x.dim() - 2)
            return namespace.w8a16_conv_transpose(x, codes, scale, None, *self.geometry, no_more, self.groups)  # type: ignore[no-any-return]
        return namespace.w8a16_conv(x, codes, scale, None, *self.geometry, self.groups)  # type: ignore[no-any-return]


LAYERS = {
    "ResNet-50, 3x3 of 64": Layer([1, 64, 56, 56], [64, 64, 3, 3], padding=1),
    "ResNet-50, 3x3 of 256": Layer([1, 256, 14, 14], [256, 256, 3, 3], padding=1),
    "ResNet-50, 1x1 of 1024": Layer([1, 1024, 14, 14], [256, 1024, 1, 1]),
    "ResNet-50, 7x7 at the start": Layer([1, 3, 224, 224], [64, 3, 7, 7], stride=2, padding=3),
    "diffusion, 3x3 of 320": Layer([1, 320, 64, 64], [320, 320, 3, 3], padding=1),
    "diffusion, 3x3 of 128 to an image": Layer([1, 128, 256, 256], [3, 128, 3, 3], padding=1),
    "ViT-B, patches of 16x16": Layer([1, 3, 224, 224], [768, 3, 16, 16], stride=16),
    "Whisper, first": Layer([1, 80, 3000], [512, 80, 3], padding=1),
    "Whisper, second": Layer([1, 512, 3000], [512, 512, 3], stride=2, padding=1),
    "ConvNeXt, 7x7 in each of 96": Layer([1, 96, 56, 56], [96, 1, 7, 7], padding=3, groups=96),
    "ConvNeXt, 7x7 in each of 768": Layer([1, 768, 7, 7], [768, 1, 7, 7], padding=3, groups=768),
    "MobileNet, 3x3 in each of 96": Layer([1, 96, 112, 112], [96, 1, 3, 3], stride=2, padding=1, groups=96),
    "ResNeXt, 3x3 in groups of 8": Layer([1, 256, 56, 56], [256, 8, 3, 3], padding=1, groups=32),
    "Conformer, 31 in each of 1024": Layer([1, 1024, 1000], [1024, 1, 31], padding=15, groups=1024),
    "DAC, up by 8 from 1536": Layer([1, 1536, 32], [768, 1536, 16], stride=8, padding=4, transposed=True),
    "DAC, up by 2 from 192": Layer([1, 192, 8192], [96, 192, 4], stride=2, padding=1, transposed=True),
    "U-Net, up by 2x2 from 128": Layer([1, 128, 64, 64], [64, 128, 2, 2], stride=2, transposed=True),
}
ROUNDS = 7

TORCH, OURS, REFERENCE = "torch", "octavo", "the reference"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
if not multiplies_bf16():
    del DTYPES["bf16"]  # in which torch's convolutions take seconds there, where those in fp32 take milliseconds
LAYERS_IN = next(iter(DTYPES))


def measure() -> dict[str, Any]:
    try:
        import transformers  # noqa: F401
    except ImportError as reason:
        raise Skipped(f"{reason}; pip install 'octavo[hf]'") from reason
    return {
        "kernels": kernels_of("w8a16_conv"),
        "layers_in": LAYERS_IN,
        "layers": {name: _race(layer) for name, layer in LAYERS.items()},
        "models": {
            name: {kind: _model(*built, dtype) for kind, dtype in DTYPES.items()}
            for name, build in MODELS.items()
            if (built := _built(build))
        },
    }


def _race(layer: Layer) -> dict[str, float]:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(layer.image, generator=chance).to(DTYPES[LAYERS_IN])
    rows = torch.randn(layer.weight, generator=chance).to(DTYPES[LAYERS_IN])
    codes, scale = quantize_weight(rows)
    weight = layer.layout(rows)
    wide = layer.layout(codes.double() * scale.double().view(-1, *[1] * (codes.dim() - 1)))
    in_float = close_to(layer.torch(x.double(), weight.double()))
    in_int8 = close_to(layer.torch(x.double(), wide))
    operands: Weights = itertools.repeat((x,))
    return race(
        [
            Way(TORCH, lambda x: layer.torch(x, weight), operands, in_float),
            Way(OURS, lambda x: layer.int8(ops, x, codes, scale), operands, in_int8),
            Way(REFERENCE, lambda x: layer.int8(torch.ops.octavo_reference, x, codes, scale), operands, in_int8),
        ]
    )


def _resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig()), {"pixel_values": torch.randn(1, 3, 224, 224)}


def _wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config()), {"input_values": torch.randn(1, 80_000)}


def _convnext() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig()), {"pixel_values": torch.randn(1, 3, 224, 224)}


def _mobilenet() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config()), {"pixel_values": torch.randn(1, 3, 224, 224)}


def _dac() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import DacConfig, DacModel

    return DacModel(DacConfig()), {"input_values": torch.randn(1, 1, 16384)}


def _crepe() -> tuple[nn.Module, dict[str, Tensor]]:
    return crepe(), {"frames": sound_frames(320)[:64]}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "CREPE, 64 frames of sound": _crepe,
    "ResNet-50, one image": _resnet,
    "ConvNeXt-T, one image": _convnext,
    "MobileNetV2, one image": _mobilenet,
    "wav2vec 2.0 base, 5 s of sound": _wav2vec2,
    "DAC (codec), 1 s of sound": _dac,
}


def _built(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> tuple[nn.Module, dict[str, Tensor]] | None:
    torch.manual_seed(0)
    try:
        return build()
    except FileNotFoundError:  # the package with its weights is not installed
        return None


@torch.no_grad()
def _model(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    model, batch = copy.deepcopy(model).to(dtype).eval(), {name: x.to(dtype) for name, x in batch.items()}
    int8 = copy.deepcopy(model)
    report = octavo.quantize(int8, "w8a16")
    expected, got = (_output(one(**batch)) for one in (model, int8))
    times: dict[str, list[float]] = {"float": [], OURS: []}
    for _ in range(ROUNDS):
        for name, one in (("float", model), (OURS, int8)):
            start = time.perf_counter()
            one(**batch)
            times[name].append(time.perf_counter() - start)
    return {
        "seconds": {name: statistics.median(of) for name, of in times.items()},
        "bytes": report.bytes_after / report.bytes_before,
        "error": float((got - expected).norm() / expected.norm()),
    }


def _output(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        return found.double()
    return (found["audio_values"] if "audio_values" in found else found[0]).double()


# -- the page -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    layers = [
        (
            name,
            human_time(of[TORCH]),
            human_time(of[REFERENCE]),
            human_time(of[OURS]),
            _ratio(of, TORCH),
            _ratio(of, REFERENCE),
        )
        for name, of in found["layers"].items()
    ]
    models = [
        (
            name,
            kind,
            human_time(of["float"]),
            human_time(of[OURS]),
            _ratio(of, "float"),
            f"{one['bytes']:.2f}x",
            f"{one['error']:.3f}",
        )
        for name, kinds in found["models"].items()
        for kind, one in kinds.items()
        for of in (one["seconds"],)
    ]
    columns = ("layer", TORCH, REFERENCE, OURS, "times as fast as torch", "as the reference")
    of_models = ("model", "in", "float", "w8a16", "times as fast", "bytes", "error")
    title = f"Convolutions alone, in {found['layers_in']}; kernels: {found['kernels']}"
    return [
        Table(title, columns, tuple(layers), "lrrrrr"),
        Table("Models", of_models, tuple(models), "llrrrrr"),
    ]


def _ratio(seconds: dict[str, float], rival: str) -> str:
    return f"{seconds[rival] / seconds[OURS]:.2f}"
