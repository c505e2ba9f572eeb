"""Classifiers of handwritten digits in float and in int8."""

from __future__ import annotations

import copy
from typing import Any

import torch

import octavo
from bench.record import Skipped
from examples.digits import Convolutions, Patches, digits, trained
from octavo.tables import Table, human_percent

TITLE = "Handwritten digits: convolutions and a vision transformer"
HOW = """
Two classifiers trained here on half of scikit-learn's 1797 images of handwritten digits (seed 0), judged on the other
half, which other people wrote. The first is made of full, depthwise and pointwise `nn.Conv2d`, the second of
patches and `nn.TransformerEncoder`. w8a16 of every layer.
"""
MODELS = {"convolutions": (Convolutions, {"shift": 1}), "transformer": (Patches, {})}


def measure() -> dict[str, Any]:
    try:
        return {name: compare_predictions(name) for name in MODELS}
    except ImportError as reason:
        raise Skipped(f"{reason}; pip install scikit-learn") from reason


def compare_predictions(name: str) -> dict[str, Any]:
    """Train a model of MODELS, quantize a copy, and compare what they say of the held-out images."""
    build, how = MODELS[name]
    train, (images, labels) = digits()
    float_model = trained(build, train, **how)
    model = copy.deepcopy(float_model)
    report = octavo.quantize(model, "w8a16")
    with torch.no_grad():
        f, q = float_model(images), model(images)
    return {
        "images": len(images),
        "int8_layers": {row.name: row.kind for row in report.rows if row.scheme},
        "accuracy": {
            "float": (f.argmax(1) == labels).double().mean().item(),
            "int8": (q.argmax(1) == labels).double().mean().item(),
        },
        "agreement": (f.argmax(1) == q.argmax(1)).double().mean().item(),
        "sqnr_db": octavo.sqnr(f, q),
    }


def tables(found: dict[str, Any]) -> list[Table]:
    rows = tuple(
        (
            name,
            str(len(one["int8_layers"])),
            human_percent(one["accuracy"]["float"]),
            human_percent(one["accuracy"]["int8"]),
            f"{one['agreement']:.2%}",
            f"{one['sqnr_db']:.1f} dB",
        )
        for name, one in found.items()
    )
    columns = ("model", "int8 weights", "accuracy, float", "accuracy, int8", "same prediction", "SQNR of the logits")
    count = next(iter(found.values()))["images"]
    return [Table(f"{count} held-out images", columns, rows, "lrrrrr")]
