"""What became int8, what stayed float, and why: a row for every float parameter that a model has or had.

`quantize` returns a `Coverage`; `coverage(model)` makes one for any model at any time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from octavo.experts import held_for, routers
from octavo.feeding import check_module
from octavo.layers import EXPERTS, kind_of
from octavo.modules import QuantConvTranspose, QuantExperts, QuantModule, TiedQuantEmbedding, TiedQuantLinear
from octavo.modules.float_linear import FloatLinear
from octavo.tables import Table, human_bytes, human_percent, in_general, render

__all__ = ["REASONS_ATTRIBUTE", "ROUTER_REASON", "Coverage", "Row", "coverage", "why_float"]

REASONS_ATTRIBUTE = "_octavo_reasons"
"""Attribute of a quantized model: {parameter name: (reason that it stayed float, whether the recipe asked for it)}."""

ROUTER_REASON = "a router stays float"


@dataclasses.dataclass(frozen=True)
class Row:
    """The fate of one float parameter.

    name: its name in the float model. kind: class of its layer, of an int8 one the kind that it was ("OutputHead" too).
    shape: its shape in the float model.
    bytes_before, bytes_after: in memory (on disk, where files were quantized); for an int8 weight the codes and scales.
    scheme: how it was quantized, or None if it is float.
    reason: why it is float, whose table it shares, or why its scheme is not the one that was asked for; else None.
    asked: for a float parameter, whether the recipe asked for it (ignored, opt-in and not opted in, or 1-D: no scheme
        covers biases and norms).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    scheme: str | None
    reason: str | None
    asked: bool = False


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What became int8, what stayed float, and why. `print` it for a table; `.to_json()` for a program.

    rows: one `Row` for each float parameter that the model has or had, in the order of its modules (of the tensors,
        where files were quantized).
    """

    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all float parameters before quantizing."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same parameters now."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def quantized_fraction(self) -> float:
        """Share of the original bytes that is int8 now, 0 to 1."""
        return self._share(row for row in self.rows if row.scheme)

    @property
    def unasked_fraction(self) -> float:
        """Share of the original bytes that is float for a reason that the recipe did not ask for, 0 to 1."""
        return self._share(row for row in self.rows if not row.scheme and not row.asked)

    def _share(self, rows: Iterator[Row]) -> float:
        total = self.bytes_before
        return sum(row.bytes_before for row in rows) / total if total else 0.0

    def float_reasons(self) -> dict[str, int]:
        """Reason -> bytes that stayed float for it, largest first."""
        reasons: dict[str, int] = {}
        for row in self.rows:
            if not row.scheme:
                reasons[row.reason or ""] = reasons.get(row.reason or "", 0) + row.bytes_before
        return dict(sorted(reasons.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Totals and rows as JSON types."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "quantized_fraction": self.quantized_fraction,
            "unasked_fraction": self.unasked_fraction,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Coverage:
        """A Coverage from `to_dict`'s form."""
        return cls(tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in data["rows"]))

    def table(self) -> Table:
        """One line for each family of parameters: those whose names and fates differ in numbers only."""
        families: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            family = in_general(row.name)
            families.setdefault((family, row.kind, row.shape, row.scheme, row.reason), []).append(row)
        lines = []
        for (family, kind, shape, scheme, reason), rows in families.items():
            lines.append(
                (
                    rows[0].name if len(rows) == 1 else f"{family}  x{len(rows)}",
                    kind,
                    " x ".join(map(str, shape)),
                    human_bytes(sum(row.bytes_before for row in rows)),
                    human_bytes(sum(row.bytes_after for row in rows)),
                    scheme or "float",
                    reason or "",
                )
            )
        total = (
            "total", "", "", human_bytes(self.bytes_before), human_bytes(self.bytes_after),
            f"{human_percent(self.quantized_fraction)} int8", "",
        )  # fmt: skip
        return Table("Coverage", ("parameter", "kind", "shape", "before", "after", "scheme", "note"), (*lines, total))

    def __str__(self) -> str:
        return render(self.table())


