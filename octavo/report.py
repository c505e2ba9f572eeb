"""Results of measurements, as plain numbers and words: `str` for people, `to_json` for programs. No torch here.

`evaluate` returns a Comparison, `smooth` a SmoothReport and `lm_eval` a TaskReport. The measures are defined in the
docstrings of those modules and of `sensitivity`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from octavo.tables import Table, human_percent, in_general, jsonable, to_json

__all__ = [
    "Comparison", "LayerQuality", "NotCompared", "SmoothReport", "SmoothedPair", "TaskReport", "TaskScore", "sqnr_db",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerQuality:
    """How far a layer's output in the int8 model is from the float model's.

    sqnr_db: SQNR of the output in dB over all batches; inf (null in JSON) if all bits are the same. The error is
        cumulative: that of the layers before, and that of this layer.
    """

    name: str
    kind: str
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class NotCompared:
    """A quantized layer without an SQNR, and the reason."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An int8 model compared with its float model, on `batches` batches with `positions` rows of output.

    kl: mean KL(float || int8) in nats per position; None if the output is not logits.
    top1: fraction of positions on which both models choose the same token, the first of equally likely ones; None if
        the output is not logits.
    sqnr_db: SQNR of the output in dB; inf (null in JSON) if all bits are the same.
    cosine_mean, cosine_min: mean and minimum over positions of the cosine between the two output rows.
    layers: the quantized layers, in the model's order.
    not_compared: the quantized layers for which there is no SQNR.
    """

    batches: int
    positions: int
    kl: float | None
    top1: float | None
    sqnr_db: float
    cosine_mean: float
    cosine_min: float
    layers: tuple[LayerQuality, ...] = ()
    not_compared: tuple[NotCompared, ...] = ()

    def worst_layers(self, count: int = 10) -> list[LayerQuality]:
        """The `count` layers of lowest SQNR, worst first."""
        return sorted(self.layers, key=lambda layer: layer.sqnr_db)[:count]

    def tables(self, count: int = 10, *, models: tuple[str, str] = ("float", "int8")) -> list[Table]:
        """The comparison for people: the measures, then the `count` worst layers, then the layers not compared.

        models: names for the two models.
        """
        reference, judged = models
        measures = [
            (f"KL({reference} || {judged})", "-" if self.kl is None else f"{self.kl:.3g} nats"),
            ("top-1 agreement", "-" if self.top1 is None else human_percent(self.top1)),
            ("output SQNR", f"{self.sqnr_db:.1f} dB"),
            ("cosine, mean", f"{self.cosine_mean:.6f}"),
            ("cosine, lowest", f"{self.cosine_min:.6f}"),
        ]
        title = f"{judged} against {reference} (batches: {self.batches}, positions: {self.positions})"
        tables = [Table(title, ("measure", "value"), tuple(measures), "lr")]
        if self.layers:
            worst = self.worst_layers(count)
            rows = tuple((layer.name, layer.kind, f"{layer.sqnr_db:.1f} dB") for layer in worst)
            title = f"The {len(worst)} layers of lowest SQNR, of {len(self.layers)}"
            tables.append(Table(title, ("layer", "kind", "output SQNR"), rows, "llr"))
        if self.not_compared:
            reasons = tuple((layer.name, layer.reason) for layer in self.not_compared)
            tables.append(Table("Quantized layers not compared", ("layer", "why"), reasons))
        return tables

    def __str__(self) -> str:
        return "\n\n".join(str(table) for table in self.tables())

    def to_dict(self) -> dict[str, Any]:
        """The comparison in JSON's own types; an SQNR of inf is None."""
        return dict(jsonable(self))

    def to_json(self) -> str:
        """The comparison as strict JSON; an SQNR of inf is null."""
        return to_json(self)


