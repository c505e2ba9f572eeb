"""How a class of mixture-of-experts layers holds its experts: which weights, in which layout, and how it is called.

Classes under transformers' experts interface say so themselves (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`, `_apply_gate`), and need not be listed. Others are recognized by what they do
(`watched_experts.py`). Any other class can be registered with one call:

    octavo.register_experts(MyExperts, up=("w1", "w3"), down="w2", gate=lambda layer, h: ...)

    up projection     x [T, H] -> h [S, U]      S = T * A: a row for each token and each of its A experts
    gate              h [S, U] -> [S, I]        the class's own: silu(gate) * up, clamped, an activation, ...
    down projection   [S, I] -> y [S, H]
    combination       sum over a token's experts of routing weight * y      unless the class leaves that to its caller
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from octavo.errors import QuantizeError
from octavo.watched_experts import own_gate, watched_experts

__all__ = [
    "ExpertsSpec",
    "Routing",
    "argument_names",
    "arguments",
    "chosen_experts",
    "held_for",
    "register_experts",
    "registered",
    "routers",
    "spec_of",
    "why_not_stacks",
]

Routing = Literal["weighted", "each", "sorted", "split"]
"""What `forward` takes and returns:

weighted   (x [T, H], expert indices [T, A], routing weights [T, A]) -> [T, H]   transformers' experts
each       (x [T, H], expert indices [T, A]) -> [T, A, H]                        gpt-fast's ConditionalFeedForward
sorted     (x [E * n, H], n rows for each expert in turn) -> [E * n, H]          Llama 4's
split      (x [S, H], how many rows each expert has, in turn) -> [S, H]          JetMoe's linear layers

T may be several dimensions ([B, S, H] with [B, S, A] or [B * S, A]), and an A of 1 may be left out. An index below 0,
or of E or above, belongs to no expert here (expert parallelism marks those of other processes so).
"""

Gate = Callable[[nn.Module, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ExpertsSpec:
    """How one class holds its experts; see `register_experts` for the fields.

    up, down: a name with a dot is that of a parameter of a child, which holds it for the layer.
    transposed: names of the weights that are stored with input channels first.
    identity: whether, in a "weighted" routing, an index of E or above means an expert that returns its input.
    experts: E if the weights are 2-D, one expert's rows after another's; else 0.
    """

    up: tuple[str, ...]
    down: str
    gate: Gate
    transposed: tuple[str, ...] = ()
    interleaved: bool = False
    up_bias: str | None = None
    down_bias: str | None = None
    norm: str | None = None
    routing: Routing = "weighted"
    identity: bool = False
    experts: int = 0

    @property
    def params(self) -> tuple[str, ...]:
        """The weights, up before down."""
        return (*self.up, self.down)

    def turned(self, name: str, stack: Tensor) -> Tensor:
        """[E, N, K] as the 3-D parameter `name` is stored, or the reverse: a view."""
        return stack.transpose(-1, -2) if name in self.transposed else stack

    def rows(self, name: str, weight: Tensor) -> Tensor:
        """The parameter `name` as [E, N, K], output channels before input channels: a view."""
        return self.turned(name, weight.unflatten(0, (self.experts, -1)) if self.experts else weight)

    def held(self, name: str, rows: Tensor) -> Tensor:
        """`rows` [E, N, K] in the layout of the parameter `name`."""
        return self.turned(name, rows).flatten(0, 1) if self.experts else self.turned(name, rows)

    def stack(self, layer: nn.Module, name: str) -> Tensor:
        """The parameter `name` of a float layer as [E, N, K]: a view."""
        return self.rows(name, layer.get_parameter(name))

    def down_input(self, layer: nn.Module, x: Tensor, expert: int) -> Tensor:
        """Rows x [S, H] through the up projection and the gate of one expert of a float layer: [S, I]."""
        bias = None if self.up_bias is None else getattr(layer, self.up_bias)[expert]
        h = [nn.functional.linear(x, self.stack(layer, name)[expert], bias) for name in self.up]
        return self.gated(layer, x, h)

    def gated(self, layer: nn.Module, x: Tensor, h: list[Tensor]) -> Tensor:
        """The input of the down projection. h: outputs of the up projections for x; without any, x itself is gated."""
        return self.gate(layer, x if not h else h[0] if len(h) == 1 else torch.cat(h, -1))


def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a class's `forward`: x, then its routing."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of one call, positional or by keyword, in the order of `names`; without those not given."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return [given[name] for name in names if name in given]


def chosen_experts(cls: type[nn.Module], spec: ExpertsSpec, x: Tensor, routing: Sequence[Any]) -> Tensor:
    """The experts of each token, int [T, A], for a routing that is "weighted" or "each".

    x: [..., H] of T tokens. routing: the arguments after x.
    Raises: QuantizeError if the indices are not integers, or do not fit x or the routing weights in shape.
    """
    wanted = 2 if spec.routing == "weighted" else 1
    if len(routing) < wanted:
        raise QuantizeError(f"{cls.__name__} was called with {1 + len(routing)} arguments, expected {1 + wanted}")
    index: Tensor = routing[0]
    if index.is_floating_point() or index.dtype == torch.bool:
        raise QuantizeError(
            f"the second argument of {cls.__name__} is {index.dtype}, expected the indices of the experts, for its "
            f"routing is {spec.routing!r}"
        )
    tokens = x.shape[:-1]
    top_k = 1 if index.shape == tokens else index.shape[-1]
    if index.numel() != tokens.numel() * top_k or any(each.shape != index.shape for each in routing[1:wanted]):
        got = ", ".join(str(list(each.shape)) for each in routing[:wanted])
        raise QuantizeError(
            f"{cls.__name__} was called with a routing of {got} for x {list(x.shape)}, expected [{tokens.numel()}, A], "
            f"for its routing is {spec.routing!r}"
        )
    return index.reshape(tokens.numel(), top_k)


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
    """Tell octavo how the class `cls` holds its experts; a subclass counts if it does not change `forward`.

    up: name of the 3-D parameter [E, U, H] of the projection before the gate; several are used as if they were one,
        their outputs side by side in the order given; () for none. down: of the projection after it, [E, H, I].
    gate: called with the layer and h [S, U]; returns [S, I]. It may use whatever the layer and its class have but these
        weights.
    transposed: the parameters are [E, H, U] and [E, I, H].
    up_bias, down_bias: names of biases [E, U], [E, H], if the class has them.
    routing: what its `forward` takes and returns, for T tokens of H numbers, A experts for each:
        "weighted"  (x [T, H], expert indices [T, A], routing weights [T, A]) -> [T, H]
        "each"      (x [T, H], expert indices [T, A]) -> [T, A, H]
        "sorted"    (x [E * n, H], n rows for each expert in turn) -> [E * n, H]
        "split"     (x [S, H], how many rows each expert has, in turn) -> [S, H]
    Raises: QuantizeError if cls is no nn.Module, gate no function, or routing none of those.

    For gpt-fast's Mixtral (it is known already):

        register_experts(
            ConditionalFeedForward, up=("w1", "w3"), down="w2", routing="each",
            gate=lambda layer, h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        )
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise QuantizeError(f"cls is {cls!r}, expected a class of nn.Module")
    if routing not in get_args(Routing):
        raise QuantizeError(f"routing is {routing!r}, expected one of {', '.join(map(repr, get_args(Routing)))}")
    if not callable(gate):
        raise QuantizeError(f"gate is {gate!r}, expected a function of the layer and h [S, U] that returns [S, I]")
    names = (up,) if isinstance(up, str) else tuple(up)
    turned = (*names, down) if transposed else ()
    _REGISTERED[cls] = ExpertsSpec(names, down, gate, turned, up_bias=up_bias, down_bias=down_bias, routing=routing)


