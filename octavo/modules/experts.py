"""Mixture-of-experts layers with int8 weights [E, N, K]. They take the same routing arguments as the float layer."""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.errors import QuantizeError
from octavo.experts import ExpertsSpec, argument_names, arguments, chosen_experts, registered, spec_of
from octavo.modules.base import Codes, QuantModule, hold_rest
from octavo.recipe import Scheme

__all__ = ["QuantExperts"]


class QuantExperts(QuantModule):
    """A stack of experts with int8 weights. Rows are sorted by expert; the weights of experts without rows are not
    read.

    Each up and down weight of the float layer becomes int8 [E, N, K], output channels before input channels, with a
    scale fp32 [E, N, 1]. Biases, norm, settings and the gate between the projections are the float layer's own. Where a
    child of the float layer holds the weights, a child of the same name holds the codes, and what else that child had.
    """

    spec: ExpertsSpec
    source_class: type[nn.Module]
    _names: tuple[str, ...]

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        spec = spec_of(layer)
        assert spec is not None
        self.op_names = (
            ("w8a16_experts_linear",) if scheme.input is None else ("quantize_per_token", "w8a8_experts_linear")
        )
        self.spec = spec
        self.source_class = type(layer)
        for holder in {"", *(name.rpartition(".")[0] for name in spec.params)}:
            hold_rest(self.get_submodule(holder), layer.get_submodule(holder))
        self._names = argument_names(type(layer))

    def _place(self, name: str) -> tuple[dict[str, Tensor | None], str]:
        holder, _, short = name.rpartition(".")
        if holder and holder not in self._modules:
            self.add_module(holder, nn.Module())
        return self.get_submodule(holder)._buffers, short

    def codes_and_scale(self, param: str = "weight") -> tuple[Tensor, Tensor]:
        buffers, short = self._place(param)
        codes, scale = buffers[short], buffers[f"{short}_scale"]
        assert codes is not None and scale is not None
        return codes, scale

    def __getattr__(self, name: str) -> Any:
        """Methods, properties and constants of the float layer's class, which the gate may use.

        Raises: AttributeError also for a method that reads one of the weights: it would get codes.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = self.__dict__.get("source_class", nn.Module)  # not while it is unpickled
            found = inspect.getattr_static(source, name, None) if not name.startswith("__") else None
            function: Any = found.fget if isinstance(found, property) else found
            is_function = isinstance(function, FunctionType)
            if found is None or (is_function and not set(self.quantized_params).isdisjoint(function.__code__.co_names)):
                raise
        if isinstance(found, property):
            return function(self)
        return functools.partial(function, self) if is_function else getattr(source, name)

    def __getstate__(self) -> dict[str, Any]:
        """Without a spec from `register_experts`: its gate may be a lambda, which cannot be pickled."""
        state = dict(vars(self))
        if registered(self.source_class) is self.spec:
            del state["spec"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "spec" not in state:
            spec = registered(self.source_class)
            if spec is None:
                raise QuantizeError(
                    f"{self.source_class.__name__} is not registered here, as it was where this model was pickled; "
                    "call octavo.register_experts for it first"
                )
            self.spec = spec

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the float layer's forward, see `octavo.experts.Routing`.

        Raises: QuantizeError for routing arguments of the wrong type or shape.
        """
        first, *routing = arguments(self._names, args, kwargs)
        x = first.reshape(-1, first.shape[-1])
        experts = self.codes_and_scale(self.spec.down)[0].shape[0]
        if self.spec.routing == "sorted":
            if len(x) % experts:
                raise QuantizeError(
                    f"{self.source_class.__name__} was called with {len(x)} rows, expected as many for each of its "
                    f"{experts} experts"
                )
            ends = torch.arange(1, experts + 1, dtype=torch.int32, device=x.device) * (len(x) // experts)
            return self._run(x, torch.arange(len(x), device=x.device), ends)
        if self.spec.routing == "split":
            sizes = torch.as_tensor(routing[0], dtype=torch.int32, device=x.device)
            if len(sizes) != experts or sizes.sum() != len(x):
                raise QuantizeError(
                    f"{self.source_class.__name__} was called with {len(x)} rows, and {sizes.tolist()} of them for its "
                    f"{experts} experts"
                )
            return self._run(x, None, sizes.cumsum(0, dtype=torch.int32))
        index = chosen_experts(self.source_class, self.spec, first, routing)
        # Rows of no expert are sorted behind all others.
        expert, order = index.where(index >= 0, experts).reshape(-1).sort(stable=True)
        each = torch.arange(experts, dtype=expert.dtype, device=x.device)
        ends = torch.searchsorted(expert, each, right=True, out_int32=True)
        y = self._run(x, order // max(index.shape[1], 1), ends)
        by_token = torch.empty_like(y).index_copy_(0, order, y)
        if self.spec.routing == "each":
            return by_token.view(*routing[0].shape, y.shape[-1])
        wide = torch.promote_types(y.dtype, torch.float32)
        weighted = by_token.view(*index.shape, y.shape[-1]).to(wide) * routing[1].reshape(*index.shape, 1).to(wide)
        total = weighted.sum(1)
        if self.spec.identity:
            of_itself = routing[1].reshape(index.shape).to(wide).where(index >= experts, 0).sum(1, keepdim=True)
            total = total + x.to(wide) * of_itself
        return total.to(x.dtype).view(first.shape)

    def _run(self, x: Tensor, token: Tensor | None, ends: Tensor) -> Tensor:
        """Rows x[token] [S, H], or x itself, sorted by expert, through their experts: [S, H]."""
        h = [self._project(x, name, self.spec.up_bias, ends, token) for name in self.spec.up]
        gated = self.spec.gated(self, x, h)
        y = self._project(gated, self.spec.down, self.spec.down_bias, ends, None)
        return y if self.spec.norm is None else getattr(self, self.spec.norm)(y)

    def _project(self, x: Tensor, name: str, bias_name: str | None, ends: Tensor, token: Tensor | None) -> Tensor:
        weight, scale = self.codes_and_scale(name)
        if self.spec.identity:  # the stack may hold weights of identity experts, which are never used
            weight, scale = weight[: len(ends)], scale[: len(ends)]
        bias = None if bias_name is None else getattr(self, bias_name)
        if self.scheme.input is None:
            return ops.w8a16_experts_linear(x if token is None else x[token], ends, weight, scale, bias)
        cast = ops.autocast(x)
        codes, x_scale = ops.quantize_per_token(cast)  # each token once, before its rows are gathered for its experts
        if token is not None:
            codes, x_scale = codes[token], x_scale[token]
        y = ops.w8a8_experts_linear(codes, x_scale, ends, weight, scale, bias, cast.dtype)
        # The float rows are needed, and so gathered, for a gradient only.
        return ops.straight_through(y, x[token] if token is not None and x.requires_grad else x, weight, scale, ends)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(codes.shape)}" for name, (codes, _) in self.codes().items())
        return f"{self.source_class.__name__}, {shapes}, {self.scheme}"
