"""Gated MLPs whose activation and product are computed by one kernel instead of two.

    y = down(act(gate(x)) * up(x))      x [..., H], gate and up [..., I]      https://arxiv.org/abs/2002.05202

In eager PyTorch act(gate) and the product with up are two passes over memory, and two launches on GPUs. Where this
package has a kernel and no gradient is wanted (`ops.fuses_gates`), it does both, with the order and rounding of torch's
two ops (fp32 differs in the last place, 16-bit dtypes hardly ever). Otherwise the module's own `forward` runs.

The activations are those of `ops/gates.py`: SiLU (Llama, Qwen, Mistral, Phi-3) and GELU by tanh (Gemma).

A gated MLP is recognized by what it does, whatever its class is called. Its own `forward` is run with stubs in place of
its layers: those for gate and up return random numbers, that for down records its input. The forward has to pass its
input tensor itself to gate and up, the bits of the formula to down, and to return the tensor that down returned. Gate
and up may be one layer whose output is cut in two. A module that does anything else is left alone.
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

    gate, up: equal if one layer makes both; its output [..., 2 I] is cut in two, gate first or up first.
    """

    gate: str
    up: str
    down: str
    activation: str
    gate_first: bool = True

    def cut(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up from the output of the one layer that makes both."""
        first, second = both.chunk(2, -1)
        return (first, second) if self.gate_first else (second, first)


class FusedGatedMLP(Derived):
    """A gated MLP that computes act(gate) * up by one kernel of this package where possible; elsewhere the `forward` of
    the class that it replaces runs."""

    _parts: _Parts
    _is_changed = False

    @staticmethod
    def of(mlp: nn.Module, parts: _Parts) -> FusedGatedMLP:
        """The stand-in for `mlp`, whose layers `parts` names. It holds the layers of `mlp` themselves, not copies."""
        new: FusedGatedMLP = FusedGatedMLP.standing_for(mlp)
        new._parts = parts
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        """Note when an attribute of the original module is set (except its layers, its mode and private attributes):
        what the module computes may have changed then, so the kernel is not used any more."""
        own, parts = vars(self), vars(self).get("_parts")
        if parts and name[0] != "_" and name not in ("training", "forward", parts.gate, parts.up, parts.down):
            own["_is_changed"] = self._is_changed or name in own or name in self._modules
        super().__setattr__(name, value)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """x [..., H] float -> [..., H]; x may be passed under the name that it has in the original module."""
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
        """Whether a child that the kernel replaces (the activation, a dropout) must be called: it has hooks, or is in
        training mode."""
        parts = self._parts
        return torch.nn.modules.module._has_any_global_hook() or any(
            child.training or child._forward_hooks or child._forward_pre_hooks
            for name, child in self._modules.items()
            if child is not None and name not in (parts.gate, parts.up, parts.down)
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"fused: {self._parts.activation}")))


def fused_gated_mlps(model: nn.Module) -> dict[str, FusedGatedMLP]:
    """Stand-ins for the gated MLPs of `model`: module name -> stand-in. `model` is not modified, and may be on `meta`.

    A gated MLP takes one argument, holds two or three linear layers (float or int8) and otherwise only modules without
    parameters or children, and does what the head of this file says for random numbers of every dtype.
    """
    found: dict[str, FusedGatedMLP] = {}
    for name, module in model.named_modules():
        for parts in _possible_parts(module):
            if (stand_in := _stand_in(module, parts)) is not None:
                found[name] = stand_in
                break
    return found


def _possible_parts(module: nn.Module) -> Iterator[_Parts]:
    """All ways to assign the roles gate, up and down to the layers of `module`; none if it cannot be a gated MLP."""
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
    """Replaces gate or up: returns `answer` if its argument is the tensor x itself."""

    def __init__(self, x: Tensor, answer: Tensor) -> None:
        super().__init__()
        self.x, self.answer = x, answer

    def forward(self, x: Tensor) -> Tensor:
        if x is not self.x:
            raise ValueError("this is not what the module was given")
        return self.answer


class _StubDown(nn.Module):
    """Replaces down: records its argument, and returns `answer`."""

    given: object = None

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, h: object) -> Tensor:
        self.given = h
        return self.answer


def _stand_in(module: nn.Module, parts: _Parts) -> FusedGatedMLP | None:
    """The stand-in with these parts, if it would compute what `forward` of the module does; else None."""
    try:
        new = FusedGatedMLP.of(module, parts)
        with torch.no_grad():
            return new if all(_does_with(new, x, both) for x, both in _samples()) else None
    except Exception:  # whatever it wants, it is not what a gated MLP is given
        return None


def _samples() -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs x [..., 5], each with numbers [..., 24] for gate and up together. They range from where an activation is
    linear near zero to where it is linear again, so that a bounded activation is noticed."""
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