_REGISTERED: dict[type[nn.Module], ExpertsSpec] = {}


def spec_of(layer: nn.Module) -> ExpertsSpec | None:
    """How `layer` holds its experts; None if it has none, or is of a class that is neither known nor recognized.

    A subclass of a known class counts if it does not change `forward`.
    """
    if (told := registered(type(layer))) is not None:
        return told
    spec = _by_interface(layer) or _by_name(layer) or _by_run(layer)
    return spec if spec is not None and all(_holds(layer, spec, name) for name in spec.params) else None


def registered(cls: type[nn.Module]) -> ExpertsSpec | None:
    """What was registered for `cls`, or for the base class whose `forward` it inherits; None if nothing was."""
    bases = (base for base in cls.__mro__ if base in _REGISTERED and _same_forward(cls, base))
    return next((_REGISTERED[base] for base in bases), None)


def _same_forward(cls: type[nn.Module], base: Any) -> bool:
    return getattr(cls, "forward", None) is getattr(base, "forward", None)


def _holds(layer: nn.Module, spec: ExpertsSpec, name: str) -> bool:
    """Whether `layer` has a parameter `name` with the dimensions that `spec` says."""
    parameter = dict(layer.named_parameters(remove_duplicate=False)).get(name)
    return parameter is not None and parameter.dim() == (2 if spec.experts else 3)


