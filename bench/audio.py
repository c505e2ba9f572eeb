"""Pitch, heard by CREPE in float and in int8."""

from __future__ import annotations

import copy
from typing import Any

import torch

import octavo
from bench.record import Skipped
from examples.crepe import crepe, pitch, sound_frames
from octavo.tables import Table, human_percent

TITLE = "CREPE: pitch of recorded sounds"
HOW = """
w8a16 of the published "full" CREPE (22 million fp32 parameters, six convolutions with kernels of 64 to 512 samples) on
the recorded sounds in the package pygame: frames of 64 ms, 5 ms apart. A prediction is whether a frame has a pitch (a
confidence above 0.5) and, if it has, which of 360.
"""
HOP = 80
BATCH = 128


def measure() -> dict[str, Any]:
    try:
        return compare_pitches(HOP)
    except FileNotFoundError as reason:
        raise Skipped(str(reason)) from reason


def compare_pitches(hop: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Quantize a copy of CREPE, and compare what the two hear, in `dtype`, in frames that start `hop` samples apart.

    Raises: FileNotFoundError when the packages with the weights and the sounds are not installed.
    """
    float_model, frames = crepe().to(dtype), sound_frames(hop).to(dtype)
    model = copy.deepcopy(float_model)
    report = octavo.quantize(model, "w8a16")
    with torch.no_grad():
        f, q = (torch.cat([one(batch) for batch in frames.split(BATCH)]).float() for one in (float_model, model))
    heard, heard_int8 = pitch(f), pitch(q)
    both = (heard >= 0) & (heard_int8 >= 0)
    return {
        "frames": len(frames),
        "voiced": int((heard >= 0).sum()),
        "int8_layers": {row.name: row.kind for row in report.rows if row.scheme},
        "bytes_after": report.bytes_after / report.bytes_before,
        "agreement": (heard == heard_int8).double().mean().item(),
        "voiced_agreement": ((heard >= 0) == (heard_int8 >= 0)).double().mean().item(),
        "pitch_agreement": (heard == heard_int8)[both].double().mean().item(),
        "sqnr_db": octavo.sqnr(f, q),
    }


def tables(found: dict[str, Any]) -> list[Table]:
    rows = (
        ("same prediction", f"{found['agreement']:.2%}"),
        ("voiced or not: the same", f"{found['voiced_agreement']:.2%}"),
        ("pitch, where both hear one: the same", f"{found['pitch_agreement']:.2%}"),
        ("SQNR of the confidences", f"{found['sqnr_db']:.1f} dB"),
        ("int8 weights", str(len(found["int8_layers"]))),
        ("bytes of fp32", human_percent(found["bytes_after"])),
    )
    return [
        Table(f"{found['frames']} frames, {found['voiced']} of them with a pitch", ("measure", "value"), rows, "lr")
    ]
