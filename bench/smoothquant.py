"""What int8 activations cost a language model, plain, smoothed, dynamic and static."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

from torch import Tensor, nn

import octavo
from bench.language import WINDOW, checkpoint, known_text, losses
from octavo.calibration.stats import Stats
from octavo.integrations.language_model import load_language_model, token_ids
from octavo.recipe import Recipe
from octavo.tables import Table, human_percent

TITLE = "SmolLM2-135M-Instruct: int8 activations, SmoothQuant"
HOW = """
Every linear layer of the decoder, weights in int8 with a scale per output channel. Perplexity on real text, in windows
of 512 tokens that do not overlap, activations in bf16 where they are not int8. Calibrated on 64 windows from the end of
the same text, which are not judged on. The ratio is to the float model on the same tokens; its standard error, from the
windows' own changes, says how much another text of this length could move it. "Smoothed" is `octavo.smooth(model,
stats, alpha="auto")`: pairs found by watching the model run, alpha chosen for each by its measured error. "Repaired"
static models keep dynamic inputs where a static scale leaves less than 22 dB.
"""
TOKENS = 128 * 512
CALIBRATION = 64


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to quantize. repair: as for `octavo.quantize`."""

    name: str
    scheme: str
    smooth: bool = False
    repair: bool = True
    attention: str = "float"


WAYS = (
    Way("w8a16", "w8a16"),
    Way("w8a8", "w8a8"),
    Way("w8a8, smoothed", "w8a8", smooth=True),
    Way("w8a8, smoothed, int8 attention", "w8a8", smooth=True, attention="int8"),
    Way("w8a8-static, all layers", "w8a8-static", repair=False),
    Way("w8a8-static, smoothed, all layers", "w8a8-static", smooth=True, repair=False),
    Way("w8a8-static, smoothed, repaired", "w8a8-static", smooth=True),
    Way("o1 (weights per tensor), smoothed", "o1", smooth=True),
    Way("o2 (inputs per tensor too), smoothed", "o2", smooth=True),
    Way("o3 (and static, all layers), smoothed", "o3", smooth=True, repair=False),
)


def measure() -> dict[str, Any]:
    text, about = known_text()
    model, tokenizer = load_language_model(checkpoint())
    ids = token_ids(tokenizer, text, limit=1 << 62, window=WINDOW)
    judged = ids[: min(TOKENS, (len(ids) // WINDOW - CALIBRATION) * WINDOW)]
    start = time.perf_counter()
    stats = octavo.calibrate(model, calibration(ids))
    seconds = time.perf_counter() - start
    truth = losses(model, judged)
    return {
        "text": about,
        "tokens": len(judged),
        "calibration_tokens": CALIBRATION * WINDOW,
        "calibration_s": seconds,
        "perplexity": truth.mean().exp().item(),
        "ways": [judge(model, stats, way, judged, truth) for way in WAYS],
    }


def calibration(ids: Tensor) -> list[Tensor]:
    """The last windows of `ids` int64 [T], each [1, WINDOW]."""
    return [window.unsqueeze(0) for window in ids[-CALIBRATION * WINDOW :].split(WINDOW)]


def judge(model: nn.Module, stats: Stats, way: Way, ids: Tensor, truth: Tensor) -> dict[str, Any]:
    """Quantize a copy of the float `model` in a way and judge it on `ids`; truth: the float model's `losses` there."""
    model, stats = copy.deepcopy(model), copy.deepcopy(stats)
    found: dict[str, Any] = {"name": way.name}
    if way.smooth:
        start = time.perf_counter()
        report = octavo.smooth(model, stats, "auto", scheme=way.scheme, repair=way.repair)
        found |= {"pairs": len(report.smoothed), "smoothing_s": time.perf_counter() - start}
    recipe = Recipe.of(way.scheme, attention=way.attention)
    coverage = octavo.quantize(model, recipe, stats=stats, repair=way.repair)
    schemes = [row.scheme for row in coverage.rows if row.scheme]
    q = losses(model, ids)
    return {
        **found,
        "layers": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))},
        "ratio": (q - truth).mean().exp().item(),
        "standard_error": ((q - truth).std() / len(q) ** 0.5).item(),
    }


def tables(found: dict[str, Any]) -> list[Table]:
    rows = [("float", "", f"{found['perplexity']:.3f}", "1", "", "")]
    for way in found["ways"]:
        rows.append(
            (
                way["name"],
                ", ".join(f"{count} {scheme}" for scheme, count in way["layers"].items()),
                f"{found['perplexity'] * way['ratio']:.3f}",
                f"{way['ratio']:.4f}",
                human_percent(way["standard_error"]),
                f"{way['smoothing_s']:.0f} s" if "smoothing_s" in way else "",
            )
        )
    title = (
        f"{found['tokens']} tokens of {found['text']}; calibrated on {found['calibration_tokens']} others in "
        f"{found['calibration_s']:.0f} s"
    )
    columns = ("scheme", "layers", "perplexity", "ratio", "standard error", "smoothing took")
    return [Table(title, columns, tuple(rows), "llrrrr")]
