"""Gated MLPs, whose activation and product are one kernel instead of two.

    y = down(act(gate(x)) * up(x))      x [..., H], gate and up [..., I]      https://arxiv.org/abs/2002.05202

In eager PyTorch act(gate) and its product with up are a pass over memory each, and a launch on GPUs. Where this
package has a kernel and nobody wants a gradient (`ops.fuses_gates`), that does both, in the order and with the rounding
of torch's two (fp32 differs in the last place, 16-bit dtypes hardly ever). Elsewhere the module's own `forward` runs.

Which activations those are says `ops/gates.py`: SiLU (Llama, Qwen, Mistral, Phi-3), GELU by tanh (Gemma).

Whether a module is one of them is asked of the module itself, whatever its class is called: its own `forward` is run
with layers in place of gate, up and down that say random numbers and remember what they were given. It has to give gate
and up the very tensor that it got, down the bits of the formula, and return the very tensor that down returned. Gate
and up may be one layer, whose output is cut in two. A module that does anything else is left alone.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.modules import QuantLinear
from octavo.ops.gates import GATES
from octavo.stand_ins import FLOATS, Derived, has_hooks, random, same_bits, takes_one_argument

__all__ = ["FusedGatedMLP", "fused_gated_mlps"]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Names of the layers of a gated MLP, and of its activation.

    gate, up: the same if it is one layer, whose output [..., 2 I] is cut in two, gate first or up first.
    """

    gate: str
    up: str
    down: str
    activation: str
    gate_first: bool = True

    def cut(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of what one layer returned for both."""
        first, second = both.chunk(2, -1)
        return (first, second) if self.gate_first else (second, first)


class FusedGatedMLP(Derived):
    """A gated MLP that computes act(gate) * up by one kernel of this package where it can; where it cannot, the other
    module's `forward` runs."""

    _parts: _Parts
    _is_changed = False

    @staticmethod
    def of(mlp: nn.Module, parts: _Parts) -> FusedGatedMLP:
        """The stand-in for `mlp`, whose layers are what `parts` says. It holds what `mlp` holds, and is no copy."""
        new: FusedGatedMLP = FusedGatedMLP.standing_for(mlp)
        new._parts = parts
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        """What the other module had, but for its layers, its mode and what is private, has to stay what it was when it
        was asked what it computes."""
        own, parts = vars(self), vars(self).get("_parts")
        if parts and name[0] != "_" and name not in ("training", "forward", parts.gate, parts.up, parts.down):
            own["_is_changed"] = self._is_changed or name in own or name in self._modules
        super().__setattr__(name, value)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """x [..., H] float -> [..., H]; x may have whatever name it had in the other module."""
        (x,) = (*args, *kwargs.values())
        if self._is_changed or not ops.fuses_gates(x) or self._needs_other_children():
            return super().forward(*args, **kwargs)  # type: ignore[misc, no-any-return]
        parts = self._parts
        gate = self._call(parts.gate, x)
        gate, up = parts.cut(gate) if parts.gate == parts.up else (gate, self._call(parts.up, x))
        return self._call(parts.down, ops.gated(gate, up, parts.activation))

    def _call(self, name: str, x: Tensor) -> Tensor:
        layer = self._modules[name]
        assert layer is not None
        return layer(x)  # type: ignore[no-any-return]

    def _needs_other_children(self) -> bool:
        """Whether a child that is not called, for its part is in the kernel, does more than its part: a dropout in
        training, or one that somebody listens to."""
        parts = self._parts
        return torch.nn.modules.module._has_any_global_hook() or any(
            child.training or child._forward_hooks or child._forward_pre_hooks
            for name, child in self._modules.items()
            if child is not None and name not in (parts.gate, parts.up, parts.down)
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"fused: {self._parts.activation}")))


