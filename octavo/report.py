"""What a judgement found: plain numbers and words, for people (`str`) and for programs (`to_json`). No torch here.

`evaluate` measures and fills these in; the definitions of the measures are at the head of that file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from octavo.tables import Table, human_percent, jsonable, to_json

__all__ = ["Comparison", "LayerQuality", "NotCompared"]


@dataclasses.dataclass(frozen=True)
class LayerQuality:
    """How far a layer's output in the int8 model is from the float model's.

    sqnr_db: SQNR of the output in dB, over all batches: inf (null in JSON) when it is the same in every bit. The error
        is what arrives here: what the layers before it left, and what this layer adds.
    """

    name: str
    kind: str
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class NotCompared:
    """A quantized layer without an SQNR, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An int8 model held against its float model, on `batches` batches with `positions` rows of output.

    kl: mean KL(float || int8) in nats per position; None when the output is no logits.
    top1: fraction of positions on which both models choose the same token; None when the output is no logits.
    sqnr_db: SQNR of the output in dB; inf (null in JSON) when it is the same in every bit.
    cosine_mean, cosine_min: cosine of the two output rows, over positions.
    layers: the quantized layers, in the model's order.
    not_compared: the quantized layers that no SQNR could be had of.
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

    def tables(self, count: int = 10) -> list[Table]:
        """The comparison for people: the measures, then the `count` worst layers, then the layers not compared."""
        measures = [
            ("KL(float || int8)", "-" if self.kl is None else f"{self.kl:.3g} nats"),
            ("top-1 agreement", "-" if self.top1 is None else human_percent(self.top1)),
            ("output SQNR", f"{self.sqnr_db:.1f} dB"),
            ("cosine, mean", f"{self.cosine_mean:.6f}"),
            ("cosine, lowest", f"{self.cosine_min:.6f}"),
        ]
        title = f"int8 against float (batches: {self.batches}, positions: {self.positions})"
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