@dataclasses.dataclass(frozen=True)
class SmoothedPair:
    """A layer whose output was divided by factors, and the layers (sinks) whose weights were multiplied by them.

    alpha: None if the pair was left alone; `reason` then says why.
    amax_before, amax_after: largest magnitude of the sinks' input.
    error_before, error_after: mean over tokens of |error|^2 / |output|^2 of the quantized sinks; None if calibration
        kept no rows to measure it on.
    """

    source: str
    sinks: tuple[str, ...]
    alpha: float | None = None
    amax_before: float | None = None
    amax_after: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class SmoothReport:
    """What smoothing did, pair by pair in the model's order. `print` it for a table; `.to_json()` for a program."""

    pairs: tuple[SmoothedPair, ...]

    @property
    def smoothed(self) -> tuple[SmoothedPair, ...]:
        """The pairs that were smoothed, not left alone."""
        return tuple(pair for pair in self.pairs if pair.reason is None)

    def table(self) -> Table:
        """One line for each family of pairs: those whose names differ in numbers only. SQNR is -10 log10(error)."""
        families: dict[tuple[Any, ...], list[SmoothedPair]] = {}
        for pair in self.pairs:
            sinks = tuple(dict.fromkeys(in_general(sink) for sink in pair.sinks))
            families.setdefault((in_general(pair.source), sinks, pair.reason), []).append(pair)
        columns = ("output of", "into", "alpha", "amax before", "after", "SQNR before", "after", "note")
        rows = []
        for (source, sinks, reason), pairs in families.items():
            rows.append(
                (
                    source if len(pairs) == 1 else f"{source}  x{len(pairs)}",
                    ", ".join(sink.rpartition(".")[2] for sink in sinks),
                    _span([pair.alpha for pair in pairs], "{:.2g}"),
                    _span([pair.amax_before for pair in pairs], "{:.3g}"),
                    _span([pair.amax_after for pair in pairs], "{:.3g}"),
                    _span([_db(pair.error_before) for pair in pairs], "{:.0f} dB"),
                    _span([_db(pair.error_after) for pair in pairs], "{:.0f} dB"),
                    reason or "",
                )
            )
        return Table("Smoothing", columns, tuple(rows), "llrrrrrl")

    def __str__(self) -> str:
        return str(self.table())

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's own types."""
        return dict(jsonable(self))

    def to_json(self) -> str:
        """The report as strict JSON."""
        return to_json(self)


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One metric of one task, for a model and, if there is one, its baseline.

    higher_is_better: None if the task does not say. documents: how many were answered.
    error: standard error of `value`; None if it is not a mean over documents, as perplexity is not.
    baseline: its value. change_error: standard error of value - baseline, from the change of each document.
    flips: fraction of the documents that one of the two answers right and the other wrong; None if documents are not
        right or wrong.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    documents: int
    value: float
    error: float | None
    baseline: float | None = None
    change_error: float | None = None
    flips: float | None = None

    def against(self, baseline: float, change_error: float | None, flips: float | None) -> TaskScore:
        """The same scores next to a baseline's."""
        return dataclasses.replace(self, baseline=baseline, change_error=change_error, flips=flips)

    def _row(self) -> tuple[str, ...]:
        """For the table: task, metric, which is better, documents, baseline, value, change, its error, flips."""
        change = None if self.baseline is None else self.value - self.baseline
        return (
            self.task,
            self.metric,
            {True: "higher", False: "lower", None: ""}[self.higher_is_better],
            str(self.documents),
            _to_4_digits(self.baseline),
            _to_4_digits(self.value),
            "" if change is None else f"{change:+.4f}",
            _to_4_digits(self.change_error),
            "" if self.flips is None else human_percent(self.flips),
        )


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """A model's scores on tasks, next to a baseline's. `print` it for a table; `.to_json()` for a program."""

    scores: tuple[TaskScore, ...]

    def table(self, *, models: tuple[str, str] = ("baseline", "model")) -> Table:
        """One row for each metric. models: names for the two models."""
        rows = [score._row() for score in self.scores]
        columns: tuple[str, ...] = ("task", "metric", "better", "documents", *models, "change", "+-", "flips")
        if all(score.baseline is None for score in self.scores):
            rows = [(*row[:4], row[5], _to_4_digits(score.error)) for row, score in zip(rows, self.scores, strict=True)]
            columns = (*columns[:4], models[1], "+-")
        return Table("Tasks", columns, tuple(rows), "lll" + "r" * (len(columns) - 3))

    def __str__(self) -> str:
        return str(self.table())

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's own types."""
        return dict(jsonable(self))

    def to_json(self) -> str:
        """The report as strict JSON."""
        return to_json(self)


def sqnr_db(error: float) -> float:
    """A relative error, |e|^2 / |y|^2, in dB: -10 log10(error); inf for none."""
    return math.inf if error == 0 else -10 * math.log10(error)


def _db(error: float | None) -> float | None:
    return None if error is None else sqnr_db(error)


def _to_4_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _span(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = form.format(min(known)), form.format(max(known))
    return low if low == high else f"{low} to {high}"