def coverage(model: nn.Module) -> Coverage:
    """A row for every float (or complex) parameter that `model` has, or had before its layers became int8.

    model: any module, quantized or not; not modified. Raises: QuantizeError for what is no module.
    """
    check_module(model)
    reasons: dict[str, tuple[str, bool]] = getattr(model, REASONS_ATTRIBUTE, {})
    rows: list[Row] = []
    owners: dict[int, str] = {}
    deciding, layer_of = routers(model), held_for(model)
    for prefix, module in model.named_modules():
        if isinstance(module, QuantModule):
            rows.extend(_int8_rows(prefix, module, owners))
        layer = model.get_submodule(layer_of[prefix]) if prefix in layer_of else module
        for short, parameter in module._parameters.items():
            if parameter is None or not (parameter.is_floating_point() or parameter.is_complex()):
                continue
            name = f"{prefix}.{short}" if prefix else short
            kind = module.replaces if isinstance(module, (QuantModule, FloatLinear)) else type(module).__name__
            tied = owners.get(id(parameter))
            owners.setdefault(id(parameter), name)
            reason, asked = reasons.get(name) or why_float(layer, parameter, router=prefix in deciding)
            rows.append(
                Row(
                    name,
                    kind,
                    tuple(parameter.shape),
                    0 if tied else _bytes(parameter),
                    0 if tied else _bytes(parameter),
                    None,
                    f"tied to {tied}" if tied else reason,
                    asked,
                )
            )
    return Coverage(tuple(rows))


def _bytes(parameter: Tensor) -> int:
    """Bytes in memory; torch's `nbytes` does not work for sparse tensors."""
    if parameter.layout == torch.sparse_coo:
        return parameter._values().nbytes + parameter._indices().nbytes
    return parameter.nbytes


def _int8_rows(prefix: str, module: QuantModule, owners: dict[int, str]) -> Iterator[Row]:
    if isinstance(module, (TiedQuantLinear, TiedQuantEmbedding)):
        table, _ = module.codes_and_scale()
        owner = owners.get(id(table), "another layer")
        yield Row(
            f"{prefix}.weight",
            module.replaces,
            _float_shape(module, "weight", table),
            0,
            0,
            str(module.scheme),
            f"tied to {owner}",
        )
    for param, (codes, scale) in module.codes().items():
        name = f"{prefix}.{param}" if prefix else param
        owners.setdefault(id(codes), name)
        before = codes.numel() * module.float_dtype.itemsize
        after = codes.nbytes + scale.nbytes
        shape = _float_shape(module, param, codes)
        yield Row(name, module.replaces, shape, before, after, str(module.scheme), module.note)


def _float_shape(module: QuantModule, param: str, codes: Tensor) -> tuple[int, ...]:
    """The shape that the parameter had before its output channels were brought to the front."""
    if isinstance(module, QuantExperts):
        return tuple(module.spec.held(param, codes).shape)
    n, *rest = codes.shape
    if module.replaces == "Conv1D":
        return (*rest, n)
    if isinstance(module, QuantConvTranspose):
        return (rest[0] * module.groups, n // module.groups, *rest[1:])
    return (n, *rest)


def why_float(module: nn.Module, parameter: Tensor, *, router: bool = False) -> tuple[str, bool]:
    """Why `parameter` of `module` is float where the plan gives no reason, and whether that counts as asked for."""
    if hasattr(parameter, "_is_flat_param"):  # FSDP's mark of its own; importing FSDP to ask is slow
        return "FSDP keeps its weights in one flat parameter; quantize before wrapping it", False
    if sum(size > 1 for size in parameter.shape) <= 1:
        return "1-D: biases and norms stay float", True
    if router:
        return ROUTER_REASON, True
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit, which lets no layer be replaced; quantize before scripting or tracing", False
    kind = kind_of(module)
    is_stack = kind is not None and any(parameter is attrgetter(name)(module) for name in kind.params_of(module))
    if parameter.dim() == 2 and not is_stack and (isinstance(module, QuantExperts) or (kind and kind.name == EXPERTS)):
        return "the biases of experts stay float", True
    if kind is not None:
        return "not quantized", True
    if parameter.dim() == 3:
        return f"3-D parameter of {type(module).__name__}, which is not a layer kind that octavo knows", False
    return f"{type(module).__name__} is not a layer kind that octavo knows", False
