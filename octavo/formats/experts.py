"""How a stack of experts is stored: as 2-D weights of each expert, which is how vLLM and others read them.

    model.layers.0.mlp.experts.gate_up_proj  [E, 2I, H]   in memory, one parameter
    model.layers.0.mlp.experts.3.gate_proj.weight [I, H]  on disk, rows 0 to I of its expert 3
    model.layers.0.mlp.experts.3.up_proj.weight   [I, H]  rows I to 2I (every other row, where gate and up interleave)

How a transformers model cuts its stacks, and how it names the parts (`w1`, `w2`, `w3` for Mixtral), is found by asking
the library: a stack that holds its own row indices as numbers goes through the library's conversion for saving, and the
numbers in each part say which rows it consists of. Stacks that the library stores whole, and those of other models, are
cut here. For transposed stacks (gpt-oss, Llama 4) and 2-D ones (DBRX) the library is not asked, because codes are
[E, N, K] in memory, output channels first.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from octavo.experts import ExpertsSpec, spec_of
from octavo.modules import QuantExperts

__all__ = ["Part", "expert_parts", "stored_expert_parts"]


def _tensor(rows: range) -> Tensor:
    return torch.arange(rows.start, rows.stop, rows.step, device="cpu")


@dataclasses.dataclass(frozen=True)
class Part:
    """A 2-D weight of one expert: some rows of a stack.

    layer: name of the experts in the model. short: name of the stack [E, N, K] in that layer. is_shared: whether the
    name of the part on disk is that of the model's library, which other readers know, and not octavo's own.
    """

    layer: str
    short: str
    _rows: range | Tensor
    is_shared: bool

    @classmethod
    def of_rows(cls, layer: str, short: str, rows: Tensor, is_shared: bool) -> Part:
        """The part with these rows, int64 [n]; stored as a range if they are one, because a model has millions of
        rows."""
        step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
        first = int(rows[0]) if len(rows) else 0
        even = range(first, first + step * len(rows), step or 1)
        return cls(layer, short, even if torch.equal(_tensor(even), rows) else rows, is_shared)

    @property
    def param(self) -> str:
        """Name of the stack in the model."""
        return f"{self.layer}.{self.short}" if self.layer else self.short

    @property
    def rows(self) -> Tensor:
        """int64 [n]: which of the E * N rows of the stack it is, in order."""
        return _tensor(self._rows) if isinstance(self._rows, range) else self._rows

    def kind(self, stack: str) -> str:
        """The kind of layer that the part is on disk: "Linear" if other readers know its name, else that of the
        stack."""
        return "Linear" if self.is_shared else stack


def expert_parts(
    model: nn.Module, on_disk: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None
) -> dict[str, Part]:
    """Name on disk of each expert's weight -> which rows of which stack it is.

    model: float (on `meta` or not) or int8. on_disk: as for `octavo.formats.save`.
    """
    parts: dict[str, Part] = {}
    for prefix, layer in model.named_modules():
        spec = layer.spec if isinstance(layer, QuantExperts) else spec_of(layer)
        if spec is not None:
            parts |= _parts_of_layer(prefix, layer, spec, on_disk)
    return parts


def _parts_of_layer(
    prefix: str,
    layer: nn.Module,
    spec: ExpertsSpec,
    on_disk: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None,
) -> dict[str, Part]:
    numbered: dict[str, Tensor] = {}
    firsts: list[int] = []
    end = 0
    for param in spec.params:
        stack = layer.codes_and_scale(param)[0] if isinstance(layer, QuantExperts) else spec.stack(layer, param)
        e, n = stack.shape[:2]
        # Two equal columns: older releases of transformers squeeze what they cut out, and would drop a single one.
        ids = torch.arange(end, end + e * n, device="cpu").view(e, n, 1).repeat(1, 1, 2)
        numbered[f"{prefix}.{param}" if prefix else param] = ids
        firsts.append(end)
        end += e * n
    params, whole = list(numbered), dict(numbered)
    parts: dict[str, Part] = {}
    for name, ids in _cut_by_library({} if spec.transposed or spec.experts else numbered, on_disk).items():
        if ids.dim() == 2:
            at = bisect.bisect_right(firsts, int(ids[0, 0])) - 1
            parts[name] = Part.of_rows(prefix, spec.params[at], ids[:, 0] - firsts[at], True)
            whole.pop(params[at], None)
    for param, ids in whole.items():
        at = params.index(param)
        own = ids[..., 0] - firsts[at]
        parts |= {name: Part.of_rows(prefix, spec.params[at], part, False) for name, part in _cut(param, spec, own)}
    return parts


def stored_expert_parts(
    model: nn.Module, on_disk: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None, int8: Mapping[str, str]
) -> dict[str, Part]:
    """`expert_parts` under their names in a given checkpoint. It may be the checkpoint of a model inside `model`, or
    around it, and the library may have renamed its weights.

    int8: as `octavo.formats.int8_names` gives it.
    """
    parts = expert_parts(model, on_disk)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    there: dict[str, str] = {}
    for renamed, stored in int8.items():
        ways = (each for name in (stored, renamed) for each in (name, name.removeprefix(prefix), prefix + name))
        if (part := next((name for name in ways if name in parts), None)) is not None:
            there[part] = stored
    return {there.get(name, name): part for name, part in parts.items()}


def _cut_by_library(
    numbered: dict[str, Tensor], on_disk: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None
) -> Mapping[str, Tensor]:
    try:
        return on_disk(numbered) if on_disk else {}
    except AttributeError as error:
        # A rule that transposes whole stacks, and cuts none, asks the int8 model for a float parameter.
        if "is not an nn.Parameter" not in str(error):
            raise
        return {}


def _cut(param: str, spec: ExpertsSpec, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and rows of the parts of a stack that is cut here. rows: int64 [E, N]."""
    prefix, _, short = param.rpartition(".")
    half = rows.shape[1] // 2
    for e, own in enumerate(rows):
        at = f"{prefix}.{e}." if prefix else f"{e}."
        if short == "gate_up_proj":
            gate, up = (own[::2], own[1::2]) if spec.interleaved else (own[:half], own[half:])
            yield f"{at}gate_proj.weight", gate
            yield f"{at}up_proj.weight", up
        else:
            yield f"{at}weight" if short == "weight" else f"{at}{short}.weight", own