def why_not_stacks(layer: nn.Module, spec: ExpertsSpec) -> str | None:
    """Why the parameters of `layer` do not fit `spec`; None if they do."""
    for name in spec.params:
        if not _holds(layer, spec, name):
            return f"{type(layer).__name__} was registered with {name!r}, which is no 3-D parameter of it"
        if hasattr(layer.get_parameter(name), "placements"):
            return f"its {name} is spread over devices (a DTensor); quantize before parallelizing"
    for other in (spec.up_bias, spec.down_bias, spec.norm):
        if other is not None and getattr(layer, other, None) is None:
            return f"{type(layer).__name__} is said to have {other!r}, and has none"
    counts = {name: len(spec.stack(layer, name)) for name in spec.params}
    if len(set(counts.values())) > 1 and not spec.identity:  # identity experts may have weights, never read
        return f"its weights are of different numbers of experts ({counts})"
    return None


_INTERFACE = "transformers.integrations.moe"


def _by_interface(layer: Any) -> ExpertsSpec | None:
    """For a class that transformers' `use_experts_implementation` decorated: its instances carry the settings."""
    forward = getattr(type(layer), "forward", None)
    if getattr(forward, "__globals__", {}).get("__name__") != _INTERFACE:  # a subclass may have its own forward
        return None
    up = "gate_up_proj" if layer.has_gate else "up_proj"
    return ExpertsSpec(
        (up,),
        "down_proj",
        own_gate if layer.has_gate else _activation,
        transposed=(up, "down_proj") if layer.is_transposed else (),
        interleaved=not layer.is_concatenated,
        up_bias=f"{up}_bias" if layer.has_bias else None,
        down_bias="down_proj_bias" if layer.has_bias else None,
        norm="post_expert_norm" if getattr(layer, "has_post_expert_norm", False) else None,
    )


def _activation(layer: Any, h: Tensor) -> Tensor:
    return layer.act_fn(h)  # type: ignore[no-any-return]


def _act_on_first_half(layer: Any, h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return layer.act_fn(gate) * up  # type: ignore[no-any-return]


def _silu_on_first_half(layer: Any, h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return nn.functional.silu(gate) * up


_TRANSFORMERS = {
    "Llama4TextExperts": ExpertsSpec(
        ("gate_up_proj",), "down_proj", _act_on_first_half, ("gate_up_proj", "down_proj"), routing="sorted"
    ),
}
"""Classes of transformers that are not under its interface, and multiply by all experts' weights at once."""

_CONDITIONAL_FEED_FORWARD = ExpertsSpec(("w1", "w3"), "w2", _silu_on_first_half, routing="each")


def _by_name(layer: nn.Module) -> ExpertsSpec | None:
    for base in type(layer).__mro__:
        if base.__module__.startswith("transformers.") and base.__name__ in _TRANSFORMERS:
            return _TRANSFORMERS[base.__name__] if _same_forward(type(layer), base) else None
    # gpt-fast is not a package: its class is known by its name and its arguments.
    if type(layer).__name__ == "ConditionalFeedForward":
        arguments = list(inspect.signature(type(layer).forward).parameters)
        return _CONDITIONAL_FEED_FORWARD if arguments == ["self", "x", "expert_indices"] else None
    return None


def _by_run(layer: nn.Module) -> ExpertsSpec | None:
    seen = watched_experts(layer)
    if seen is None or any(spec_of(child) is not None for child in layer.children()):  # it only calls them
        return None
    return ExpertsSpec(**vars(seen))


def held_for(model: nn.Module) -> dict[str, str]:
    """Children that hold the weights of experts: name of the child -> name of the layer that computes with them."""
    found = {}
    for name, module in model.named_modules():
        spec = _float_or_int8(module)
        if spec is not None and (holder := spec.down.rpartition(".")[0]):
            found[f"{name}.{holder}" if name else holder] = name
    return found


_ROUTER = re.compile(r"(gate|gating|router\w*|shared_experts?_gate)(\.|$)")


def routers(model: nn.Module) -> set[str]:
    """Names of the routers and of all modules in them: modules beside experts that are named like a router.

    A router decides which experts run and how much each counts. Its few thousand weights decide on the use of all the
    others, so an error in them costs more than their bytes are worth.
    """
    blocks = {
        name.rpartition(".")[0] for name, module in model.named_modules() if name and _holds_experts(name, module)
    }
    found: set[str] = set()
    for block in blocks:
        beside = model.get_submodule(block).named_modules(prefix=block)
        found.update(name for name, _ in beside if _ROUTER.match(name.removeprefix(block).lstrip(".")))
    return found


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether `module` is experts of any kind: a stack, int8 or float, a list of modules, or only called experts."""
    if name.rpartition(".")[2] == "experts" or "experts" in type(module).__name__.lower():
        return True
    return _float_or_int8(module) is not None


def _float_or_int8(module: nn.Module) -> ExpertsSpec | None:
    """`spec_of` a float layer, or what an int8 one keeps of it; None for other modules."""
    kept = getattr(module, "spec", None)
    return kept if isinstance(kept, ExpertsSpec) else spec_of(module)