def fused_gated_mlps(model: nn.Module) -> dict[str, FusedGatedMLP]:
    """What can stand for gated MLPs of `model`, which is not modified and may be on `meta`: module name -> stand-in.

    A gated MLP is recognized if it holds two or three linear layers, int8 or not, and besides them only modules that
    hold nothing, takes one argument, and does with random numbers, in every dtype, what this file's head says.
    """
    found: dict[str, FusedGatedMLP] = {}
    for name, module in model.named_modules():
        for parts in _possible_parts(module):
            if (stand_in := _stand_in(module, parts)) is not None:
                found[name] = stand_in
                break
    return found


def _possible_parts(module: nn.Module) -> Iterator[_Parts]:
    """Which of the module's layers may be what, if it may be a gated MLP."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    layers = [name for name, child in children.items() if isinstance(child, (nn.Linear, QuantLinear))]
    others = [child for name, child in children.items() if name not in layers]
    holds_more = module._parameters or module._buffers or has_hooks(module) or "forward" in vars(module)
    others_hold = any(child._modules or child._parameters or child._buffers for child in others)
    if len(layers) not in (2, 3) or holds_more or others_hold or not takes_one_argument(module):
        return
    for activation in GATES:
        if len(layers) == 3:
            yield from (_Parts(gate, up, down, activation) for gate, up, down in itertools.permutations(layers))
        else:
            orders = itertools.product(itertools.permutations(layers), (True, False))
            yield from (_Parts(both, both, down, activation, gate_first) for (both, down), gate_first in orders)


class _StubUp(nn.Module):
    """In the place of gate or up: says `answer` when it is given x itself."""

    def __init__(self, x: Tensor, answer: Tensor) -> None:
        super().__init__()
        self.x, self.answer = x, answer

    def forward(self, x: Tensor) -> Tensor:
        if x is not self.x:
            raise ValueError("this is not what the module was given")
        return self.answer


class _StubDown(nn.Module):
    """In the place of down: remembers what it is given."""

    given: object = None

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, h: object) -> Tensor:
        self.given = h
        return self.answer


def _stand_in(module: nn.Module, parts: _Parts) -> FusedGatedMLP | None:
    """The one with these parts, if the module's `forward` does what it would."""
    try:
        new = FusedGatedMLP.of(module, parts)
        with torch.no_grad():
            return new if all(_does_with(new, x, both) for x, both in _samples()) else None
    except Exception:  # whatever it wants, it is not what a gated MLP is given
        return None


def _samples() -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs x [..., 5], and numbers [..., 24] that stand for gate and up: from where an activation is a straight line
    to where it is one again, so that one that is bounded is noticed."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = torch.logspace(-3, 3, 12, device="cpu", dtype=torch.float32).unsqueeze(1)
    for dtype, shape in itertools.product(FLOATS, ((12,), (3, 4))):
        both = random(12, 24, generator=generator) * sizes
        yield random(*shape, 5, generator=generator).to(dtype), both.to(dtype).view(*shape, 24)


def _does_with(stand_in: FusedGatedMLP, x: Tensor, both: Tensor) -> bool:
    parts = stand_in._parts
    gate, up = parts.cut(both)
    if parts.gate == parts.up:
        said = {parts.gate: both.clone()}
    else:
        gate, up = gate.contiguous(), up.contiguous()
        said = {parts.gate: gate.clone(), parts.up: up.clone()}
    expected = GATES[parts.activation].formula(gate) * up
    given, down = x.clone(), _StubDown(torch.empty(0, device="cpu"))
    probe = copy.copy(stand_in)
    others = {name: copy.copy(child) for name, child in stand_in.named_children()}
    says = {name: _StubUp(given, answer) for name, answer in said.items()}
    vars(probe)["_modules"] = {**others, **says, parts.down: down}
    before = dict(vars(probe.eval()))
    y = stand_in.source_class.forward(probe, given)
    after = vars(probe)
    unchanged = len(after) == len(before) and all(after.get(name) is value for name, value in before.items())
    return y is down.answer and unchanged and torch.equal(given, x) and same_bits(expected, down.given)
