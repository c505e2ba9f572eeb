"""How a class of mixture-of-experts layers holds its experts: which 3-D weights, in which layout, called how.

Every class under transformers' experts interface says so itself (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`, `_apply_gate`), and is known without being listed. Any other class is told with one call:

    octavo.register_experts(MyExperts, up=("w1", "w3"), down="w2", gate=lambda layer, h: ...)

    up projection     x [T, H] -> h [S, U]      S = T * A: a row for each token and each of its A experts
    gate              h [S, U] -> [S, I]        the class's own: silu(gate) * up, clamped, an activation, ...
    down projection   [S, I] -> y [S, H]
    combination       sum over a token's experts of routing weight * y      unless the class leaves that to its caller
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from octavo.errors import QuantizeError

__all__ = ["ExpertsSpec", "Routing", "register_experts", "spec_of"]

Routing = Literal["weighted", "each", "sorted"]
"""What `forward` takes and returns:

weighted   (x [T, H], expert indices [T, A], routing weights [T, A]) -> [T, H]   transformers' experts
each       (x [T, H], expert indices [T, A]) -> [T, A, H]                        gpt-fast's ConditionalFeedForward
sorted     (x [E * n, H], n rows for each expert in turn) -> [E * n, H]          Llama 4's
"""

Gate = Callable[[nn.Module, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ExpertsSpec:
    """One class of experts; see `register_experts` for the fields."""

    up: tuple[str, ...]
    down: str
    gate: Gate
    transposed: bool = False
    interleaved: bool = False
    up_bias: str | None = None
    down_bias: str | None = None
    norm: str | None = None
    routing: Routing = "weighted"

    @property
    def params(self) -> tuple[str, ...]:
        """The 3-D weights, up before down."""
        return (*self.up, self.down)

    def rows(self, weight: Tensor) -> Tensor:
        """A weight, of one expert or all, with output channels before input channels."""
        return weight.transpose(-1, -2) if self.transposed else weight


def register_experts(
    cls: type[nn.Module],
    *,
    up: str | tuple[str, ...],
    down: str,
    gate: Gate,
    transposed: bool = False,
    up_bias: str | None = None,
    down_bias: str | None = None,
    routing: Routing = "weighted",
) -> None:
    """Tell octavo how the class `cls` (and its subclasses) holds its experts.

    up: name of the 3-D parameter [E, U, H] of the projection before the gate; several are used as if they were one,
        their outputs side by side in the order given. down: of the projection after it, [E, H, I].
    gate: called with the layer and h [S, U]; returns [S, I]. It may use any attribute of the layer but these weights.
    transposed: the parameters are [E, H, U] and [E, I, H].
    up_bias, down_bias: names of biases [E, U], [E, H], if the class has them.
    routing: what its `forward` takes and returns, see `octavo.experts.Routing`.
    Raises: QuantizeError for a class that is no nn.Module, or a routing that does not exist.

    For gpt-fast's Mixtral (it is known already):

        register_experts(
            ConditionalFeedForward, up=("w1", "w3"), down="w2", routing="each",
            gate=lambda layer, h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        )
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise QuantizeError(f"cls is {cls!r}, expected a class of nn.Module")
    if routing not in ("weighted", "each", "sorted"):
        raise QuantizeError(f"routing is {routing!r}, expected 'weighted', 'each' or 'sorted'")
    names = (up,) if isinstance(up, str) else tuple(up)
    _REGISTERED[cls] = ExpertsSpec(names, down, gate, transposed, up_bias=up_bias, down_bias=down_bias, routing=routing)


_REGISTERED: dict[type[nn.Module], ExpertsSpec] = {}


def spec_of(layer: nn.Module) -> ExpertsSpec | None:
    """How `layer` holds its experts; None if it is no such layer, or one that nothing is known of."""
    for base in type(layer).__mro__:
        if base in _REGISTERED:
            return _REGISTERED[base]
    spec = _by_interface(layer) or _by_name(layer)
    if spec is None or any(_dims(layer, name) != 3 for name in spec.params):
        return None
    return spec


def _dims(layer: nn.Module, name: str) -> int:
    parameter = layer._parameters.get(name)
    return 0 if parameter is None else parameter.dim()


def _by_interface(layer: Any) -> ExpertsSpec | None:
    """A class that transformers' `use_experts_implementation` decorated: its instances carry what it was told."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    if not all(hasattr(layer, flag) for flag in flags) or not hasattr(layer, "_apply_gate"):
        return None
    up = "gate_up_proj" if layer.has_gate else "up_proj"
    return ExpertsSpec(
        (up,),
        "down_proj",
        _own_gate if layer.has_gate else _activation,
        transposed=layer.is_transposed,
        interleaved=not layer.is_concatenated,
        up_bias=f"{up}_bias" if layer.has_bias else None,
        down_bias="down_proj_bias" if layer.has_bias else None,
        norm="post_expert_norm" if layer.has_post_expert_norm else None,
    )


def _own_gate(layer: Any, h: Tensor) -> Tensor:
    return layer.source_class._apply_gate(layer, h)  # type: ignore[no-any-return]


def _activation(layer: Any, h: Tensor) -> Tensor:
    return layer.act_fn(h)  # type: ignore[no-any-return]


def _by_name(layer: Any) -> ExpertsSpec | None:
    """Two classes outside the interface, by the structure that makes them what they are."""
    own = {name for name, parameter in layer._parameters.items() if parameter is not None}
    arguments = list(inspect.signature(type(layer).forward).parameters)[1:]
    if own == {"gate_up_proj", "down_proj"} and arguments == ["hidden_states"] and hasattr(layer, "act_fn"):
        return ExpertsSpec(("gate_up_proj",), "down_proj", _act_on_first_half, transposed=True, routing="sorted")
    if own == {"w1", "w2", "w3"} and arguments == ["x", "expert_indices"]:
        return ExpertsSpec(("w1", "w3"), "w2", _silu_on_first_half, routing="each")
    return None


def _act_on_first_half(layer: Any, h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return layer.act_fn(gate) * up  # type: ignore[no-any-return]


def _silu_on_first_half(layer: Any, h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return nn.functional.silu(gate) * up
